"""What the table has: the comparisons of each group, in full size or tiny."""

from collections.abc import Callable

from lowbit_jax.bench import layer, producer, step
from lowbit_jax.models import LlamaConfig, llama_config
from pallas_kernels.measure import Comparison
from pallas_kernels.mixed_matmul import bench as mixed_matmul
from pallas_kernels.rotate_quantize import bench as rotate_quantize
from pallas_kernels.scaled_matmul import bench as scaled_matmul

_TOKENS, _TINY_TOKENS = 16384, 128
_TINY_MODEL = LlamaConfig(256, 128, 1, 2, d_ff=256)


def product(tiny: bool) -> list[Comparison]:
    """The exact product of MXFP4 operands beside XLA's."""
    shape = (_TINY_TOKENS, 128, 128) if tiny else (_TOKENS, 4096, 4096)
    return [scaled_matmul.comparison(shape)]


def quantizer(tiny: bool) -> list[Comparison]:
    """Both operands of a matrix in one pass beside a copy."""
    shape = (_TINY_TOKENS, 128) if tiny else (_TOKENS, 4096)
    return [rotate_quantize.comparison(shape, rotate_quantize.OF_QUARTET)]


def made_and_quantized(tiny: bool) -> list[Comparison]:
    """RMSNorm and SwiGLU of a 7B's widths before the quantizer."""
    if tiny:
        return [producer.norm(_TINY_TOKENS, 128), producer.gated(_TINY_TOKENS, 128)]
    return [producer.norm(_TOKENS, 4096), producer.gated(_TOKENS, 14336)]


def linear(tiny: bool) -> list[Comparison]:
    """A layer with its gradients under each recipe."""
    if tiny:
        return [layer.comparison(_TINY_TOKENS, 128, 128)]
    shapes = ((4096, 4096), (14336, 4096), (2048, 2048))
    return [layer.comparison(_TOKENS, n, k) for n, k in shapes]


def decode(tiny: bool) -> list[Comparison]:
    """Few rows times 4-bit weights beside XLA's bfloat16 product."""
    shapes = ((128, 256),) if tiny else ((14336, 4096), (4096, 14336))
    return [mixed_matmul.comparison((m, n, k), ("MXFP4",)) for n, k in shapes for m in (1, 16)]


def step_800m(tiny: bool) -> list[Comparison]:
    """A training step of the 800m model of QuEST: 16 layers of width 2048, without a loop."""
    model = _TINY_MODEL if tiny else llama_config("800m", scan_unroll=16)
    return [_step("step_800m", "training step, Llama 0.8B", model, tiny)]


def step_7b(tiny: bool) -> list[Comparison]:
    """A training step of 4 layers of the shape of Mistral 7B (Jiang et al., arXiv:2310.06825)."""
    model = LlamaConfig(32000, 4096, 4, 32, n_kv_heads=8, d_ff=14336, scan_unroll=4)
    model = _TINY_MODEL if tiny else model
    return [_step("step_7b", "training step, 4 layers of a 7B", model, tiny)]


# By the name of the group that their comparisons carry.
GROUPS: dict[str, Callable[[bool], list[Comparison]]] = {
    "product": product,
    "quantizer": quantizer,
    "producer": made_and_quantized,
    "layer": linear,
    "decode": decode,
    "step_7b": step_7b,
    "step_800m": step_800m,
}


def select(names: tuple[str, ...]) -> tuple[str, ...]:
    """The groups whose names begin with one of `names`, in the order of `GROUPS`; all for none.

    Raises:
      ValueError: If a name selects nothing.
    """
    unknown = [name for name in names if not any(g.startswith(name) for g in GROUPS)]
    if unknown:
        raise ValueError(
            f"bench: groups must be among {', '.join(GROUPS)}, or their beginnings, got"
            f" {', '.join(map(repr, unknown))}."
        )
    return tuple(g for g in GROUPS if not names or g.startswith(names))


def _step(group: str, work: str, model: LlamaConfig, tiny: bool) -> Comparison:
    batch_size, seq_len = (2, 64) if tiny else (8, 2048)
    label = f"{work}, {batch_size} x {seq_len} tokens"
    return step.comparison(group, label, model, batch_size=batch_size, seq_len=seq_len)

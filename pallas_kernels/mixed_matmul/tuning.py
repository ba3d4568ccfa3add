"""How the kernel of `mixed_matmul` is cut into blocks, and which cut a shape gets."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lowbit_jax.numerics import (
    INT4,
    MXFP4,
    NVFP4,
    QUEST_INT4,
    QuantSpec,
    integer,
    quantize,
    unsigned,
)

MAX_ROWS = 64  # of x: its chunks must fit into shared memory, its sums into registers
_TILE = 64
_SHARED_MEMORY_BYTES = 226 * 1024
_WARPGROUPS = 396  # 3 for each of 132 multiprocessors
_INT4_32 = QuantSpec(integer(4), 32)
_UINT4_64 = QuantSpec(unsigned(4), 64, "minmax")
_SHAPES = (
    (1, 4096, 4096),
    (64, 4096, 4096),
    (16, 14336, 4096),
    (64, 14336, 4096),
    (16, 4096, 14336),
    (4, 640, 1792),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Schedule of the kernel; the result depends on it in the order of float32 sums alone.

    Attributes:
      warpgroups: Of a block, 1, 2 or 4; each multiplies 64 rows of the weights, all of them by the
        same columns of x.
      splits: Blocks along k, each of which leaves float32 sums that a second kernel adds.
      chunk: Columns that a warpgroup loads at a time, 128 or 256: while it decodes one chunk, the
        next one is on its way into registers.
    """

    warpgroups: int = 2
    splits: int = 4
    chunk: int = 256

    def __post_init__(self):
        if self.warpgroups not in (1, 2, 4) or self.chunk not in (128, 256) or self.splits < 1:
            raise ValueError(
                "mixed_matmul: warpgroups must be 1, 2 or 4, chunk 128 or 256 and splits positive,"
                f" got {self}."
            )


def config_obstacle(config: Config, m: int, n: int, k: int) -> str | None:
    """Why a schedule does not fit a product of `(m, k)` by weights `(n, k)`, or None."""
    if n % (_TILE * config.warpgroups) or k % (config.chunk * config.splits):
        return (
            f"rows must be a multiple of {_TILE * config.warpgroups} and columns of"
            f" {config.chunk * config.splits} for {config}, got weights of shape {(n, k)}"
        )
    needed = _shared_bytes(config, m, k)
    if needed > _SHARED_MEMORY_BYTES:
        return f"{config} needs {needed} bytes of shared memory for x of shape {(m, k)}"
    return None


def _shared_bytes(config, m, k):
    """Of a block: its part of x, and the float32 tiles that it writes."""
    rows = -(-m // 8) * 8
    return rows * (k // config.splits) * 2 + config.warpgroups * rows * _TILE * 4 + 1024


def choose_config(m: int, n: int, k: int, *, sums_group: int | None = None) -> Config:
    """A schedule for `(m, k)` by weights `(n, k)`; the last resort may not fit, see there.

    By arithmetic, not yet by measurement. A warpgroup has the codes of its next chunk under way, 8
    KiB of 256 columns, and 3.35 TB/s at 0.8 us need some 20 KiB a multiprocessor: so 3 or 4
    warpgroups on each of 132, which at about 100 registers a thread is what fits. Splits beyond
    that cost float32 sums, written and read again; fewer need more shared memory for x.

    Args:
      m: Rows of x.
      n: Rows of the weights.
      k: Columns.
      sums_group: Columns that share a scale of sums, for formats with float32 scales a group.
        ptxas keeps the accumulators of several groups: shorter chunks have fewer, and blocks of
        four warpgroups, which leave a thread 128 registers, are out of question for small groups
        (209 registers for groups of 32 and 64 rows of x).
    """
    needs_registers = sums_group is not None and m > 16
    chunk = 128 if k % 256 or needs_registers else 256
    sizes = (2, 1) if needs_registers and sums_group != 128 else (2, 4, 1)
    best = None
    for warpgroups in sizes:
        for splits in range(1, k // chunk + 1):
            config = Config(warpgroups, splits, chunk)
            if config_obstacle(config, m, n, k) is not None:
                continue
            total = n // _TILE * splits
            blocks = min(_SHARED_MEMORY_BYTES // _shared_bytes(config, m, k), 4 // warpgroups)
            score = (min(total, _WARPGROUPS), min(blocks * warpgroups, 3), -splits)
            if best is None or score > best[0]:
                best = score, config
    return Config(1, 1, chunk) if best is None else best[1]


def lowering_cases() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """The shapes of a Llama of 8B parameters and of one of 30M, in every format: name, op, args."""
    # Here, for both import the schedules.
    from pallas_kernels.mixed_matmul.layout import prepack
    from pallas_kernels.mixed_matmul.op import mixed_matmul

    for spec in (MXFP4, NVFP4, INT4, _INT4_32, _UINT4_64, QUEST_INT4):
        for m, n, k in _SHAPES if spec in (MXFP4, NVFP4, INT4) else _SHAPES[3:4]:
            weights = jax.ShapeDtypeStruct((n, k), jnp.float32)
            packed = jax.eval_shape(lambda w, spec=spec: prepack(quantize(w, spec)), weights)
            x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
            yield f"{spec} {m}x{n}x{k}", mixed_matmul, (x, packed)

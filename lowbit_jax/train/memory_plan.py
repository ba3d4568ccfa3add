"""Predicted bytes of a training step on one device, and the fastest plan that fits into a memory.

    total = weights + master + gradients + m + v + layers * activations + recomputed + logits

Counted from shapes, before anything is compiled. Left out is what the compiler adds: workspaces,
results between the operations of a layer, updates that it does not fuse, copies.

References:
  Schultheis and Alistarh, LLMQ: Efficient Lower-Precision LLM Training for Consumer GPUs,
  arXiv:2512.15306: the categories, what each stage of ZeRO divides, and the order of `LADDER`.
  Rajbhandari et al., ZeRO, arXiv:1910.02054: the stages.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax.numpy as jnp

from lowbit_jax.models import LlamaConfig, count_params
from lowbit_jax.models.activations import kept_bytes
from lowbit_jax.ops.cross_entropy import default_chunks

OFFLOADABLE = ("m", "v", "master", "gradients", "residual")
# What is divided over the devices at each stage, beside what is at the stages before.
_SHARDED_FROM = {"master": 1, "m": 1, "v": 1, "gradients": 2, "weights": 3}
# What to give up when memory is short, in this order: flags of recomputation, factor on the chunks
# of the loss, what moves to the host's memory.
LADDER: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("none", 1, ()),
    ("swiglu", 1, ()),
    ("swiglu+norm", 1, ()),
    ("swiglu+norm", 4, ()),
    ("ffn+norm", 4, ()),
    ("ffn+norm", 4, ("m", "v")),
    ("ffn+norm", 4, ("m", "v", "master")),
    ("block", 4, ()),
    ("block", 4, ("m", "v", "master", "residual")),
)


@dataclasses.dataclass(frozen=True)
class Storage:
    """Bytes of an entry of each kind; the defaults are those of float32 AdamW.

    Attributes:
      params: Of stored matrices, embedding and head.
      vectors: Of norms and biases.
      copies: Of codes of the seven matrices that are kept beside the stored ones for a whole step,
        scales included; None: products read the stored weights.
      gradients: Of all parameters.
      accumulators: Of sums over micro-batches beside `gradients`; 0 where there are none.
      m: Of first moments, scales included.
      v: Of second moments.
      logits: Of one chunk of them, with their gradient if that exists at the same time.
    """

    params: int | float = 4
    vectors: int | float = 4
    copies: int | float | None = None
    gradients: int | float = 4
    accumulators: int | float = 0
    m: int | float = 4
    v: int | float = 4
    logits: int | float = 6


# All in bfloat16 but codes of the matrices in float8, the gradient of the logits in their place.
LLMQ_STORAGE = Storage(2, 2, 1, 2, 0, 2, 2, 2)


def training_storage(
    param_dtype: str = "float32",
    moments: str = "float32",
    *,
    dtype: str = "bfloat16",
    micro_batches: int = 1,
) -> Storage:
    """The `Storage` of a run of `scripts/pretrain.py` with AdamW.

    Args:
      param_dtype: "float32" or "bfloat16".
      moments: "float32", "bfloat16" or "e4m3", as `setups.training_setup` reads them.
      dtype: Of activations, and so of the gradient of the logits.
      micro_batches: More than one are summed in float32.

    Raises:
      ValueError: If a name is none of these.
    """
    sizes = {"float32": 4, "bfloat16": 2}
    # A float32 scale for 128 first moments; second ones are never stored in float8.
    moment_sizes = {"float32": (4, 4), "bfloat16": (2, 2), "e4m3": (1 + 4 / 128, 2)}
    for name, value, legal in (
        ("param_dtype", param_dtype, sizes),
        ("moments", moments, moment_sizes),
        ("dtype", dtype, sizes),
    ):
        if value not in legal:
            raise ValueError(
                f"training_storage: {name} must be one of {', '.join(legal)}, got {value!r}."
            )
    size = sizes[param_dtype]
    m, v = moment_sizes[moments]
    accumulators = 4 if micro_batches > 1 else 0
    return Storage(size, 4, None, size, accumulators, m, v, 4 + sizes[dtype])


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device by category; `str()` is a table for people.

    Attributes:
      recompute: Flags, see `models.recompute`.
      zero: Stage of ZeRO: 1 divides master weights and moments over the devices, 2 gradients too,
        3 weights too.
      world_size: Devices.
      loss_chunks: See `ops.cross_entropy.linear_cross_entropy`.
      n_layers: Of the model.
      weights: What products read, embedding and head included.
      master: Stored matrices, where `weights` are codes made of them.
      gradients: With their accumulators.
      m: First moments.
      v: Second moments.
      activations: Of one layer, name and bytes, see `models.activations.kept_bytes`.
      recomputed: What backward makes anew of one layer.
      logits: Of one chunk.
      host: Categories whose arrays lie in the host's memory, with their bytes there. The device
        holds two layers of each: one in use, one on its way. Of "residual", the inputs of blocks.
    """

    recompute: str
    zero: int
    world_size: int
    loss_chunks: int
    n_layers: int
    weights: int
    master: int
    gradients: int
    m: int
    v: int
    activations: tuple[tuple[str, int], ...]
    recomputed: int
    logits: int
    host: tuple[tuple[str, int], ...] = ()

    @property
    def activation_bytes(self) -> int:
        """Of all layers, on the device."""
        per_layer = sum(size for _, size in self.activations)
        return self.n_layers * per_layer - self._moved("residual")

    @property
    def categories(self) -> dict[str, int]:
        """Bytes on the device by category; they sum to `total`."""
        stored = ("weights", "master", "gradients", "m", "v")
        found = {name: getattr(self, name) - self._moved(name) for name in stored}
        return found | {
            "activations": self.activation_bytes,
            "recomputed": self.recomputed,
            "logits": self.logits,
        }

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.categories.values())

    def _moved(self, category: str) -> int:
        size = dict(self.host).get(category, 0)
        return size - min(size, -(-2 * size // self.n_layers))

    def __str__(self) -> str:
        """Options, a line a category, the layer's activations by name, total and host."""
        lines = [
            f"Memory of a device, predicted: recompute {self.recompute}, loss in"
            f" {self.loss_chunks} {'chunk' if self.loss_chunks == 1 else 'chunks'}, ZeRO"
            f" {self.zero} over {self.world_size} {'device' if self.world_size == 1 else 'devices'}"
        ]
        sizes = self.categories
        lines += [f"  {name:<12} {_show(size):>12}" for name, size in sizes.items()]
        lines.append(f"  {'total':<12} {_show(self.total):>12}")
        largest = sorted(self.activations, key=lambda pair: -pair[1])
        parts = ", ".join(f"{name} {_show(size)}" for name, size in largest if size)
        lines.append(f"  a layer keeps {_show(sum(dict(largest).values()))}: {parts}")
        if self.host:
            parts = ", ".join(f"{name} {_show(size)}" for name, size in self.host)
            lines.append(f"  in the host's memory: {parts}")
        return "\n".join(lines)


def memory_plan(
    config: LlamaConfig,
    *,
    batch_size: int,
    seq_len: int,
    storage: Storage = Storage(),
    zero: int = 1,
    world_size: int = 1,
    offload: tuple[str, ...] = (),
) -> MemoryPlan:
    """The bytes that a training step of `config` takes on each device.

    Args:
      config: Shape, recipes, `recompute` and `loss_chunks`. Activations are those of the paths that
        this process would choose for its default device.
      batch_size: Sequences of one micro-batch on one device.
      seq_len: Tokens of each.
      storage: See `Storage`.
      zero: Stage, 1 to 3; see `MemoryPlan`.
      world_size: Devices over which the stage divides.
      offload: Of `OFFLOADABLE`, what a trainer would keep in the host's memory.

    Raises:
      ValueError: If a number is out of range, or `offload` names something else.
    """
    return _plan(config, _tracer(config, batch_size, seq_len), batch_size, seq_len, storage,
                 zero, world_size, offload)  # fmt: skip


def _tracer(config: LlamaConfig, batch_size: int, seq_len: int) -> Callable[[str], dict[str, int]]:
    """Flags to `kept_bytes`, each traced once."""

    @functools.cache
    def kept(recompute):
        return kept_bytes(dataclasses.replace(config, recompute=recompute), batch_size, seq_len)

    return kept


def _plan(
    config: LlamaConfig,
    kept: Callable[[str], dict[str, int]],
    batch_size: int,
    seq_len: int,
    storage: Storage,
    zero: int,
    world_size: int,
    offload: tuple[str, ...],
) -> MemoryPlan:
    if zero not in (1, 2, 3) or min(world_size, batch_size, seq_len) < 1:
        raise ValueError(
            "memory_plan: zero must be 1, 2 or 3, and world_size, batch_size and seq_len at least"
            f" 1, got {zero}, {world_size}, {batch_size} and {seq_len}."
        )
    if unknown := [name for name in offload if name not in OFFLOADABLE]:
        raise ValueError(
            f"memory_plan: offload may name {', '.join(OFFLOADABLE)}, got {unknown[0]!r}."
        )
    counts = count_params(config)
    copies = storage.params if storage.copies is None else storage.copies
    others = counts["vectors"] * storage.vectors + counts["tables"] * storage.params
    stored = {
        "weights": counts["matrices"] * copies + others,
        "master": 0 if storage.copies is None else counts["matrices"] * storage.params,
        "gradients": counts["total"] * (storage.gradients + storage.accumulators),
        "m": counts["total"] * storage.m,
        "v": counts["total"] * storage.v,
    }
    sizes = {
        name: math.ceil(size / (world_size if zero >= _SHARDED_FROM[name] else 1))
        for name, size in stored.items()
    }
    activations, everything = kept(config.recompute), kept("none")
    tokens = batch_size * seq_len
    chunks = config.loss_chunks or default_chunks(tokens, config.vocab_size)
    residual = tokens * config.d_model * jnp.dtype(config.dtype).itemsize * config.n_layers
    return MemoryPlan(
        recompute=config.recompute,
        zero=zero,
        world_size=world_size,
        loss_chunks=chunks,
        n_layers=config.n_layers,
        activations=tuple(activations.items()),
        recomputed=max(sum(everything.values()) - sum(activations.values()), 0),
        logits=math.ceil(tokens / chunks) * math.ceil(config.vocab_size * storage.logits),
        host=tuple((name, (sizes | {"residual": residual})[name]) for name in offload),
        **sizes,
    )


def choose_plan(
    config: LlamaConfig,
    memory_bytes: int,
    *,
    batch_size: int,
    seq_len: int,
    storage: Storage = Storage(),
    zero: int = 1,
    world_size: int = 1,
    may_offload: bool = False,
) -> MemoryPlan:
    """The first plan of `LADDER` that fits into `memory_bytes`: the fastest, as its order claims.

    Args:
      config: `recompute` and `loss_chunks` are chosen anew; the ladder's factor is on the chunks
        that `default_chunks` would take.
      memory_bytes: Of a device, less what the compiler is to have for itself.
      batch_size: As for `memory_plan`, like all that follow but the last.
      seq_len: See there.
      storage: See there.
      zero: See there.
      world_size: See there.
      may_offload: Whether plans may keep arrays in the host's memory.

    Raises:
      ValueError: If none fits; the message names what takes most and what would make it less.
    """
    tokens = batch_size * seq_len
    fewest = default_chunks(tokens, config.vocab_size)
    kept = _tracer(config, batch_size, seq_len)
    plans = []
    for recompute, factor, offload in LADDER:
        if offload and not may_offload:
            continue
        chunks = next(n for n in range(min(factor * fewest, tokens), 0, -1) if tokens % n == 0)
        rung = dataclasses.replace(config, recompute=recompute, loss_chunks=max(chunks, fewest))
        plan = _plan(rung, kept, batch_size, seq_len, storage, zero, world_size, offload)
        if plan.total <= memory_bytes:
            return plan
        plans.append(plan)
    least = min(plans, key=lambda plan: plan.total)
    category = max(least.categories, key=lambda name: least.categories[name])
    raise ValueError(
        f"choose_plan: no plan fits into {_show(memory_bytes)}, the least takes"
        f" {_show(least.total)}, of which {category} {_show(least.categories[category])};"
        f" {_remedy(category, least, may_offload)}."
    )


def _remedy(category: str, plan: MemoryPlan, may_offload: bool) -> str:
    """What makes a category smaller."""
    if category in ("activations", "recomputed", "logits"):
        return "use fewer sequences a micro-batch, that is, more micro_batches or devices"
    stage = _SHARDED_FROM[category]
    if plan.world_size == 1:
        remedy = "use more devices"
    elif plan.zero < stage:
        remedy = f"use ZeRO stage {stage}"
    else:
        remedy = "use more devices"
    if not may_offload and category in ("m", "v", "master"):
        remedy += ", or offload moments and master weights"
    return f"{remedy}, or store parameters and moments in fewer bytes (param_dtype, moments)"


def _show(size: int | float) -> str:
    """Bytes with a unit, three digits or more."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.{2 if size < 100 * scale else 0}f} {unit}"
    return f"{size:.0f} B"

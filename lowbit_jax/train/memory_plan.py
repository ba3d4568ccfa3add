"""Predicted bytes of a training step on one device, counted before anything is compiled.

A step has four parts, and needs what the part needs that needs most:

    loss       state + activations of all layers + logits of a chunk
    backward   state + activations of all layers + gradients + what one layer's backward works on
    embedding  state + gradients
    update     state + gradients

State is weights, master weights and moments. What is offloaded lies in the host's memory but for
what is in use: two layers of it, one under way, and a table or a piece of one.

Passing is what exists for a moment beside that: weights that ZeRO cuts, gathered for a layer or the
head; gradients that it cuts, of a layer or of the embedding, before they are; and of an embedding
that is the head as well the second gradient, before the two are added.

Validation takes micro-batches, as training does, and needs less.

Left out is what the compiler adds: workspaces, updates that it does not fuse, copies, and gaps
between buffers.

References:
  Schultheis and Alistarh, LLMQ: Efficient Lower-Precision LLM Training for Consumer GPUs,
  arXiv:2512.15306: the categories, and what each stage of ZeRO divides.
  Rajbhandari et al., ZeRO, arXiv:1910.02054: the stages.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax.numpy as jnp

from lowbit_jax.models import LlamaConfig, count_params
from lowbit_jax.models.activations import kept_bytes
from lowbit_jax.ops.attention import SAVED_AS as ATTENTION
from lowbit_jax.ops.cross_entropy import default_chunks
from lowbit_jax.train.offload import offload_flags
from lowbit_jax.train.stored_bytes import Held, Stored
from lowbit_jax.train.streaming import MAX_ENTRIES

# What each flag of offloading moves to the host's memory.
OFFLOADS: dict[str, tuple[str, ...]] = {
    "moments": ("m", "v"),
    "gradients": ("gradients", "sums"),
    "weights": ("weights", "master"),
    "residuals": ("activations",),
}
PARTS = ("loss", "backward", "embedding", "update")
# During which parts of a step each category exists.
_LIVES = {
    "weights": PARTS,
    "master": PARTS,
    "m": PARTS,
    "v": PARTS,
    "sums": PARTS,
    "gradients": ("backward", "embedding", "update"),
    "activations": ("loss", "backward"),
    "working": ("backward",),
    "logits": ("loss",),
    "passing": (),  # see `MemoryPlan.passing`
}
# During which parts offloaded arrays pass through the device: else nothing of them is there.
_PASSES = {
    "weights": PARTS,
    "master": ("update",),
    "m": ("update",),
    "v": ("update",),
    "gradients": ("backward", "embedding", "update"),
    "sums": ("backward", "embedding", "update"),
}
# Activations that are cut together with the matrices that make them; what has no name is the scores
# of attention, a part of the heads on each device.
_CUT_WITH_MATRICES = ("qkv", ATTENTION, "mlp_up", "swiglu", "weights", "unnamed")


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device by category and part of the step; `str()` is a table for people.

    Attributes:
      recompute: Flags, see `models.recompute`.
      offload: Flags of `OFFLOADS` joined by "+", or "none".
      zero: Stage of ZeRO: 1 divides master weights and moments over the devices, 2 gradients too,
        3 weights too.
      world_size: Devices.
      loss_chunks: See `ops.cross_entropy.linear_cross_entropy`.
      n_layers: Of the model.
      n_tables: Embedding, and head if it is another one.
      table_entries: Of each of them.
      stored: Category and bytes, see `stored_bytes.Stored`.
      activations: Of one layer, name and bytes, see `models.activations.kept_bytes`.
      working: What backward holds of the layer it is at: all that the layer keeps where it keeps
        everything, sliced out or made anew, and the gradient of its widest activation.
      logits: Of one chunk, with what sums the head's gradient over chunks.
      passing: By part, see the head of this file.
    """

    recompute: str
    offload: str
    zero: int
    world_size: int
    loss_chunks: int
    n_layers: int
    n_tables: int
    table_entries: int
    stored: tuple[tuple[str, Held], ...]
    activations: tuple[tuple[str, int], ...]
    working: int
    logits: int
    passing: tuple[tuple[str, int], ...] = ()

    @property
    def bytes_by_part(self) -> dict[str, dict[str, int]]:
        """Bytes on the device: part of the step, then category; what is not there is left out."""
        sizes: dict[str, Held] = dict(self.stored)
        sizes["activations"] = Held(self.n_layers * sum(size for _, size in self.activations))
        sizes["working"], sizes["logits"] = Held(self.working), Held(self.logits)
        found: dict[str, dict[str, int]] = {part: {} for part in PARTS}
        for name, held in sizes.items():
            for part in _LIVES[name]:
                if size := self._on_device(name, held, part):
                    found[part][name] = size
        for part, size in self.passing:
            if size:
                found[part]["passing"] = size
        clears_early = "weights" in self._offloaded and "gradients" not in self._offloaded
        if clears_early and (size := sizes["gradients"].matrices):
            # As XLA schedules it: among copies from the host it clears their stacks early.
            found["loss"]["gradients"] = size
        return found

    @property
    def peak(self) -> str:
        """The part that needs most."""
        sizes = self.bytes_by_part
        return max(PARTS, key=lambda part: sum(sizes[part].values()))

    @property
    def categories(self) -> dict[str, int]:
        """Bytes on the device at the peak; they sum to `total`."""
        return self.bytes_by_part[self.peak]

    @property
    def total(self) -> int:
        """Bytes that the step needs on the device: those of its peak."""
        return sum(self.categories.values())

    @property
    def host_bytes(self) -> dict[str, int]:
        """Bytes in the host's memory by category."""
        moved = self._offloaded
        found = {name: held.total for name, held in self.stored if name in moved and held.total}
        if "activations" in moved:
            found["activations"] = self.n_layers * self._residual
        return found

    @property
    def _offloaded(self) -> tuple[str, ...]:
        return tuple(name for flag in offload_flags(self.offload) for name in OFFLOADS[flag])

    @property
    def _residual(self) -> int:
        return dict(self.activations).get("resid", 0)

    def _on_device(self, name: str, held: Held, part: str) -> int:
        if name not in self._offloaded:
            return held.total
        if name == "activations":
            return held.total - max(self.n_layers - 2, 0) * self._residual
        if part not in _PASSES[name]:
            return 0
        # One layer on its way in, one on its way out; tables likewise, a piece at a time, but
        # whole where a product reads or makes them.
        layers = min(held.matrices, math.ceil(2 * held.matrices / self.n_layers))
        if part == "loss":
            return math.ceil(held.tables / self.n_tables) + held.vectors
        tables = held.tables if name in OFFLOADS["gradients"] else 0
        if part == "embedding":
            return held.vectors + tables
        if part == "backward":
            return layers + held.vectors + tables
        share = MAX_ENTRIES / max(self.n_tables * self.table_entries, 1)
        pieces = min(held.tables, math.ceil(2 * share * held.tables))
        return max(layers, pieces) + held.vectors

    def __str__(self) -> str:
        """Options, a line a category with a column a part, the layer's activations by name."""
        devices = "device" if self.world_size == 1 else "devices"
        sizes, host = self.bytes_by_part, self.host_bytes
        columns = [*sizes.values(), *([host] if host else [])]
        rows = [("", [*PARTS, *(["host"] if host else [])])]
        for name in _LIVES:
            if any(name in column for column in columns):
                shown = [show_bytes(c[name]) if name in c else "-" for c in columns]
                rows.append((name, shown))
        rows.append(("total", [show_bytes(sum(column.values())) for column in columns]))
        kept = sorted(self.activations, key=lambda pair: -pair[1])
        names = ", ".join(f"{name} {show_bytes(size)}" for name, size in kept if size)
        return "\n".join(
            [
                f"memory of a device, predicted: {show_bytes(self.total)}, most of it during"
                f" {self.peak}; {self.options}, ZeRO {self.zero} over {self.world_size} {devices}",
                *(f"  {name:<11}" + "".join(f"{c:>11}" for c in cells) for name, cells in rows),
                f"  a layer keeps {show_bytes(sum(size for _, size in kept))}: {names}",
            ]
        )

    @property
    def options(self) -> str:
        """What a plan may choose, in words."""
        chunks = "1 chunk" if self.loss_chunks == 1 else f"{self.loss_chunks} chunks"
        return f"recompute {self.recompute}, loss in {chunks}, offload {self.offload}"


# (recompute, chunks of the loss or None, offload) -> plan
Planner = Callable[[str, int | None, str], MemoryPlan]


def planner(
    config: LlamaConfig,
    *,
    batch_size: int,
    seq_len: int,
    stored: Stored,
    zero: int = 1,
    world_size: int = 1,
    tensor: int = 1,
    loss_tokens: int | None = None,
    quantize_once: bool = False,
) -> Planner:
    """Plans of one run that differ in what they recompute, cut and offload.

    Args:
      config: Shape and recipes. Activations are those of the paths that this process would choose
        for its default device.
      batch_size: Sequences of one micro-batch on one device.
      seq_len: Tokens of each.
      stored: What each device holds.
      zero: Stage, 1 to 3; see `MemoryPlan`.
      world_size: All devices.
      tensor: Those over which matrices are cut.
      loss_tokens: As many as the loss counts to choose its chunks: those of a micro-batch, of all
        devices where one program has them all. None: `batch_size * seq_len`.
      quantize_once: Whether layers get weights as codes.

    Raises:
      ValueError: If a number is out of range.
    """
    _check_numbers(zero, world_size, tensor, batch_size, seq_len)
    tokens, size = batch_size * seq_len, jnp.dtype(config.dtype).itemsize

    @functools.cache
    def kept(recompute: str) -> dict[str, int]:
        model = dataclasses.replace(config, recompute=recompute)
        sizes = kept_bytes(model, batch_size, seq_len, quantize_once)
        cuts: dict[str, int] = dict.fromkeys(_CUT_WITH_MATRICES, tensor)
        return {name: math.ceil(found / cuts.get(name, 1)) for name, found in sizes.items()}

    def kept_by_trainer(recompute: str, flags: frozenset[str]) -> dict[str, int]:
        # Nobody keeps weights that were gathered or fetched; checkpoints keep nothing unnamed.
        if "weights" in flags:
            return kept("weights" if recompute == "none" else f"{recompute}+weights")
        is_plain = recompute == "none" and (zero == 3 or "residuals" in flags)
        return kept("unnamed" if is_plain else recompute)

    # Of a device's part of a layer and of a table, whole over the devices that ZeRO cuts for.
    layer = math.ceil(count_params(config)["matrices"] / (config.n_layers * tensor))
    table = math.ceil(config.vocab_size * config.d_model / tensor)
    is_cut = world_size > tensor
    gathers, scatters = is_cut and zero == 3, is_cut and zero >= 2
    tied = int(config.tie_embeddings)
    passing = {
        # A head that is stored otherwise is cast, and counted with the logits.
        "loss": size * table if gathers and stored.entry == size else 0,
        # The gradient of a tied table is cut when both of its parts are there.
        "backward": layer * (size * gathers + stored.entry * scatters)
        + stored.entry * table * (scatters and tied),
        "embedding": stored.entry * table * (scatters + tied),
    }

    def plan(recompute: str, loss_chunks: int | None, offload: str) -> MemoryPlan:
        flags = offload_flags(offload)
        chunks = loss_chunks or default_chunks(loss_tokens or tokens, config.vocab_size)
        logits = math.ceil(tokens / chunks) * stored.logit
        # A single chunk has nothing to add its gradient to.
        head = config.d_model * (stored.head - (0 if chunks > 1 else 4))
        widest = tokens * config.mlp_width * size
        return MemoryPlan(
            recompute=recompute,
            offload=offload,
            zero=zero,
            world_size=world_size,
            loss_chunks=chunks,
            n_layers=config.n_layers,
            n_tables=1 if config.tie_embeddings else 2,
            table_entries=config.vocab_size * config.d_model,
            stored=tuple(stored.held.items()),
            activations=tuple(kept_by_trainer(recompute, flags).items()),
            working=sum(kept("none").values()) + math.ceil(widest / tensor),
            logits=math.ceil(config.vocab_size * (logits + head) / tensor),
            passing=tuple(passing.items()),
        )

    return plan


def _check_numbers(zero: int, world_size: int, tensor: int, batch_size: int, seq_len: int) -> None:
    if zero not in (1, 2, 3) or min(world_size, tensor, batch_size, seq_len) < 1:
        raise ValueError(
            "memory_plan: zero must be 1, 2 or 3, and world_size, tensor, batch_size and seq_len at"
            f" least 1, got {zero}, {world_size}, {tensor}, {batch_size} and {seq_len}."
        )


def show_bytes(size: int | float) -> str:
    """Bytes with a unit, three digits or more."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.{2 if size < 100 * scale else 0}f} {unit}"
    return f"{size:.0f} B"

"""The fastest way to train that fits into a memory, of a ladder of ways to use less of it."""

from lowbit_jax.models import LlamaConfig
from lowbit_jax.ops.cross_entropy import default_chunks
from lowbit_jax.train.memory_plan import OFFLOADS, MemoryPlan, Planner, show_bytes
from lowbit_jax.train.offload import NONE as NO_OFFLOAD
from lowbit_jax.train.offload import OFFLOADABLE, offload_flags
from lowbit_jax.train.stored_bytes import SHARDED_FROM

# What to give up when memory is short, in this order; of two sets of flags, one within the other,
# the smaller comes first. The order of Schultheis and Alistarh, LLMQ, arXiv:2512.15306, but that a
# block is computed anew, for a third more operations, before anything is offloaded, whose cost a
# step of few tokens cannot hide; and that what has been offloaded may spare the recomputation.
RECOMPUTE = (
    "none", "unnamed", "swiglu", "norm", "swiglu+norm", "ffn", "ffn+norm", "block",
)  # fmt: skip
_STATE = "moments+gradients+weights"
OFFLOAD = (NO_OFFLOAD, "moments", "moments+gradients", _STATE, f"{_STATE}+residuals")
LADDER = tuple((recompute, offload) for offload in OFFLOAD for recompute in RECOMPUTE)
# The loss is cut into so many times the chunks that `default_chunks` takes, at most: each costs a
# pass over the gradient of the head.
MOST_CHUNKS = 16


class DoesNotFit(ValueError):
    """No plan, or not the one asked for, fits into the memory."""


def choose_plan(
    config: LlamaConfig,
    memory_bytes: int,
    plan: Planner,
    *,
    tokens: int,
    offloadable: frozenset[str] = frozenset(OFFLOADABLE),
    host_bytes: int | None = None,
) -> tuple[MemoryPlan, MemoryPlan | None]:
    """The first plan of `LADDER` that fits into `memory_bytes`: the fastest, as its order claims.

    On each rung the loss is cut into the fewest chunks with which the plan fits, from those that
    `default_chunks` would take on; more of them only where the loss is what needs most.

    Args:
      config: Of the model.
      memory_bytes: Of a device, less what the compiler is to have for itself.
      plan: From `memory_plan.planner`.
      tokens: Of one micro-batch on one device.
      offloadable: What plans may keep in the host's memory.
      host_bytes: That a device may have of it; None: as many as it takes.

    Returns:
      The plan, and the one before it on the ladder, which does not fit; None if it is the first.

    Raises:
      DoesNotFit: If none fits; the message names what takes most and what would make it less.
    """
    fewest = default_chunks(tokens, config.vocab_size)
    chunks = [n for n in range(fewest, min(MOST_CHUNKS * fewest, tokens) + 1) if tokens % n == 0]
    plans: list[MemoryPlan] = []
    over: MemoryPlan | None = None  # the first that the device could hold, but not the host
    for recompute, offload in LADDER:
        if not offload_flags(offload) <= offloadable:
            continue
        for count in chunks:
            found = plan(recompute, count, offload)
            in_host = host_bytes is None or sum(found.host_bytes.values()) <= host_bytes
            if found.total <= memory_bytes and in_host:
                return found, plans[-1] if plans else None
            if found.total <= memory_bytes:
                over = over or found
                break
            if found.peak != "loss":
                break
        if in_host:
            plans.append(found)
    least = min(plans, key=lambda plan: plan.total)
    why = (
        f"choose_plan: no plan fits into {show_bytes(memory_bytes)}; the one that takes least,"
        f" {refusal(least, offloadable)}"
    )
    if over is not None:
        why += (
            f" With {over.options} it would fit, but that takes"
            f" {show_bytes(sum(over.host_bytes.values()))} of the host's memory for each device,"
            f" which has {show_bytes(host_bytes or 0)}."
        )
    raise DoesNotFit(why)


def refusal(plan: MemoryPlan, offloadable: frozenset[str] = frozenset(OFFLOADABLE)) -> str:
    """What a plan takes, what of it most, and what would make that less."""
    sizes = plan.categories
    most = max(sizes, key=lambda name: sizes[name])
    return (
        f"{plan.options}, takes {show_bytes(plan.total)}, of which {most}"
        f" {show_bytes(sizes[most])}; {_remedy(most, plan, offloadable)}."
    )


def _remedy(category: str, plan: MemoryPlan, offloadable: frozenset[str]) -> str:
    """What makes a category smaller."""
    if category == "passing":
        return "use a smaller model, or cut its matrices over more devices of tensor"
    if category not in SHARDED_FROM:
        remedies = ["use fewer sequences a micro-batch, that is, more micro_batches or devices"]
        if category == "logits":
            remedies.append("cut the loss into more chunks (loss_chunks)")
        elif "block" not in plan.recompute.split("+"):
            remedies.append("recompute more (up to recompute 'block')")
        elif "residuals" in offloadable and "residuals" not in offload_flags(plan.offload):
            remedies.append("offload residuals")
        return ", or ".join(remedies)
    remedies = ["use more devices"]
    if plan.world_size > 1 and plan.zero < SHARDED_FROM[category]:
        remedies = [f"use ZeRO stage {SHARDED_FROM[category]}"]
    flag = next((flag for flag, names in OFFLOADS.items() if category in names), None)
    if flag in offloadable and flag not in offload_flags(plan.offload):
        remedies.append(f"offload {flag}")
    return (
        f"{', or '.join(remedies)}, or store parameters and moments in fewer bytes (param_dtype,"
        " moments)"
    )

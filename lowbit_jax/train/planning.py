"""The memory plan of a run: what it will need, what it may choose, and what the compiler says."""

import dataclasses
import math
import os
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from lowbit_jax.models import Llama
from lowbit_jax.models.host_memory import HOST
from lowbit_jax.numerics import QTensor
from lowbit_jax.parallel import on_each
from lowbit_jax.train.config import Config, RunOptions, UsageError, quantized_weights
from lowbit_jax.train.gradient_exchange import parse_exchange
from lowbit_jax.train.memory_plan import MemoryPlan, Planner, planner, show_bytes
from lowbit_jax.train.offload import NONE, OFFLOADABLE, check_quantized_once
from lowbit_jax.train.plan_ladder import DoesNotFit, choose_plan, refusal
from lowbit_jax.train.start import draw_state, place_run
from lowbit_jax.train.stored_bytes import stored_by_run

# Of the memory, for what a plan leaves out.
HEADROOM = 0.05
_GIB = 2**30
# What XLA's client for GPUs pins for a process where nobody says otherwise, and where to say it.
_PINNED_BYTES, _PINNED_VARIABLE = 64 * 10**9, "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What a run does about memory; `str()` is for people.

    Attributes:
      config: Of the run, as the plan has it.
      options: Likewise.
      plan: The bytes.
      notes: What it fits into, and why it was chosen.
      memory_bytes: That a device has; None if nobody says.
    """

    config: Config
    options: RunOptions
    plan: MemoryPlan
    notes: tuple[str, ...]
    memory_bytes: int | None = None

    def __str__(self) -> str:
        return "\n".join([str(self.plan), *(f"  {note}" for note in self.notes)])


def plan_run(config: Config, options: RunOptions, mesh: Mesh | None) -> RunPlan:
    """The plan that `options.memory_plan` asks for, of what the run really holds.

    What is trained does not depend on it, but for the random bits of stochastic rounding where the
    optimizer's arrays are offloaded, so that a run may go on under another plan.

    Args:
      config: Of the run.
      options: `memory_plan`, `memory_gib` and `offload` are read, and `zero`.
      mesh: From `open_mesh`.

    Raises:
      UsageError: If no plan fits, or the one of `config` does not fit into `options.memory_gib`.
    """
    memory = _memory_bytes(options.memory_gib)
    plan = run_planner(config, options, mesh)
    model = config.model.config
    if options.memory_plan == "auto":
        return _chosen(config, options, plan, memory, mesh)
    try:
        if config.quantize_once:
            check_quantized_once(options.offload)
        found = plan(model.recompute, model.loss_chunks, options.offload)
    except ValueError as error:
        raise UsageError(f"--offload {options.offload}: {error}") from error
    notes = _host_notes(found, mesh)
    if memory is None:
        return RunPlan(config, options, found, notes)
    limit = (f"the device has {show_bytes(memory)}",)
    if found.total > memory:
        advice = f"{refusal(found)} {_advice(config, options, plan, memory, mesh)}"
        if options.memory_gib is not None:
            raise UsageError(f"--memory-gib {options.memory_gib:g}: {advice}")
        limit = (f"warning: the device has {show_bytes(memory)}. {advice}",)
    return RunPlan(config, options, found, limit + notes, memory)


def run_planner(config: Config, options: RunOptions, mesh: Mesh | None) -> Planner:
    """Plans of a run, counted from the shapes of its state and where they lie.

    Where the recipes change during a run, the plan is that of the recipes that need most.

    Raises:
      UsageError: If a recipe refuses the shapes of the model.
    """
    state = jax.eval_shape(lambda key: draw_state(config, key), jax.random.key(0))
    placement = None if mesh is None else place_run(config, mesh, options.zero)
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} if mesh is None else dict(mesh.shape)

    def of_phase(model: Llama) -> Planner:
        batch_size = config.batch_size // config.micro_batches
        cuts = sizes["data"] * sizes["fsdp"]
        # One program counts the tokens of all devices; devices that exchange their gradients
        # themselves have a loss each.
        is_one = parse_exchange(options.gradient_exchange) is None
        counted = batch_size if is_one else batch_size // cuts
        return planner(
            model.config,
            batch_size=batch_size // cuts,
            seq_len=config.seq_len,
            loss_tokens=counted * config.seq_len,
            quantize_once=config.quantize_once,
            stored=stored_by_run(
                model.config,
                state,
                quantized_once=dict(quantized_weights(model)) if config.quantize_once else {},
                micro_batches=config.micro_batches,
                places=placement and placement.state,
                gradient_places=placement and placement.gradients,
            ),
            zero=options.zero,
            world_size=cuts * sizes["tensor"],
            tensor=sizes["tensor"],
        )

    planners = [of_phase(model) for _, model in config.phases]

    def plan(recompute: str, loss_chunks: int | None, offload: str) -> MemoryPlan:
        found = [planner(recompute, loss_chunks, offload) for planner in planners]
        return max(found, key=lambda one: one.total)

    model = config.model.config
    try:  # the first that traces products; what it finds is kept for the next
        plan(model.recompute, model.loss_chunks, NONE)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return plan


def compiled_memory(train_step: Any, state: Any, batch: Any, planned: RunPlan) -> str:
    """A line with what the compiler allots to the step, beside the plan; one more if it is much.

    Call it once the step has run with such arguments: the program that ran is at hand then, and
    nothing is compiled.

    Args:
      train_step: From `make_train_step`.
      state: As it was passed, or its successor.
      batch: As it was passed.
      planned: What was predicted, and what the device has.
    """
    used = program_memory(train_step.lower(state, batch).compile())
    in_host = f", and {show_bytes(used.host_bytes)} of the host's" if used.host_bytes else ""
    line = (
        f"memory of a device, by the compiler: {show_bytes(used.total_bytes)} ("
        f"{show_bytes(used.state_bytes)} of state and batch, {show_bytes(used.temporary_bytes)}"
        f" of temporaries{in_host}); predicted {show_bytes(planned.plan.total)}"
    )
    memory = planned.memory_bytes
    if memory is None or used.total_bytes <= memory:
        return line
    return (
        f"{line}\nwarning: that is more than the {show_bytes(memory)} of a device: what the plan"
        " leaves out takes more here than is left for it. Give --memory-plan auto a --memory-gib"
        f" of less than {memory / _GIB:.3g}, or the run a smaller micro-batch."
    )


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """What the compiler allots to a program.

    Attributes:
      state_bytes: Arguments and results on a device, those in one place once.
      temporary_bytes: Beside them.
      host_bytes: In the host's memory.
    """

    state_bytes: int
    temporary_bytes: int
    host_bytes: int

    @property
    def total_bytes(self) -> int:
        """On a device."""
        return self.state_bytes + self.temporary_bytes


def program_memory(compiled: Any) -> ProgramMemory:
    """`compiled.memory_analysis()`, added up."""
    used = compiled.memory_analysis()
    results = used.output_size_in_bytes - used.alias_size_in_bytes
    return ProgramMemory(
        used.argument_size_in_bytes + results,
        used.temp_size_in_bytes,
        used.host_argument_size_in_bytes + used.host_temp_size_in_bytes,
    )


def device_memory_bytes() -> int | None:
    """What the allocator of this process may take of its first device; None if it has no limit."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def host_memory_bytes() -> int:
    """Memory of the host, or what a container may take of it."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            sizes.append(int((pathlib.Path("/sys/fs/cgroup") / name).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(sizes)


def offloadable(config: Config) -> frozenset[str]:
    """What the devices, and the optimizer's way with weights, allow to offload."""
    if all(memory.kind != HOST for memory in jax.local_devices()[0].addressable_memories()):
        return frozenset()
    # Weights that are quantized once a step are read as a whole; those stored as codes stay.
    whole = {"weights", "gradients"} if config.quantize_once else set()
    shapes = jax.eval_shape(lambda key: draw_state(config, key), jax.random.key(0)).params
    leaves = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, QTensor))
    has_codes = any(isinstance(leaf, QTensor) for leaf in leaves)
    return frozenset(OFFLOADABLE) - whole - ({"weights"} if has_codes else set())


def _memory_bytes(memory_gib: float | None) -> int | None:
    if memory_gib is None:  # the least of all processes, for all must choose alike
        limits = on_each(device_memory_bytes)
        return None if None in limits else min(limits)
    if not (math.isfinite(memory_gib) and memory_gib > 0):
        raise UsageError(f"--memory-gib must be a positive number, got {memory_gib}.")
    return int(memory_gib * _GIB)


def _chosen(
    config: Config, options: RunOptions, plan: Planner, memory: int | None, mesh: Mesh | None
) -> RunPlan:
    if memory is None:
        raise UsageError(
            "--memory-plan auto: this device does not say how much memory it has; pass"
            " --memory-gib."
        )
    usable = int((1 - HEADROOM) * memory)
    try:
        found, faster = _fitting(config, plan, memory, mesh)
    except DoesNotFit as error:
        raise UsageError(f"--memory-plan auto: {error}") from error
    model = config.model.config
    limit = f"{show_bytes(usable)}, {1 - HEADROOM:.0%} of {show_bytes(memory)}"
    why = f"chosen as the fastest that fits into {limit}"
    if faster is not None:
        why += f"; the next faster one, {faster.options}, takes {show_bytes(faster.total)}"
    ignored = [
        f"{name} {given}"
        for name, given, default, chosen in (
            ("recompute", model.recompute, "none", found.recompute),
            ("loss_chunks", model.loss_chunks, None, found.loss_chunks),
            ("offload", options.offload, "none", found.offload),
        )
        if given not in (default, chosen)
    ]
    if ignored:
        why += f"; takes the place of {', '.join(ignored)}, as configured"
    model = dataclasses.replace(model, recompute=found.recompute, loss_chunks=found.loss_chunks)
    return RunPlan(
        dataclasses.replace(config, model=Llama(model)),
        dataclasses.replace(options, offload=found.offload),
        found,
        (why, *_host_notes(found, mesh)),
        memory,
    )


def _fitting(
    config: Config, plan: Planner, memory: int, mesh: Mesh | None
) -> tuple[MemoryPlan, MemoryPlan | None]:
    """`choose_plan` for a run."""
    cuts = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return choose_plan(
        config.model.config,
        int((1 - HEADROOM) * memory),
        plan,
        tokens=config.batch_size * config.seq_len // (config.micro_batches * cuts),
        offloadable=offloadable(config),
        host_bytes=min(on_each(host_memory_bytes)) // _local_devices(mesh),
    )


def _advice(
    config: Config, options: RunOptions, plan: Planner, memory: int, mesh: Mesh | None
) -> str:
    try:
        found, _ = _fitting(config, plan, memory, mesh)
    except DoesNotFit:
        return "No choice of recomputation, chunks and offloading fits."
    return f"--memory-plan auto would choose what fits: {found.options}."


def _local_devices(mesh: Mesh | None) -> int:
    return 1 if mesh is None else len(mesh.local_devices)


def _host_notes(plan: MemoryPlan, mesh: Mesh | None) -> tuple[str, ...]:
    """Warnings, if a plan wants more of the host's memory than there is or XLA gives."""
    wanted = sum(plan.host_bytes.values()) * _local_devices(mesh)
    notes = []
    if wanted > (there := host_memory_bytes()):
        notes.append(
            f"warning: offloading takes {show_bytes(wanted)} of the host's memory, which has"
            f" {show_bytes(there)}."
        )
    limit = os.environ.get(_PINNED_VARIABLE, "")
    pinned = int(limit) * 10**9 if limit.isdecimal() else _PINNED_BYTES
    if jax.default_backend() == "gpu" and wanted > pinned:
        notes.append(
            f"warning: offloading takes {show_bytes(wanted)} of pinned memory, of which XLA gives a"
            f" process {show_bytes(pinned)}; start it with"
            f" {_PINNED_VARIABLE}={math.ceil(1.1 * wanted / 1e9)} in its environment."
        )
    return tuple(notes)

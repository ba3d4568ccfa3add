"""Programs timed in turn, beside baselines and beside what the device's data sheet allows.

All programs are compiled before the first one is timed: XLA runs kernels on the device to choose
among them, and a new program takes the CUDA graphs of the older ones from the device.

A GPU at its power limit sets its clock by what ran in the last tenths of a second: just after a
program that heats more, another is slower than it is by itself, and the other way round. So each
runs for a while before it is timed.
"""

import concurrent.futures
import dataclasses
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from pallas_kernels.compat import cuda_capability, hopper_obstacle
from pallas_kernels.measurement import Measurement, data_sheet, floor_s

_PATIENCE_S = 30  # between lines that say what is still compiling


@dataclasses.dataclass(frozen=True)
class Program:
    """Something compiled, ready to be timed.

    Attributes:
      call: Queues one call; returns what to wait for.
      flops: Floating-point operations of one unit of work, by the unit that can do them fastest.
      bytes: That one unit of work must read and write at least: arguments and results once.
      units: Units of work a call.
      note: The path taken, for people to read.
      tokens: Of one unit of work, where a rate in tokens says something.
      memory_bytes: Of the device, at the peak of a call.
    """

    call: Callable[[], Any]
    flops: dict[str, float]
    bytes: int
    units: int = 1
    note: str = ""
    tokens: int | None = None
    memory_bytes: int | None = None


class Build(NamedTuple):
    """A program on its way: lowered, and how to go on when it is compiled.

    Attributes:
      lowered: Its `compile()` is called in a thread; None if there is nothing to compile.
      bind: Makes a program of what was compiled and of the inputs; may run it.
    """

    lowered: Any
    bind: Callable[[Any, Any], Program]


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to do a piece of work.

    Attributes:
      name: Of the way.
      build: Lowers it for inputs of these shapes (`jax.ShapeDtypeStruct`s); runs nothing.
      obstacle: Why it cannot run on this machine, or None.
    """

    name: str
    build: Callable[[Any], Build]
    obstacle: Callable[[], str | None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Ways to do one piece of work, timed in turn: the device's clock drifts, so neighbours count.

    Attributes:
      group: What it belongs to, for selection.
      work: What is done.
      inputs: Makes of a key what the cases share, a pytree of arrays; compiled as one function.
      cases: The ways.
      baselines: Names of cases with which all are compared.
      calls: Queued back to back in one measurement, so that launches hide behind the device's work.
      is_profiled: Whether the time of the kernels alone is wanted too, as where launches show.
    """

    group: str
    work: str
    inputs: Callable[[PRNGKeyArray], Any]
    cases: tuple[Case, ...]
    baselines: tuple[str, ...] = ()
    calls: int = 30
    is_profiled: bool = False


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays in a pytree of arrays or `jax.ShapeDtypeStruct`s."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def jitted(
    fn: Callable[..., Any],
    pick: Callable[[Any], tuple[Any, ...]] = lambda inputs: inputs,
    **fields: Any,
) -> Callable[[Any], Build]:
    """A builder of `jax.jit(fn)(*pick(inputs))`; its bytes are those of arguments and results.

    Each call writes its results over those of the call before, as a program does that keeps its
    state: XLA records launches as a CUDA graph, and must do so again where an address changes.

    Args:
      fn: Any function of arrays, each of which it reads.
      pick: Its arguments among the inputs, or their shapes among the shapes.
      **fields: Of the program, `flops` for example, or functions of the shapes of the arguments
        that give them.
    """

    def build(shapes: Any) -> Build:
        args = pick(shapes)
        results = jax.eval_shape(fn, *args)
        known: dict[str, Any] = {"flops": {}, "bytes": tree_bytes((args, results)), **fields}
        known = {key: f(args) if callable(f) else f for key, f in known.items()}

        def run(results, *args):
            del results
            return fn(*args)

        lowered = jax.jit(run, donate_argnums=0, keep_unused=True).lower(results, *args)

        def bind(compiled, inputs) -> Program:
            args = pick(inputs)
            held = [jax.tree.map(lambda s: jnp.empty(s.shape, s.dtype), results)]

            def call():
                held.append(compiled(held.pop(), *args))
                return held[0]

            return Program(call=call, **known)

        return Build(lowered, bind)

    return build


def kernel_obstacle() -> str | None:
    """Why kernels for Hopper cannot run on this process's first device, or None."""
    return hopper_obstacle(cuda_capability())


def time_in_turn(
    programs: dict[str, Program], *, repeats: int, calls: int, settle_s: float = 0.0
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds for a unit of work, and the host's share of it: A B C, A B C, and so on.

    Args:
      programs: By name; each has run before.
      repeats: Measurements of each.
      calls: Queued in each of them, then waited for together.
      settle_s: Seconds that a program runs right before each of its measurements, at least; none
        for 0.

    Returns:
      Two lists a program, in the order of the repeats.
    """
    times: dict[str, list[float]] = {name: [] for name in programs}
    host: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            settled = time.perf_counter() + settle_s
            while settle_s and time.perf_counter() < settled:
                _run(program, calls)
            start, queued, end = _run(program, calls)
            times[name].append((end - start) / (calls * program.units))
            host[name].append((queued - start) / (end - start))
    return times, host


def _run(program: Program, calls: int) -> tuple[float, float, float]:
    """When calls began, when all were queued, and when all had ended."""
    start = time.perf_counter()
    for _ in range(calls):
        out = program.call()
    queued = time.perf_counter()
    jax.block_until_ready(out)
    return start, queued, time.perf_counter()


def measure(comparison: Comparison, **options: Any) -> list[Measurement]:
    """`measure_all` of one comparison."""
    (rows,) = measure_all([comparison], **options)
    return rows


def measure_all(
    comparisons: Sequence[Comparison],
    *,
    repeats: int = 20,
    warmups: int = 3,
    settle_s: float = 0.0,
    say: Callable[[str], None] = lambda text: None,
    device_seconds: Callable[[Callable[[], Any]], float | None] = lambda call: None,
) -> Iterator[list[Measurement]]:
    """Compiles the cases of all comparisons, then times each comparison's cases in turn.

    A case that cannot run here is skipped, one that raises has failed; the others go on.

    Args:
      comparisons: What to measure.
      repeats: Measurements of each case.
      warmups: Calls of each case before.
      settle_s: See `time_in_turn`.
      say: Gets a line of progress now and then, from any thread.
      device_seconds: Seconds that the kernels of a call run, by a profiler, or None.

    Yields:
      For each comparison a row for each case, in their order.
    """
    plans = [_Plan(comparison) for comparison in comparisons]
    _compile(plans, say)
    for plan in plans:
        turns = {"repeats": repeats, "calls": plan.comparison.calls, "settle_s": settle_s}
        yield _time(plan, warmups, turns, say, device_seconds)


class _Plan:
    """A comparison on its way: what is compiled of it, and which cases have dropped out."""

    def __init__(self, comparison: Comparison):
        self.comparison = comparison
        self.make_inputs: concurrent.futures.Future | None = None
        self.cases: dict[str, tuple[Build, concurrent.futures.Future]] = {}
        self.reasons: dict[str, tuple[Literal["skipped", "failed"], str]] = {}

    def drop(self, name: str, status: Literal["skipped", "failed"], reason: str, say) -> None:
        self.cases.pop(name, None)
        self.reasons[name] = status, reason
        say(f"{self.comparison.work}: {name} {status}: {reason}")


def _compile(plans: list[_Plan], say) -> None:
    """Lowers on this thread, as Python must, while others compile what has been lowered.

    Baselines are compiled alone and first: XLA times candidates for them on the device, which other
    work on the host would disturb. The others in reverse: what takes long comes last in a
    comparison, and should be under way early.
    """
    start = time.perf_counter()
    names: dict[concurrent.futures.Future, str] = {}
    todo: list[tuple[_Plan, Case, Any]] = []
    others: list[tuple[_Plan, str, Any]] = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:

        def submit(name, lowered):
            def run():
                began = time.perf_counter()
                compiled = None if lowered is None else lowered.compile()
                say(f"{name} compiled in {time.perf_counter() - began:.1f} s")
                return compiled

            future = pool.submit(run)
            names[future] = name
            return future

        for plan in reversed(plans):
            comparison, key = plan.comparison, jax.random.key(0)
            obstacles = {case.name: case.obstacle() for case in comparison.cases}
            for name, obstacle in obstacles.items():
                if obstacle is not None:
                    plan.drop(name, "skipped", obstacle, say)
            runnable = [case for case in comparison.cases if obstacles[case.name] is None]
            if not runnable:
                continue
            make = jax.jit(comparison.inputs)
            try:
                shapes = jax.eval_shape(make, key)
                make_lowered = make.lower(key)
            except Exception as error:
                for case in runnable:
                    plan.drop(case.name, "failed", _first_lines(error), say)
                continue
            todo += [(plan, case, shapes) for case in reversed(runnable)]
            others.append((plan, f"{comparison.work}: inputs", make_lowered))
        todo.sort(key=lambda item: item[1].name not in item[0].comparison.baselines)
        for plan, case, shapes in todo:
            began = time.perf_counter()
            try:
                build = case.build(shapes)
            except Exception as error:  # whatever it is, the other cases are wanted
                plan.drop(case.name, "failed", _first_lines(error), say)
                continue
            name = f"{plan.comparison.work}: {case.name}"
            say(f"{name} lowered in {time.perf_counter() - began:.1f} s")
            future = submit(name, build.lowered)
            plan.cases[case.name] = build, future
            if case.name in plan.comparison.baselines:
                concurrent.futures.wait([future])
        for plan, name, lowered in others:
            plan.make_inputs = submit(name, lowered)
        pending = set(names)
        while pending:
            _, pending = concurrent.futures.wait(pending, _PATIENCE_S)
            if pending:
                say(f"still compiling: {'; '.join(sorted(names[future] for future in pending))}")
    say(f"all compiled in {time.perf_counter() - start:.1f} s")


def _time(
    plan: _Plan, warmups: int, turns: dict[str, Any], say, device_seconds
) -> list[Measurement]:
    comparison = plan.comparison
    programs: dict[str, Program] = {}
    inputs = None
    try:
        if plan.make_inputs is not None:
            inputs = jax.block_until_ready(plan.make_inputs.result()(jax.random.key(0)))
    except Exception as error:
        for name in tuple(plan.cases):
            plan.drop(name, "failed", _first_lines(error), say)
    for case in comparison.cases:
        if case.name not in plan.cases:
            continue
        build, compiled = plan.cases[case.name]
        try:
            program = build.bind(compiled.result(), inputs)
            for _ in range(warmups):
                jax.block_until_ready(program.call())
        except Exception as error:
            plan.drop(case.name, "failed", _first_lines(error), say)
            continue
        programs[case.name] = program
    device: dict[str, float] = {}
    try:
        times, host = time_in_turn(programs, **turns)
        if comparison.is_profiled:
            found = {name: device_seconds(program.call) for name, program in programs.items()}
            device = {n: s / programs[n].units for n, s in found.items() if s is not None}
    except Exception as error:  # an asynchronous error says not whose it was
        for name in programs:
            plan.drop(name, "failed", _first_lines(error), say)
        times, host = {}, {}
    rows = []
    kind = jax.devices()[0].device_kind
    for case in comparison.cases:
        row = Measurement(
            comparison.group, comparison.work, case.name, kind, jax.__version__, "measured"
        )
        if case.name in plan.reasons:
            status, note = plan.reasons[case.name]
            row = dataclasses.replace(row, status=status, note=note)
        else:
            program = programs[case.name]
            row = _filled(row, program, times, host, device, comparison.baselines)
            row = dataclasses.replace(row, settle_s=turns["settle_s"])
        rows.append(row)
    return rows


def print_comparisons(
    comparisons: Iterable[Comparison], *, pattern: str = "", repeats: int = 20
) -> int:
    """Measures and prints the cases whose "work: name" contains `pattern`; 1 if one failed."""
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    chosen = []
    for comparison in comparisons:
        cases = tuple(c for c in comparison.cases if pattern in f"{comparison.work}: {c.name}")
        if cases:
            chosen.append(dataclasses.replace(comparison, cases=cases))
    has_failed = False
    say = functools.partial(print, flush=True)
    for rows in measure_all(chosen, repeats=repeats, say=say):
        for row in rows:
            has_failed |= row.status == "failed"
            print(row, flush=True)
    return int(has_failed)


def _filled(row, program, times, host, device, baselines) -> Measurement:
    seconds, device_s = times[row.name], device.get(row.name)
    ratios = {
        baseline: statistics.median(b / s for b, s in zip(times[baseline], seconds, strict=True))
        for baseline in baselines
        if baseline in times and baseline != row.name
    }
    device_ratios = {
        baseline: device[baseline] / device_s
        for baseline in baselines
        if baseline in device and baseline != row.name and device_s
    }
    return dataclasses.replace(
        row,
        note=program.note,
        median_s=statistics.median(seconds),
        min_s=min(seconds),
        max_s=max(seconds),
        repeats=len(seconds),
        host_share=statistics.median(host[row.name]),
        flops=program.flops,
        bytes=program.bytes,
        tokens=program.tokens,
        memory_bytes=program.memory_bytes,
        floor_s=floor_s(program.flops, program.bytes, data_sheet(row.device)),
        ratios=ratios,
        device_s=device_s,
        device_ratios=device_ratios,
    )


def _first_lines(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

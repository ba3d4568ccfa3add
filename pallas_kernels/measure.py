"""Programs timed in turn, beside baselines and beside what the device's data sheet allows."""

import dataclasses
import functools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax

from pallas_kernels.compat import hopper_obstacle

# Units that multiply, by what they read: the keys of FLOPs and of peaks.
BF16, FP8 = "bf16", "fp8"
# A call shorter than this, most of whose time the host needs to queue it, is bound by launches.
_SHORT_CALL_S = 2e-3
_HOST_BOUND_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class DataSheet:
    """What the maker promises of a device, dense products.

    Attributes:
      peak: FLOP/s by unit.
      bandwidth: Of its memory, bytes/s.
    """

    peak: dict[str, float]
    bandwidth: float


# NVIDIA's data sheets of the H100 SXM and the H200 SXM, by the name that JAX reports. Names that
# merely begin or end like these are of other cards: GH200, H200 NVL, slices of an H100.
_DATA_SHEETS = {
    "NVIDIA H100 80GB HBM3": DataSheet({BF16: 989e12, FP8: 1979e12}, 3.35e12),
    "NVIDIA H200": DataSheet({BF16: 989e12, FP8: 1979e12}, 4.8e12),
}


def data_sheet(device_kind: str) -> DataSheet | None:
    """The data sheet of a device; None where it is not known."""
    return _DATA_SHEETS.get(device_kind)


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


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to do a piece of work.

    Attributes:
      name: Of the way.
      build: Compiles it for the inputs of its `Comparison`.
      obstacle: Why it cannot run on this machine, or None.
    """

    name: str
    build: Callable[[Any], Program]
    obstacle: Callable[[], str | None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Ways to do one piece of work, timed in turn: the device's clock drifts, so neighbours count.

    Attributes:
      group: What it belongs to, for selection.
      work: What is done.
      inputs: Makes what the builders get, once.
      cases: The ways.
      baselines: Names of cases with which all are compared.
      calls: Queued back to back in one measurement, so that launches hide behind the device's work.
    """

    group: str
    work: str
    inputs: Callable[[], Any]
    cases: tuple[Case, ...]
    baselines: tuple[str, ...] = ()
    calls: int = 30


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One case, measured or not; plain data.

    Attributes:
      group: Of the comparison.
      work: Likewise.
      name: Of the case.
      device: Its kind.
      jax_version: Of JAX.
      status: Whether there are numbers.
      note: The path taken, or why there are no numbers.
      median_s: Seconds for a unit of work, over the repeats; each is the mean of queued calls.
      min_s: Their minimum.
      max_s: Their maximum.
      repeats: How many.
      host_share: Of that time, what the host needed to queue the calls, median.
      flops: See `Program`, as all that follow but the last two.
      bytes: Likewise.
      tokens: Likewise.
      memory_bytes: Likewise.
      floor_s: The least that the data sheet allows; None where the device is not known.
      ratios: Time of each baseline over the time of this case, median over the repeats, both of
        the same repeat: 2 is twice as fast.
    """

    group: str
    work: str
    name: str
    device: str
    jax_version: str
    status: Literal["measured", "skipped", "failed"]
    note: str = ""
    median_s: float | None = None
    min_s: float | None = None
    max_s: float | None = None
    repeats: int = 0
    host_share: float | None = None
    flops: dict[str, float] = dataclasses.field(default_factory=dict)
    bytes: int = 0
    tokens: int | None = None
    memory_bytes: int | None = None
    floor_s: float | None = None
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def flops_per_s(self) -> float | None:
        """All operations over the median; None where there are none."""
        total = sum(self.flops.values())
        return total / self.median_s if total and self.median_s else None

    @property
    def share_of_floor(self) -> float | None:
        """`floor_s / median_s`: 1 is as fast as the data sheet allows."""
        return self.floor_s / self.median_s if self.floor_s and self.median_s else None

    @property
    def mfu(self) -> float | None:
        """Model FLOP utilization: all operations over the bfloat16 peak, whatever the unit."""
        sheet = data_sheet(self.device)
        rate = self.flops_per_s
        return rate / sheet.peak[BF16] if sheet and rate else None

    @property
    def is_host_bound(self) -> bool:
        """Whether launching the calls took about as long as running them; never on a CPU."""
        if self.median_s is None or self.host_share is None or self.device == "cpu":
            return False
        return self.median_s < _SHORT_CALL_S and self.host_share > _HOST_BOUND_SHARE

    def __str__(self) -> str:
        name = f"{self.work}: {self.name}"
        if self.median_s is None or self.min_s is None or self.max_s is None:
            return f"{name:60} {self.status}: {self.note}"
        times = f"{show_time(self.median_s)} ({show_time(self.min_s)} to {show_time(self.max_s)})"
        parts = [f"{name:60} {times:34}"]
        if self.flops_per_s:
            parts.append(f"{show_rate(self.flops_per_s)} TFLOP/s")
        if self.share_of_floor:
            parts.append(f"{self.share_of_floor:4.0%} of floor")
        parts += [f"{ratio:.2f} x {baseline}" for baseline, ratio in self.ratios.items()]
        return "  ".join(parts)


def show_time(seconds: float) -> str:
    """Four digits, in milliseconds from 1 on, in microseconds below."""
    return f"{1e3 * seconds:.4g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.4g} us"


def show_rate(flops_per_s: float) -> str:
    """TFLOP/s, three digits or whole numbers."""
    rate = flops_per_s / 1e12
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def floor_s(flops: dict[str, float], bytes: int, sheet: DataSheet | None) -> float | None:
    """`max(sum over units of FLOPs / peak, bytes / bandwidth)`: the units share one tensor core."""
    if sheet is None:
        return None
    return max(sum(n / sheet.peak[unit] for unit, n in flops.items()), bytes / sheet.bandwidth)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays in a pytree of arrays or `jax.ShapeDtypeStruct`s."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def jitted(fn: Callable[..., Any], args: tuple[Any, ...], **fields: Any) -> Program:
    """`jax.jit(fn)(*args)` as a program, compiled; its bytes are those of `args` and results.

    Args:
      fn: Any function of arrays, each of which it reads.
      args: Its arguments.
      **fields: Of the program, `flops` for example.
    """
    fn = jax.jit(fn)
    fields.setdefault("bytes", tree_bytes((args, jax.eval_shape(fn, *args))))
    jax.block_until_ready(fn(*args))
    return Program(call=lambda: fn(*args), **{"flops": {}, **fields})


def kernel_obstacle() -> str | None:
    """Why kernels for Hopper cannot run on this process's first device, or None."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    match = re.fullmatch(r"(\d+)\.(\d+)", capability)  # not so where it is no GPU of NVIDIA's
    return hopper_obstacle((int(match[1]), int(match[2])) if match else None)


def time_in_turn(
    programs: dict[str, Program], *, repeats: int, calls: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds for a unit of work, and the host's share of it: A B C, A B C, and so on.

    Args:
      programs: By name; each has run before.
      repeats: Measurements of each.
      calls: Queued in each of them, then waited for together.

    Returns:
      Two lists a program, in the order of the repeats.
    """
    times: dict[str, list[float]] = {name: [] for name in programs}
    host: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            for _ in range(calls):
                out = program.call()
            queued = time.perf_counter()
            jax.block_until_ready(out)
            end = time.perf_counter()
            times[name].append((end - start) / (calls * program.units))
            host[name].append((queued - start) / (end - start))
    return times, host


def measure(
    comparison: Comparison,
    *,
    repeats: int = 20,
    warmups: int = 3,
    say: Callable[[str], None] = lambda text: None,
) -> list[Measurement]:
    """Compiles the cases one after the other, then times those that run, in turn.

    A case that cannot run here is skipped, one that raises has failed; the others go on.

    Args:
      comparison: What to measure.
      repeats: Measurements of each case.
      warmups: Calls of each case before.
      say: Gets a line of progress now and then.

    Returns:
      A row for each case, in their order.
    """
    device = jax.devices()[0].device_kind
    programs: dict[str, Program] = {}
    reasons: dict[str, tuple[Literal["skipped", "failed"], str]] = {}
    for case in comparison.cases:
        obstacle = case.obstacle()
        if obstacle is not None:
            reasons[case.name] = ("skipped", obstacle)
            say(f"{comparison.work}: {case.name} skipped: {obstacle}")
    runnable = [case for case in comparison.cases if case.name not in reasons]
    try:
        inputs = comparison.inputs() if runnable else None
    except Exception as error:
        reasons.update({case.name: ("failed", _first_lines(error)) for case in runnable})
        say(f"{comparison.work}: inputs failed: {_first_lines(error)}")
        runnable = []
    for case in runnable:
        start = time.perf_counter()
        try:
            program = case.build(inputs)
            for _ in range(warmups):
                jax.block_until_ready(program.call())
        except Exception as error:  # whatever it is, the other cases are wanted
            reasons[case.name] = ("failed", _first_lines(error))
            say(f"{comparison.work}: {case.name} failed: {_first_lines(error)}")
            continue
        programs[case.name] = program
        say(f"{comparison.work}: {case.name} ready in {time.perf_counter() - start:.1f} s")
    try:
        times, host = time_in_turn(programs, repeats=repeats, calls=comparison.calls)
    except Exception as error:  # an asynchronous error says not whose it was
        reasons.update({name: ("failed", _first_lines(error)) for name in programs})
        times, host = {}, {}
    rows = []
    for case in comparison.cases:
        row = Measurement(
            comparison.group, comparison.work, case.name, device, jax.__version__, "measured"
        )
        if case.name in reasons:
            status, note = reasons[case.name]
            row = dataclasses.replace(row, status=status, note=note)
        else:
            row = _filled(row, programs[case.name], times, host, comparison.baselines)
        rows.append(row)
    return rows


def print_comparisons(
    comparisons: Iterable[Comparison], *, pattern: str = "", repeats: int = 20
) -> int:
    """Measures and prints the cases whose "work: name" contains `pattern`; 1 if one failed."""
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    has_failed = False
    for comparison in comparisons:
        cases = tuple(c for c in comparison.cases if pattern in f"{comparison.work}: {c.name}")
        if not cases:
            continue
        comparison = dataclasses.replace(comparison, cases=cases)
        for row in measure(comparison, repeats=repeats, say=functools.partial(print, flush=True)):
            has_failed |= row.status == "failed"
            print(row, flush=True)
    return int(has_failed)


def _filled(row, program, times, host, baselines) -> Measurement:
    seconds = times[row.name]
    ratios = {
        baseline: statistics.median(b / s for b, s in zip(times[baseline], seconds, strict=True))
        for baseline in baselines
        if baseline in times and baseline != row.name
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
    )


def _first_lines(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

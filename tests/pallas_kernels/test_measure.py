"""What turns times into rows: order, ratios, floors, and rows without numbers."""

import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import measure as module
from pallas_kernels.measure import (
    Build,
    Case,
    Comparison,
    Program,
    jitted,
    kernel_obstacle,
    measure,
    measure_all,
    time_in_turn,
    tree_bytes,
)
from pallas_kernels.measurement import (
    BF16,
    FP8,
    DataSheet,
    Measurement,
    data_sheet,
    floor_s,
    show_rate,
    show_time,
)

H100 = "NVIDIA H100 80GB HBM3"
ROW = Measurement("g", "w", "n", H100, "0.11", "measured", median_s=2e-3, min_s=1e-3, max_s=3e-3)


class Clock:
    """A `time.perf_counter` that moves only when it is told to."""

    def __init__(self):
        self.now = 0.0

    def program(self, seconds, **fields):
        """A program whose calls take these seconds, one after the other, then over again."""
        durations = itertools.cycle(seconds)

        def call():
            self.now += next(durations)
            return self.now

        return Program(call, fields.pop("flops", {}), fields.pop("bytes", 0), **fields)


def ready(make):
    """A builder with nothing to compile: `make` gets the inputs."""
    return lambda shapes: Build(None, lambda compiled, inputs: make(inputs))


def fails(*args):
    raise RuntimeError("no such kernel")


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
    return clock


def test_programs_take_turns():
    order = []
    programs = {name: Program(lambda name=name: order.append(name), {}, 0) for name in "ab"}
    time_in_turn(programs, repeats=3, calls=2)
    assert "".join(order) == "aabb" * 3


def test_a_program_runs_alone_for_a_while_before_it_is_timed(clock):
    # As on a device whose clock follows what it ran last: the first calls after others are slow.
    programs = {
        "hot": clock.program([1.0, 1.0, 2.0]),
        "cool": clock.program([3.0, 2.0]),
    }
    times, _ = time_in_turn(programs, repeats=2, calls=1, settle_s=1.5)
    assert times == {"hot": [2.0, 2.0], "cool": [2.0, 2.0]}


def test_a_time_is_that_of_one_unit_of_work_of_one_call(clock):
    times, host = time_in_turn({"a": clock.program([6.0], units=3)}, repeats=2, calls=5)
    assert times == {"a": [2.0, 2.0]}
    assert host == {"a": [1.0, 1.0]}  # the call itself took all of it


def test_ratios_compare_neighbours_in_time(clock):
    # Both slow down by 4 together, as a device does that lowers its clock, between the repeats.
    programs = {"slow": clock.program([2.0, 8.0, 8.0]), "fast": clock.program([1.0, 4.0, 4.0])}
    cases = tuple(Case(name, ready(lambda _, p=p: p)) for name, p in programs.items())
    comparison = Comparison("g", "w", lambda key: (), cases, ("slow", "absent"), calls=1)
    slow, fast = measure(comparison, repeats=3, warmups=3)
    assert fast.ratios == {"slow": 2.0}
    assert slow.ratios == {}
    assert (fast.median_s, fast.min_s, fast.max_s, fast.repeats) == (4.0, 1.0, 4.0, 3)


def test_the_floor_is_the_larger_of_arithmetic_and_memory():
    sheet = DataSheet({BF16: 10.0, FP8: 20.0}, bandwidth=100.0)
    assert floor_s({BF16: 30.0, FP8: 40.0}, 0, sheet) == 5.0
    assert floor_s({BF16: 30.0}, 400, sheet) == 4.0
    assert floor_s({}, 200, sheet) == 2.0
    assert floor_s({BF16: 30.0}, 400, None) is None


def test_only_known_devices_have_a_floor():
    assert data_sheet(H100).peak[FP8] == 1978.9e12
    assert data_sheet("NVIDIA H200").bandwidth == 4.8e12
    assert data_sheet("NVIDIA H100 PCIe").peak[BF16] == 756e12
    others = "H100", "H100 80GB HBM3 MIG 1g.10gb", "H200 NVL"
    for name in (*(f"NVIDIA {other}" for other in others), "cpu"):
        assert data_sheet(name) is None


def test_what_a_device_has_no_unit_for_runs_in_bfloat16():
    sheet = data_sheet("NVIDIA A100-SXM4-80GB")
    assert floor_s({BF16: 312e12, FP8: 312e12}, 0, sheet) == 2.0


def test_what_follows_from_a_row():
    row = dataclasses.replace(ROW, flops={BF16: 1e12, FP8: 3e12}, floor_s=1e-3)
    assert row.flops_per_s == 2e15
    assert row.share_of_floor == 0.5
    assert row.mfu == 2e15 / 989.4e12
    assert dataclasses.replace(row, device="cpu").mfu is None
    assert ROW.flops_per_s is None
    assert "2000 TFLOP/s   50% of floor" in str(row)


@pytest.mark.parametrize(
    ("median_s", "share", "device", "claim"),
    [
        (1e-5, 0.95, H100, True),
        (1e-5, 0.5, H100, False),  # the device works longer than the host
        (0.2, 0.95, H100, False),  # a long program fills the queue of launches
        (1e-5, 1.0, "cpu", False),  # calls may run while they are queued
    ],
)
def test_calls_are_bound_by_launches_if_queueing_takes_all_their_time(
    median_s, share, device, claim
):
    row = dataclasses.replace(ROW, median_s=median_s, host_share=share, device=device)
    assert row.is_host_bound is claim


@pytest.mark.parametrize(
    ("capability", "said"), [((8, 0), "this device has 8.0"), (None, "no CUDA device")]
)
def test_devices_without_the_kernels_say_why(capability, said, monkeypatch):
    monkeypatch.setattr(module, "cuda_capability", lambda: capability)
    assert said in kernel_obstacle()


def test_a_failing_case_and_a_skipped_one_leave_the_others_alone(clock):
    fails_to_compile = types.SimpleNamespace(compile=fails)
    fails_when_called = dataclasses.replace(clock.program([1.0]), call=fails)
    cases = (
        Case("a", fails),
        Case("b", lambda shapes: Build(fails_to_compile, fails)),
        Case("c", ready(lambda _: fails_when_called)),
        Case("d", fails, obstacle=lambda: "no CUDA device"),
        Case("e", ready(lambda inputs: clock.program([float(inputs)]))),
    )
    said = []
    comparison = Comparison("g", "w", lambda key: jnp.float32(4.0), cases, ("a",))
    rows = measure(comparison, repeats=2, say=said.append)
    assert [row.status for row in rows] == ["failed", "failed", "failed", "skipped", "measured"]
    assert {row.note for row in rows[:3]} == {"RuntimeError: no such kernel"}
    assert rows[3].note == "no CUDA device"
    assert rows[4].median_s == 4.0
    for name in "abcd":  # never silently
        assert any(text.startswith(f"w: {name} ") for text in said)


def test_inputs_that_cannot_be_made_fail_their_cases_once():
    attempts = []

    def inputs(key):
        attempts.append(0)
        raise MemoryError("too large")

    cases = tuple(Case(name, fails) for name in "ab")
    rows = measure(Comparison("g", "w", inputs, cases))
    assert [row.note for row in rows] == ["MemoryError: too large"] * 2
    assert len(attempts) == 1


def test_a_failure_while_timing_fails_what_was_timed():
    calls = itertools.count()

    def call():
        if next(calls) == 4:
            raise RuntimeError("illegal address")

    cases = (Case("a", ready(lambda _: Program(call, {}, 0))),)
    (row,) = measure(Comparison("g", "w", lambda key: (), cases), warmups=3, repeats=2)
    assert (row.status, row.note) == ("failed", "RuntimeError: illegal address")


def test_everything_is_compiled_before_anything_runs_and_rows_keep_their_order():
    events = []

    class Lowered:
        def __init__(self, name):
            self.name = name

        def compile(self):
            events.append("compile")
            return self.name

    def bind(name, inputs):
        return Program(lambda: events.append(name), {}, 0)

    def comparison(work):
        names = (f"{work}1", f"{work}2")
        cases = tuple(Case(n, lambda shapes, n=n: Build(Lowered(n), bind)) for n in names)
        return Comparison("g", work, lambda key: (), cases, calls=1)

    rows = list(measure_all([comparison("a"), comparison("b")], repeats=1, warmups=0))
    assert events == ["compile"] * 4 + ["a1", "a2", "b1", "b2"]
    assert [row.name for both in rows for row in both] == ["a1", "a2", "b1", "b2"]


def test_times_of_kernels_are_of_one_unit_and_compared_too(clock):
    programs = {"slow": clock.program([3.0], units=3), "fast": clock.program([1.0])}
    device = {programs["slow"].call: 3.0, programs["fast"].call: 0.25}
    cases = tuple(Case(name, ready(lambda _, p=p: p)) for name, p in programs.items())
    comparison = Comparison("g", "w", lambda key: (), cases, ("slow",), is_profiled=True)
    slow, fast = measure(comparison, repeats=1, device_seconds=device.get)
    assert (slow.device_s, slow.device_ratios) == (1.0, {})
    assert (fast.device_s, fast.device_ratios) == (0.25, {"slow": 4.0})
    assert fast.device_note == "kernels 250 ms, 4.00 x slow"
    unknown, _ = measure(comparison, repeats=1)
    assert unknown.device_s is None
    assert unknown.device_note == ""


def test_a_jitted_function_counts_arguments_and_results_once():
    x = jnp.ones((8, 4), jnp.bfloat16)
    builder = jitted(
        lambda x: (2 * x, x.astype(jnp.float32)),
        lambda inputs: (inputs["x"],),
        note="here",
        units=lambda args: len(args),
    )
    build = builder({"x": jax.ShapeDtypeStruct(x.shape, x.dtype)})
    program = build.bind(build.lowered.compile(), {"x": x})
    assert program.bytes == 64 + 64 + 128
    assert (program.note, program.units) == ("here", 1)
    first = program.call()
    doubled, wide = program.call()
    assert first[0].is_deleted()  # its memory is that of the second call's result
    assert (doubled == 2).all()
    assert wide.dtype == jnp.float32


def test_bytes_of_shapes_are_those_of_arrays():
    tree = {"a": jnp.zeros((3, 5), jnp.int8), "b": jax.ShapeDtypeStruct((2,), jnp.float32)}
    assert tree_bytes(tree) == 23


def test_numbers_keep_the_digits_that_mean_something():
    assert show_time(15.034e-6) == "15.03 us"
    assert show_time(2.36e-3) == "2.36 ms"
    assert show_rate(1421.3e12) == "1421"
    assert show_rate(2.8e12) == "2.8"

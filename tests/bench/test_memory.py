"""The table of memory, on a small model in this process, and what becomes of its rows."""

import dataclasses
import sys

import pytest

from lowbit_jax.bench import memory, memory_row
from lowbit_jax.bench.memory import main
from lowbit_jax.bench.memory_case import Case, MemoryRow
from lowbit_jax.bench.memory_report import freed, load, markdown, save
from lowbit_jax.bench.memory_row import measure

GIB = 2**30


def test_rows_are_measured_saved_and_compared(tmp_path, capsys):
    assert main(tiny=True, rows=("none", "block"), seq_len=16, steps=1, out=tmp_path) == 0
    printed = capsys.readouterr().out
    rows = load(tmp_path)
    assert [row.case.name for row in rows] == ["none", "block"]
    for row in rows:
        assert row.status == "measured"
        assert row.tokens_per_s > 0
        assert f"] {row.case.name}: predicted " in printed
    found = freed(rows[1], rows)
    assert found["predicted"] > 0
    assert found["compiler"] > 0
    assert found["peak"] is None  # nobody counts on a CPU
    assert (tmp_path / "memory.md").read_text() in printed


def test_freed_bytes_are_held_against_the_prediction(tmp_path):
    base = Case("none", "qwen2.5-1.5b")
    flag = dataclasses.replace(base, name="block", baseline="none", recompute="block")
    row = MemoryRow(base, "measured", predicted_bytes=9 * GIB, state_bytes=4 * GIB,
                    temporary_bytes=4 * GIB, peak_bytes=10 * GIB)  # fmt: skip
    smaller = dataclasses.replace(row, case=flag, predicted_bytes=6 * GIB, peak_bytes=6 * GIB)
    rows = [row, smaller]
    assert freed(row, rows) == {}
    assert freed(smaller, rows) == {"predicted": 3 * GIB, "compiler": 0, "peak": 4 * GIB}
    line = next(line for line in markdown(rows).splitlines() if line.startswith("| block"))
    assert line.split(" | ")[1:9] == [
        "6.00 GiB", "8.00 GiB", "6.00 GiB", "", "3.00 GiB", "0 B", "4.00 GiB", "-25.0%",
    ]  # fmt: skip
    larger = dataclasses.replace(smaller, peak_bytes=11 * GIB)  # has taken, not freed
    line = next(line for line in markdown([row, larger]).splitlines() if "block" in line)
    assert line.split(" | ")[7:9] == ["-1.00 GiB", ""]
    offloading = dataclasses.replace(smaller.case, offload="moments")
    on_cpu = dataclasses.replace(smaller, case=offloading, device="cpu", peak_bytes=None)
    assert freed(on_cpu, [row, on_cpu])["compiler"] is None
    line = next(line for line in markdown([row, on_cpu]).splitlines() if "block" in line)
    assert line.split(" | ")[6:9] == ["", "", ""]
    assert "counts the host's memory as well" in line
    save(tmp_path, "1.5b", rows)
    save(tmp_path, "7b", [row])
    save(tmp_path, "1.5b", rows[:1])
    assert load(tmp_path) == [row, row]


def test_the_first_case_that_fits_is_the_one_that_runs(monkeypatch):
    def run(row, wait):
        return dataclasses.replace(row, status="measured")

    monkeypatch.setattr(memory_row, "_run", run)
    cases = [Case(str(b), "tiny", batch_size=b, seq_len=16) for b in (64, 4, 2)]
    most = measure(cases[1:2])[0].predicted_bytes
    rows = measure(cases, fits_device=most, fits_host=0)
    assert [row.status for row in rows] == ["skipped", "measured"]
    assert "of the device, may take" in rows[0].note
    offloading = [dataclasses.replace(cases[0], offload="moments")]
    assert "of the host, may take" in measure(offloading, fits_host=0)[0].note


def test_each_flag_has_a_row_against_none():
    base, *flags = memory.table_cases("qwen2.5-1.5b", 4, 2048, 10)
    assert (base.recompute, base.offload, base.baseline) == ("none", "none", "")
    assert {case.baseline for case in flags} == {"none"}
    alone = {case.recompute for case in flags if case.offload == "none"}
    assert alone == {"swiglu", "norm", "ffn", "qkv", "att", "block"}
    offloads = {case.offload for case in flags if case.recompute == "none"}
    assert offloads == {"moments", "weights", "gradients", "residuals"}


def test_a_process_that_dies_fails_its_case_and_the_next_is_tried(monkeypatch):
    class Dies(memory.subprocess.Popen):
        def __init__(self, command, **options):
            super().__init__([sys.executable, "-c", "raise SystemExit(7)"], **options)

    monkeypatch.setattr(memory.subprocess, "Popen", Dies)
    group = [Case("large", "tiny"), Case("small", "tiny")]
    rows = list(memory._measure_apart([group], {}, {}, 60.0, together=False))
    assert [(row.case.name, row.status) for row in rows] == [
        ("large", "failed"),
        ("small", "failed"),
    ]
    assert "exit status 7" in rows[0].note
    alone = [group[:1], group[1:]]
    rows = list(memory._measure_apart(alone, {}, {}, 60.0, together=True))
    assert [row.status for row in rows] == ["failed", "failed"]
    rows = list(memory._measure_apart(alone, {}, {}, 0.0, together=True))
    assert [row.status for row in rows] == ["skipped", "skipped"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": ("swigly",)}, "--rows may be 'none', 'block'"),
        ({"steps": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"only": "7b", "memory_gib": float("nan")}, "set aside"),
        ({"only": "7b", "memory_gib": 1.0}, "set aside"),
    ],
)
def test_wrong_options_are_told_what_to_do(capsys, options, message):
    assert main(tiny=True, **options) == 2
    assert message in capsys.readouterr().err

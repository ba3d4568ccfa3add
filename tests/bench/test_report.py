import dataclasses
import io
import os

import pytest
from rich.console import Console

from lowbit_jax.bench import report
from lowbit_jax.bench.report import load_rows, markdown, plot_roofline, save_rows, table
from pallas_kernels.measurement import Measurement

ROW = Measurement(
    "product", "product 8x8x8", "XLA bf16", "NVIDIA H100 80GB HBM3", "0.11.2", "measured",
    note="y: hopper", median_s=2e-3, min_s=1e-3, max_s=3e-3, repeats=20, host_share=0.1,
    flops={"bf16": 1e12}, bytes=10**9, floor_s=1e-3, ratios={"XLA fp8": 0.5},
)  # fmt: skip
STEP = dataclasses.replace(
    ROW, group="step_7b", work="step", tokens=1000, memory_bytes=3 * 2**30, name="quartet"
)
FAILED = Measurement("product", "product 8x8x8", "ours", "cpu", "0.11.2", "failed", "broken")


def test_rows_survive_the_file(tmp_path):
    save_rows(tmp_path / "new", [ROW, STEP, FAILED])
    assert load_rows(tmp_path / "new") == [ROW, STEP, FAILED]


def test_the_later_folder_wins(tmp_path):
    faster = dataclasses.replace(ROW, median_s=1e-3)
    save_rows(tmp_path / "a", [ROW, STEP])
    save_rows(tmp_path / "b", [faster])
    assert load_rows(tmp_path / "a", tmp_path / "b") == [faster, STEP]


def test_a_write_that_is_interrupted_leaves_the_old_rows(tmp_path, monkeypatch):
    save_rows(tmp_path, [ROW])

    def dies(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", dies)
    with pytest.raises(KeyboardInterrupt):
        save_rows(tmp_path, [STEP])
    assert load_rows(tmp_path) == [ROW]


def test_the_table_says_what_a_row_measured():
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table([ROW, STEP, FAILED]))
    text = console.export_text()
    for said in (
        *("2 ms", "1 ms to 3 ms", "500", "50%", "0.50 x XLA fp8", "y: hopper"),
        *("500.0 ktok/s; MFU 50.5%; 3.0 GiB", "failed", "broken", "20 measurements"),
    ):
        assert said in text, said


def test_a_row_bound_by_launches_says_so():
    row = dataclasses.replace(ROW, median_s=1e-5, host_share=0.97)
    assert "launches take 97% of the time" in markdown([row])


def test_the_time_of_the_kernels_alone_is_named_as_such():
    row = dataclasses.replace(ROW, device_s=5e-4, device_ratios={"XLA bf16": 3.0})
    assert "y: hopper; kernels 500 us, 3.00 x XLA bf16" in markdown([row])


def test_markdown_has_as_many_cells_in_every_line():
    lines = markdown([ROW, STEP, FAILED]).split("\n\n")[0].splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + 2 + 3  # header, works, rows


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "cpu"])
def test_a_plot_is_made_with_roofs_or_without(tmp_path, device):
    path = tmp_path / "bench.png"
    assert plot_roofline(path, [dataclasses.replace(ROW, device=device), FAILED])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_rows_without_operations_make_no_plot(tmp_path):
    copy = dataclasses.replace(ROW, flops={})
    assert not plot_roofline(tmp_path / "bench.png", [copy, FAILED])
    assert not list(tmp_path.iterdir())


def test_devices_that_differ_are_named():
    other = dataclasses.replace(ROW, device="NVIDIA H200", name="ours")
    nowhere = dataclasses.replace(FAILED, device="")  # a process that died before it knew
    assert report.caption([ROW, other, nowhere]).startswith(
        "NVIDIA H100 80GB HBM3, jax 0.11.2; NVIDIA H200, jax 0.11.2. Medians"
    )

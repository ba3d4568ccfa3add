import io
import json

import pytest
from rich.console import Console

from lowbit_jax.analysis.speed_of_light import SpeedOfLight, speed_metrics
from lowbit_jax.train import tracking
from lowbit_jax.train.tracking import (
    MetricsLog,
    Progress,
    Throughput,
    plot_loss,
    read_metrics,
    truncate_metrics,
)


def write_rows(run_dir, steps, start=0):
    with MetricsLog(run_dir, start) as log:
        for step in steps:
            log.write(step, "train", loss=1.0 / step, missing=None)


def test_rows_come_back_as_written(tmp_path):
    write_rows(tmp_path, [1, 2, 3])
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows == [{"step": s, "split": "train", "loss": 1.0 / s} for s in (1, 2, 3)]
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_rows_are_on_disk_before_the_log_is_closed(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, "train", loss=2.0)
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_resuming_leaves_each_step_once(tmp_path):
    write_rows(tmp_path, range(1, 8))
    write_rows(tmp_path, range(5, 11), start=4)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [*range(1, 11)]


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_last_row_that_a_kill_cut_off_is_dropped(tmp_path, cut):
    write_rows(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    truncate_metrics(path, 10)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]


def test_throughput_is_the_median_and_forgets_pauses(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 102.0, 103.0, 105.0, 115.0])
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: next(clock))
    throughput = Throughput(tokens_per_step=10, window=1)
    assert throughput.overall() is None
    for _ in range(3):
        throughput.tick()  # steps of 1 s and 1 s
    throughput.pause()  # 100 s that belong to no step
    for _ in range(4):
        throughput.tick()  # steps of 1 s, 2 s and 10 s
    assert throughput.overall() == 10.0
    assert throughput.recent() == 1.0


def test_plot_is_a_png(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, "train", loss=2.0)
        log.write(2, "train", loss=1.5)
        log.write(2, "validation", loss=1.7)
    assert plot_loss(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_without_a_terminal_progress_is_a_line_now_and_then():
    out = io.StringIO()
    with Progress(Console(file=out, width=200), steps=5, every_s=1e9) as progress:
        for step in range(1, 6):
            progress.update(step, 2.0, 1500.0)
        progress.message("done [not markup]")
    first, last, message = out.getvalue().splitlines()
    assert first == "step 1/5  loss 2.0000  1.5 ktok/s"  # one step tells nothing of the time left
    assert last == "step 5/5  loss 2.0000  1.5 ktok/s  0:00:00 left"
    assert message == "done [not markup]"


def test_speed_is_shown_with_what_is_known_of_it():
    light = SpeedOfLight(
        {"blocks": 1.0, "head": 0.0, "attention": 0.0},
        {"blocks": "fp8", "head": "bf16", "attention": "bf16"},
        {"bf16": 1000.0, "fp8": 4000.0},
    )
    assert speed_metrics(None, light) == {}
    assert speed_metrics(1500.0, None) == {"tokens_per_s": 1500.0}  # a device without a data sheet
    # Exact: quotients of powers of two and three.
    known = speed_metrics(1500.0, light, devices=2)
    assert known == {"tokens_per_s": 1500.0, "share_of_light": 0.1875, "mfu": 0.75}
    out = io.StringIO()
    with Progress(Console(file=out, width=200), steps=1) as progress:
        progress.update(1, 2.0, 1500.0, known)
    assert out.getvalue() == "step 1/1  loss 2.0000  1.5 ktok/s, 19% of light, MFU 75%\n"


def test_on_a_terminal_progress_is_a_bar():
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True)
    with Progress(console, steps=5, start_step=2) as progress:
        progress.update(3, 2.0, 1500.0)
        progress.message("hello")
    assert "3/5" in out.getvalue()
    assert "loss 2.0000  1.5 ktok/s" in out.getvalue()
    assert "hello" in out.getvalue()

"""What a run writes about itself: metrics.jsonl, TensorBoard events, a plot, a progress bar."""

import contextlib
import json
import math
import os
import pathlib
import platform
import statistics
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from lowbit_jax.analysis.speed_of_light import SPEEDS, show_speed
from lowbit_jax.files import write_atomically


class Throughput:
    """Step times as seen from the host: medians, so that a pause or a compilation counts little."""

    def __init__(self, tokens_per_step: int, window: int = 50):
        """`tokens_per_step` in tokens; `recent` looks back over `window` steps."""
        self._tokens, self._window = tokens_per_step, window
        self._times_s: list[float] = []
        self._last: float | None = None

    def pause(self) -> None:
        """The time until the next `tick` belongs to no step (validation, saving, compiling)."""
        self._last = None

    def tick(self) -> float | None:
        """A step has finished; returns its time in seconds if the one before was seen."""
        now = time.perf_counter()
        step_time_s = None if self._last is None else now - self._last
        if step_time_s is not None:
            self._times_s.append(step_time_s)
        self._last = now
        return step_time_s

    def recent(self) -> float | None:
        """Tokens per second, median of the last steps."""
        return self._rate(self._times_s[-self._window :])

    def overall(self) -> float | None:
        """Tokens per second, median of all steps."""
        return self._rate(self._times_s)

    def _rate(self, times_s: list[float]) -> float | None:
        return self._tokens / statistics.median(times_s) if times_s else None


class MetricsLog:
    """Appends rows to `metrics.jsonl` and to TensorBoard; close it, or use it in a `with`."""

    def __init__(
        self,
        run_dir: pathlib.Path,
        start_step: int = 0,
        *,
        warn: Callable[[str], None] = lambda text: None,
    ):
        """Rows of steps after `start_step`, left by a run that was killed, are dropped.

        `warn` receives a message if rows up to `start_step` are missing.
        """
        path = run_dir / "metrics.jsonl"
        truncate_metrics(path, start_step)
        steps = {row["step"] for row in read_metrics(path) if row["split"] == "train"}
        if missing := start_step - len(steps & {*range(1, start_step + 1)}):
            warn(
                f"{path} lacks {missing} of the rows up to step {start_step}: it was cut or damaged"
                " while the run was off. They are not taken again; the weights are not affected."
            )
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in `close`
        self._events = _Events(run_dir / "tensorboard", start_step)

    def write(self, step: int, split: str, **values: float | int | None) -> None:
        """One row, `{"step": ..., "split": "train" | "validation", **values}`; None is left out.

        Raises:
          OSError: If the disk does not take it.
        """
        row = {name: value for name, value in values.items() if value is not None}
        try:
            self._file.write(json.dumps({"step": step, "split": split, **row}) + "\n")
            self._file.flush()
            self._events.write(step, {f"{split}/{name}": value for name, value in row.items()})
        except OSError as error:  # a full disk does not say which file it did not take
            raise OSError(
                error.errno,
                f"cannot write the row of step {step}: {error.strerror}. What was saved stays: make"
                " room, and the same command goes on from the newest checkpoint",
                self._file.name,
            ) from error

    def sync(self) -> None:
        """Has the disk confirm all rows, as a checkpoint does that follows them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes both, whatever of the last row the disk did not take."""
        for file in (self._file, self._events):
            with contextlib.suppress(OSError):  # `write` has told it
                file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Events:
    """A TensorBoard file of scalars.

    Written at once: tensorboardX's own writer hands events to a thread, and once that has ended on
    a full disk, the next event waits for it forever.
    """

    def __init__(self, folder: pathlib.Path, start_step: int):
        # Here: it imports torch where that is installed, which takes seconds.
        from tensorboardX import record_writer
        from tensorboardX.proto import event_pb2, summary_pb2

        events: Any = event_pb2  # generated when imported: no checker sees their names
        summaries: Any = summary_pb2
        self._event, self._summary = events.Event, summaries.Summary
        self._checksum = record_writer.masked_crc32c
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of these seconds. A clock that was set back must not
        # give a new file the place of an old one, nor a second start in a second its very name.
        names = (path.name.split(".") for path in folder.glob("events.out.tfevents.*"))
        seconds = max([int(time.time()), *(int(name[3]) + 1 for name in names)])
        path = folder / f"events.out.tfevents.{seconds}.{platform.node()}"
        self._file = open(path, "xb")  # noqa: SIM115 - closed in `close`
        self._put(file_version="brain.Event:2")
        if start_step:  # hides what a killed run has written after it
            start = events.SessionLog(status=events.SessionLog.START)
            self._put(step=start_step + 1, session_log=start)

    def write(self, step: int, values: dict[str, float | int]) -> None:
        """The scalars of a step, by their names."""
        scalar = self._summary.Value
        scalars = [scalar(tag=name, simple_value=value) for name, value in values.items()]
        self._put(step=step, summary=self._summary(value=scalars))

    def _put(self, **fields: Any) -> None:
        """A record: length and event, each followed by its checksum."""
        event = self._event(wall_time=time.time(), **fields).SerializeToString()
        for part in (struct.pack("<Q", len(event)), event):
            self._file.write(part + struct.pack("<I", self._checksum(part)))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: pathlib.Path, *, with_speeds: bool = True) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line that a kill cut off is left out. [] if it is missing.

    Without speeds a row holds what was computed, which a run that is repeated computes again.
    """
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # power failed in the middle of a write
        if isinstance(row, dict) and {"step", "split"} <= row.keys():
            rows.append({k: v for k, v in row.items() if with_speeds or k not in SPEEDS})
    return rows


def truncate_metrics(path: pathlib.Path, step: int) -> None:
    """Drops the rows after `step`, atomically: a resumed run writes these steps again."""
    if path.exists():
        copy_metrics(path, path, step)


def copy_metrics(source: pathlib.Path, target: pathlib.Path, step: int) -> None:
    """Writes the rows of `source` up to `step` to `target`, atomically."""
    kept = [json.dumps(row) + "\n" for row in read_metrics(source) if row["step"] <= step]
    write_atomically(target, "".join(kept))


def plot_loss(run_dir: pathlib.Path) -> pathlib.Path:
    """Draws training and validation loss over the steps into `loss.png`; returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, needed once
    from matplotlib.figure import Figure

    rows = read_metrics(run_dir / "metrics.jsonl")
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)  # no global state, no display
    axes = figure.subplots()
    styles: dict[str, dict[str, Any]] = {
        "train": {"lw": 0.8, "alpha": 0.7},
        "validation": {"marker": "o"},
    }
    for split, style in styles.items():
        points = [(row["step"], row["loss"]) for row in rows if row["split"] == split]
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, label=split, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    path = run_dir / "loss.png"
    figure.savefig(path, dpi=120)
    return path


class Progress:
    """A bar on a terminal; elsewhere a plain line now and then."""

    def __init__(self, console: Console, steps: int, start_step: int = 0, every_s: float = 10.0):
        """`every_s`: seconds between plain lines."""
        self._console, self._steps, self._every_s = console, steps, every_s
        # Step and time of the first update: what came before was compilation.
        self._first: tuple[int, float] | None = None
        self._last_line = -math.inf
        self._bar = None
        if console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=console,
                transient=False,
            )
            self._task = self._bar.add_task(
                "train", total=steps, completed=start_step, shown="compiling"
            )

    def update(
        self,
        step: int,
        loss: float,
        tokens_per_s: float | None,
        speed: Mapping[str, float] | None = None,
    ) -> None:
        """Shows the state after `step` steps; `speed` as from `speed_metrics`."""
        shown = f"loss {loss:.4f}"
        if tokens_per_s is not None:
            known = speed or {}
            shares = known.get("share_of_light"), known.get("mfu")
            shown += f"  {show_speed(tokens_per_s, *shares)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, shown=shown)
            return
        now = time.perf_counter()
        if step < self._steps and now - self._last_line < self._every_s:
            return
        self._last_line = now
        left = ""
        if self._first is None:
            self._first = step, now
        else:
            first_step, first_time = self._first
            left_s = (now - first_time) / (step - first_step) * (self._steps - step)
            left = f"  {_clock(left_s)} left"
        self._console.print(f"step {step}/{self._steps}  {shown}{left}", highlight=False)

    def message(self, text: str) -> None:
        """Prints a line of text, above the bar if there is one."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

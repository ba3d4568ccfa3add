"""Progress of a command: a bar on a terminal, elsewhere a plain line now and then."""

import math
import time
from typing import Any

import rich.progress
from rich.console import Console


class Progress(rich.progress.Progress):
    """`rich.progress.Progress` that also says how far it is in log files and pipes.

    Where the console is no terminal, `update` and `advance` print a line every `every_s` seconds at
    most, and one as a task ends. Bars are written to standard error unless a console is given.
    """

    def __init__(
        self, *columns: Any, console: Console | None = None, every_s: float = 10.0, **options: Any
    ):
        console = Console(stderr=True) if console is None else console
        if not console.is_terminal:
            options["transient"] = True  # the bar would be written once, at the end
        super().__init__(*columns, console=console, **options)
        self._every_s, self._last_s = every_s, -math.inf

    def stop(self) -> None:
        """See `rich.progress.Progress.stop`, which ends with an empty line where nothing was."""
        if self.console.is_terminal:
            super().stop()
        else:
            self.live.stop()

    def update(self, task_id: rich.progress.TaskID, **fields: Any) -> None:
        """See `rich.progress.Progress.update`."""
        was_finished = self._tasks[task_id].finished
        super().update(task_id, **fields)
        self._say(self._tasks[task_id], was_finished)

    def advance(self, task_id: rich.progress.TaskID, advance: float = 1) -> None:
        """See `rich.progress.Progress.advance`."""
        was_finished = self._tasks[task_id].finished
        super().advance(task_id, advance)
        self._say(self._tasks[task_id], was_finished)

    def _say(self, task: rich.progress.Task, was_finished: bool) -> None:
        now = time.monotonic()
        ends = task.finished and not was_finished
        if self.console.is_terminal or (not ends and now - self._last_s < self._every_s):
            return
        self._last_s = now
        total = "?" if task.total is None else f"{task.total:g}"
        left = "" if task.time_remaining is None else f", {task.time_remaining:.0f} s left"
        self.console.print(
            f"{task.description}: {task.completed:g}/{total}{left}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

"""Commands as processes, some at a time: after each other, within a time limit, on chosen GPUs."""

import collections
import dataclasses
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lowbit_jax.train.interrupts import StopRequest, listen_for_signals

_POLL_S = 0.05
# A run that is asked to stop finishes its step and writes a checkpoint.
_GRACE_S = 120.0
# Exit codes after a SIGTERM: with and without a handler.
_STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)


@dataclasses.dataclass(frozen=True)
class Job:
    """A process to run.

    Attributes:
      name: For messages; unique in a queue.
      command: Its words.
      log: File for what it prints, replaced.
      waits_for: Name of a job of the same queue that must succeed first.
      is_resumable: Whether what it did by a SIGTERM is kept for the next time.
    """

    name: str
    command: tuple[str, ...]
    log: pathlib.Path
    waits_for: str | None = None
    is_resumable: bool = False


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place for one process at a time: `environment` is added to ours."""

    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class QueueReport:
    """What became of the jobs.

    Attributes:
      succeeded: Names of those that exited with 0.
      errors: By name, what those that failed said last.
      left: Names of those stopped by the time limit or a signal, or not started.
      signal_number: Of the signal that ended the queue, or 0.
    """

    succeeded: tuple[str, ...]
    errors: dict[str, str]
    left: tuple[str, ...]
    signal_number: int


def run_jobs(
    jobs: Sequence[Job],
    slots: Sequence[Slot],
    *,
    console: Console,
    time_limit_s: float | None = None,
    on_success: Callable[[Job], str] = lambda job: "",
    on_error: Callable[[Job, str, int | None], None] = lambda job, error, code: None,
) -> QueueReport:
    """Runs each job in a session of its own; one that fails stops only those that wait for it.

    At the time limit, and on Ctrl-C or SIGTERM, the running processes get a SIGTERM and time to
    save; a second signal kills them. If this process is killed itself, Linux sends them that
    SIGTERM. A job that could not resume is not started when less time is left than the shortest job
    so far has taken.

    Args:
      jobs: In the order in which they start, as far as `waits_for` permits.
      slots: As many processes run at once.
      console: For a line at each end, and on a terminal a bar.
      time_limit_s: Wall-clock seconds, without the saving; None: no limit.
      on_success: Called after a job exited with 0, for a text about it. A ValueError means that
        the job failed all the same.
      on_error: Called with a job that failed, what it said and its exit code, which is None if it
        was not started and 0 if `on_success` rejected it.

    Raises:
      OSError: If a log cannot be written, or from the callbacks. What runs is asked to save first.
    """
    queue = _Queue(jobs, slots, console, time_limit_s, on_success, on_error)
    with listen_for_signals(queue.say, queue.kill) as stop:
        return queue.run(stop)


@dataclasses.dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    started: float


class _Queue:
    def __init__(self, jobs, slots, console, time_limit_s, on_success, on_error):
        self.waiting = collections.deque(jobs)
        self.slots, self.busy = tuple(slots), {}
        self.total = len(jobs)
        self.console = console
        self.on_success, self.on_error = on_success, on_error
        self.succeeded: list[str] = []
        self.errors: dict[str, str] = {}
        self.left: list[str] = []
        self.times_s: list[float] = []
        self.deadline = float("inf")
        if time_limit_s is not None:
            self.deadline = time.monotonic() + time_limit_s

    def run(self, stop: StopRequest) -> QueueReport:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        bar = Progress(
            *columns,
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        with bar:
            task = bar.add_task("", total=self.total)
            try:
                while not stop and time.monotonic() < self.deadline:
                    self.collect()
                    self.fill()
                    if not self.busy:
                        break  # nothing runs and nothing could be started
                    names = ", ".join(running.job.name for running in self.busy.values())
                    bar.update(task, completed=self.ended, description=names)
                    time.sleep(_POLL_S)
                self.wind_down()
            except OSError:  # a full disk, for example: those that run can still save on theirs
                self.wind_down()
                raise
            finally:
                self.kill()  # nobody is left behind, whatever went wrong
        left = (*self.left, *(job.name for job in self.waiting))
        return QueueReport(tuple(self.succeeded), self.errors, left, stop.number)

    @property
    def ended(self) -> int:
        return len(self.succeeded) + len(self.errors)

    def fill(self) -> None:
        """Starts what can be started."""
        for number, slot in enumerate(self.slots):
            if number in self.busy:
                continue
            job = next((job for job in self.waiting if self.may_start(job)), None)
            if job is None:
                return
            self.waiting.remove(job)
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with open(job.log, "w", encoding="utf-8") as log:
                process = subprocess.Popen(
                    _ending_with_us(job.command),
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    env={**os.environ, **slot.environment},
                    start_new_session=True,  # Ctrl-C reaches us alone, and we pass it on once
                )  # fmt: skip
            self.busy[number] = _Running(job, process, time.monotonic())

    def may_start(self, job: Job) -> bool:
        left_s = self.deadline - time.monotonic()
        if not job.is_resumable and self.times_s and left_s < min(self.times_s):
            return False
        return job.waits_for is None or job.waits_for in self.succeeded

    def collect(self) -> None:
        """Takes note of what has ended."""
        for number, running in list(self.busy.items()):
            code = running.process.poll()
            if code is None:
                continue
            del self.busy[number]
            job, took_s = running.job, time.monotonic() - running.started
            if code != 0:
                self.fail(job, _last_words(job.log, code), code)
                continue
            try:
                said = self.on_success(job)
            except ValueError as error:  # it has not left what it should have
                self.fail(job, str(error), code)
                continue
            self.succeeded.append(job.name)
            self.times_s.append(took_s)
            self.say(self.line(job.name, took_s, said))

    def fail(self, job: Job, error: str, code: int | None = None) -> None:
        self.errors[job.name] = error
        self.on_error(job, error, code)
        self.say(f"[{self.ended}/{self.total}] {job.name} failed: {error} (see {job.log})")
        for other in [other for other in self.waiting if other.waits_for == job.name]:
            self.waiting.remove(other)
            self.fail(other, f"{job.name}, for which it waits, failed")

    def line(self, name: str, took_s: float, result: str) -> str:
        text = f"[{self.ended}/{self.total}] {name}: {result}{', ' if result else ''}{took_s:.0f} s"
        if jobs_left := self.total - self.ended:
            left_s = statistics.mean(self.times_s) * jobs_left / len(self.slots)
            text += f"; about {left_s / 60:.0f} min left"
        return text

    def wind_down(self) -> None:
        """Asks what still runs to save and leave."""
        for running in self.busy.values():
            running.process.terminate()
        give_up = time.monotonic() + _GRACE_S
        for number, running in list(self.busy.items()):
            try:
                code = running.process.wait(timeout=max(give_up - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                self.left.append(running.job.name)  # `kill` ends it
                continue
            if code in _STOPPED:
                self.left.append(running.job.name)
                del self.busy[number]
        self.collect()  # what ended by itself in this moment

    def kill(self) -> None:
        for running in list(self.busy.values()):
            running.process.kill()
            running.process.wait()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


# Asks the kernel for a SIGTERM at the end of the parent, whatever ends it, and becomes the command.
# Not in `preexec_fn`: between fork and exec no Python may run where there are threads.
_LEASH = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):  # else it has ended before
    os.execvp(sys.argv[2], sys.argv[2:])
"""


def _ending_with_us(command: Sequence[str]) -> Sequence[str]:
    """`command` as a process that saves and leaves when this one is killed; on Linux only.

    The signal comes at the end of the thread that starts the process, so let that be the main one.
    """
    if sys.platform != "linux":
        return command
    return (sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid()), *command)


def _last_words(log: pathlib.Path, code: int) -> str:
    """The last error message in a log, or else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").split("\n")]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = errors or [line for line in lines if line] or ["nothing printed"]
    return f"{said[-1][:400]}" if errors else f"exit code {code}: {said[-1][:400]}"

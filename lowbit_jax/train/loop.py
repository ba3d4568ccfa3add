"""The training loop: data in, checkpoints and records out, exact after any interruption."""

import collections
import contextlib
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from rich.console import Console

from lowbit_jax.analysis.speed_of_light import speed_metrics
from lowbit_jax.optim import dequantize_leaves
from lowbit_jax.parallel import is_first, on_each, on_first
from lowbit_jax.train.checkpoint import save_checkpoint
from lowbit_jax.train.config import Config, RunIdentity, RunOptions, UsageError, check_data
from lowbit_jax.train.evaluate import Evaluation
from lowbit_jax.train.feed import held_out_batches, train_batches
from lowbit_jax.train.interrupts import Interrupted, StopRequest, listen_for_signals
from lowbit_jax.train.offender import first_offender
from lowbit_jax.train.phase import Phase
from lowbit_jax.train.placement import open_mesh
from lowbit_jax.train.planning import RunPlan, compiled_memory, plan_run
from lowbit_jax.train.processes import (
    SharedStopRequest,
    check_alike,
    check_mesh,
    find_finished,
    open_together,
)
from lowbit_jax.train.run_directory import RunDirectory, versions
from lowbit_jax.train.start import initial_state, place_run
from lowbit_jax.train.state import TrainState, nonfinite_leaves
from lowbit_jax.train.step import Metrics
from lowbit_jax.train.summary import Summary, summarize
from lowbit_jax.train.tracking import MetricsLog, Progress, Throughput, read_metrics

# Steps whose metrics may still be on the device: enough to keep its queue filled.
_LAG = 2

# (apply_fn, params, prompt (1, t), *, steps, temperature, key) -> tokens
Generate = Callable[..., Any]


class Diverged(RuntimeError):
    """A loss or gradient was not finite; the message names the step and the tensor.

    Attributes:
      exit_code: Of a script that ends so, by which a sweep tells it from other failures.
    """

    exit_code = 3


def train(
    config: Config,
    identity: RunIdentity,
    options: RunOptions,
    *,
    generate: Generate | None = None,
    console: Console | None = None,
) -> Summary:
    """Trains `config` in its run folder, or goes on with it, and measures the result.

    A run that was killed at any moment and is started again takes the same steps to the same
    bits: the state comes from the newest undamaged checkpoint, batches and random bits follow
    from seed and step, rows of the metrics file after that step are dropped.

    In several processes (`parallel.join_processes`) all call it alike. Each reads its part of the
    data, the first one writes and prints, all return and raise the same.

    Args:
      config: What to train.
      identity: By which a later run recognises the folder as its own.
      options: Where, and what to leave out.
      generate: As `lowbit_jax.decoding.generate`, for the sample; None: no sample.
      console: Where to print.

    Returns:
      What was measured; also in the run folder as `summary.json`.

    Raises:
      UsageError: If data, folder or checkpoint do not fit.
      Diverged: If a loss or gradient is not finite. The checkpoints are from before.
      Interrupted: On Ctrl-C, on SIGTERM or after `options.stop_after`, the state saved.
    """
    console = (console or Console()) if is_first() else Console(quiet=True)
    check_alike(identity, config, options)
    on_each(lambda: check_data(config, needs_validation=options.validate), UsageError)
    if options.stop_after is not None and options.stop_after < 1:
        raise UsageError(f"train: --stop-after must be at least 1, got {options.stop_after}.")
    planned = None
    if options.fresh or not _is_finished(options.run_dir):
        planned = plan_run(config, options, open_mesh(config, options))
        config, options = planned.config, planned.options
    mesh = open_mesh(config, options)
    check_mesh(mesh)
    with open_together(
        identity, config, options, warn=lambda text: _say(console, f"warning: {text}")
    ) as run:
        if (finished := find_finished(run)) is not None:
            _say(console, f"{run.path} holds this run, finished; pass --fresh to train it anew.")
            return finished
        assert planned is not None  # a folder with a summary holds a finished run
        return _Run(planned, run, console, mesh).train(generate)


class _Run:
    """What the parts of `train` share."""

    def __init__(self, planned: RunPlan, run: RunDirectory, console: Console, mesh: Mesh | None):
        self.planned, self.run, self.console = planned, run, console
        self.config, self.options = config, options = planned.config, planned.options
        self.placement = (
            None
            if mesh is None
            else place_run(config, mesh, options.zero, options.offload, options.gradient_exchange)
        )
        self.phases = [Phase(config, *phase, self.placement) for phase in config.phases]
        self.values = jax.jit(dequantize_leaves)  # hands on what is no QTensor, without a copy
        # Without text behind the tokens (synthetic data) there are no bits per byte.
        bytes_per_token = config.data.validation.bytes_per_token
        self.tokens_per_byte = 1 / bytes_per_token if bytes_per_token else None
        self.devices = 1 if mesh is None else mesh.size
        self.throughput = Throughput(config.batch_size * config.seq_len)
        self.pending: collections.deque[tuple[int, Metrics]] = collections.deque()

    def train(self, generate: Generate | None) -> Summary:
        config = self.config
        self.say(f"{self.planned}\n")
        state = initial_state(config, self.run, self.options, self.phases, self.placement, self.say)
        start = int(state.step)
        progress = Progress(self.console, config.steps, start)
        with (
            listen_for_signals(progress.message, self.console.show_cursor) as stop,
            self.open_log(start) as self.log,
            progress as self.progress,
        ):
            self.validated = set(on_first(self.validated_steps))
            if jax.process_count() > 1:
                assert self.placement is not None
                stop = SharedStopRequest(stop, self.placement.layout.mesh)
            state, final = self.steps(state, stop)
        return summarize(
            config,
            self.run.path,
            self.values(state.params),
            final=final,
            tokens_per_s=self.throughput.overall(),
            generate=generate if self.options.sample else None,
            with_baselines=self.options.sample,
            has_checkpoint=self.run.checkpoints.exists(),
            light=self.phases[-1].light,
            devices=self.devices,
        )

    def phase(self, done: int) -> Phase:
        """The phase of the step that follows `done` steps."""
        return next(phase for phase in reversed(self.phases) if phase.start <= done)

    def steps(self, state: TrainState, stop: StopRequest) -> tuple[TrainState, Evaluation | None]:
        """Takes the remaining steps; returns the state and the last validation."""
        config, evaluation, stop_after = self.config, None, self.options.stop_after
        done = int(state.step)
        if done < config.steps:
            batches = train_batches(config, done, self.place)
            batch = next(batches)
        first = saved = done
        while True:
            stop.poll()
            is_last = done == config.steps
            stops_here = not is_last and stop_after is not None and done >= stop_after
            due_eval = self.options.validate and (is_last or done % config.eval_interval == 0)
            due_save = is_last or stops_here or done % config.checkpoint_interval == 0
            phase = self.phase(done)
            switches = bool(phase.start) and done == phase.start
            if stop or is_last or due_eval or due_save or switches:
                self.drain(state, keep=0)
                self.throughput.pause()
            if due_eval and done and not stop and (is_last or done not in self.validated):
                evaluation = self.validate(state, done, stop, whole=is_last)
            if (due_save or stop) and self.options.save and done > saved:
                self.save(state)
                saved = done
            if stop or stops_here:
                raise Interrupted(self.farewell(done, stop), stop.number)
            if is_last:
                return state, evaluation
            if switches:
                self.progress.message(f"step {done}: from here on {phase.recipes}")
            state, metrics = phase.train_step(state, batch)
            if done == first:
                used = compiled_memory(phase.train_step, state, batch, self.planned)
                self.progress.message(used)
            for value in (metrics.loss, metrics.grad_norm, metrics.learning_rate):
                value.copy_to_host_async()
            done += 1
            self.pending.append((done, metrics))
            if done < config.steps:
                batch = next(batches)  # while the device computes
            self.drain(state, keep=_LAG)

    @property
    def place(self) -> NamedSharding | None:
        """Of a batch."""
        return self.placement and self.placement.batch

    def drain(self, state: TrainState, keep: int) -> None:
        """Records steps until only `keep` are on the device; stops at one that is not finite."""
        while len(self.pending) > keep:
            step, metrics = self.pending.popleft()
            loss, grad_norm, rate = map(
                float, jax.device_get((metrics.loss, metrics.grad_norm, metrics.learning_rate))
            )
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                where = first_offender(metrics, state.params, self.phases[0].plan.stacked)
                raise Diverged(
                    f"train: step {step} is not finite in {where}. Nothing was saved from it on;"
                    f" the checkpoints in {self.run.checkpoints} are from before. The run would"
                    " fail there again: lower the learning rate, change the seed, or look at the"
                    " batch of this step."
                )
            self.throughput.tick()
            recent = self.throughput.recent()
            speed = speed_metrics(recent, self.phase(step - 1).light, self.devices)
            norms = {"loss": loss, "grad_norm": grad_norm, "learning_rate": rate}
            if self.log is not None:
                self.log.write(step, "train", **norms, **speed)
            self.progress.update(step, loss, recent, speed)

    def validate(
        self, state: TrainState, step: int, stop: StopRequest, *, whole: bool
    ) -> Evaluation | None:
        """Validation loss, recorded; None if a signal came in between."""
        config, phase = self.config, self.phase(max(step - 1, 0))
        count = config.final_eval_batches if whole else config.eval_batches
        evaluation = phase.evaluate(
            self.values(state.params),
            held_out_batches(config, count, self.place),
            tokens_per_byte=self.tokens_per_byte,
            needs_key=phase.plan.needs_key,
            should_stop=stop.poll,
        )
        self.throughput.pause()
        if evaluation is not None and not math.isfinite(evaluation.loss):
            raise Diverged(
                f"train: the validation loss after step {step} is not finite ({evaluation.loss});"
                f" bad parameters: {nonfinite_leaves(state.params)[:3]}; the checkpoints in"
                f" {self.run.checkpoints} are from before."
            )
        if evaluation is not None and step not in self.validated and self.log is not None:
            self.log.write(
                step,
                "validation",
                loss=evaluation.loss,
                bits_per_byte=evaluation.bits_per_byte,
                tokens=evaluation.tokens,
            )
            self.progress.message(f"step {step}: validation loss {evaluation.loss:.4f}")
        return evaluation

    def save(self, state: TrainState) -> None:
        """Writes a checkpoint, unless the last update has made the state not finite."""
        metadata = {"versions": versions()}
        on_first(self.before_save, UsageError, OSError)
        try:
            save_checkpoint(
                self.run.checkpoints, state, metadata, keep=self.config.keep_checkpoints
            )
        except ValueError as error:
            raise Diverged(f"train: {error}") from error
        self.throughput.pause()

    def open_log(self, start: int) -> contextlib.AbstractContextManager[MetricsLog | None]:
        if not is_first():
            return contextlib.nullcontext()
        return MetricsLog(self.run.path, start, warn=self.warn)

    def before_save(self) -> None:
        self.run.check_lock()
        if self.log is not None:
            self.log.sync()  # a checkpoint is no older than the rows that go with it

    def validated_steps(self) -> list[int]:
        rows = read_metrics(self.run.path / "metrics.jsonl")
        return [row["step"] for row in rows if row["split"] == "validation"]

    def farewell(self, step: int, stop: StopRequest) -> str:
        if not self.options.save:
            return f"stopped after step {step}; nothing was saved (--no-save)"
        if not stop:
            return (
                f"stopped after step {step} as --stop-after {self.options.stop_after} says, saved"
                f" in {self.run.path}; the same command without it goes on"
            )
        if step == 0:
            return "stopped before the first step; the same command starts again"
        return f"stopped after step {step}, saved in {self.run.path}; the same command resumes"

    def say(self, text: str) -> None:
        _say(self.console, text)

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")


def _is_finished(run_dir: str | None) -> bool:
    """Whether the folder holds a finished run, of which no plan is needed any more."""
    if run_dir is None:  # another folder is taken then
        return False
    return on_first(lambda: (pathlib.Path(run_dir) / "summary.json").exists())


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)

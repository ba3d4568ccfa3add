"""The training loop: data in, checkpoints and records out, exact after any interruption."""

import collections
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import PRNGKeyArray
from rich.console import Console

from lowbit_jax.data.pipeline import make_batches, validation_batches
from lowbit_jax.train.checkpoint import restore_latest, save_checkpoint
from lowbit_jax.train.config import Config, RunIdentity, RunOptions, UsageError, check_data
from lowbit_jax.train.evaluate import Evaluation, make_evaluate
from lowbit_jax.train.interrupts import Interrupted, StopRequest, listen_for_signals
from lowbit_jax.train.run_directory import RunDirectory, open_run_directory, versions
from lowbit_jax.train.state import TrainState, create_state, nonfinite_leaves
from lowbit_jax.train.step import (
    Metrics,
    StepPlan,
    first_offender,
    loss_function,
    make_train_step,
    needs_key,
)
from lowbit_jax.train.summary import Summary, describe_model, load_summary, summarize
from lowbit_jax.train.tracking import MetricsLog, Progress, Throughput, read_metrics

# Steps whose metrics may still be on the device: enough to keep its queue filled.
_LAG = 2

# (apply_fn, params, prompt (1, t), *, steps, temperature, key) -> tokens
Generate = Callable[..., Any]


class Diverged(RuntimeError):
    """A loss or gradient was not finite; the message names the step and the tensor."""


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
      Interrupted: On Ctrl-C or SIGTERM, after the state was saved.
    """
    console = console or Console()
    check_data(config, needs_validation=options.validate)
    with open_run_directory(identity, options.run_dir, fresh=options.fresh) as run:
        if (finished := load_summary(run.path)) is not None:
            _say(console, f"{run.path} holds this run, finished; pass --fresh to train it anew.")
            return finished
        return _Run(config, run, options, console).train(generate)


class _Run:
    """What the parts of `train` share."""

    def __init__(self, config: Config, run: RunDirectory, options: RunOptions, console: Console):
        self.config, self.run, self.options, self.console = config, run, options, console
        self.plan = StepPlan(config.micro_batches, config.seed, needs_key=needs_key(config.model))
        self.loss_fn = loss_function(config.model)
        self.train_step = make_train_step(
            self.loss_fn, config.optimizer, self.plan, learning_rate=config.learning_rate
        )
        self.evaluate = make_evaluate(self.loss_fn)
        # Without text behind the tokens (synthetic data) there are no bits per byte.
        bytes_per_token = config.data.validation.bytes_per_token
        self.tokens_per_byte = 1 / bytes_per_token if bytes_per_token else None
        self.throughput = Throughput(config.batch_size * config.seq_len)
        self.pending: collections.deque[tuple[int, Metrics]] = collections.deque()

    def train(self, generate: Generate | None) -> Summary:
        config = self.config
        state = self.initial_state()
        start = int(state.step)
        progress = Progress(self.console, config.steps, start)
        with (
            listen_for_signals(progress.message, self.console.show_cursor) as stop,
            MetricsLog(self.run.path, start) as self.log,
            progress as self.progress,
        ):
            self.validated = {
                row["step"]
                for row in read_metrics(self.run.path / "metrics.jsonl")
                if row["split"] == "validation"
            }
            state, final = self.steps(state, stop)
        return summarize(
            config,
            self.run.path,
            state.params,
            final=final,
            tokens_per_s=self.throughput.overall(),
            generate=generate,
            has_checkpoint=self.run.checkpoints.exists(),
        )

    def initial_state(self) -> TrainState:
        """The newest undamaged checkpoint, or freshly drawn weights."""
        config = self.config

        # Placed explicitly, as a restored state is: otherwise the step would compile twice.
        placement = jax.sharding.SingleDeviceSharding(jax.devices()[0])

        @functools.partial(jax.jit, out_shardings=placement)
        def create(key: PRNGKeyArray) -> TrainState:
            tokens = np.zeros((1, config.seq_len), np.int32)
            params = nn.meta.unbox(config.model.init(key, tokens)["params"])
            return create_state(params, config.optimizer)

        # A key that no step has: those are folded with step numbers.
        key = jax.random.fold_in(jax.random.key(config.seed), 2**32 - 1)
        tokens = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), np.int32)
        try:
            _say(self.console, describe_model(config))
            target = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement),
                jax.eval_shape(create, key),
            )
            self.train_step.trace(target, (tokens, tokens))  # shapes that a recipe refuses
            restored = restore_latest(self.run.checkpoints, target, warn=self.warn)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if restored is None:
            return create(key)
        state, _ = restored
        _say(self.console, f"resuming {self.run.path} after step {int(state.step)}")
        return state

    def steps(self, state: TrainState, stop: StopRequest) -> tuple[TrainState, Evaluation | None]:
        """Takes the remaining steps; returns the state and the last validation."""
        config, evaluation = self.config, None
        done = int(state.step)
        if done < config.steps:
            batches = self.batches(done)
            batch = next(batches)
        saved = done
        while True:
            is_last = done == config.steps
            due_eval = self.options.validate and (is_last or done % config.eval_interval == 0)
            due_save = is_last or done % config.checkpoint_interval == 0
            if stop or is_last or due_eval or due_save:
                self.drain(state, keep=0)
                self.throughput.pause()
            if due_eval and done and not stop and (is_last or done not in self.validated):
                evaluation = self.validate(state, done, stop, whole=is_last)
            if (due_save or stop) and self.options.save and done > saved:
                self.save(state)
                saved = done
            if stop:
                raise Interrupted(self.farewell(done), stop.number)
            if is_last:
                return state, evaluation
            state, metrics = self.train_step(state, batch)
            for value in (metrics.loss, metrics.grad_norm, metrics.learning_rate):
                value.copy_to_host_async()
            done += 1
            self.pending.append((done, metrics))
            if done < config.steps:
                batch = next(batches)  # while the device computes
            self.drain(state, keep=_LAG)

    def batches(self, start: int) -> Iterator[Any]:
        """Training batches from step `start` on, on the device."""
        config = self.config
        for batch in make_batches(
            config.data.train,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            seed=config.seed,
            start_step=start,
        ):
            yield jax.device_put(tuple(batch))

    def drain(self, state: TrainState, keep: int) -> None:
        """Records steps until only `keep` are on the device; stops at one that is not finite."""
        while len(self.pending) > keep:
            step, metrics = self.pending.popleft()
            loss, grad_norm, rate = map(
                float, jax.device_get((metrics.loss, metrics.grad_norm, metrics.learning_rate))
            )
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                where = first_offender(metrics, state.params, self.plan)
                raise Diverged(
                    f"train: step {step} is not finite in {where}. Nothing was saved from it on;"
                    f" the checkpoints in {self.run.checkpoints} are from before. The run would"
                    " fail there again: lower the learning rate, change the seed, or look at the"
                    " batch of this step."
                )
            self.throughput.tick()
            self.log.write(step, "train", loss=loss, grad_norm=grad_norm, learning_rate=rate)
            self.progress.update(step, loss, self.throughput.recent())

    def validate(
        self, state: TrainState, step: int, stop: StopRequest, *, whole: bool
    ) -> Evaluation | None:
        """Validation loss, recorded; None if a signal came in between."""
        config = self.config
        evaluation = self.evaluate(
            state.params,
            validation_batches(
                config.data.validation,
                batch_size=config.batch_size,
                seq_len=config.seq_len,
                max_batches=config.final_eval_batches if whole else config.eval_batches,
            ),
            tokens_per_byte=self.tokens_per_byte,
            needs_key=self.plan.needs_key,
            should_stop=lambda: bool(stop),
        )
        self.throughput.pause()
        if evaluation is not None and not math.isfinite(evaluation.loss):
            raise Diverged(
                f"train: the validation loss after step {step} is {evaluation.loss}, parameters"
                f" that are not finite: {nonfinite_leaves(state.params)[:3]}; the checkpoints in"
                f" {self.run.checkpoints} are from before."
            )
        if evaluation is not None and step not in self.validated:
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
        try:
            save_checkpoint(
                self.run.checkpoints, state, metadata, keep=self.config.keep_checkpoints
            )
        except ValueError as error:
            raise Diverged(f"train: {error}") from error
        self.throughput.pause()

    def farewell(self, step: int) -> str:
        if not self.options.save:
            return f"stopped after step {step}; nothing was saved (--no-save)"
        if step == 0:
            return "stopped before the first step; the same command starts again"
        return f"stopped after step {step}, saved in {self.run.path}; the same command resumes"

    def warn(self, text: str) -> None:
        _say(self.console, f"warning: {text}")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)

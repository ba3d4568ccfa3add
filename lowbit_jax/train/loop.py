"""The training loop: data in, checkpoints and records out, exact after any interruption."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray
from rich.console import Console

from lowbit_jax.data.pipeline import make_batches, validation_batches
from lowbit_jax.models import Llama, logical_axes
from lowbit_jax.ops import explain
from lowbit_jax.optim import dequantize_leaves
from lowbit_jax.train.branch import branch_off
from lowbit_jax.train.checkpoint import restore_latest, save_checkpoint
from lowbit_jax.train.config import Config, RunIdentity, RunOptions, UsageError, check_data
from lowbit_jax.train.evaluate import Evaluation, make_evaluate
from lowbit_jax.train.interrupts import Interrupted, StopRequest, listen_for_signals
from lowbit_jax.train.placement import Placement, make_placement, open_mesh
from lowbit_jax.train.run_directory import RunDirectory, open_run_directory, versions
from lowbit_jax.train.state import TrainState, create_state, nonfinite_leaves
from lowbit_jax.train.step import (
    Metrics,
    first_offender,
    loss_function,
    make_train_step,
    step_plan,
)
from lowbit_jax.train.summary import Summary, describe_model, load_summary, paths_table, summarize
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
    console = console or Console()
    check_data(config, needs_validation=options.validate)
    if options.stop_after is not None and options.stop_after < 1:
        raise UsageError(f"train: --stop-after must be at least 1, got {options.stop_after}.")
    mesh = open_mesh(config, options)
    with open_run_directory(
        identity,
        options.run_dir,
        fresh=options.fresh,
        branch_from=options.branch_from,
        warn=lambda text: _say(console, f"warning: {text}"),
    ) as run:
        if (finished := load_summary(run.path)) is not None:
            _say(console, f"{run.path} holds this run, finished; pass --fresh to train it anew.")
            return finished
        run.check_data(config.data.fingerprint)
        if options.save:
            run.check_writable()
        return _Run(config, run, options, console, mesh).train(generate)


class _Phase:
    """A stretch of the run under one set of recipe rules; compiled when first called."""

    def __init__(
        self, config: Config, start: int, model: Llama, placement: Placement | None = None
    ):
        if placement is not None and placement.layout.stage.parameters:
            model = _regathering(model)
        self.start, self.model = start, model
        self.plan = step_plan(config, model)
        loss_fn = loss_function(model, None if placement is None else placement.layout)
        self.train_step = make_train_step(
            loss_fn,
            config.optimizer,
            self.plan,
            learning_rate=config.learning_rate,
            placement=placement,
        )
        self.evaluate = make_evaluate(loss_fn)


class _Run:
    """What the parts of `train` share."""

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        options: RunOptions,
        console: Console,
        mesh: Mesh | None,
    ):
        self.config, self.run, self.options, self.console = config, run, options, console
        self.placement = None if mesh is None else self.place(mesh)
        self.phases = [_Phase(config, *phase, self.placement) for phase in config.phases]
        self.values = jax.jit(dequantize_leaves)  # hands on what is no QTensor, without a copy
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
            MetricsLog(self.run.path, start, warn=self.warn) as self.log,
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
            self.values(state.params),
            final=final,
            tokens_per_s=self.throughput.overall(),
            generate=generate if self.options.sample else None,
            with_baselines=self.options.sample,
            has_checkpoint=self.run.checkpoints.exists(),
            devices=1 if self.placement is None else self.placement.layout.mesh.size,
        )

    def initial_state(self) -> TrainState:
        """The newest undamaged checkpoint, or freshly drawn weights."""
        config = self.config
        # A key that no step has: those are folded with step numbers.
        key = jax.random.fold_in(jax.random.key(config.seed), 2**32 - 1)
        # Placed explicitly, as a restored state is: otherwise the step would compile twice. And
        # each part is drawn where it lies: no device holds a state that is cut as a whole.
        places = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        if self.placement is not None:
            places = self.placement.state
        create = jax.jit(self.create, out_shardings=places)
        tokens = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), np.int32)
        try:
            if self.placement is not None:
                _say(self.console, f"{self.placement.table}\n")
            _say(self.console, describe_model(config))
            shapes = jax.eval_shape(create, key)
            if self.placement is None:
                places = jax.tree.map(lambda _: places, shapes)
            target = jax.tree.map(
                lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                shapes,
                places,
            )
            for phase in self.phases:
                traced = phase.train_step.trace(target, (tokens, tokens))  # or a recipe refuses
                for line in paths_table(explain(traced)):
                    _say(self.console, line)
            restored = restore_latest(self.run.checkpoints, target, warn=self.warn)
            if restored is None and self.options.branch_from is not None:
                return self.branch(self.options.branch_from, target)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if restored is None:
            return create(key)
        state, _ = restored
        _say(self.console, f"resuming {self.run.path} after step {int(state.step)}")
        return state

    def create(self, key: PRNGKeyArray) -> TrainState:
        """The state before the first step."""
        config = self.config
        tokens = np.zeros((1, config.seq_len), np.int32)
        params = nn.meta.unbox(config.model.init(key, tokens)["params"])
        return create_state(params, config.optimizer, config.store)

    def place(self, mesh: Mesh) -> Placement:
        """Where everything lies on several devices."""
        config, model = self.config, self.config.model.config
        try:
            shapes = jax.eval_shape(self.create, jax.random.key(0))
            return make_placement(
                shapes,
                logical_axes(config.model),
                mesh,
                self.options.zero,
                pieces={"heads": model.n_heads, "kv_heads": model.kv_heads},
                micro_batches=config.micro_batches,
            )
        except ValueError as error:  # shapes that a recipe refuses
            raise UsageError(str(error)) from error

    def branch(self, origin: str, target: TrainState) -> TrainState:
        state = branch_off(
            self.run,
            origin,
            target,
            steps=self.config.steps,
            save=self.options.save,
            warn=self.warn,
        )
        _say(self.console, f"branching off from {origin} after step {int(state.step)}")
        return state

    def phase(self, done: int) -> _Phase:
        """The phase of the step that follows `done` steps."""
        return next(phase for phase in reversed(self.phases) if phase.start <= done)

    def steps(self, state: TrainState, stop: StopRequest) -> tuple[TrainState, Evaluation | None]:
        """Takes the remaining steps; returns the state and the last validation."""
        config, evaluation, stop_after = self.config, None, self.options.stop_after
        done = int(state.step)
        if done < config.steps:
            batches = self.batches(done)
            batch = next(batches)
        saved = done
        while True:
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
                self.progress.message(f"step {done}: from here on {_recipes(phase.model)}")
            state, metrics = phase.train_step(state, batch)
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
            yield jax.device_put(tuple(batch), self.placement and self.placement.batch)

    def drain(self, state: TrainState, keep: int) -> None:
        """Records steps until only `keep` are on the device; stops at one that is not finite."""
        while len(self.pending) > keep:
            step, metrics = self.pending.popleft()
            loss, grad_norm, rate = map(
                float, jax.device_get((metrics.loss, metrics.grad_norm, metrics.learning_rate))
            )
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                where = first_offender(metrics, state.params, self.phases[0].plan)
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
        config, phase = self.config, self.phase(max(step - 1, 0))
        batches: Iterable[Any] = validation_batches(
            config.data.validation,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            max_batches=config.final_eval_batches if whole else config.eval_batches,
        )
        if self.placement is not None:
            place = self.placement.batch
            batches = (jax.device_put(tuple(batch), place) for batch in batches)
        evaluation = phase.evaluate(
            self.values(state.params),
            batches,
            tokens_per_byte=self.tokens_per_byte,
            needs_key=phase.plan.needs_key,
            should_stop=lambda: bool(stop),
        )
        self.throughput.pause()
        if evaluation is not None and not math.isfinite(evaluation.loss):
            raise Diverged(
                f"train: the validation loss after step {step} is not finite ({evaluation.loss});"
                f" bad parameters: {nonfinite_leaves(state.params)[:3]}; the checkpoints in"
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
        self.run.check_lock()
        self.log.sync()  # a checkpoint is no older than the rows that go with it
        try:
            save_checkpoint(
                self.run.checkpoints, state, metadata, keep=self.config.keep_checkpoints
            )
        except ValueError as error:
            raise Diverged(f"train: {error}") from error
        self.throughput.pause()

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

    def warn(self, text: str) -> None:
        _say(self.console, f"warning: {text}")


def _regathering(model: Llama) -> Llama:
    """The model that gathers cut weights once more for its backward pass.

    Without recomputation a loop over layers would keep the gathered weights of all of them.
    """
    if model.config.recompute != "none":
        return model
    return Llama(dataclasses.replace(model.config, recompute="unnamed"))


def _recipes(model: Llama) -> str:
    """`pattern=recipe` of each rule, as the configs take them."""
    return ", ".join(f"{pattern}={recipe}" for pattern, recipe in model.config.recipe_rules)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)

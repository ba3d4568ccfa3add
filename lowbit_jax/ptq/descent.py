"""Steps of an optimizer on a loss, watched every interval and kept so that a killed run goes on."""

import hashlib
import itertools
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from lowbit_jax.ptq.kept_blocks import KeptBlocks, digest_of

LossFn = Callable[[PyTree, Any], Float[Array, ""]]


class Diverged(ValueError):
    """The loss of a training became NaN or infinite."""


class Record(NamedTuple):
    """What is seen every interval and at the end.

    Attributes:
      step: Steps so far.
      loss: Mean over the steps since the last record.
      gap: Of Elsa `|x - z| / |x|` of the constrained leaves, else 0.
      flips: Of Elsa the fraction of their entries that z has zeroed or brought back since the last
        record, else 0.
    """

    step: int
    loss: float
    gap: float
    flips: float


class Keep(NamedTuple):
    """Where a run is kept, and how often.

    Parameters and optimizer state are written whole, over the ones before: 20 bytes a parameter
    under Elsa in float32, on the host twice while they are written.

    Attributes:
      folder: Of this run alone.
      settings: What the result depends on beside the parameters and batches, which are held
        against those of the folder anyway. Plain data for JSON.
      every_s: Seconds after which the next interval is kept; the end always is.
    """

    folder: pathlib.Path
    settings: Mapping[str, Any]
    every_s: float = 300.0


class Watch(NamedTuple):
    """What is looked at every interval.

    Attributes:
      start: Of the optimizer's state: what to compare with.
      look: `(params, state, seen) -> (gap, flips, seen)`.
    """

    start: Callable[[PyTree], Any]
    look: Callable[[PyTree, PyTree, Any], tuple[Any, Any, Any]]


NOTHING = Watch(lambda state: None, lambda params, state, seen: (0.0, 0.0, None))


def descend(
    who: str,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    params: PyTree,
    batches: Iterable[Any],
    *,
    steps: int,
    interval: int,
    watch: Watch = NOTHING,
    report: Callable[[Record], None] | None = None,
    keep: Keep | None = None,
) -> tuple[PyTree, PyTree, tuple[Record, ...]]:
    """Parameters and optimizer state after `steps` steps of `tx`, and the records.

    A run that goes on draws the batches of the steps that are done once more, and drops them. It
    ends with the bits of an unbroken one wherever the compiled step gives the same bits twice.

    Args:
      who: Complains, in messages.
      loss_fn: `(params, batch) -> loss`.
      tx: Its updates are added by `optax.apply_updates`.
      params: Float32 (or float64) leaves; copied.
      batches: One a step, of one shape.
      steps: Of `tx`.
      interval: Steps from record to record.
      watch: See there.
      report: Called with each record as it comes.
      keep: None: not kept.

    Raises:
      Diverged: If the loss becomes NaN or infinite.
      ValueError: If a parameter has no 32 bits, there are fewer batches than steps, or what is kept
        is of another run or damaged.
    """
    if narrow := {str(p.dtype) for p in jax.tree.leaves(params)} - {"float32", "float64"}:
        raise ValueError(
            f"{who}: parameters must be float32 while they train, got {', '.join(sorted(narrow))},"
            " where small updates would be lost; cast them (param_dtype='float32')."
        )

    def step_of(params, state, batch):
        loss, gradients = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    step = jax.jit(step_of, donate_argnums=(0, 1))
    kept = None if keep is None else _Kept(who, keep, params, steps)
    done, records, digest = 0, [], hashlib.sha256()
    # Copies, for what is donated must be ours.
    start = jax.tree.map(lambda p: jnp.array(p, copy=True), params)
    found = None if kept is None else kept.load(start, jax.eval_shape(tx.init, start))
    if found is None:
        # Not jitted: XLA would fold quantized moments of zeros for minutes.
        params, state = start, tx.init(start)
    else:
        params, state, notes = found
        done, records = notes["step"], [Record(*row) for row in notes["records"]]
        if report is not None and records:
            report(records[-1])
    del start, found
    stream, drawn = iter(batches), 0
    for batch in itertools.islice(stream, done):
        _add(digest, batch)
        drawn += 1
    if keep is not None and done and (drawn < done or digest.hexdigest() != notes["batches"]):
        raise ValueError(
            f"{who}: {keep.folder} was begun with other batches than the {drawn} that came first"
            " now; pass the same, or choose another folder."
        )
    seen = watch.start(state)
    losses = []
    while done < steps:
        try:
            batch = next(stream)
        except StopIteration:
            raise ValueError(
                f"{who}: needs a batch for each of {steps} steps, got {done}; pass more, or"
                " cycle through them."
            ) from None
        if kept is not None:
            _add(digest, batch)
        params, state, loss = step(params, state, batch)
        losses.append(loss)
        done += 1
        if done % interval and done < steps:
            continue
        mean = _mean(who, done, losses)
        gap, flips, seen = watch.look(params, state, seen)
        records.append(Record(done, mean, float(gap), float(flips)))
        losses = []
        if report is not None:
            report(records[-1])
        if kept is not None and (done == steps or kept.is_due()):
            notes = {"step": done, "records": records, "batches": digest.hexdigest()}
            kept.save((params, state), notes)
    return params, state, tuple(records)


class _Kept:
    """One file with parameters, state and what was seen."""

    def __init__(self, who: str, keep: Keep, params: PyTree, steps: int):
        settings = {**keep.settings, "steps": steps, "params_sha256": digest_of(params)}
        self._blocks = KeptBlocks(keep.folder, settings, who=who, name="state")
        self._every_s, self._last = keep.every_s, time.monotonic()

    def load(self, params: PyTree, state: PyTree) -> tuple[PyTree, PyTree, dict] | None:
        if 0 not in self._blocks:
            return None
        tree, notes = self._blocks.load(0, (params, state))
        params, state = jax.tree.map(lambda x: jnp.array(x, copy=True), tree)
        return params, state, notes

    def is_due(self) -> bool:
        return time.monotonic() - self._last >= self._every_s

    def save(self, tree: PyTree, notes: dict) -> None:
        self._blocks.save(0, jax.tree.map(np.asarray, tree), notes)
        self._last = time.monotonic()


def _add(digest, batch: Any) -> None:
    for leaf in jax.tree.leaves(batch):
        digest.update(np.ascontiguousarray(leaf).tobytes())


def _mean(who, step, losses):
    loss = float(jnp.mean(jnp.stack(losses)))
    if not np.isfinite(loss):
        raise Diverged(
            f"{who}: the loss must stay finite, got {loss} before step {step}; lower learning_rate"
            " or strength, or look for NaN in the parameters and batches."
        )
    return loss

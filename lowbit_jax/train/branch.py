"""A run that starts where another stands."""

import os
import pathlib
from collections.abc import Callable

from lowbit_jax.parallel import on_first
from lowbit_jax.train.checkpoint import restore_latest, save_checkpoint
from lowbit_jax.train.config import UsageError
from lowbit_jax.train.run_directory import RunDirectory, versions
from lowbit_jax.train.state import TrainState
from lowbit_jax.train.tracking import copy_metrics


def branch_off(
    run: RunDirectory,
    origin: str | os.PathLike,
    target: TrainState,
    *,
    steps: int,
    save: bool,
    warn: Callable[[str], None],
) -> TrainState:
    """The state of the newest undamaged checkpoint of another run, made the first of this one.

    The step goes into run.json as `branch_step`, the other run's metrics up to it into this run's
    file. The checkpoint comes last: once it is there, this run resumes by itself, whatever becomes
    of the other folder.

    Args:
      run: Folder of the branch, without a checkpoint so far.
      origin: Folder of the other run.
      target: As in `restore_latest`.
      steps: Length of the branch, the steps before it included.
      save: Whether to write the checkpoint.
      warn: As in `restore_latest`.

    Raises:
      UsageError: If `origin` holds no checkpoint or one that is past `steps`.
      ValueError: If its arrays have other shapes or dtypes than `target`, or all are damaged.
    """
    origin = pathlib.Path(origin)
    restored = restore_latest(origin / "checkpoints", target, warn=warn)
    if restored is None:
        raise UsageError(
            f"train: --branch-from must name the folder of a run with a checkpoint, got {origin},"
            " which has none; let that run save one first, with --stop-after N for example."
        )
    state, _ = restored
    step = int(state.step)
    if step > steps:
        raise UsageError(
            f"train: --branch-from {origin} stands after step {step}, and this run has only"
            f" {steps} steps; branch from an earlier checkpoint or take more steps."
        )

    def record() -> None:
        run.record(branch_step=step)
        copy_metrics(origin / "metrics.jsonl", run.path / "metrics.jsonl", step)

    on_first(record, UsageError, OSError)
    if save:
        save_checkpoint(run.checkpoints, state, {"versions": versions()})
    return state

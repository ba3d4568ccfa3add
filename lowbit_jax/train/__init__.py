"""Training: a config, a loop that resumes exactly, its records and checkpoints."""

from lowbit_jax.train.checkpoint import restore_latest, save_checkpoint
from lowbit_jax.train.config import Config, RunIdentity, RunOptions, UsageError, parse_command
from lowbit_jax.train.corpora import open_corpus
from lowbit_jax.train.evaluate import Evaluation, make_evaluate
from lowbit_jax.train.interrupts import Interrupted
from lowbit_jax.train.loop import Diverged, train
from lowbit_jax.train.state import TrainState, abstract_state, create_state
from lowbit_jax.train.step import Metrics, StepPlan, loss_function, make_train_step
from lowbit_jax.train.summary import Summary
from lowbit_jax.train.sweep_rows import Row

__all__ = [
    "Config",
    "Diverged",
    "Evaluation",
    "Interrupted",
    "Metrics",
    "Row",
    "RunIdentity",
    "RunOptions",
    "StepPlan",
    "Summary",
    "TrainState",
    "UsageError",
    "abstract_state",
    "create_state",
    "loss_function",
    "make_evaluate",
    "make_train_step",
    "open_corpus",
    "parse_command",
    "restore_latest",
    "save_checkpoint",
    "train",
]

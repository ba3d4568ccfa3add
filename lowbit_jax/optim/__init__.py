"""Optimizers and their parts, as Optax gradient transformations."""

from lowbit_jax.optim.cage import (
    CageState,
    add_cage_correction,
    add_cage_post_correction,
    cage,
    cage_strength,
    cage_strength_for_total,
)
from lowbit_jax.optim.masks import match_paths
from lowbit_jax.optim.schedules import one_cycle_cosine, warmup_stable_decay

__all__ = [
    "CageState",
    "add_cage_correction",
    "add_cage_post_correction",
    "cage",
    "cage_strength",
    "cage_strength_for_total",
    "match_paths",
    "one_cycle_cosine",
    "warmup_stable_decay",
]

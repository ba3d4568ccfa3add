"""Optimizers and their parts, as Optax gradient transformations."""

from lowbit_jax.optim.admm import (
    SPLIT_E4M3,
    AdmmState,
    adam_second_moments,
    admm,
    admm_finish,
    admm_strength,
    constraint_gap,
    elsa,
    elsa_low_precision,
    find_admm_state,
)
from lowbit_jax.optim.cage import (
    CageState,
    add_cage_correction,
    add_cage_post_correction,
    cage,
    cage_strength,
    cage_strength_for_total,
)
from lowbit_jax.optim.eco import EcoState, eco, scale_by_eco
from lowbit_jax.optim.low_precision import (
    Replacement,
    apply_updates_low_precision,
    apply_updates_with_error_feedback,
    dequantize_leaves,
    init_errors,
    quantize_leaves,
)
from lowbit_jax.optim.low_precision_adam import (
    MOMENT_E4M3_128,
    AdamLowPrecisionState,
    adamw_low_precision,
    scale_by_adam_low_precision,
)
from lowbit_jax.optim.masks import match_paths, resolve_mask
from lowbit_jax.optim.quartet import (
    attach_quantized,
    quantize_params,
    quartet,
    quartet_gradients,
)
from lowbit_jax.optim.schedules import one_cycle_cosine, warmup_stable_decay

__all__ = [
    "MOMENT_E4M3_128",
    "SPLIT_E4M3",
    "AdamLowPrecisionState",
    "AdmmState",
    "CageState",
    "EcoState",
    "Replacement",
    "adam_second_moments",
    "adamw_low_precision",
    "add_cage_correction",
    "add_cage_post_correction",
    "admm",
    "admm_finish",
    "admm_strength",
    "apply_updates_low_precision",
    "apply_updates_with_error_feedback",
    "attach_quantized",
    "cage",
    "cage_strength",
    "cage_strength_for_total",
    "constraint_gap",
    "dequantize_leaves",
    "eco",
    "elsa",
    "elsa_low_precision",
    "find_admm_state",
    "init_errors",
    "match_paths",
    "one_cycle_cosine",
    "quantize_leaves",
    "quantize_params",
    "quartet",
    "quartet_gradients",
    "resolve_mask",
    "scale_by_adam_low_precision",
    "scale_by_eco",
    "warmup_stable_decay",
]

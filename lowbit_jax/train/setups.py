"""From plain knobs, as a command line has them, to recipes, optimizer and storage of a run."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from lowbit_jax.models import llama_rules, resolve_recipes
from lowbit_jax.models.linear import RecipeRules
from lowbit_jax.models.llama import QUANTIZABLE_PATHS
from lowbit_jax.numerics import PRESETS, QTensor, QuantSpec
from lowbit_jax.ops.recipes import FP8_WEIGHTS, INT4_WEIGHTS, get_recipe, weight_projection
from lowbit_jax.optim import (
    add_cage_correction,
    cage_strength,
    cage_strength_for_total,
    eco,
    match_paths,
    quantize_leaves,
)
from lowbit_jax.optim.low_precision_adam import MOMENT_E4M3_128, scale_by_adam_low_precision
from lowbit_jax.sparsity import identity

OptimizerName = Literal["adamw", "eco", "naive"]
WeightRounding = Literal["stochastic", "nearest"]
Moments = Literal["float32", "bfloat16", "e4m3"]
ParamDtype = Literal["float32", "bfloat16"]
RecipeSchedule = tuple[tuple[int, RecipeRules], ...]

# AdamW as in Panferov et al., QuEST, arXiv:2502.05003.
_B1, _B2, _EPS = 0.9, 0.95, 1e-8
_MAX_GRAD_NORM = 1.0


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the knobs of `training_setup` come to.

    Attributes:
      recipe_rules: For `LlamaConfig`.
      recipe_schedule: For `Config`, like the two that follow.
      optimizer: The chain, learning rate included. It does not clip: pass `clip_norm` on as well.
      store: From fresh float32 parameters to those that are stored; None: as they are.
      clip_norm: Global norm to which the step clips gradients.
    """

    recipe_rules: RecipeRules
    recipe_schedule: RecipeSchedule
    optimizer: optax.GradientTransformation
    store: Callable[[PyTree], PyTree] | None
    clip_norm: float


def training_setup(
    *,
    learning_rate: optax.Schedule,
    steps: int,
    recipe: str,
    rules: Sequence[str] = (),
    recipe_schedule: Sequence[str] = (),
    optimizer: str = "adamw",
    weights: str | None = None,
    weight_rounding: str | None = None,
    cage_total_strength: float = 0.0,
    weight_decay: float = 0.1,
    moments: str = "float32",
    param_dtype: str = "float32",
    seed: int = 0,
) -> Setup:
    """Recipes, optimizer and storage for a `Llama`.

    Gradients are to be clipped at norm 1, by the step (`Config.clip_norm`). "adamw" decays the
    seven matrices of the blocks, with CAGE's correction before the learning rate: `optim.cage`, but
    with a projection for each recipe that the matrices have at the end of the run. "eco" and
    "naive" keep those matrices as codes alone.

    Args:
      learning_rate: Function of the updates already applied.
      steps: Length of the run, for the ramp of CAGE.
      recipe: As `get_recipe` reads it, of the matrices that no rule matches.
      rules: See `parse_rules`.
      recipe_schedule: Texts `STEP:RECIPE`: once that many steps are done, RECIPE takes the place
        of `recipe`; what `rules` match keeps its recipe.
      optimizer: "adamw"; "eco", whose momentum carries the rounding residuals of the weights; or
        "naive", which drops them.
      weights: Of "eco" and "naive": "fp8" (a scale a row), "int4" (a scale for 32) or a name in
        `lowbit_jax.numerics.PRESETS`. None: "fp8".
      weight_rounding: Of "eco" and "naive". None: "stochastic".
      cage_total_strength: Of "adamw", see `optim.cage`; 0 leaves the correction at zero.
      weight_decay: Of the seven matrices.
      moments: How Adam's are stored. "e4m3" is the first one in blocks of 128, the second one in
        bfloat16.
      param_dtype: Of all parameters but the norms' scales and, for "eco" and "naive", the seven
        matrices.
      seed: Of stochastic rounding in the optimizer.

    Raises:
      ValueError: If a text cannot be read, or two knobs do not go together.
    """
    in_force = parse_rules(recipe, rules)
    schedule = tuple(_parse_switch(text, rules) for text in recipe_schedule)
    for name, value, legal in (
        ("optimizer", optimizer, get_args(OptimizerName)),
        ("moments", moments, get_args(Moments)),
        ("param_dtype", param_dtype, get_args(ParamDtype)),
        ("weight_rounding", weight_rounding, (None, *get_args(WeightRounding))),
    ):
        if value not in legal:
            raise ValueError(f"training_setup: {name} must be one of {legal}, got {value!r}.")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(
            f"training_setup: weight_decay must be finite and at least 0, got {weight_decay}."
        )
    cast = None if param_dtype == "float32" else _to_bfloat16
    all_rules = (in_force, *(later for _, later in schedule))
    if optimizer == "adamw":
        if weights is not None or weight_rounding is not None:
            raise ValueError(
                "training_setup: weights and weight_rounding belong to optimizer 'eco' or 'naive',"
                f" got {weights!r} and {weight_rounding!r} with 'adamw', whose weights are"
                f" {param_dtype}; for a master copy, name a recipe such as fp8_weights instead."
            )
        last_rules = all_rules[-1]
        strength = cage_strength_for_total(cage_total_strength, learning_rate, steps)
        corrections = [
            optax.masked(add_cage_correction(projection, cage_strength(strength, steps)), mask)
            for projection, mask in _projections(last_rules, is_silent=not cage_total_strength)
        ]
        chain = optax.chain(
            _scale_by_adam(moments, param_dtype, seed),
            optax.add_decayed_weights(weight_decay, _matrices()),
            *corrections,
            optax.scale_by_learning_rate(learning_rate),
        )
        return Setup(in_force, schedule, chain, cast, _MAX_GRAD_NORM)
    _check_eco(all_rules, cage_total_strength, moments)
    spec = _weight_spec(weights or "fp8", weight_rounding or "stochastic")
    chain = eco(
        learning_rate,
        spec,
        b1=_B1,
        b2=_B2,
        eps=_EPS,
        weight_decay=weight_decay,
        decay_mask=_matrices(),
        mask=_matrices(),
        inject=optimizer == "eco",
        moment_dtype=jnp.dtype(moments),
        seed=seed,
    )

    def store(params):
        # To nearest: there is no trend yet that rounding could lose.
        nearest = dataclasses.replace(spec, rounding="nearest")
        stored = quantize_leaves(params, nearest, _matrices())
        return stored if cast is None else cast(stored)

    return Setup(in_force, schedule, chain, store, _MAX_GRAD_NORM)


def parse_rules(recipe: str, rules: Sequence[str] = ()) -> RecipeRules:
    """Rules of the seven matrices: texts `PATTERN=RECIPE`, the first match wins, then `recipe`.

    Args:
      recipe: As `get_recipe` reads it.
      rules: As in `"layers/mlp/down_proj/weight=fp8_tensorwise"`; the pattern is a regular
        expression without "=" that has to match the path of a matrix as a whole.

    Raises:
      ValueError: If there is no such recipe, or a text is not of that form.
    """
    pairs = []
    for text in rules:
        pattern, _, name = text.partition("=")
        if not (pattern and name):
            raise ValueError(
                f"rules: each must be PATTERN=RECIPE, got {text!r}; for example"
                " layers/mlp/down_proj/weight=fp8_tensorwise."
            )
        pairs.append((pattern, get_recipe(name)))
    try:
        resolve_recipes(tuple(pairs), QUANTIZABLE_PATHS)  # a pattern that matches nothing
    except re.error as error:
        raise ValueError(
            f"rules: each pattern must be a regular expression, got {error.pattern!r} ({error})."
        ) from error
    return (*pairs, *llama_rules(get_recipe(recipe)))


def _parse_switch(text: str, rules: Sequence[str]) -> tuple[int, RecipeRules]:
    step, _, recipe = text.partition(":")
    if not (step.isdecimal() and recipe):
        raise ValueError(
            f"recipe_schedule: each entry must be STEP:RECIPE, got {text!r}; 2000:quest_w4a4 for"
            " example."
        )
    return int(step), parse_rules(recipe, rules)


def _matrices() -> Callable[[PyTree], PyTree]:
    return match_paths(r"layers/.*_proj/weight")


def _projections(rules: RecipeRules, *, is_silent: bool) -> list[tuple[Any, Callable]]:
    """The grids of the weights and the matrices that live on each."""
    groups: dict[Any, list[str]] = {}
    recipes = {}
    for path, (_, recipe) in resolve_recipes(rules, QUANTIZABLE_PATHS).items():
        grid = recipe.y_w, recipe.rotation_of("y")
        groups.setdefault(grid, []).append(path)
        recipes.setdefault(grid, recipe)
    return [
        # Silent ones keep their place, so that runs of other strengths can branch off.
        (identity if is_silent else weight_projection(recipes[grid]),
         match_paths(*map(re.escape, paths)))
        for grid, paths in groups.items()
    ]  # fmt: skip


def _scale_by_adam(moments: str, param_dtype: str, seed: int) -> optax.GradientTransformation:
    if moments == param_dtype == "float32":
        return optax.scale_by_adam(_B1, _B2, _EPS)
    m, v = (MOMENT_E4M3_128, "bfloat16") if moments == "e4m3" else (moments, moments)
    return scale_by_adam_low_precision(_B1, _B2, _EPS, m=m, v=v, seed=seed)


def _weight_spec(name: str, rounding: str) -> QuantSpec:
    specs = {"fp8": FP8_WEIGHTS.y_w, "int4": INT4_WEIGHTS.y_w}
    # "eden" is unbiased under a fresh rotation alone, and stored weights have none.
    usable = {n.lower(): spec for n, spec in PRESETS.items() if spec.rounding != "eden"}
    specs |= {n: spec for n, spec in usable.items() if n not in specs}
    spec = specs.get(name.lower())
    if spec is None:
        raise ValueError(
            f"training_setup: weights must be one of {', '.join(specs)}, got {name!r}."
        )
    return dataclasses.replace(spec, rounding=rounding)


def _check_eco(all_rules: Sequence[RecipeRules], cage_total_strength: float, moments: str) -> None:
    again = [str(r) for rules in all_rules for _, r in rules if r.y_w is not None]
    if again:
        raise ValueError(
            "training_setup: 'eco' and 'naive' keep the weights on a grid, so that no recipe may"
            f" quantize them again, got {again[0]}; use recipe bf16, or one that quantizes"
            " activations alone."
        )
    if cage_total_strength:
        raise ValueError(
            "training_setup: CAGE pulls float weights towards a grid, where those of 'eco' and"
            f" 'naive' are, got cage_total_strength={cage_total_strength}; use 0, or 'adamw'."
        )
    if moments == "e4m3":
        raise ValueError(
            "training_setup: the momentum of 'eco' carries rounding residuals and needs more bits,"
            " got moments 'e4m3'; use 'bfloat16' or 'float32'."
        )


def _to_bfloat16(params: PyTree) -> PyTree:
    """All but `QTensor`s and the norms' scales, which are few and near one."""

    def cast(path, p):
        is_weight = jax.tree_util.keystr(path[-1:], simple=True) == "weight"
        return p.astype(jnp.bfloat16) if is_weight and not isinstance(p, QTensor) else p

    return jax.tree_util.tree_map_with_path(cast, params, is_leaf=lambda p: isinstance(p, QTensor))

"""A linear layer that multiplies by a recipe, and the rules that give each layer its recipe."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from lowbit_jax.models.layers import logical_init
from lowbit_jax.ops import recipes
from lowbit_jax.ops.dot_recipe import DotRecipe
from lowbit_jax.ops.quantized_dot import quantized_dot, quantized_dots
from lowbit_jax.ops.quantized_weight import QuantizedWeight

RecipeRules = tuple[tuple[str, DotRecipe], ...]


def resolve_recipes(
    rules: RecipeRules, paths: Iterable[str]
) -> dict[str, tuple[str | None, DotRecipe]]:
    """The rule and recipe of each path: of the first rule that matches, else no rule and `BF16`.

    Args:
      rules: Pairs of a regular expression (syntax of `re`), which has to match a whole path, and a
        recipe.
      paths: Of the weights that can be quantized, as in `"layers/attention/q_proj/weight"`.

    Returns:
      Path to (pattern or `None`, recipe), in the order of `paths`.

    Raises:
      ValueError: If a rule matches no path, for a misspelt one would silently quantize nothing. A
        rule whose paths earlier rules have all taken is legal.
    """
    paths = tuple(paths)
    for pattern, _ in rules:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise ValueError(
                f"resolve_recipes: every rule must match a whole path, got {pattern!r}, which"
                f" matches none of {', '.join(paths)}; correct the pattern or drop the rule."
            )
    matches = {path: [rule for rule in rules if re.fullmatch(rule[0], path)] for path in paths}
    return {path: (found[0] if found else (None, recipes.BF16)) for path, found in matches.items()}


class QuantizedLinear(nn.Module):
    """`y = x weight^T`, the product by `recipe`; no bias.

    The parameter `weight` `(features, k)` is float32 and starts as `N(0, stddev^2)`. `apply` also
    takes a `QuantizedWeight` in its place.

    Attributes:
      features: Width of the output.
      recipe: What the three products of training quantize.
      axes: Logical names of the axes of `weight`.
      stddev: Of the initial weights.
      implementation: Of the products, see `quantized_dots`.
    """

    features: int
    recipe: DotRecipe
    axes: tuple[str, str]
    stddev: float = 0.02
    implementation: str | None = None

    @nn.compact
    def matrix(self, k: int) -> Any:
        """The weight `(features, k)`, or the `QuantizedWeight` in its place."""
        shape = (self.features, k)
        weight = self.get_variable("params", "weight")
        if not isinstance(weight, QuantizedWeight):  # whose parts `param` would compare one by one
            init = logical_init(nn.initializers.normal(self.stddev), self.axes)
            return self.param("weight", init, shape, jnp.float32)
        if weight.master.shape != shape:
            raise ValueError(
                f"QuantizedLinear: the weight must be {shape}, got a QuantizedWeight of"
                f" {weight.master.shape}; initialize the parameters with this very model."
            )
        return weight

    def __call__(
        self, x: Float[Array, "*batch k"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch n"]:
        """`(*batch, features)` in `x.dtype`; `key` only where the recipe is random."""
        weight = self.matrix(x.shape[-1])
        return quantized_dot(x, weight, self.recipe, key=key, implementation=self.implementation)


def multiply_all(
    x: Float[Array, "*batch k"],
    layers: Sequence[QuantizedLinear],
    *,
    key: PRNGKeyArray | None = None,
) -> list[Float[Array, "*batch n"]]:
    """What each layer makes of x, which those of one recipe share once it is quantized.

    Call it within the module that owns the layers, of different names.
    """
    alike = {}
    for layer in layers:
        alike.setdefault((layer.recipe, layer.implementation), []).append(layer)
    results = {}
    for index, ((recipe, implementation), group) in enumerate(alike.items()):
        own_key = jax.random.fold_in(key, index) if index and key is not None else key
        weights = {layer.name: layer.matrix(x.shape[-1]) for layer in group}
        results |= quantized_dots(x, weights, recipe, key=own_key, implementation=implementation)
    return [results[layer.name] for layer in layers]

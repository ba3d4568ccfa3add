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
from lowbit_jax.ops.quantized_dot import quantized_dots
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
    """`y = x weight^T`, or `x weight^T + bias`, the product by `recipe`.

    The parameter `weight` `(features, k)` is float32 and starts as `N(0, stddev^2)`, `bias`
    `(features,)`, never quantized, as zeros. `apply` also takes a `QuantizedWeight` for the weight.

    Attributes:
      features: Width of the output.
      recipe: What the three products of training quantize.
      axes: Logical names of the axes of `weight`.
      stddev: Of the initial weights.
      implementation: Of the products, see `quantized_dots`.
      has_bias: Whether there is a `bias`; it is added in the dtype of the product.
      saved_as: See `quantized_dots`.
    """

    features: int
    recipe: DotRecipe
    axes: tuple[str, str]
    stddev: float = 0.02
    implementation: str | None = None
    has_bias: bool = False
    saved_as: tuple[str, str] | None = None

    @nn.compact
    def parameters(self, k: int) -> tuple[Any, Float[Array, "n"] | None]:
        """The weight `(features, k)` or the `QuantizedWeight` in its place; the bias or None."""
        shape, bias = (self.features, k), None
        if self.has_bias:
            init = logical_init(nn.initializers.zeros_init(), self.axes[:1])
            bias = self.param("bias", init, shape[:1], jnp.float32)
        weight = self.get_variable("params", "weight")
        if not isinstance(weight, QuantizedWeight):  # whose parts `param` would compare one by one
            init = logical_init(nn.initializers.normal(self.stddev), self.axes)
            weight = self.param("weight", init, shape, jnp.float32)
        elif weight.master.shape != shape:
            raise ValueError(
                f"QuantizedLinear: the weight must be {shape}, got a QuantizedWeight of"
                f" {weight.master.shape}; initialize the parameters with this very model."
            )
        return weight, bias

    def matrix(self, k: int) -> Any:
        """The weight of `parameters`."""
        return self.parameters(k)[0]

    def add_bias(self, y: Float[Array, "*batch n"], k: int) -> Float[Array, "*batch n"]:
        """`y + bias` in the dtype of `y`; `y` where there is no bias."""
        bias = self.parameters(k)[1]
        return y if bias is None else y + bias.astype(y.dtype)

    def __call__(
        self, x: Float[Array, "*batch k"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch n"]:
        """`(*batch, features)` in `x.dtype`; `key` only where the recipe is random."""
        weights = {"": self.matrix(x.shape[-1])}
        options = {"implementation": self.implementation, "saved_as": self.saved_as}
        y = quantized_dots(x, weights, self.recipe, key=key, **options)[""]
        return self.add_bias(y, x.shape[-1])


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
        how = layer.recipe, layer.implementation, layer.saved_as
        alike.setdefault(how, []).append(layer)
    results = {}
    for index, ((recipe, implementation, saved_as), group) in enumerate(alike.items()):
        own_key = jax.random.fold_in(key, index) if index and key is not None else key
        weights = {layer.name: layer.matrix(x.shape[-1]) for layer in group}
        options = {"implementation": implementation, "saved_as": saved_as}
        results |= quantized_dots(x, weights, recipe, key=own_key, **options)
    return [layer.add_bias(results[layer.name], x.shape[-1]) for layer in layers]

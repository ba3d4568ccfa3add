"""A linear layer that multiplies by a recipe, and the rules that give each layer its recipe."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from lowbit_jax.models.host_memory import OffloadedWeight, fetched
from lowbit_jax.models.layers import logical_init
from lowbit_jax.ops import recipes
from lowbit_jax.ops.coded_dot import coded_dots
from lowbit_jax.ops.coded_weight import CodedWeight
from lowbit_jax.ops.dot_recipe import DotRecipe
from lowbit_jax.ops.quantized_dot import quantized_dots
from lowbit_jax.ops.quantized_weight import QuantizedWeight
from pallas_kernels.partition import Partition

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
    `(features,)`, never quantized, as zeros. `apply` also takes a `QuantizedWeight` or an
    `OffloadedWeight` for the weight, which it fetches from the host's memory if it is there; and a
    `CodedWeight`, which says itself what inputs go through, so that `recipe` must quantize nothing.

    Attributes:
      features: Width of the output.
      recipe: What the three products of training quantize.
      axes: Logical names of the axes of `weight`.
      stddev: Of the initial weights.
      implementation: Of the products, see `quantized_dots`.
      has_bias: Whether there is a `bias`; it is added in the dtype of the product.
      saved_as: See `quantized_dots`.
      coded_implementation: Of the product with a `CodedWeight`, see `coded_dot`.
    """

    features: int
    recipe: DotRecipe
    axes: tuple[str, str]
    stddev: float = 0.02
    implementation: str | None = None
    has_bias: bool = False
    saved_as: tuple[str, str] | None = None
    coded_implementation: str | None = None

    @nn.compact
    def parameters(self, k: int) -> tuple[Any, Float[Array, "n"] | None]:
        """The weight `(features, k)` or what is in its place; the bias or None."""
        shape, bias = (self.features, k), None
        if self.has_bias:
            init = logical_init(nn.initializers.zeros_init(), self.axes[:1])
            bias = self.param("bias", init, shape[:1], jnp.float32)
        weight = self.get_variable("params", "weight")
        if isinstance(weight, QuantizedWeight):
            held = weight.master.shape
        elif isinstance(weight, OffloadedWeight):
            held = weight.weight.shape
        elif isinstance(weight, CodedWeight):
            held = weight.shape
            weight = jax.tree.map(fetched, weight)
            if not self.recipe.is_identity:
                raise ValueError(
                    f"QuantizedLinear: codes are multiplied without a recipe, got {self.recipe} for"
                    f" {self.name}; drop the rules of the model: CodedWeight.activations says what"
                    " inputs are rounded to."
                )
        else:  # `param` would compare the parts of the others one by one
            init = logical_init(nn.initializers.normal(self.stddev), self.axes)
            weight, held = self.param("weight", init, shape, jnp.float32), shape
        if held != shape:
            raise ValueError(
                f"QuantizedLinear: the weight must be {shape}, got a {type(weight).__name__} of"
                f" {held}; initialize the parameters with this very model."
            )
        return fetched(weight), bias

    def partition(self) -> Partition | None:
        """How tokens are cut over a mesh: not known here; what places the model intercepts this."""
        return None

    def __call__(
        self, x: Float[Array, "*batch k"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch n"]:
        """`(*batch, features)` in `x.dtype`; `key` only where the recipe is random."""
        return multiply_all(x, [self], key=key)[0]


def multiply_all(
    x: Float[Array, "*batch k"],
    layers: Sequence[QuantizedLinear],
    *,
    key: PRNGKeyArray | None = None,
) -> list[Float[Array, "*batch n"]]:
    """What each layer makes of x, which those of one recipe share once it is quantized.

    Call it within the module that owns the layers, of different names if there are several. While
    it is initialized nothing is quantized: parameters do not depend on it, and nobody reads the
    products, of which a quantized one takes several times as long to trace.
    """
    parameters = [layer.parameters(x.shape[-1]) for layer in layers]
    if layers[0].is_initializing():
        return [_plain_product(x, *found) for found in parameters]
    names = [layer.name if len(layers) > 1 else "" for layer in layers]
    alike, coded = {}, {}
    for name, layer, (weight, _) in zip(names, layers, parameters, strict=True):
        if isinstance(weight, CodedWeight):
            coded.setdefault(layer.coded_implementation, {})[name] = weight
            continue
        how = layer.recipe, layer.implementation, layer.saved_as, layer.partition()
        alike.setdefault(how, {})[name] = weight
    results = {}
    for implementation, weights in coded.items():
        results |= coded_dots(x, weights, implementation=implementation)
    for index, (how, weights) in enumerate(alike.items()):
        recipe, implementation, saved_as, partition = how
        own_key = jax.random.fold_in(key, index) if index and key is not None else key
        results |= quantized_dots(
            x,
            weights,
            recipe,
            key=own_key,
            implementation=implementation,
            partition=partition,
            saved_as=saved_as,
        )
    biases = [bias for _, bias in parameters]
    return [
        results[name] if bias is None else results[name] + bias.astype(results[name].dtype)
        for name, bias in zip(names, biases, strict=True)
    ]


def _plain_product(x, weight, bias):
    y = x @ weight.astype(x.dtype).T
    return y if bias is None else y + bias.astype(x.dtype)

"""Differentiable operations, the recipes that configure them, and what ran."""

from lowbit_jax.ops.quantized_dot import quantized_dot
from lowbit_jax.ops.recipes import RECIPES, DotRecipe, get_recipe, weight_projection
from lowbit_jax.ops.report import Explanation, ProductRow, explain

__all__ = [
    "RECIPES",
    "DotRecipe",
    "Explanation",
    "ProductRow",
    "explain",
    "get_recipe",
    "quantized_dot",
    "weight_projection",
]

"""Differentiable operations, the recipes that configure them, and what ran."""

from lowbit_jax.ops.dot_recipe import DotRecipe
from lowbit_jax.ops.quantized_dot import quantized_dot, quantized_dots
from lowbit_jax.ops.quantized_weight import QuantizedWeight, gradient_to_master, quantize_weight
from lowbit_jax.ops.recipes import RECIPES, get_recipe, weight_projection
from lowbit_jax.ops.report import Explanation, ProductRow, explain

__all__ = [
    "RECIPES",
    "DotRecipe",
    "Explanation",
    "ProductRow",
    "QuantizedWeight",
    "explain",
    "get_recipe",
    "gradient_to_master",
    "quantize_weight",
    "quantized_dot",
    "quantized_dots",
    "weight_projection",
]

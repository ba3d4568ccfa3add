"""Differentiable operations, the recipes that configure them, and what ran."""

from lowbit_jax.ops.coded_dot import coded_dot, coded_dots
from lowbit_jax.ops.coded_weight import CodedWeight, map_coded, pack_weights
from lowbit_jax.ops.dot_recipe import DotRecipe
from lowbit_jax.ops.quantized_dot import quantized_dot, quantized_dots
from lowbit_jax.ops.quantized_weight import QuantizedWeight, gradient_to_master, quantize_weight
from lowbit_jax.ops.recipes import RECIPES, get_recipe, weight_projection
from lowbit_jax.ops.report import Explanation, ProductRow, explain

__all__ = [
    "RECIPES",
    "CodedWeight",
    "DotRecipe",
    "Explanation",
    "ProductRow",
    "QuantizedWeight",
    "coded_dot",
    "coded_dots",
    "explain",
    "get_recipe",
    "gradient_to_master",
    "map_coded",
    "pack_weights",
    "quantize_weight",
    "quantized_dot",
    "quantized_dots",
    "weight_projection",
]

"""A linear layer, forward and backward, under each recipe."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from lowbit_jax.ops import Explanation, explain, get_recipe, quantized_dot
from pallas_kernels.measure import Build, Case, Comparison, jitted
from pallas_kernels.measurement import BF16, FP8

BASELINES = ("bf16", "fp8_tensorwise")
RECIPES = (*BASELINES, "quartet", "quartet_rtn", "quartet2", "nvfp4_nvidia", "quest_w4a4")


def comparison(tokens: int, n: int, k: int, recipes: tuple[str, ...] = RECIPES) -> Comparison:
    """`y = x w^T` and both gradients by `jax.vjp`, by the path that the library chooses.

    Args:
      tokens: Rows of x `(tokens, k)`, bfloat16.
      n: Rows of w `(n, k)`, float32, so that what casts it is counted.
      k: Columns of both.
      recipes: Names in `lowbit_jax.ops.recipes`.
    """
    cases = tuple(
        Case(name, functools.partial(_build, name, 6.0 * tokens * n * k)) for name in recipes
    )
    make = functools.partial(_inputs, tokens, n, k)
    return Comparison(
        "layer", f"layer {tokens}x{n}x{k}, forward + backward", make, cases, BASELINES
    )


def train_layer(recipe: str) -> Callable[..., Any]:
    """The function that is timed: of x, w, the gradient g of y, and a key."""

    def train(x, w, g, key):
        y, gradients = jax.vjp(
            functools.partial(quantized_dot, recipe=get_recipe(recipe), key=key), x, w
        )
        return y, *gradients(g)

    return train


def split_flops(total: float, explanation: Explanation) -> dict[str, float]:
    """`total` by unit: products whose operands both have a low-bit format could run in FP8.

    That is a matter of the recipe, not of the path that was taken: a path that multiplies such
    operands in bfloat16 is as far above its floor as it is.
    """
    low = 0.0
    for row in explanation.rows:
        if "-" not in (row.a_format, row.b_format):
            low += 2.0 * math.prod(row.a_shape) * row.b_shape[-2] * (row.count or 0)
    return {BF16: max(total - low, 0.0), FP8: min(low, total)}


def describe_paths(explanation: Explanation) -> str:
    """Products by path, `"y, dx, dw: hopper"` for example; "plain" if nothing is quantized."""
    products: dict[str, list[str]] = {}
    for row in sorted(explanation.rows, key=lambda row: ("y", "dx", "dw").index(row.product)):
        is_plain = row.a_format == row.b_format == "-"
        found = products.setdefault("plain" if is_plain else row.path, [])
        if row.product not in found:
            found.append(row.product)
    return "; ".join(f"{', '.join(names)}: {path}" for path, names in products.items())


def _inputs(tokens: int, n: int, k: int, key: PRNGKeyArray) -> tuple[Any, ...]:
    keys = jax.random.split(key, 4)
    x = jax.random.normal(keys[0], (tokens, k), jnp.bfloat16)
    w = 0.02 * jax.random.normal(keys[1], (n, k))
    g = jax.random.normal(keys[2], (tokens, n), jnp.bfloat16)
    return x, w, g, keys[3]


def _build(recipe: str, flops: float, shapes: tuple[Any, ...]) -> Build:
    fn = jax.jit(train_layer(recipe))
    explanation = explain(fn, *shapes)
    fields = {"flops": split_flops(flops, explanation), "note": describe_paths(explanation)}
    return jitted(fn, **fields)(shapes)

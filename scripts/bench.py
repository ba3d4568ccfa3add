"""Times a linear layer, forward and with its gradients, under each recipe, beside BF16.

Example:
    python scripts/bench.py --tokens 16384 --n 4096 --k 4096 --recipes bf16 quest_w4a4
"""

import functools
import sys

import jax
import jax.numpy as jnp
import tyro

from lowbit_jax.ops import get_recipe, quantized_dot
from pallas_kernels.testing import time_device

RECIPES = ("bf16", "fp8_tensorwise", "rtn_w4a4", "mxfp4_forward", "quest_w4a4")


def main(
    tokens: int = 16384,
    n: int = 4096,
    k: int = 4096,
    recipes: tuple[str, ...] = RECIPES,
    repeats: int = 20,
) -> int:
    """Times `y = x w^T` and its gradients; ratios are to the first recipe's medians.

    Args:
      tokens: Rows of x, bfloat16.
      n: Rows of w, float32.
      k: Columns of both.
      recipes: Names in lowbit_jax.ops.recipes.
      repeats: Measurements, each of ten queued calls; medians with minimum and maximum are shown.
    """
    x = jax.random.normal(jax.random.key(0), (tokens, k), jnp.bfloat16)
    w = 0.02 * jax.random.normal(jax.random.key(1), (n, k))
    g = jax.random.normal(jax.random.key(2), (tokens, n), jnp.bfloat16)
    flops = 2 * tokens * n * k
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {tokens} x {n} x {k}")
    print(
        f"{'recipe':16} {'forward':32} {'TFLOP/s':>8}   {'forward + backward':32} {'speed-up':>8}"
    )
    baseline = None
    for name in recipes:
        dot = functools.partial(quantized_dot, recipe=get_recipe(name), key=jax.random.key(3))

        def train(x, w, g, dot=dot):
            y, gradients = jax.vjp(dot, x, w)
            return y, gradients(g)

        forward = time_device(jax.jit(dot), x, w, repeats=repeats)
        both = time_device(jax.jit(train), x, w, g, repeats=repeats)
        baseline = baseline or both
        rate = flops / forward.median_s / 1e12
        speed_up = baseline.median_s / both.median_s
        print(f"{name:16} {forward!s:32} {rate:8.1f}   {both!s:32} {speed_up:7.2f}x", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))

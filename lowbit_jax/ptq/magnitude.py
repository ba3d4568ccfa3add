"""Magnitude pruning: the smallest weights go. The baseline of every sparsity solver."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from lowbit_jax.ptq.hessian import layer_error
from lowbit_jax.ptq.info import Info
from lowbit_jax.sparsity import Pattern, apply_masks, mask_of
from lowbit_jax.sparsity.patterns import Comparison


@functools.partial(jax.jit, static_argnames=("pattern", "per"))
def magnitude(
    w: Shaped[Array, "n k"],
    matrix: Float[Array, "k k"],
    pattern: Pattern,
    *,
    per: Comparison = "matrix",
) -> tuple[Float[Array, "n k"], Info]:
    """`w` without its smallest entries.

    Args:
      w: `(n, k)` weights, (out, in).
      matrix: `(k, k)`, the Hessian, for the error alone.
      pattern: What stays.
      per: Entries that compete, see `mask_of`.

    Returns:
      `(n, k)` float32, and an `Info` without damping or failures.
    """
    return keep_largest(w, w, matrix, pattern, per)


def keep_largest(
    w: Shaped[Array, "n k"],
    scores: Shaped[Array, "n k"],
    matrix: Float[Array, "k k"],
    pattern: Pattern,
    per: Comparison,
) -> tuple[Float[Array, "n k"], Info]:
    """`w` in float32 where `scores` are largest, zero elsewhere, and what that costs."""
    w = w.astype(jnp.float32)
    values = apply_masks(w, mask_of(scores, pattern, per))
    error = layer_error(w, values, matrix)
    return values, Info(error.astype(jnp.float32), jnp.float32(0), jnp.int32(0))

"""Wanda: weights are compared by what they contribute to the output of their row."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from lowbit_jax.ptq.info import Info
from lowbit_jax.ptq.magnitude import keep_largest
from lowbit_jax.sparsity import Pattern
from lowbit_jax.sparsity.patterns import Comparison


@functools.partial(jax.jit, static_argnames=("pattern", "per"))
def wanda(
    w: Shaped[Array, "n k"],
    matrix: Float[Array, "k k"],
    pattern: Pattern,
    *,
    per: Comparison = "row",
) -> tuple[Float[Array, "n k"], Info]:
    """`w` without the entries of least `|w_ij| sqrt(H_jj)`: weight times the rms of its input.

    No weight is changed. Of `tr(dw H dw^T)` it minimises what the diagonal of H says.

    Args:
      w: `(n, k)` weights, (out, in).
      matrix: `(k, k)`, the Hessian; only its diagonal chooses.
      pattern: What stays.
      per: Entries that compete; the paper finds rows best.

    Returns:
      `(n, k)` float32, and an `Info` without damping or failures.

    References:
      Sun et al., A Simple and Effective Pruning Approach for Large Language Models,
      arXiv:2306.11695.
    """
    scores = w.astype(jnp.float32) * jnp.sqrt(jnp.diagonal(matrix))
    return keep_largest(w, scores, matrix, pattern, per)

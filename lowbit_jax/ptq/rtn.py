"""RTN: each weight by itself to the nearest level. The baseline of every solver."""

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, Float

from lowbit_jax.numerics import QTensor, QuantSpec, dequantize
from lowbit_jax.ptq.grids import Search, find_grid
from lowbit_jax.ptq.hessian import layer_error
from lowbit_jax.ptq.info import Info


def rtn(
    w: Float[ArrayLike, "..."],
    matrix: Float[ArrayLike, "k k"],
    spec: QuantSpec,
    *,
    search: Search = "rule",
) -> tuple[QTensor, Info]:
    """`quantize(w, spec)`, with the error that it makes on the layer's outputs.

    Args:
      w: `(n, k)` weights, (out, in).
      matrix: `(k, k)`, the Hessian, for the error alone.
      spec: Target.
      search: Which scales; see `find_grid`.

    Returns:
      The quantized weights, and an `Info` without damping or failures.

    Raises:
      ValueError: As `find_grid`.
    """
    w = jnp.asarray(w, jnp.float32)
    q = find_grid(w, spec, search)
    return q, Info(_error(w, q, matrix), jnp.float32(0), jnp.int32(0))


@jax.jit
def _error(w, q, matrix):
    return layer_error(w, dequantize(q), matrix).astype(jnp.float32)

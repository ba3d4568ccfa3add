"""Stacked matrices, quantized one by one.

A model that scans over its layers keeps one array `(*layers, n, k)` for all of them. A scale for
the whole array would tie each matrix to the largest of the others, and could not be cut along the
layers. Here every rule sees one matrix, and all parts of the result have the layers in front.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Shaped

from lowbit_jax.numerics.qtensor import QTensor
from lowbit_jax.numerics.quantize import Key, dequantize, quantize
from lowbit_jax.numerics.spec import QuantSpec


def quantize_matrices(w: Shaped[ArrayLike, "..."], spec: QuantSpec, *, key: Key = None) -> QTensor:
    """`quantize` of each matrix of `w` by itself.

    Args:
      w: `(*layers, n, k)`, or a single matrix or vector; any float dtype.
      spec: Target.
      key: For specs that need one; split over the matrices.

    Returns:
      A `QTensor` whose `global_scale`, where the rule has one, is `(*layers,)`. What is cut from
      it along the leading axes, as by `lax.scan`, is the `QTensor` of those matrices alone.

    Raises:
      ValueError: As `quantize`.
    """
    w = jnp.asarray(w)
    if w.ndim <= 2:
        return quantize(w, spec, key=key)
    if key is None:
        return jax.vmap(lambda w: quantize_matrices(w, spec))(w)
    keys = jax.random.split(key, w.shape[0])
    return jax.vmap(lambda w, key: quantize_matrices(w, spec, key=key))(w, keys)


def dequantize_matrices(q: QTensor, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
    """`dequantize` of what `quantize_matrices` or `quantize` returned.

    Args:
      q: The axes of its `global_scale` say which leading axes are stacked.
      dtype: A floating dtype.

    Returns:
      `(*layers, n, k)`.
    """
    if q.global_scale is None or q.global_scale.ndim == 0:
        return dequantize(q, dtype)
    return jax.vmap(lambda q: dequantize_matrices(q, dtype))(q)

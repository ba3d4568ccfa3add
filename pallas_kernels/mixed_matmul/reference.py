"""The definition of `mixed_matmul` in `jax.numpy`."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from lowbit_jax.numerics.qtensor import QTensor
from lowbit_jax.numerics.quantize import dequantize


def mixed_matmul_reference(
    x: Shaped[Array, "..."], q: QTensor, *, out_dtype: DTypeLike = jnp.bfloat16
) -> Float[Array, "m n"]:
    """`x (m, k)` times the transpose of the dequantized `q (n, k)`, all in float32.

    A global scale multiplies the sums. Without it, E2M1 weights are exact in bfloat16 too.
    """
    w = dequantize(dataclasses.replace(q, global_scale=None))
    out = lax.dot_general(
        x.astype(jnp.float32), w, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
    )
    if q.global_scale is not None:
        out = out * q.global_scale
    return out.astype(out_dtype)

"""The definition of `scaled_matmul` in `jax.numpy`."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped, UInt32

from lowbit_jax.rotations.hadamard import hadamard_transform
from pallas_kernels.folded import unpack_mask


def scaled_matmul_reference(
    a: Shaped[Array, "m k"],
    b: Shaped[Array, "n k"],
    a_scales: Float[Array, "..."] | None = None,
    b_scales: Float[Array, "..."] | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    mask: UInt32[Array, "words m"] | None = None,
    inverse_hadamard: int | None = None,
) -> Float[Array, "m n"]:
    """`scaled_matmul` as a float32 product at the highest precision, then the same epilogue.

    The operands are cast to float32, which is exact. See `scaled_matmul` for the arguments.
    """
    out = lax.dot_general(
        a.astype(jnp.float32),
        b.astype(jnp.float32),
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
    )
    if a_scales is not None and b_scales is not None and 0 in (a_scales.ndim, b_scales.ndim):
        # One number for all is multiplied with the other scales, not with the sums.
        product = a_scales * b_scales
        a_scales, b_scales = (product, None) if a_scales.ndim else (None, product)
    if a_scales is not None:
        out = out * (a_scales[:, None] if a_scales.ndim else a_scales)
    if b_scales is not None:
        out = out * b_scales
    if mask is not None:
        out = jnp.where(unpack_mask(mask), out, 0)
    if inverse_hadamard is not None:
        if jnp.dtype(out_dtype) == jnp.bfloat16:
            # Not a cast there and back, which XLA may leave out.
            out = lax.reduce_precision(out, exponent_bits=8, mantissa_bits=7)
        out = hadamard_transform(out, inverse_hadamard)
    return out.astype(out_dtype)

"""The implementations of a product `a b^T` of quantized operands; `dispatch` chooses among them.

All compute the same function of the same operands, up to the order in which float32 sums are taken,
to the accumulators of float8 tensor cores, see `quantized_dot`, and to what `scaled_matmul` says of
its epilogue.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.compat import is_interpreting
from pallas_kernels.partition import Partition, map_parts
from pallas_kernels.scaled_matmul import scaled_matmul

# Names of `jax_default_matmul_precision` for the least precise products.
_FAST_PRECISIONS = (None, "default", "fastest", "bfloat16")
_CUBLAS_ROWS = 16  # what XLA pads operands of float8 products to, a multiple of


class Operand(NamedTuple):
    """One operand of a product `a b^T`, stored with its contraction axis last.

    The array is `values * scale`. Scales wait for the product's float32 result, so that the
    values, which have few bits, are not rounded once more.
    """

    values: Float[Array, "rows c"]  # in the compute dtype, or float8 codes
    scale: Float[Array, ""] | Float[Array, "rows"] | None  # float32; None: 1


def dequantized(
    a: Operand, b: Operand, compute_dtype: np.dtype, out_dtype: np.dtype
) -> Float[Array, "p q"]:
    """The reference: operands in the compute dtype, float8 codes among them, which is exact."""
    a_values, b_values = a.values.astype(compute_dtype), b.values.astype(compute_dtype)
    return _multiply(a, b, a_values, b_values, compute_dtype, out_dtype)


def by_kernel(
    a: Operand, b: Operand, compute_dtype: np.dtype, out_dtype: np.dtype, **epilogue
) -> Float[Array, "p q"]:
    """Our kernel: float8 operands, exact for 4-bit formats; `epilogue` as for `scaled_matmul`."""
    del compute_dtype
    return scaled_matmul(
        a.values, b.values, a.scale, b.scale,
        out_dtype=out_dtype, interpret=is_interpreting(), **epilogue,
    )  # fmt: skip


def on_parts(
    multiply: Callable[..., Array],
    partition: Partition,
    a: Operand,
    b: Operand,
    compute_dtype: np.dtype,
    out_dtype: np.dtype,
    *,
    sums_tokens: bool,
    mask: Array | None = None,
    **options,
) -> Float[Array, "p q"]:
    """`multiply` of what each device has of operands that are made of tokens.

    A product that sums over tokens is one of the tokens of each device, mask and rotation back
    included, in float32, and then the sum over the devices, in float32: in another order than on
    one device.

    Args:
      multiply: As `by_kernel`.
      partition: How the tokens are cut.
      a: Its rows are tokens; or, if the product sums over them, its columns.
      b: The same on all devices; or its columns are tokens, too.
      compute_dtype: Of what is not quantized.
      out_dtype: Of the result.
      sums_tokens: Whether the product sums over tokens.
      mask: `(words, p)`, see `scaled_matmul`.
      **options: Of `multiply`.
    """
    has_row_scales = not sums_tokens and a.scale is not None and a.scale.ndim
    optional = {  # what there is, and the axis of its tokens
        "a": (a.values, 1 if sums_tokens else 0),
        "b": (b.values, 1 if sums_tokens else None),
        "a_scale": (a.scale, 0 if has_row_scales else None),
        "b_scale": (b.scale, None),
        "mask": (mask, None if sums_tokens else 1),
    }
    arrays = {name: array for name, (array, _) in optional.items() if array is not None}
    axes = {name: optional[name][1] for name in arrays}

    def of_part(arrays):
        a, b = (Operand(arrays[name], arrays.get(name + "_scale")) for name in "ab")
        given = options if mask is None else {**options, "mask": arrays["mask"]}
        if not sums_tokens:
            return multiply(a, b, compute_dtype, out_dtype, **given)
        return multiply(a, b, compute_dtype, np.dtype(np.float32), **given)[None]

    y = map_parts(of_part, partition, (axes,), 0)(arrays)
    return jnp.sum(y, axis=0).astype(out_dtype) if sums_tokens else y


def float8(
    a: Operand, b: Operand, compute_dtype: np.dtype, out_dtype: np.dtype, *, by_cublas: bool
) -> Float[Array, "p q"]:
    """XLA's product of float8 codes, which must have one scale each, or two.

    Args:
      a: e4m3 or e5m2.
      b: Likewise, but not both e5m2.
      compute_dtype: Of what is not quantized.
      out_dtype: Of the result.
      by_cublas: Whether the device has units for it, and the compiler does not cut the product.
    """
    # XLA makes a sum of products of one row, for which it knows no algorithm.
    is_matrix = min(len(a.values), len(b.values)) > 1
    if not (by_cublas and is_matrix and out_dtype in (jnp.bfloat16, jnp.float32)):
        # Operands are multiplied as the codes they are.
        return _multiply(a, b, a.values, b.values, compute_dtype, out_dtype)
    assert a.scale is not None  # as float8 codes have
    assert b.scale is not None
    presets = jax.lax.DotAlgorithmPreset
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue] (not declared by JAX 0.10)
    is_fast = precision in _FAST_PRECISIONS
    algorithm = presets.ANY_F8_ANY_F8_F32_FAST_ACCUM if is_fast else presets.ANY_F8_ANY_F8_F32
    return _cublas_product(a.values, b.values, a.scale * b.scale, algorithm, out_dtype)


@functools.partial(jax.jit, static_argnums=(3, 4), inline=True)
def _cublas_product(a, b, scale, algorithm, out_dtype):
    """`(a b^T) scale` in one call of cuBLASLt, which scales its float32 sums and rounds them once.

    It is written so that XLA recognizes it. The algorithm keeps the product from XLA's own
    generator of kernels, which would leave scale and rounding to a pass over a float32 result. The
    multiplication looks as if it rounded twice, and the scale before; but one by a scalar, in the
    dtype of the product, becomes part of the call, and the float32 scalar is what the call gets,
    unless the XLA option `xla_allow_excess_precision` is off: casts there and back cancel. The
    barrier keeps whatever made the scale from getting between them. So it is compiled as one, even
    where nothing else is, and `vmap` makes a loop of it: a scale for each product is no scalar.

    Where the product might not become one call, it is float32 up to the one rounding at the end.
    """
    is_one_call = out_dtype == jnp.float32 or _is_one_call(len(a), len(b), a.shape[1])
    sum_dtype = out_dtype if is_one_call else jnp.dtype(jnp.float32)

    @jax.custom_batching.sequential_vmap
    def product(a, b, scale):
        scale = jax.lax.optimization_barrier(scale)
        y = jax.lax.dot_general(
            a, b, (((1,), (1,)), ((), ())), precision=algorithm, preferred_element_type=sum_dtype
        )
        return (y * scale.astype(sum_dtype)).astype(out_dtype)

    return product(a, b, scale)


def _is_one_call(m: int, n: int, k: int) -> bool:
    """Whether XLA is sure to make one call of `(m, k)` times `(n, k)`, the scale in it.

    There are two obstacles, and after both the scale would be rounded to bfloat16, and so would the
    sum before it is multiplied. XLA cuts what it has padded out of the result. And it splits sums,
    to be added up later, where the tiles of a result are too few for the device. Its cost models
    (splitk_rewriter.cc; they change) weigh the time of one wave of tiles, which is proportional to
    k, against writing and reading m n partial sums: with none of the three that were looked at did
    it split sums of m n >= max(2**21, 256 k). Here is twice that. For less, a pass over the result
    costs at most 2**22 times 8 bytes or, where XLA splits, nothing.
    """
    is_padded = m % _CUBLAS_ROWS or n % _CUBLAS_ROWS
    return not is_padded and min(m, n) >= 64 and m * n >= max(2**22, 512 * k)


def _multiply(a: Operand, b: Operand, a_values, b_values, compute_dtype, out_dtype):
    """Sums in float32 on every backend, whatever the dtype in which the product hands them over."""
    scales = [
        scale[:, None] if scale.ndim and is_rows else scale
        for scale, is_rows in ((a.scale, True), (b.scale, False))
        if scale is not None
    ]
    sum_dtype = jnp.promote_types(compute_dtype, jnp.float32)
    # Without a scale the product itself rounds to 16 bits, as a plain one does; a float32 result
    # and a cast after it could be written to memory in between.
    y = jax.lax.dot_general(
        a_values,
        b_values,
        (((1,), (1,)), ((), ())),
        preferred_element_type=sum_dtype if scales else out_dtype,
    )
    for scale in scales:
        y = y * scale
    return y.astype(out_dtype)

"""Quantize to a `QTensor` and back, or to the rounded values without storing codes.

Definition: with the block's scale s from the rule of the spec, `quantize` stores the codes of
`round(x / s)` and `dequantize` returns `round(x / s) * s`. All arithmetic is float32, so bfloat16
input gives the codes of its float32 upcast. Eager, jitted and vmapped calls give the same bits on
one device; devices whose float32 division is not correctly rounded may move a value that lies
within an ulp of a rounding boundary, except under the power-of-two rules, which are exact.

`x * s` in float32 is not protected once it leaves this module: a caller that adds to it inside the
same `jit` may get a fused multiply-add, the sum rounded once instead of twice.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Shaped, UInt32

from lowbit_jax.numerics.formats import decode, encode, pack, unpack
from lowbit_jax.numerics.qtensor import QTensor
from lowbit_jax.numerics.rounding import round_to_grid
from lowbit_jax.numerics.scales import (
    block_scales,
    divide_by_scales,
    is_nan_scale,
    multiply_by_scales,
)
from lowbit_jax.numerics.spec import QuantSpec

Key = PRNGKeyArray | UInt32[Array, "2"] | None


def quantize(x: Shaped[ArrayLike, "..."], spec: QuantSpec, *, key: Key = None) -> QTensor:
    """Rounds `x / scale` to the grid of `spec.format`, the scale of each block by `spec.scale`.

    A block with a NaN or an infinity gets a NaN scale and decodes to NaN as a whole; a zero block
    gets codes 0 and scale 0.

    Args:
      x: `(*batch, k)`, any float dtype. Blocks run along the last axis.
      spec: Target.
      key: For stochastic rounding; otherwise not used.

    Returns:
      A `QTensor`; not differentiable, see `fake_quantize`.

    Raises:
      ValueError: If x is not floating, k is not a multiple of the block size, the codes do not
        fill whole bytes, or stochastic rounding has no key.
    """
    x = jnp.asarray(x)
    grid, _ = _to_grid("quantize", x, spec, key)
    format = spec.format
    codes = encode(grid.levels, format)
    codes = jnp.where(grid.is_live, codes, 0).astype(jnp.uint8).reshape(x.shape)
    if format.bits < 8:
        codes = pack(codes, format.bits)
    else:
        codes = lax.bitcast_convert_type(codes, format.storage)
    scales, zero_points = grid.scales, grid.zero_points
    if spec.block_size != "tensor":
        scales, zero_points = jax.tree.map(lambda s: s[..., 0], (scales, zero_points))
    return QTensor(codes, scales, grid.global_scale, spec, zero_points)


def dequantize(q: QTensor, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
    """`(level(codes) - zero_points) * scales * global_scale`, in float32, then cast to `dtype`.

    Args:
      q: From `quantize`.
      dtype: A floating dtype.

    Returns:
      `(*batch, k)`.

    Raises:
      ValueError: If the dtype is not floating.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"dequantize: dtype must be floating, got {jnp.dtype(dtype)}; the codes themselves are"
            " q.codes."
        )
    format = q.spec.format
    if format.bits < 8:
        codes = unpack(q.codes, format.bits)
    else:
        codes = lax.bitcast_convert_type(q.codes, jnp.uint8)
    scales, zero_points = q.scales, q.zero_points
    if q.spec.block_size != "tensor":
        scales, zero_points = jax.tree.map(lambda s: s[..., None], (scales, zero_points))
    levels = _to_blocks(decode(codes, format), q.spec)
    if zero_points is not None:
        levels = levels - zero_points.astype(jnp.float32)
    values = multiply_by_scales(levels, scales, q.global_scale)
    return values.reshape(codes.shape).astype(dtype)


def quantize_values(
    x: Shaped[ArrayLike, "..."], spec: QuantSpec, *, key: Key = None
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """`dequantize(quantize(x))` bit for bit, without packing, and `x` in units of its scale.

    Args:
      x: `(*batch, k)`, any float dtype; k need not make whole bytes.
      spec: Target.
      key: For stochastic rounding.

    Returns:
      `(values, units)`, both float32 `(*batch, k)`: the rounded values and `x / scale`, plus the
      zero point if there is one, which is 0 in a zero block and NaN in a non-finite one. Masks
      compare the units with the grid.

    Raises:
      ValueError: As `quantize`, whole bytes excepted.
    """
    x = jnp.asarray(x)
    grid, units = _to_grid("quantize_values", x, spec, key)
    levels = grid.levels
    if grid.zero_points is not None:
        levels = levels - grid.zero_points.astype(jnp.float32)
    values = multiply_by_scales(levels, grid.scales, grid.global_scale)
    return values.reshape(x.shape), units.reshape(x.shape)


class _Grid(NamedTuple):
    levels: jax.Array  # in blocks
    scales: jax.Array
    global_scale: jax.Array | None
    is_live: jax.Array
    zero_points: jax.Array | None


def _to_grid(who, x, spec, key):
    """Blocks of `x` rounded to levels, with their scales, and `x` in units of the scale."""
    _check(who, x, spec, key)
    blocks = _to_blocks(x.astype(jnp.float32), spec)
    axis = tuple(range(max(x.ndim - 2, 0), x.ndim)) if spec.block_size == "tensor" else -1
    found = block_scales(blocks, spec.format, spec.scale, axis)
    scales, global_scale, is_live, zero_points = found
    units = divide_by_scales(blocks, scales, global_scale)
    if zero_points is not None:
        units = units + zero_points.astype(jnp.float32)
    units = jnp.where(is_live, units, 0)
    # Rounded in the shape of x, so that the random bits do not depend on the block size.
    levels = round_to_grid(units.reshape(x.shape), spec.format, spec.rounding, key)
    units = jnp.where(is_nan_scale(scales), jnp.float32(jnp.nan), units)
    levels = levels.reshape(blocks.shape)
    return _Grid(levels, scales, global_scale, is_live, zero_points), units


def _to_blocks(x, spec):
    if spec.block_size == "tensor":
        return x
    *batch, k = x.shape
    block_size = spec.block_size or k
    return x.reshape(*batch, k // block_size, block_size)


def _check(who, x, spec, key):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{who}: x must be floating, got {x.dtype}; cast it first, or if these are codes,"
            " use dequantize."
        )
    if x.ndim == 0 or x.size == 0:
        raise ValueError(f"{who}: x needs at least one axis and one element, got shape {x.shape}.")
    if isinstance(spec.block_size, int) and x.shape[-1] % spec.block_size:
        raise ValueError(
            f"{who}: the last axis must be a multiple of block_size={spec.block_size}, got shape"
            f" {x.shape}; pad it or choose a smaller block."
        )
    if spec.rounding == "stochastic" and key is None:
        raise ValueError(
            f"{who}: {spec} rounds stochastically and needs a random key, got key=None; pass"
            " key=jax.random.key(...), a new one every step."
        )

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
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Shaped, UInt32

from lowbit_jax.numerics.eden import eden_round
from lowbit_jax.numerics.formats import decode, encode, pack, unpack
from lowbit_jax.numerics.qtensor import QTensor
from lowbit_jax.numerics.rounding import round_to_grid
from lowbit_jax.numerics.scales import (
    block_scales,
    divide_by_scales,
    is_nan_scale,
    multiply_by_scales,
)
from lowbit_jax.numerics.spec import E4M3_RULES, QuantSpec

Key = PRNGKeyArray | UInt32[Array, "2"] | None


class Factored(NamedTuple):
    """A quantized array as `values * scale`, the factor apart that a row or the whole array shares.

    A product over rows can take the values and multiply its result by the scales. Where the
    scales of smaller blocks are E8M0 or E4M3, or there are none, the values have so few
    significant bits that bfloat16 holds them: those of the format, plus 4 under E4M3.

    Attributes:
      values: `(*batch, k)` float32: levels, times the scales of their blocks unless these are the
        factor.
      scale: Float32: `(*batch, 1)` for one scale a row, `(*batch, 1, 1)` for one an array, `()` for
        a global scale; None stands for 1.
    """

    values: jax.Array
    scale: jax.Array | None

    def multiply(self) -> Float[Array, "..."]:
        """The array, float32."""
        return self.values if self.scale is None else self.values * self.scale


def quantize(
    x: Shaped[ArrayLike, "..."],
    spec: QuantSpec,
    *,
    key: Key = None,
    global_scale: Float[ArrayLike, ""] | None = None,
) -> QTensor:
    """Rounds `x / scale` to the grid of `spec.format`, the scale of each block by `spec.scale`.

    A block with a NaN or an infinity gets a NaN scale and decodes to NaN as a whole; a zero block
    gets codes 0 and scale 0.

    Args:
      x: `(*batch, k)`, any float dtype. Blocks run along the last axis.
      spec: Target.
      key: For a spec that needs one; otherwise not used.
      global_scale: Of the E4M3 rules: one that was found before, such as for inputs by calibration,
        so that no element depends on the others beyond its block. What exceeds 448 times it times
        the outermost level saturates. None: from the abs-max of x.

    Returns:
      A `QTensor`; not differentiable, see `fake_quantize`.

    Raises:
      ValueError: If x is not floating, k is not a multiple of the block size, the codes do not
        fill whole bytes, a spec that needs a key has none, or one without a global scale gets one.
    """
    x = jnp.asarray(x)
    grid, is_live, _ = _to_grid("quantize", x, spec, key, global_scale)
    format = spec.format
    codes = encode(grid.levels, format)
    codes = jnp.where(is_live, codes, 0).astype(jnp.uint8).reshape(x.shape)
    if format.bits < 8:
        codes = pack(codes, format.bits)
    else:
        codes = lax.bitcast_convert_type(codes, format.storage)
    scales, zero_points = grid.scales, grid.zero_points
    if spec.block_size != "tensor":
        axes = _block_axes(spec, x.ndim)
        scales, zero_points = jax.tree.map(lambda s: s.squeeze(axes), (scales, zero_points))
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
    return factor(q).multiply().astype(dtype)


def factor(q: QTensor) -> Factored:
    """The two factors of `dequantize(q)`, which is their product bit for bit."""
    format = q.spec.format
    if format.bits < 8:
        codes = unpack(q.codes, format.bits)
    else:
        codes = lax.bitcast_convert_type(q.codes, jnp.uint8)
    scales, zero_points = q.scales, q.zero_points
    if q.spec.block_size != "tensor":
        axes = _block_axes(q.spec, codes.ndim)
        scales, zero_points = jax.tree.map(
            lambda s: jnp.expand_dims(s, axes), (scales, zero_points)
        )
    levels = _to_blocks(decode(codes, format), q.spec)
    grid = _Grid(levels, scales, q.global_scale, zero_points)
    return _factor(grid, q.spec, codes.shape)


def quantize_values(
    x: Shaped[ArrayLike, "..."], spec: QuantSpec, *, key: Key = None
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """`dequantize(quantize(x))` bit for bit, without packing, and `x` in units of its scale.

    Args:
      x: `(*batch, k)`, any float dtype; k need not make whole bytes.
      spec: Target.
      key: For a spec that needs one.

    Returns:
      `(values, units)`, both float32 `(*batch, k)`: the rounded values and `x / scale`, plus the
      zero point if there is one, which is 0 in a zero block and NaN in a non-finite one. Masks
      compare the units with the grid.

    Raises:
      ValueError: As `quantize`, whole bytes excepted.
    """
    factored, units = quantize_factored(x, spec, key=key)
    return factored.multiply(), units


def quantize_factored(
    x: Shaped[ArrayLike, "..."],
    spec: QuantSpec,
    *,
    key: Key = None,
    global_scale: Float[ArrayLike, ""] | None = None,
) -> tuple[Factored, Float[Array, "..."]]:
    """`factor(quantize(x))` bit for bit, without packing, and the units of `quantize_values`.

    Args:
      x: `(*batch, k)`, any float dtype; k need not make whole bytes.
      spec: Target.
      key: For a spec that needs one.
      global_scale: See `quantize`.

    Raises:
      ValueError: As `quantize`, whole bytes excepted.
    """
    x = jnp.asarray(x)
    grid, _, units = _to_grid("quantize_values", x, spec, key, global_scale)
    return _factor(grid, spec, x.shape), units.reshape(x.shape)


def to_units(x: Shaped[ArrayLike, "..."], spec: QuantSpec) -> Float[Array, "..."]:
    """The units of `quantize_values`, without rounding anything.

    Args:
      x: `(*batch, k)`, any float dtype.
      spec: Target; its rounding does not matter.

    Returns:
      Float32 `(*batch, k)`: `x / scale`, plus the zero point if there is one; 0 in a zero block,
      NaN in a non-finite one.

    Raises:
      ValueError: As `quantize_values`, but for the key.
    """
    x = jnp.asarray(x)
    _check("to_units", x, spec)
    found, units = _find_scales(x, spec)
    return _mark_non_finite(units, found.scales).reshape(x.shape)


class _Grid(NamedTuple):
    levels: jax.Array  # in blocks
    scales: jax.Array
    global_scale: jax.Array | None
    zero_points: jax.Array | None


def _factor(grid: _Grid, spec: QuantSpec, shape: tuple[int, ...]) -> Factored:
    levels, scales = grid.levels, grid.scales
    if grid.zero_points is not None:
        levels = levels - grid.zero_points.astype(jnp.float32)
    is_shared = spec.block_size in (None, "tensor") and spec.block_rows == 1
    if is_shared and scales.dtype == jnp.float32:
        if spec.block_size is None:
            scales = scales.squeeze(-1)
        return Factored(levels.reshape(shape), scales)
    return Factored(multiply_by_scales(levels, scales, None).reshape(shape), grid.global_scale)


def _to_grid(who, x, spec, key, global_scale=None):
    """Blocks of `x` rounded to levels, which are neither zero nor bad, and `x` in their units."""
    _check(who, x, spec)
    _check_key(who, spec, key)
    if global_scale is not None:
        if spec.scale not in E4M3_RULES:
            raise ValueError(
                f"{who}: global_scale is for {' and '.join(E4M3_RULES)}, got it for {spec}; leave"
                " it None."
            )
        global_scale = jnp.asarray(global_scale, jnp.float32)
    (scales, global_scale, is_live, zero_points), units = _find_scales(x, spec, global_scale)
    with jax.named_scope("lowbit_quantize"):  # to find it in a jaxpr or a profile
        if spec.rounding == "eden":
            levels, scales = eden_round(units, scales, spec, key)
            is_live = is_live & (scales.astype(jnp.float32) != 0)
        else:
            # In the shape of x, so that the random bits do not depend on the block size.
            flat = round_to_grid(units.reshape(x.shape), spec.format, spec.rounding, key)
            levels = flat.reshape(units.shape)
    if spec.gain != 1:
        assert global_scale is not None  # as QuantSpec demands
        global_scale = global_scale * np.float32(spec.gain)
    grid = _Grid(levels, scales, global_scale, zero_points)
    return grid, is_live, _mark_non_finite(units, scales)


def _find_scales(x, spec, global_scale=None):
    """The scales of the blocks of `x`, and the blocks in their units, 0 in those not live."""
    blocks = _to_blocks(x.astype(jnp.float32), spec)
    found = block_scales(blocks, spec, _block_axes(spec, x.ndim), global_scale)
    units = divide_by_scales(blocks, found.scales, found.global_scale)
    if found.zero_points is not None:
        units = units + found.zero_points.astype(jnp.float32)
    return found, jnp.where(found.is_live, units, 0)


def _mark_non_finite(units, scales):
    return jnp.where(is_nan_scale(scales), jnp.float32(jnp.nan), units)


def _to_blocks(x, spec):
    """`x` with the entries that share a scale along axes of their own; see `_block_axes`."""
    if spec.block_size == "tensor":
        return x
    *batch, k = x.shape
    block_size = spec.block_size or k
    if spec.block_rows == 1:
        return x.reshape(*batch, k // block_size, block_size)
    *batch, n = batch
    rows = spec.block_rows
    return x.reshape(*batch, n // rows, rows, k // block_size, block_size)


def _block_axes(spec, ndim):
    """The axes of `_to_blocks` over which a scale is shared, counted from the end."""
    if spec.block_size == "tensor":
        return tuple(range(-min(ndim, 2), 0))
    return -1 if spec.block_rows == 1 else (-3, -1)


def _check(who, x, spec):
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
    if spec.block_rows > 1 and (x.ndim < 2 or x.shape[-2] % spec.block_rows):
        raise ValueError(
            f"{who}: the last axis but one must be a multiple of block_rows={spec.block_rows}, got"
            f" shape {x.shape}; pad it or choose a smaller block."
        )
    if spec.correction_block is not None and x.shape[-1] % spec.correction_block:
        raise ValueError(
            f"{who}: the last axis must be a multiple of correction_block={spec.correction_block},"
            f" got shape {x.shape}; pad it or leave correction_block at None."
        )


def _check_key(who, spec, key):
    if spec.needs_key and key is None:
        raise ValueError(
            f"{who}: {spec} rounds at random and needs a random key, got key=None; pass"
            " key=jax.random.key(...), a new one every step."
        )

"""Quantizes a rotated chunk in registers: the scales of its blocks, and rounding without division.

Formats with blocks are computed in units of the one scale of the folded operand, a power of two, so
that the level is what is stored. Rounding to nearest takes no table and no comparison: with
t = max(|v|, scale) the distance of the levels of e2m1 round v is `2**(exponent(t) - 1)`, which is
also the last bit of `big = 1.5 * 2**(22 + exponent(t))`; so `(v + big) - big` rounds v to the grid,
ties to the even code. At random, bits are added to the number's own below the one of the mantissa
that stays, see `registers.round_at_random`. The scale of a block with a NaN or an infinity is NaN,
which makes all its values NaN.

Scales follow the rules of `lowbit_jax.numerics.scales` bit by bit, but for sums of squares: those
are float32 sums here, and there of a fixed point that does not depend on the order.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowbit_jax.numerics import QuantSpec
from lowbit_jax.numerics.random_bits import swap_halves
from lowbit_jax.numerics.spec import GAUSSIAN_ALPHA, RMS_RULES
from pallas_kernels.folded import folded_format
from pallas_kernels.rotate_quantize.reference import Target
from pallas_kernels.rotate_quantize.registers import (
    CHUNK,
    GROUP,
    along_rows,
    binade,
    bits_of,
    complements,
    float_of,
    floor,
    round_at_random,
    smallest_normal,
    to_nearest,
)

_EXPONENT = np.int32(0x7F800000)
_FOUR = np.int32(129 << 23)  # the bits of 4.0
_CLIPPING_RULES = ("absmax_floor", *RMS_RULES)  # to nearest
_FITTING_RULES = ("absmax_floor43", "absmax_ceil")  # nothing exceeds the outermost level
# Added to the bits of an abs-max to round its logarithm up; the other rules round down.
_ROUND_UP = {"absmax_ct175": np.int32(1 << 21), "absmax_ceil": np.int32(0x3FFFFF)}


@dataclasses.dataclass(frozen=True)
class Side:
    """What one pass does along one axis.

    Attributes:
      target: Format, rule and rotation.
      is_written: Writes the operand; or else a statistic of each row of a tile, from which the
        scale of the row or of the array follows: the sum of squares of the rotated entries for the
        rule "rms", the largest magnitude for the others.
    """

    target: Target
    is_written: bool = True

    @property
    def spec(self) -> QuantSpec:
        """Format and rule."""
        return self.target.spec

    @property
    def is_signed(self) -> bool:
        """Whether every coordinate has its own sign."""
        return self.target.is_signed

    @property
    def span(self) -> int:
        """Entries along the axis that one rotated chunk is made of."""
        return max(CHUNK, self.target.transform)

    @property
    def factor(self) -> np.float32:
        """That the transform is multiplied by last."""
        return np.float32(self.target.transform**-0.5)

    @property
    def storage(self) -> np.dtype:
        """The dtype of the operand."""
        return np.dtype(jnp.bfloat16 if self.target.is_nvfp4 else folded_format(self.spec).storage)


class Chunk(NamedTuple):
    """A rotated chunk of 64 rows and 64 columns, quantized."""

    values: Any  # float32 (64, 64): what is stored
    again: Any  # bfloat16 (64, 64): dequantized, in units of the operand's scale; None if not asked
    mask: list[jax.Array]  # int32 (64,) for each 32 columns


def quantize_blocks(
    y,
    side: Side,
    inverse,
    *,
    sign=None,
    seed=None,
    column=0,
    mask_bound=None,
    again=None,
    interpret=False,
) -> Chunk:
    """Rounds a chunk of rows with power-of-two scales of blocks.

    Args:
      y: float32 `(64, 64)`, the sums of the rotation.
      side: What is asked for.
      inverse: float32 `(64,)`: a power of two that turns the rotated numbers into units of the
        scale of the folded operand.
      sign: float32 `(64,)`: the chunk is this times the sums, +1 or -1 for each row; None: +1.
      seed: uint32 `(64,)`, for random bits, if these are to round.
      column: Of the first entry of the chunk, a multiple of 64.
      mask_bound: Of the mask; None: none.
      again: float32 `(64,)`: dequantizes the chunk, and multiplies it by this; None: does not.
      interpret: On the CPU.
    """
    word = None
    if seed is None:
        factor = side.factor * inverse
        y = y * along_rows(factor if sign is None else sign * factor, y.shape)
    else:
        word = complements(seed, column)
    values, mask = [], []
    for half in range(CHUNK // GROUP):
        v = y[:, half * GROUP : (half + 1) * GROUP]
        if word is None:
            v, keep = _round_to_nearest(v, side, mask_bound)
        else:
            bits = swap_halves(word) if half else word
            v, keep = _round_at_random(v, side, inverse, sign, bits, mask_bound, interpret)
        values.append(v)
        if keep is not None:
            mask.append(_pack(keep))
    values = lax.concatenate(values, 1)
    if again is not None:
        dequantized = values.astype(jnp.bfloat16)
        again = dequantized * along_rows(again.astype(jnp.bfloat16), dequantized.shape)
    return Chunk(values, again, mask)


def _round_to_nearest(v, side, mask_bound):
    """The e2m1 levels that v is nearest to, see the module, and where it is within the mask."""
    rule, format = side.spec.scale, side.spec.format
    if rule in RMS_RULES:
        scale = _scale_by_squares(v, rule, format)
    else:
        scale = _scale_by_absmax(jnp.max(jnp.abs(v), axis=1), rule)
    if rule == "absmax_floor43":
        v = v * np.float32(0.75)
    keep = None
    if mask_bound is not None:
        keep = jnp.abs(v) <= along_rows(scale * np.float32(mask_bound), v.shape)
    v = to_nearest(v, jnp.maximum(jnp.abs(v), along_rows(scale, v.shape)), format.mantissa_bits)
    if rule in _CLIPPING_RULES:  # by the others nothing reaches 7, where 8 is nearer than 6
        top = along_rows(scale * np.float32(format.max), v.shape)
        v = jnp.minimum(jnp.maximum(v, -top), top)
    return v, keep


def _round_at_random(sums, side, inverse, sign, complement, mask_bound, interpret):
    """The e2m1 levels above or below the sums, see `round_at_random`; takes `~bits`.

    The inverse of a scale, in units of the smallest normal number, is a number up to 1, which no
    scale exceeds unless numbers exceed their bound by more than `2**40`; a larger one counts as 1,
    and what is stored saturates.

    As `numerics.stochastic_round` but for what two products by constants round in one, too.
    """
    rule, top = side.spec.scale, side.spec.format.max
    absmax = jnp.max(jnp.abs(sums), axis=1) * side.factor
    scale = _scale_by_absmax(absmax, rule, _FOUR)
    unit = smallest_normal(interpret=interpret)
    factor = float_of(np.int32((254 if interpret else 128) << 23) - bits_of(scale))
    factor = factor * (side.factor * np.float32(0.75 if rule == "absmax_floor43" else 1))
    v = sums * along_rows(factor if sign is None else factor * sign, sums.shape)
    keep = None
    if mask_bound is not None:
        keep = jnp.abs(v) <= np.float32(mask_bound) * unit
    if rule not in _FITTING_RULES:
        v = jnp.minimum(jnp.maximum(v, -np.float32(top) * unit), np.float32(top) * unit)
    v = round_at_random(v, complement, interpret=interpret)
    # Scaled in two steps, for `scale * inverse * 2**126` can be 2**139.
    return v * along_rows(scale * (inverse * np.float32(2.0**26)), v.shape), keep


def _scale_by_absmax(absmax, rule, top=None):
    """The scale of each row, NaN if its abs-max is no finite number; 0 of zeros.

    As if the abs-max were no larger than the number with the bits `top`, if there is one.
    """
    bits = bits_of(absmax)
    if top is not None or rule in _ROUND_UP:
        bits = jnp.minimum(bits, _EXPONENT if top is None else top) + _ROUND_UP.get(rule, 0)
    return binade(float_of(bits)) * np.float32(0.25) + absmax * np.float32(0)


def _scale_by_squares(v, rule, format):
    """The scale of each row, NaN if one entry is no finite number; tiny for zeros."""
    if rule == "std_floor":
        mean = jnp.sum(v, axis=1) * np.float32(1 / GROUP)
        v = v - along_rows(mean, v.shape)
    alpha = (GAUSSIAN_ALPHA[format.name] / format.max) ** 2
    # Its exponent is halved, rounded down, by a shift; to nearest with twice the square.
    twice = 2 * (2 if rule == "rms_nearest" else 1)
    square = jnp.sum(v * v, axis=1) * np.float32(twice * alpha / GROUP)
    scale = binade(float_of((bits_of(square) >> 1) + np.int32(63 << 23)))
    return scale + square * np.float32(0)


def quantize_rows(y, side: Side, scale, *, sign=None, mask_bound=None) -> Chunk:
    """Formats with one scale a row or a tensor: y over the scale, rounded to the levels.

    Args:
      y: float32 `(64, 64)`, the sums of the rotation.
      side: What is asked for.
      scale: float32 `(64,)`, of the rows, or `()`.
      sign: float32 `(64,)`: the chunk is this times the sums, a power of two for each row, or
        minus one; None: 1.
      mask_bound: Of the mask; None: none.
    """
    format = side.spec.format
    is_live = scale > 0  # else the row counts as zeros
    divisor = jnp.where(is_live, scale, np.float32(1))
    factor = jnp.where(is_live, side.factor, np.float32(0))
    if scale.ndim:
        factor, divisor = (along_rows(v, y.shape) for v in (factor, divisor))
    if sign is not None:
        y = y * along_rows(sign, y.shape)
    units = y * factor / divisor
    mask = []
    if mask_bound is not None:
        keep = jnp.abs(units) <= np.float32(mask_bound)
        mask = [_pack(keep[:, first : first + GROUP]) for first in range(0, CHUNK, GROUP)]
    if format.kind == "midrise":
        return Chunk(_round_midrise(units, format), None, mask)
    # Rounded where they are stored. An infinity would be the largest number there.
    return Chunk(units + y * np.float32(0), None, mask)


def statistic(found, y, side: Side):
    """That of each row in the chunks up to this one; `found` is None before the first."""
    z = y * side.factor
    if side.spec.scale == "rms":
        new = jnp.sum(z * z, axis=1)
        return new if found is None else found + new
    # As integers, of which NaN is the largest: what XLA makes of maxima for a CPU may lose it.
    new = jnp.max(bits_of(jnp.abs(z)), axis=1)
    if side.target.is_nvfp4:
        # The maximum of all chunks that are finite: a NaN must not hide those beside it.
        new = jnp.where(new < np.int32(0x7F800000), new, 0)
    return float_of(new if found is None else jnp.maximum(bits_of(found), new))


def _round_midrise(y, format):
    """Twice the level, an odd integer, as `numerics.round_to_grid` chooses it."""
    low = floor(y)
    is_odd = low != 2 * floor(low * np.float32(0.5))
    low = jnp.where((low == y) & is_odd, low - 1, low)
    count = np.float32(2.0 ** (format.bits - 1))
    return 2 * jnp.clip(low, -count, count - 1) + 1


def _pack(keep):
    """Bit j of a row's word is column j."""
    bits = jnp.left_shift(jnp.int32(1), lax.broadcasted_iota(jnp.int32, keep.shape, 1))
    return jnp.sum(jnp.where(keep, bits, 0), axis=1)


def stored(values, dtype: np.dtype, *, interpret: bool):
    """Values of a chunk in FP8, rounded to nearest; saturates. Or in bfloat16, which holds them."""
    if interpret and dtype != jnp.bfloat16:
        # The instruction of the GPU saturates, the conversion of XLA does not.
        top = np.float32(jnp.finfo(dtype).max)
        values = jnp.clip(values, -top, top)
    return values.astype(dtype)

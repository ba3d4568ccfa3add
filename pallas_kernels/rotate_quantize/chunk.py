"""Quantizes a rotated chunk in registers: the scales of its blocks, and rounding without division.

A block is rounded in units of a power of two. To nearest it takes no table and no comparison: with
t = max(|v|, scale) the distance of the levels of e2m1 round v is `2**(exponent(t) - 1)`, which is
also the last bit of `big = 1.5 * 2**(22 + exponent(t))`; so `(v + big) - big` rounds v to the grid,
ties to the even code. The units are those of the row's scale of the folded operand, so that the
level is what is stored; or a binade of the block's abs-max, in which its squares are summed too. At
random, in units of the block's scale, bits are added to the number's own below the one of the
mantissa that stays, see `_round_stochastically`; a last product turns the level into units of the
row's scale.

On a Hopper GPU minima, comparisons and logic take twice as long as products and sums, which is why
some things here are products.

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
from lowbit_jax.numerics.floats import SMALLEST_NORMAL
from lowbit_jax.numerics.formats import E4M3
from lowbit_jax.numerics.random_bits import pair_bits, swap_halves
from lowbit_jax.numerics.spec import GAUSSIAN_ALPHA, POWER_OF_TWO_RULES

CHUNK = 64  # rows and columns of a chunk, what one product of matrices rotates
GROUP = 32  # entries that share a power-of-two scale

_SIGN = np.int32(-(2**31))
_EXPONENT = np.int32(0x7F800000)
_RANDOM_BITS = 22  # of a float32 below its first bit of mantissa
_REACH = 40  # binades; e4m3 spans 18
_LARGEST = np.float32(2.0**100)  # factor of a block; far beyond e4m3, 6 times it far below infinity
_SQUARES_RULES = ("rms_nearest", "std_floor")
_CLIPPING_RULES = ("absmax_floor", *_SQUARES_RULES)


@dataclasses.dataclass(frozen=True)
class Side:
    """What one pass does along one axis.

    Attributes:
      spec: Format and rule.
      block_size: Of the Hadamard transform; 1: none.
      is_signed: Whether every coordinate has its own sign.
      is_written: Writes the operand.
      is_emitted: Writes a statistic of each tile for every row, see `statistic_of`.
      is_given: Whether the scales were given, so that they need not tell of NaNs and infinities.
    """

    spec: QuantSpec
    block_size: int
    is_signed: bool
    is_written: bool
    is_emitted: bool
    is_given: bool

    @property
    def span(self) -> int:
        """Entries along the axis that one rotated chunk is made of."""
        return max(CHUNK, self.block_size)

    @property
    def factor(self) -> np.float32:
        """That the transform is multiplied by last."""
        return np.float32(self.block_size**-0.5)

    @property
    def has_blocks(self) -> bool:
        """Whether the format has a power-of-two scale a block, not one scale a row."""
        return self.spec.scale in POWER_OF_TWO_RULES


def statistic_of(spec: QuantSpec) -> str:
    """What a pass emits for each row of a tile.

    "absmax": the largest magnitude of the rotated entries, from which the scale follows; "squares":
    the sum of their squares; "scale": the largest scale of the blocks.
    """
    if spec.scale in _SQUARES_RULES:
        return "scale"
    return "squares" if spec.scale == "rms" else "absmax"


class Chunk(NamedTuple):
    """A rotated chunk of 64 rows and 64 columns, quantized."""

    values: Any  # float32 (64, 64): what is stored as e4m3; None without scales
    again: Any  # bfloat16 (64, 64): dequantized; None if not asked for
    statistic: Any  # float32 (64,); None if not emitted
    mask: list[jax.Array]  # int32 (64,) for each 32 columns


def quantize_chunk(
    y,
    side: Side,
    scale,
    *,
    sign=None,
    seed=None,
    column=0,
    mask_bound=None,
    again=None,
) -> Chunk:
    """Rounds a chunk of rows in units of their scales; without scales only takes its statistic.

    Args:
      y: float32 `(64, 64)`, the sums of the rotation.
      side: What is asked for.
      scale: float32 `(64,)`, a power of two for scales of blocks, or that of the whole row; None.
      sign: float32 `(64,)`: the chunk is this times the sums, +1 or -1 for each row; None: +1.
      seed: uint32 `(64,)`, for random bits; None to round to nearest.
      column: Of the first entry of the chunk, a multiple of 64.
      mask_bound: Of the mask; None: none.
      again: float32 `(64,)`: dequantizes the chunk, also without scales, and multiplies it by this;
        for scales of blocks. None: does not.
    """
    if not side.has_blocks:
        return _quantize_rows(y, side, scale, sign, mask_bound)
    is_rounded = scale is not None or again is not None
    if not is_rounded and side.spec.scale not in _SQUARES_RULES:
        absmax = jnp.max(jnp.abs(y), axis=1) * side.factor
        return Chunk(None, None, absmax, [])
    word = None
    if is_rounded and seed is not None:
        shape = (CHUNK, GROUP)
        pairs = lax.broadcasted_iota(jnp.int32, shape, 1) + lax.div(column, 2)
        word = ~pair_bits(along_rows(seed, shape), pairs.astype(jnp.uint32))
    unit = inverse = None
    if scale is not None and side.spec.rounding == "nearest":
        unit = _bits(scale) >> 23  # what is rounded in these units is what is stored
    elif scale is not None:
        inverse = _float((252 << 23) - _bits(scale))  # a quarter of one over the scale
    values, dequantized, found, mask = [], [], [], []
    for half in range(CHUNK // GROUP):
        block = y[:, half * GROUP : (half + 1) * GROUP]
        absmax = jnp.max(jnp.abs(block), axis=1) * side.factor
        unless_finite = absmax * np.float32(0)  # zero, or NaN if an entry is not finite
        four, units = _in_units(block, absmax, unit, sign, side)
        if side.spec.scale in _SQUARES_RULES:
            level = (_float(four) + unless_finite) * np.float32(0.25)
            found.append(jnp.maximum(level, SMALLEST_NORMAL))
        else:
            found.append(absmax)
        if not is_rounded:
            continue
        v = units.values
        if mask_bound is not None:
            mask.append(_pack(jnp.abs(v) <= units.steps(mask_bound, v)))
        if word is None:
            v = _round_to_nearest(v, units)
        else:
            v = _round_stochastically(v, swap_halves(word) if half else word, side)
        if scale is None:
            # bfloat16 holds all that follows, of which an instruction takes two.
            v = v.astype(jnp.bfloat16)
        # By the other rules nothing reaches 7, where 8 is nearer than 6.
        if word is None and side.spec.scale in _CLIPPING_RULES:
            top = units.steps(side.spec.format.max, v)
            v = jnp.minimum(jnp.maximum(v, -top), top)
        four = _float(units.four) + unless_finite
        if again is not None:
            factor = (four * (again * np.float32(0.25))).astype(v.dtype)
            dequantized.append((v * along_rows(factor, v.shape)).astype(jnp.bfloat16))
        if unit is not None:
            values.append(v)
        elif inverse is not None:
            # Blocks far above a reference that was given saturate.
            values.append(v * along_rows(jnp.minimum(four * inverse, _LARGEST), v.shape))
    return Chunk(
        lax.concatenate(values, 1) if values else None,
        lax.concatenate(dequantized, 1) if dequantized else None,
        jnp.maximum(*found) if side.is_emitted else None,
        mask,
    )


class _Units(NamedTuple):
    """A block in units of a power of two for each row."""

    values: jax.Array  # float32 (64, 32); zeros where the abs-max is subnormal
    four: jax.Array  # int32 (64,): the bits of four times the unit, a normal number always
    scale: jax.Array | None  # float32 (64,): the scale in these units, a power of two; None: 1

    def steps(self, count, like):
        """So many times the scale, for each entry of an array."""
        if self.scale is None:
            return like.dtype.type(count)
        return along_rows((self.scale * np.float32(count)).astype(like.dtype), like.shape)


def _in_units(block, absmax, unit, sign, side):
    """The bits of four times the scale of each row, a normal number, and the block in units.

    The scale as `numerics.scales` defines it and clips it, to `2**-127` and what float32 holds.
    `unit` is the exponent of the unit, as float32 has it, or None: of the scale, or near the
    abs-max. It is only followed `_REACH` binades from the abs-max: farther all saturates in e4m3
    or is a zero.
    """
    rule = side.spec.scale
    # A product, as selecting takes a comparison more.
    is_live = jnp.minimum(_binade(absmax) * np.float32(2.0**127), np.float32(1))
    if sign is not None:
        is_live = is_live * sign
    binade = _bits(absmax) >> 23
    if unit is not None:
        unit = jnp.minimum(jnp.maximum(unit, binade - _REACH), binade + _REACH)
    if rule in _SQUARES_RULES:
        # So that no square leaves float32.
        unit = jnp.minimum(binade, 247) if unit is None else unit
        factor = _float((254 - unit) << 23) * side.factor * is_live
        z = block * along_rows(factor, block.shape)
        four = jnp.clip(_exponent_by_squares(z, side) + unit, 2, 254) << 23
        scale = _float(four - ((unit - 125) << 23))
        if side.spec.rounding == "nearest":
            return four, _Units(z, (unit + 2) << 23, scale)
        inverse = _float((254 << 23) - _bits(scale))
        return four, _Units(z * along_rows(inverse, z.shape), four, None)
    lowest, highest = np.int32(2 << 23), np.int32(254 << 23)
    up = {"absmax_ct175": 1 << 21, "absmax_ceil": 0x3FFFFF}.get(rule, 0)
    four = jnp.maximum((_bits(absmax) + np.int32(up)) & _EXPONENT, lowest)
    if rule == "absmax_floor43":
        four = jnp.minimum(four, highest - (1 << 23))
    elif up:
        four = jnp.minimum(four, highest)
    scale, of_unit = None, four
    if unit is not None:
        of_unit = (unit + 2) << 23
        scale = _float(four - ((unit - 125) << 23))
    inverse = _float(_SIGN - of_unit)  # one over the unit
    if rule == "absmax_floor43":
        block = block * side.factor  # two roundings, as in the definition
        factor = inverse * np.float32(0.75)
    else:
        factor = inverse * side.factor
    return four, _Units(block * along_rows(factor * is_live, block.shape), of_unit, scale)


def _exponent_by_squares(z, side):
    """The exponent of the scale of each row, in units of z, plus two; not clipped."""
    rule, format = side.spec.scale, side.spec.format
    if rule == "std_floor":
        mean = jnp.sum(z, axis=1) * np.float32(1 / GROUP)
        z = z - along_rows(mean, z.shape)
    # Half the logarithm of the square, rounded down; to nearest with twice the square.
    alpha = (GAUSSIAN_ALPHA[format.name] / format.max) ** 2
    square = jnp.sum(z * z, axis=1) * np.float32(
        (2 if rule == "rms_nearest" else 1) * alpha / GROUP
    )
    return ((_bits(square) + (1 << 23)) >> 24) - 62


def _round_to_nearest(v, units):
    """The e2m1 level that v is nearest to, up to 8 and beyond; see the module."""
    big = _binade(jnp.maximum(jnp.abs(v), units.steps(1, v))) * np.float32(1.5 * 2.0**22)
    return (v + big) - big


def _round_stochastically(v, complement, side):
    """Up where `bits / 2**32` is below the distance to the lower level, in steps; takes `~bits`.

    One bit of the mantissa stays. The complement of the first 22 random bits is added to the 22
    below it, which carries where it should, and those are cut off. Magnitudes below 1, the
    subnormal range of e2m1, have the same step as those from 1 to 2, so that 1 is added to them
    first. As `numerics.stochastic_round`, bit by bit for magnitudes from 1 on; below, the sum is
    rounded to `2**-22` steps, so that it is the other level once in `2**22` entries at most.
    """
    if side.spec.scale not in ("absmax_floor43", "absmax_ceil"):  # by which nothing exceeds 6
        top = np.float32(side.spec.format.max)
        v = jnp.minimum(jnp.maximum(v, -top), top)
    offset = (jnp.abs(v) < 1).astype(jnp.float32)
    offset = _float(_bits(offset) | (_bits(v) & _SIGN))
    random = lax.bitcast_convert_type(complement >> (32 - _RANDOM_BITS), jnp.int32)
    rounded = (_bits(v + offset) + random) & np.int32(-(1 << _RANDOM_BITS))
    return _float(rounded) - offset  # zero has no sign: 1 - 1 or -1 + 1


def _quantize_rows(y, side, scale, sign, mask_bound) -> Chunk:
    """Formats with one scale a row: y over the scale, rounded to the levels."""
    format = side.spec.format
    statistic = None
    if side.is_emitted:
        z = y * side.factor
        is_sum = statistic_of(side.spec) == "squares"
        statistic = jnp.sum(z * z, axis=1) if is_sum else jnp.max(jnp.abs(z), axis=1)
    if scale is None:
        return Chunk(None, None, statistic, [])
    is_live = scale > 0  # else the row counts as zeros
    divisor = jnp.where(is_live, scale, np.float32(1))
    factor = jnp.where(is_live, side.factor, np.float32(0))
    if sign is not None:
        y = jnp.where(y == 0, y, y * along_rows(sign, y.shape))  # e4m3 has a zero of each sign
    units = y * along_rows(factor, y.shape) / along_rows(divisor, y.shape)
    mask = []
    if mask_bound is not None:
        keep = jnp.abs(units) <= np.float32(mask_bound)
        mask = [_pack(keep[:, first : first + GROUP]) for first in range(0, CHUNK, GROUP)]
    # Those of e4m3 are rounded where they are stored.
    values = _round_midrise(units, format) if format.kind == "midrise" else units
    if side.is_given:  # the scale was given and need not tell of a NaN or an infinity
        values = jnp.where(jnp.abs(units) < np.float32(np.inf), values, np.float32(np.nan))
    return Chunk(values, None, statistic, mask)


def _round_midrise(y, format):
    """Twice the level, an odd integer, as `numerics.round_to_grid` chooses it."""
    low = _floor(y)
    is_odd = low != 2 * _floor(low * np.float32(0.5))
    low = jnp.where((low == y) & is_odd, low - 1, low)
    count = np.float32(2.0 ** (format.bits - 1))
    return 2 * jnp.clip(low, -count, count - 1) + 1


def _floor(x):
    """Mosaic has rounding to nearest only."""
    nearest = jnp.round(x)
    return jnp.where(nearest > x, nearest - 1, nearest)


def _pack(keep):
    """Bit j of a row's word is column j."""
    bits = jnp.left_shift(jnp.int32(1), lax.broadcasted_iota(jnp.int32, keep.shape, 1))
    return jnp.sum(jnp.where(keep, bits, 0), axis=1)


def stored(values, *, interpret: bool):
    """Values of a chunk as e4m3, rounded to nearest; saturates."""
    if interpret:  # the instruction of the GPU saturates, the conversion of XLA gives NaN
        values = jnp.clip(values, -np.float32(E4M3.max), np.float32(E4M3.max))
    return values.astype(E4M3.storage)


def combine(found, new, spec):
    """The statistic of two chunks of the same rows; `found` is None before the first."""
    if found is None:
        return new
    if statistic_of(spec) == "squares":
        return found + new
    # As integers, of which NaN is the largest: what XLA makes of maxima for a CPU may lose it.
    return _float(jnp.maximum(_bits(jnp.abs(found)), _bits(jnp.abs(new))))


def along_rows(vector, shape):
    """A number for each row, repeated along it."""
    return lax.broadcast_in_dim(vector, shape, [0])


def along_columns(vector, shape):
    """A number for each column, repeated along it."""
    return lax.broadcast_in_dim(vector, shape, [1])


def cut_to_bfloat16(x):
    """float32 without the bits that bfloat16 has not."""
    return _float(_bits(x) & np.int32(-(2**16)))


def _bits(x):
    return lax.bitcast_convert_type(x, jnp.int32)


def _binade(x):
    """The power of two below x >= 0."""
    return _float(_bits(x) & _EXPONENT)


def _float(bits):
    return lax.bitcast_convert_type(bits, jnp.float32)

"""Quantizes a rotated chunk in registers: the scales of its blocks, and rounding without division.

Rounding to e2m1 takes no division, table or comparison. With s the block's scale, y >= 0 and
t = max(y, s), the distance of the levels round y is `2**(exponent(t) - 1)`, which is also the last
bit of `big = 1.5 * 2**(22 + exponent(t))`; so `(y + big) - big` rounds y to the grid, ties to the
even code. It happens in units of the row's scale of the folded operand. s is a power of two in
them, and the result is what is stored.

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

_FRACTION_BITS = 28  # of a count of steps, which is 4 at most
# Minus the bits of a binade, modulo 2**32, those of the fraction's range over half of it.
_INVERSE_STEP = np.int32(((255 + _FRACTION_BITS) << 23) - 2**32)
_SIGN = np.int32(-(2**31))


@dataclasses.dataclass(frozen=True)
class Side:
    """What one pass does along one axis.

    Attributes:
      spec: Format and rule.
      block_size: Of the Hadamard transform; 1: none.
      is_signed: Whether every coordinate has its own sign, part of the rotation matrices then.
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

    "scale": the largest scale of its blocks; "absmax": the largest magnitude, "squares": the sum of
    squares, both of the rotated entries.
    """
    if spec.scale in POWER_OF_TWO_RULES:
        return "scale"
    return "squares" if spec.scale == "rms" else "absmax"


class Chunk(NamedTuple):
    """A rotated chunk of 64 rows and 64 columns, quantized."""

    values: Any  # float32 (64, 64): what is stored as e4m3; None without scales
    statistic: Any  # float32 (64,); None if not emitted
    mask: list[jax.Array]  # int32 (64,) for each 32 columns


def quantize_chunk(y, side: Side, scale, seed, column, mask_bound) -> Chunk:
    """Rounds a chunk of rows in units of their scales; without scales only takes its statistic.

    Args:
      y: float32 `(64, 64)`, the sums of the rotation.
      side: What is asked for.
      scale: float32 `(64,)`, a power of two for scales of blocks, or that of the whole row; None.
      seed: uint32 `(64,)`, for random bits; None to round to nearest.
      column: Of the first entry of the chunk, a multiple of 64.
      mask_bound: Of the mask; None: none.
    """
    if not side.has_blocks:
        return _quantize_rows(y, side, scale, mask_bound)
    word = None
    if seed is not None:
        shape = (CHUNK, GROUP)
        pairs = lax.broadcasted_iota(jnp.int32, shape, 1) + lax.div(column, 2)
        word = pair_bits(along_rows(seed, shape), pairs.astype(jnp.uint32))
    values, found, mask = [], [], []
    for half in range(CHUNK // GROUP):
        block = y[:, half * GROUP : (half + 1) * GROUP]
        absmax = jnp.max(jnp.abs(block), axis=1) * side.factor
        exponent = _scale_exponent(block, absmax, side)
        is_finite = absmax < np.float32(np.inf)  # false for NaN, too
        found.append(jnp.where(is_finite, _power(jnp.maximum(exponent, -126)), np.float32(np.nan)))
        if scale is None:
            continue
        # The exponent in units of the row's scale. Lower ones count as zero; higher ones, where a
        # reference was given that is far too small, saturate as well from here.
        relative = jnp.clip(exponent - _exponent(scale), -90, 98)
        factor = jnp.where(absmax >= SMALLEST_NORMAL, _power(relative - exponent), np.float32(0))
        factor = jnp.where(is_finite, factor, np.float32(np.nan))
        step = along_rows(_power(relative), block.shape)
        if side.spec.scale == "absmax_floor43":
            # Two roundings, as in the definition.
            scaled = block * side.factor * along_rows(factor * np.float32(0.75), block.shape)
        else:
            scaled = block * along_rows(factor * side.factor, block.shape)
        if mask_bound is not None:
            mask.append(_pack(jnp.abs(scaled) <= step * np.float32(mask_bound)))
        if word is None:
            values.append(_round_to_nearest(scaled, step, side))
        else:
            bits = swap_halves(word) if half else word
            values.append(_round_stochastically(scaled, step, bits, side))
    statistic = jnp.maximum(*found) if side.is_emitted else None
    return Chunk(lax.concatenate(values, 1) if values else None, statistic, mask)


def _scale_exponent(block, absmax, side):
    """The exponent of the scale of each row of a block, as `numerics.scales` defines it."""
    spec = side.spec
    rule, format = spec.scale, spec.format
    if rule in ("rms_nearest", "std_floor"):
        # In units of a power of two, so that no square leaves float32.
        unit = jnp.minimum(_exponent(absmax), 126)
        factor = _power(-unit) * side.factor
        z = block * along_rows(factor, block.shape)
        if rule == "std_floor":
            mean = jnp.sum(z, axis=1) * np.float32(1 / GROUP)
            z = z - along_rows(mean, block.shape)
        mean_square = jnp.sum(z * z, axis=1) * np.float32(1 / GROUP)
        # Half the logarithm of the square, rounded down; to nearest with twice the square.
        alpha = (GAUSSIAN_ALPHA[format.name] / format.max) ** 2
        square = mean_square * np.float32(2 * alpha if rule == "rms_nearest" else alpha)
        exponent = (_exponent(square) >> 1) + unit
    else:
        up = {"absmax_ct175": 1 << 21, "absmax_ceil": 0x3FFFFF}.get(rule, 0)
        exponent = ((_bits(absmax) + up) >> 23) - 127 - format.max_exponent
    top = 127 - format.max_exponent - (rule == "absmax_floor43")
    return jnp.clip(exponent, -127, top)


def _round_to_nearest(y, scale, side):
    """The multiple of `scale` by an e2m1 level that y is nearest to; see the module."""
    binade = _binade(jnp.maximum(jnp.abs(y), scale))
    big = _float(binade) * np.float32(1.5 * 2.0**22)
    rounded = (y + big) - big
    if side.spec.scale in ("absmax_floor", "rms_nearest", "std_floor"):
        top = scale * np.float32(side.spec.format.max)
        rounded = jnp.minimum(jnp.maximum(rounded, -top), top)
    return rounded


def _round_stochastically(y, scale, bits, side):
    """Up where `bits / 2**32` is below the distance to the lower level, in steps.

    As `numerics.stochastic_round`, but that the comparison takes 28 bits: it can differ for
    magnitudes below 1/64 of the scale, and there once in 2**28 entries. The magnitude is counted
    in steps in fixed point, the complement of the random bits added, and what carries is kept.
    """
    magnitude = jnp.abs(y)
    if side.spec.scale not in ("absmax_floor43", "absmax_ceil"):
        magnitude = jnp.minimum(magnitude, scale * np.float32(side.spec.format.max))
    binade = _binade(jnp.maximum(magnitude, scale))
    # Steps are half a binade, so that there are less than four of them.
    count = (magnitude * _float(_INVERSE_STEP - binade)).astype(jnp.int32)
    random = lax.bitcast_convert_type(bits >> (32 - _FRACTION_BITS), jnp.int32)
    count = (count + ((1 << _FRACTION_BITS) - 1) - random) >> _FRACTION_BITS
    # 2**22 + count / 2, by its bits. The difference of the products is exact, and zero has no sign.
    shifted = _float(count | ((127 + 22) << 23))
    signed = _float((_bits(y) & _SIGN) | binade)
    return shifted * signed - np.float32(2.0**22) * signed


def _quantize_rows(y, side, scale, mask_bound) -> Chunk:
    """Formats with one scale a row: y over the scale, rounded to the levels."""
    format = side.spec.format
    statistic = None
    if side.is_emitted:
        z = y * side.factor
        is_sum = statistic_of(side.spec) == "squares"
        statistic = jnp.sum(z * z, axis=1) if is_sum else jnp.max(jnp.abs(z), axis=1)
    if scale is None:
        return Chunk(None, statistic, [])
    is_live = scale > 0  # else the row counts as zeros
    divisor = jnp.where(is_live, scale, np.float32(1))
    factor = jnp.where(is_live, side.factor, np.float32(0))
    units = y * along_rows(factor, y.shape) / along_rows(divisor, y.shape)
    mask = []
    if mask_bound is not None:
        keep = jnp.abs(units) <= np.float32(mask_bound)
        mask = [_pack(keep[:, first : first + GROUP]) for first in range(0, CHUNK, GROUP)]
    # Those of e4m3 are rounded where they are stored.
    values = _round_midrise(units, format) if format.kind == "midrise" else units
    if side.is_given:  # the scale was given and need not tell of a NaN or an infinity
        values = jnp.where(jnp.abs(units) < np.float32(np.inf), values, np.float32(np.nan))
    return Chunk(values, statistic, mask)


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
    return found + new if statistic_of(spec) == "squares" else jnp.maximum(found, new)


def along_rows(vector, shape):
    """A number for each row, repeated along it."""
    return lax.broadcast_in_dim(vector, shape, [0])


def _bits(x):
    return lax.bitcast_convert_type(x, jnp.int32)


def _binade(x):
    """Bits of the power of two below x >= 0."""
    return _bits(x) & 0x7F800000


def _exponent(x):
    """Of x > 0."""
    return (_bits(x) >> 23) - 127


def _float(bits):
    return lax.bitcast_convert_type(bits, jnp.float32)


def _power(exponent):
    return _float((exponent + 127) << 23)

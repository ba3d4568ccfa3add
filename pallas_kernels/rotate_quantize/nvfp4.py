"""Quantizes a rotated chunk to NVFP4 in registers: e2m1 in blocks of 16 with e4m3 scales.

A level has two significant bits and a scale four, so bfloat16 holds their product, which is what is
stored; one float32 scale of the array is left. It is found from all of the rotated array, and so
comes from outside. Each block is divided by its own scale: a multiplication by the inverse could
turn ties, which the levels of numbers that were rounded before hit often.

As `numerics` defines it, but for the sums of MS-EDEN: those are float32 sums here, and there of a
fixed point that does not depend on the order. The choice of four over six takes the same sums:
where numbers were rounded before, both errors are equal more often than chance would have it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowbit_jax.numerics.formats import E2M1, E4M3, Format
from lowbit_jax.numerics.random_bits import swap_halves
from lowbit_jax.numerics.scales import units_bound
from pallas_kernels.rotate_quantize.chunk import Side
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

BLOCK = 16  # entries that share a scale
BLOCKS = CHUNK // BLOCK  # of a row of a chunk

_SMALLEST = {E2M1: np.float32(1), E4M3: np.float32(2.0**-6)}  # normal numbers


def quantize_nvfp4(
    y: jax.Array,
    side: Side,
    global_scale: jax.Array,
    *,
    sign: jax.Array | None = None,
    seed: jax.Array | None = None,
    column: Any = 0,
    draws: list[jax.Array] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Rounds a chunk of rows: `levels * scales`, in units of the global scale, bfloat16.

    Args:
      y: float32 `(64, 64)`, the sums of the rotation.
      side: What is asked for.
      global_scale: float32 `()`.
      sign: float32 `(64,)`: the chunk is this times the sums, a power of two for each row, or
        minus one; None: 1.
      seed: uint32 `(64,)`, for random bits, if these are to round elements.
      column: Of the first entry of the chunk, a multiple of 64.
      draws: uint32 `(64,)` for each block of a row, if they are to round scales.
      interpret: On the CPU.
    """
    spec = side.spec
    unit = global_scale * np.float32(spec.format.max / spec.margin)
    factor = jnp.full((CHUNK,), side.factor) if sign is None else sign * side.factor
    y = y * along_rows(factor, y.shape)
    words = None if seed is None else complements(seed, column)
    values = []
    for i in range(BLOCKS):
        block = y[:, i * BLOCK : (i + 1) * BLOCK]
        absmax = jnp.max(jnp.abs(block), axis=1)
        # NaN where a number is not finite.
        target = absmax / unit + absmax * np.float32(0)
        if spec.scale == "absmax_e4m3_four_over_six":
            values.append(_four_over_six(block, target, global_scale, spec))
        elif draws is not None:
            values.append(_eden(block, target, global_scale, draws[i]))
        elif words is not None:
            first = i * BLOCK % GROUP
            bits = words[:, first : first + BLOCK]
            bits = swap_halves(bits) if i * BLOCK >= GROUP else bits
            values.append(_at_random(block, target, global_scale, bits, interpret))
        else:
            scale = _nearest(target, E4M3)
            levels = _nearest(_units(block, scale, global_scale), E2M1)
            values.append(levels * along_rows(scale, block.shape))
    return lax.concatenate(values, 1).astype(jnp.bfloat16)


def _four_over_six(block, target, global_scale, spec):
    """By the scale of less squared error: the abs-max on 6, or on 4; ties to six."""
    six, four = _nearest(target, E4M3), _nearest(target * np.float32(1.5), E4M3)
    (six_error, six), (four_error, four) = (
        _rounded_with_error(block, scale, global_scale, spec) for scale in (six, four)
    )
    return jnp.where(
        along_rows(four_error, block.shape) < along_rows(six_error, block.shape), four, six
    )


def _rounded_with_error(block, scale, global_scale, spec):
    units = _units(block, scale, global_scale)
    levels = _nearest(units, E2M1)
    error = (units - levels) * np.float32(1 / units_bound(spec))
    square = _order_free_sum(error * error) * (scale * scale)
    return square, levels * along_rows(scale, block.shape)


def _order_free_sum(x):
    """The bits of `numerics.floats.order_free_sum` along rows of up to 512, for `0 <= x < 1`.

    Integers below 2**24 add exactly in float32. What is split off below there is split off
    to nearest here: the parts differ, and their sum, which is rounded once, does not.
    """
    scaled = x * np.float32(2.0**15)
    high = jnp.round(scaled)
    low = floor((scaled - high) * np.float32(2.0**15))
    return jnp.sum(high, axis=1) * np.float32(2.0**-15) + jnp.sum(low, axis=1) * np.float32(
        2.0**-30
    )


def _eden(block, target, global_scale, bits):
    """Levels to nearest, and at random the scale that restores the length of the projection.

    See `numerics.eden`; for correction blocks of 16.
    """
    scale = _nearest(target, E4M3)
    units = _units(block, scale, global_scale)
    levels = _nearest(units, E2M1)
    projection = jnp.sum(units * levels, axis=1)
    is_live = projection > 0
    rho = jnp.sum(units * units, axis=1) / jnp.where(is_live, projection, np.float32(1))
    wanted = jnp.where(is_live, rho, np.float32(1)) * scale
    return levels * along_rows(_scale_at_random(wanted, bits), block.shape)


def _scale_at_random(wanted, bits):
    """The e4m3 number above `wanted` if `bits / 2**32` is below the distance to the one below it.

    In steps between the two. Of the random bits 24 are used: of normal numbers the distance has 20.
    """
    clipped = jnp.minimum(wanted, np.float32(E4M3.max))
    step = binade(jnp.maximum(clipped, _SMALLEST[E4M3])) * np.float32(2.0**-E4M3.mantissa_bits)
    inverse = float_of(np.int32(254 << 23) - bits_of(step))  # of a power of two
    count = clipped * inverse
    low = floor(count)
    random = lax.bitcast_convert_type(bits >> 8, jnp.int32).astype(jnp.float32)
    is_up = random * np.float32(2.0**-24) < count - low
    return jnp.where(is_up, low + 1, low) * step + wanted * np.float32(0)


def _at_random(block, target, global_scale, complement, interpret):
    """Each element up or down at random, under scales to nearest."""
    scale = _nearest(target, E4M3)
    unit = smallest_normal(interpret=interpret)
    units = _clipped(_units(block, scale, global_scale), E2M1) * unit
    levels = round_at_random(units, complement, interpret=interpret)  # times 2**-26
    return levels * along_rows(scale * np.float32(2.0**26), block.shape)


def _units(block, scale, global_scale):
    """The block over its scale; 0 if that is 0 or NaN, which makes all values what it is itself."""
    divisor = jnp.where(scale > 0, scale * global_scale, np.float32(math.inf))
    return block / along_rows(divisor, block.shape)


def _nearest(v, format: Format):
    """The levels of a float that v is nearest to, ties to the even code; saturates."""
    v = _clipped(v, format)
    return to_nearest(v, jnp.maximum(jnp.abs(v), _SMALLEST[format]), format.mantissa_bits)


def _clipped(v, format):
    return jnp.minimum(jnp.maximum(v, -np.float32(format.max)), np.float32(format.max))

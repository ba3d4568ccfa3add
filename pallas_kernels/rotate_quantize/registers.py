"""Arithmetic on numbers in registers by their bits: rounding without comparisons, random bits.

On a Hopper GPU minima, comparisons and logic take twice as long as products and sums, which is why
some things here are products.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowbit_jax.numerics.random_bits import MULTIPLIERS

CHUNK = 64  # rows and columns of a chunk, what one product of matrices rotates
GROUP = 32  # entries that share a power-of-two scale, and pairs of which share random bits

RANDOM_BITS = 22  # of a float32 below its first bit of mantissa
_SIGN = np.int32(-(2**31))
_EXPONENT = np.int32(0x7F800000)


def to_nearest(v: jax.Array, reach: jax.Array, mantissa_bits: int) -> jax.Array:
    """`v` on the grid of a float, ties to the even code.

    The distance of the levels round v is the last bit of `big`, so that `(v + big) - big` rounds v.

    Args:
      v: float32.
      reach: Above 0: `max(|v|, smallest)`, with smallest the format's smallest normal number.
      mantissa_bits: Of the format, without the leading one.
    """
    big = binade(reach) * np.float32(1.5 * 2.0 ** (23 - mantissa_bits))
    return (v + big) - big


def smallest_normal(*, interpret: bool) -> np.float32:
    """What 1 stands for in numbers that `round_at_random` takes."""
    return np.float32(1 if interpret else 2.0**-126)


def round_at_random(v: jax.Array, complement: jax.Array, *, interpret: bool) -> jax.Array:
    """`2**-26` times the level of e2m1 above or below `v / smallest_normal()`.

    Up where `bits / 2**32` is below the distance to the lower level, in steps; takes `~bits`. The
    smallest normal number of e2m1 is that of float32 here, 2**-126, so that the steps of float32
    below it are those above it, as they are in e2m1. One bit of the mantissa stays: the complement
    of the first 22 random bits is added to the 22 below it, which carries where it should, and
    those are cut off. Products of float32 become subnormal numbers on a GPU, where XLA on a CPU has
    zeros.

    As `numerics.stochastic_round` but for what magnitudes below 1 are rounded to, `2**-22` steps.
    """
    found = _simulated_bits(v) if interpret else bits_of(v)
    random = lax.bitcast_convert_type(complement >> (32 - RANDOM_BITS), jnp.int32)
    found = (found + random) & np.int32(-(1 << RANDOM_BITS))
    return _simulated_float(found) if interpret else float_of(found) * np.float32(2.0**100)


def _simulated_bits(v):
    """Those of `v * 2**-126`, subnormal below 1."""
    magnitude = jnp.abs(v)
    subnormal = jnp.round(magnitude * np.float32(2.0**23)).astype(jnp.int32)
    normal = bits_of(magnitude) - np.int32(126 << 23)
    return jnp.where(magnitude < 1, subnormal, normal) | (bits_of(v) & _SIGN)


def _simulated_float(bits):
    """The number of these bits times `2**100`."""
    magnitude = bits & ~_SIGN
    subnormal = magnitude.astype(jnp.float32) * np.float32(2.0**-23)
    normal = float_of(magnitude + np.int32(126 << 23))
    v = jnp.where(magnitude < (1 << 23), subnormal, normal) * np.float32(2.0**-26)
    return jnp.where(bits < 0, -v, v)


def complements(seed: jax.Array, column: jax.Array | int) -> jax.Array:
    """`~random_bits.pair_bits` of the pairs of columns from this one on, (64, 32).

    The hash in fewer steps: the first changes what is equal in a row, for a place in it has 5 bits,
    and the complement is taken within the last.
    """
    shape = (CHUNK, GROUP)
    row = seed ^ lax.div(column, 2).astype(jnp.uint32)
    word = along_rows(row ^ (row >> 16), shape) ^ lax.broadcasted_iota(jnp.uint32, shape, 1)
    word = word * np.uint32(MULTIPLIERS[0])
    word = (word ^ (word >> 15)) * np.uint32(2**32 - MULTIPLIERS[1]) - np.uint32(1)
    return word ^ (word >> 15) ^ np.uint32(0x1FFFF)


def floor(x: jax.Array) -> jax.Array:
    """Mosaic has rounding to nearest only."""
    nearest = jnp.round(x)
    return jnp.where(nearest > x, nearest - 1, nearest)


def along_rows(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number for each row, repeated along it."""
    return lax.broadcast_in_dim(vector, shape, [0])


def along_columns(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number for each column, repeated along it."""
    return lax.broadcast_in_dim(vector, shape, [1])


def cut_to_bfloat16(x: jax.Array) -> jax.Array:
    """float32 without the bits that bfloat16 has not."""
    return float_of(bits_of(x) & np.int32(-(2**16)))


def binade(x: jax.Array) -> jax.Array:
    """The power of two below x >= 0."""
    return float_of(bits_of(x) & _EXPONENT)


def bits_of(x: jax.Array) -> jax.Array:
    """The bit pattern of float32, int32."""
    return lax.bitcast_convert_type(x, jnp.int32)


def float_of(bits: jax.Array) -> jax.Array:
    """The float32 of a bit pattern."""
    return lax.bitcast_convert_type(bits, jnp.float32)

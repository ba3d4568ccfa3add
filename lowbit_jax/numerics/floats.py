"""Exact operations on float32 that no compiler may round differently.

XLA fuses `a * b + c` into one rounding when it likes, turns division by a constant into a
multiplication, reorders sums and flushes subnormals. The helpers here are built so that none of
that can change a bit: maxima of bit patterns, exponents by shifts, sums of integers. That is why
quantizing gives the same codes eagerly, under `jit` and under `vmap`.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

SMALLEST_NORMAL = np.float32(2.0**-126)
_MANTISSA_BITS = 23
_MAX_SUM_LENGTH = 65536


def float_bits(x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """The int32 bit pattern of `x` in float32."""
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)


def absmax(x: Float[Array, "..."], axis: int | tuple[int, ...]) -> Float[Array, "..."]:
    """`max |x|` along `axis`, kept as an axis of length 1, float32.

    The maximum of the bit patterns: their order as integers is the order of the magnitudes, with
    infinity and then NaN on top, so a non-finite entry always comes through.
    """
    bits = float_bits(x) & 0x7FFFFFFF
    return lax.bitcast_convert_type(jnp.max(bits, axis=axis, keepdims=True), jnp.float32)


def floor_log2(x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """`floor(log2 |x|)` from the exponent bits, exact; -127 for zero and subnormals."""
    return ((float_bits(x) >> _MANTISSA_BITS) & 0xFF) - 127


def power_of_two(exponent: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`2**exponent`, exact, for exponents in [-126, 127]."""
    return lax.bitcast_convert_type((exponent + 127) << _MANTISSA_BITS, jnp.float32)


def times_power_of_two(x: Float[Array, "..."], exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """`x * 2**exponent`, exact wherever the result is a normal number; exponents in [-252, 254].

    In two steps, for `2**-127` is subnormal and would be flushed to zero. The value in between
    lies between `x` and the result, so it neither overflows nor underflows unless the result does.
    """
    half = exponent >> 1
    return x * power_of_two(half) * power_of_two(exponent - half)


def order_free_sum(x: Float[Array, "..."], axis: int | tuple[int, ...] = -1) -> Float[Array, "..."]:
    """`sum(x)` along `axis` for `-1 < x < 1`, the same bits in whatever order it is taken.

    Each entry is split into two 15-bit integers, which add exactly. An entry loses less than
    `2**-30`. The axes summed over are kept with length 1.

    Raises:
      NotImplementedError: If more than 65,536 entries are summed, where int32 could overflow.
    """
    axes = (axis,) if isinstance(axis, int) else axis
    count = math.prod(x.shape[i] for i in axes)
    if count > _MAX_SUM_LENGTH:
        raise NotImplementedError(
            f"order_free_sum: at most {_MAX_SUM_LENGTH} entries are summed, got {count};"
            " use a smaller block_size."
        )
    # Multiplying by 2**15 is exact, so a fused multiply-subtract gives the same bits.
    scaled = x * np.float32(2.0**15)
    high = jnp.floor(scaled)
    low = jnp.floor((scaled - high) * np.float32(2.0**15))
    high_sum = jnp.sum(high.astype(jnp.int32), axis, keepdims=True)
    low_sum = jnp.sum(low.astype(jnp.int32), axis, keepdims=True)
    return high_sum.astype(jnp.float32) * np.float32(2.0**-15) + low_sum.astype(
        jnp.float32
    ) * np.float32(2.0**-30)


def root_mean_square(
    x: Float[Array, "*batch k"], *, subtract_mean: bool = False
) -> Float[Array, "*batch 1"]:
    """`sqrt(mean(x**2))` over the last axis, float32, equal bits eagerly and compiled.

    `x` is divided by a power of two above its abs-max first, which makes the result exactly
    equivariant under powers of two and keeps squares from overflowing. The squares then carry an
    absolute error of `2**-30` of that power squared, so the relative error of the mean square is
    below `k * 2**-28` however the row is distributed.

    Args:
      x: `(*batch, k)`; k at most 65,536.
      subtract_mean: Gives the standard deviation (divided by k, not k - 1) instead; k must then
        be a power of two.

    Returns:
      `(*batch, 1)`; not meaningful for rows that hold non-finite values.
    """
    k = x.shape[-1]
    x = x.astype(jnp.float32)
    exponent = floor_log2(absmax(x, axis=-1)) + 1
    x = times_power_of_two(x, -exponent)
    if subtract_mean:
        # 1/k is a power of two, so that the product is exact and may be fused with the
        # subtraction. Half, to stay inside (-1, 1).
        x = (x - order_free_sum(x) * np.float32(1 / k)) * np.float32(0.5)
        exponent = exponent + 1
    mean_square = order_free_sum(x * x) * np.float32(1 / k)
    return times_power_of_two(jnp.sqrt(mean_square), exponent)


def reciprocal(value: float) -> np.float32:
    """`1 / value` in float32, to multiply by.

    Compiled, XLA turns division by a constant into multiplication by its reciprocal; doing so
    here makes the eager result the same.
    """
    return np.float32(1.0 / value)

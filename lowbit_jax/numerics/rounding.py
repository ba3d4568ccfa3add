"""Rounding to a grid: to nearest with ties to the even code, or stochastically.

Nearest is what `astype` to the 4- and 8-bit float dtypes does inside their range; beyond it, where
a float8 cast gives NaN or infinity, we saturate.
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, UInt32

from lowbit_jax.numerics.floats import float_bits, floor_log2, power_of_two
from lowbit_jax.numerics.formats import E4M3, E5M2, Format
from lowbit_jax.numerics.random_bits import random_bits

_FLOAT16 = Format("float16", "float", 16, 65504.0, np.dtype(np.float16), 5, 10, 15)
# The narrow floats that the casts know, but bfloat16, whose steps float32 does not hold.
CAST_FORMATS = {format.storage: format for format in (_FLOAT16, E4M3, E5M2)}


def round_to_grid(
    y: Float[ArrayLike, "*shape"],
    format: Format,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    key: PRNGKeyArray | UInt32[Array, "2"] | None = None,
) -> Float[Array, "*shape"]:
    """The level of `format` that `y` rounds to, float32; saturates at the outermost levels.

    Args:
      y: In units of the scale, any float dtype; finite.
      format: The grid.
      rounding: "nearest" breaks ties to the even code; "stochastic": see `stochastic_round`.
      key: For stochastic rounding.

    Returns:
      Levels, same shape. A float format keeps the sign of zero, the others have one zero.

    Raises:
      ValueError: If stochastic rounding is asked for without a key, or there is no such rounding.
    """
    if rounding == "stochastic":
        if key is None:
            raise ValueError(
                "round_to_grid: stochastic rounding needs a random key, got key=None; pass"
                " key=jax.random.key(...), a new one every step."
            )
        return stochastic_round(y, format, key)
    if rounding != "nearest":
        raise ValueError(
            f"round_to_grid: rounding must be 'nearest' or 'stochastic', got {rounding!r}."
        )
    y = jnp.asarray(y, jnp.float32)
    if format.kind == "midrise":
        # Not round(y - 1/2) + 1/2, which loses the sign of a tiny y.
        j = jnp.floor(y)
        is_tie = j == y
        is_odd = j != 2 * jnp.floor(j * np.float32(0.5))
        j = jnp.where(is_tie & is_odd, j - 1, j)
        half_count = 2.0 ** (format.bits - 1)
        return jnp.clip(j, -half_count, half_count - 1) + np.float32(0.5)
    y = jnp.clip(y, format.min, format.max)
    if format.kind == "integer":
        rounded = jnp.round(y)
        return jnp.where(rounded == 0, np.float32(0), rounded)  # two's complement has no -0
    step, inverse_step = _float_steps(y, format)
    return jnp.round(y * inverse_step) * step


def stochastic_round(
    x: Float[ArrayLike, "*shape"], format: Format, key: PRNGKeyArray | UInt32[Array, "2"]
) -> Float[Array, "*shape"]:
    """Rounds up with probability `(x - lo) / (hi - lo)`, `lo <= x <= hi` the neighbouring levels.

    Unbiased between the outermost levels: `E[result] = x` up to `2**-32 (hi - lo)`, the resolution
    of the random bits. Beyond them it saturates, which is a bias; a scale rule that never clips
    avoids it.

    Args:
      x: In units of the scale, any float dtype; finite.
      format: The grid.
      key: One random key; every element has its own 32 bits, see `random_bits`.

    Returns:
      Levels in float32, same shape.
    """
    y = jnp.clip(jnp.asarray(x, jnp.float32), format.min, format.max)
    magnitude = jnp.abs(y)
    bits = random_bits(key, y.shape)
    # The magnitude is rounded, not y: a tiny negative y has no exact distance to the level below.
    if format.kind == "float":
        step, inverse_step = _float_steps(y, format)
    else:
        step = inverse_step = np.float32(1)
    count = magnitude * inverse_step
    low = jnp.floor(count)
    fraction = ((count - low) * np.float32(2.0**32)).astype(jnp.uint32)
    if format.kind == "midrise":
        # Levels lie half a step off the integers: add 1/2 to the fraction modulo 1.
        low = jnp.where(fraction < np.uint32(2**31), low - np.float32(0.5), low + np.float32(0.5))
        fraction = fraction + np.uint32(2**31)
    rounded = jnp.where(bits < fraction, low + 1, low) * step
    rounded = jnp.where(y < 0, -rounded, rounded)
    if format.kind == "integer":
        return jnp.where(rounded == 0, np.float32(0), rounded)
    return rounded


def stochastic_cast(
    x: Float[ArrayLike, "*shape"], dtype: DTypeLike, key: PRNGKeyArray | UInt32[Array, "2"]
) -> Float[Array, "*shape"]:
    """Casts to a narrow float, up with probability `(x - lo) / (hi - lo)`, `lo <= x <= hi`.

    Unbiased up to the resolution of the random bits, subnormal results included. A finite value
    beyond the largest finite one saturates, unlike in `astype`; NaN and infinity stay what they
    are (e4m3 has no infinity and gets NaN).

    Args:
      x: Any float dtype; computed in float32.
      dtype: bfloat16, float16, float8_e4m3fn or float8_e5m2.
      key: One random key.

    Returns:
      Same shape, in `dtype`.

    Raises:
      ValueError: If there is no stochastic cast to that dtype.
    """
    x = jnp.asarray(x, jnp.float32)
    dtype = np.dtype(dtype)
    if dtype == jnp.bfloat16:
        rounded = _stochastic_bfloat16(x, key)
    elif dtype in CAST_FORMATS:
        rounded = stochastic_round(x, CAST_FORMATS[dtype], key).astype(dtype)
    else:
        names = ", ".join(map(str, [np.dtype(jnp.bfloat16), *CAST_FORMATS]))
        raise ValueError(f"stochastic_cast: dtype must be one of {names}, got {dtype}.")
    return jnp.where(jnp.isfinite(x), rounded, x.astype(dtype))


def _stochastic_bfloat16(x, key):
    """Adds 16 random bits below the mantissa that stays and cuts: exact in every binade."""
    bits = float_bits(x)
    magnitude = (bits & 0x7FFFFFFF) + (random_bits(key, x.shape) >> 16).astype(jnp.int32)
    magnitude = jnp.minimum(magnitude >> 16, 0x7F7F)
    sign = jnp.where(bits < 0, 0x8000, 0)
    return lax.bitcast_convert_type((magnitude | sign).astype(jnp.uint16), jnp.bfloat16)


def _float_steps(y, format):
    """Distance between the levels round `y`, and its inverse; both powers of two."""
    exponent = jnp.maximum(floor_log2(y), 1 - format.bias) - format.mantissa_bits
    return power_of_two(exponent), power_of_two(-exponent)

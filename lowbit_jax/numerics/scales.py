"""Scale rules: from a block of numbers to the scale that its codes are multiplied by.

`x ~ codes * scales * global_scale`: scales multiply, always. Rules by what they store:

- float32: `absmax`, `rms`, and `minmax`, which has a zero point a block besides.
- E8M0, a power of two kept as its biased exponent in uint8 (0xFF is NaN): the `absmax_floor`,
  `absmax_floor43`, `absmax_ceil`, `absmax_ct175`, `rms_nearest` and `std_floor` rules.
- E4M3 with one float32 scale for the whole array: `absmax_e4m3` (NVFP4) and
  `absmax_e4m3_four_over_six`.

With a the abs-max of the block, m the outermost level and emax its exponent:

===========================  ====================================================================
`absmax`                     `a / m`; `a / (m + 1/2)` for integers of full range, which clips.
`minmax`                     `(hi - lo) / (2^b - 1)` with `lo = min(x, 0)`, `hi = max(x, 0)` of the
                             block and the zero point `round(-lo / scale)`: asymmetric integers, as
                             GPTQ and others store them. For unsigned formats, and they for it.
`absmax_floor`               `2^(floor(log2 a) - emax)`; the largest values clip. The rule of the
                             OCP MX specification v1.0, section 6.3.
`absmax_floor43`             4/3 of it, never clips where m is at least `1.5 * 2^emax`, as it is
                             for every float format. The 4/3 is not a power of two, so it is the
                             `global_scale`. Castro et al., Quartet, arXiv:2505.14669 (backward
                             pass); Egiazarian et al., Bridging the Gap Between Promise and
                             Performance for Microscaling FP4 Quantization (MR-GPTQ),
                             arXiv:2509.23202.
`absmax_ceil`                `2^ceil(log2(a / m))`, never clips.
`absmax_ct175`               `absmax_floor` of an a whose mantissa, if 1.75 or more, was rounded up
                             to the next power of two. The rule of compressed-tensors; the least
                             error on Gaussian data of the powers of two.
`absmax_e4m3`                `E4M3(a / (m * global_scale))`, `global_scale = max a / (448 m)`; 256
                             instead of 448 under "eden", to leave room for its correction.
`absmax_e4m3_four_over_six`  The better, by squared error, of that and 1.5 times it, which puts the
                             abs-max on 4 instead of 6; ties to six; 256 instead of 448 leaves the
                             room. Panferov et al., Quartet II, arXiv:2601.22813.
`rms`                        `alpha * rms / m`, alpha the clipping point that minimises the squared
                             error on Gaussian data. Panferov et al., QuEST, arXiv:2502.05003,
                             section 3.
`rms_nearest`, `std_floor`   `2^round` and `2^floor` of `log2(alpha / 6 * rms)` or of the
                             mean-subtracted standard deviation. `std_floor` is what Quartet's
                             published code does in the forward pass; `rms_nearest` fits the errors
                             that the paper reports.
===========================  ====================================================================

A margin c puts `m / c` in the place of m in `absmax` and the E4M3 rules, so that the outermost
level stands for `c a`.

Where we differ: QuEST's and Quartet's code adds 1e-8 to the scale (before the logarithm, in the
second); we do not, so that multiplying the input by a power of two multiplies the result by it
exactly. A row of zeros then gets the scale 0. NVIDIA's NVFP4 recipe divides by `448 * 6 / amax`;
we multiply by the inverse.

A zero block stores scale 0 (E8M0: code 0), a block with a non-finite entry a NaN scale. A block
whose abs-max is subnormal counts as zero, for XLA flushes subnormals on some devices.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from lowbit_jax.numerics.floats import (
    SMALLEST_NORMAL,
    absmax,
    float_bits,
    order_free_sum,
    reciprocal,
    root_mean_square,
    times_power_of_two,
)
from lowbit_jax.numerics.formats import E4M3
from lowbit_jax.numerics.rounding import round_to_grid
from lowbit_jax.numerics.spec import (
    E4M3_RULES,
    GAUSSIAN_ALPHA,
    POWER_OF_TWO_RULES,
    QuantSpec,
)

_E8M0_NAN = 0xFF
_E4M3_NAN = 0x7F


class BlockScales(NamedTuple):
    """Scales of blocks, as they are stored.

    Attributes:
      scales: float32, uint8 (E8M0) or float8_e4m3fn; the blocks' shape with the reduced axes kept.
      global_scale: float32 scalar or None.
      is_live: bool like `scales`: neither a zero block nor a non-finite one.
      zero_points: uint8 like `scales`, the code of zero; None but for `minmax`.
    """

    scales: jax.Array
    global_scale: jax.Array | None
    is_live: jax.Array
    zero_points: jax.Array | None = None


def block_scales(
    blocks: Float[Array, "..."],
    spec: QuantSpec,
    axis: int | tuple[int, ...] = -1,
    global_scale: Float[Array, ""] | None = None,
) -> BlockScales:
    """The scale of each block by `spec.scale`; see the table of the module.

    Args:
      blocks: Any float dtype; computed in float32.
      spec: The rule, the grid that the scale is for and the margin.
      axis: The axes of one block; the `rms` rules take the last one only.
      global_scale: Of the E4M3 rules, in place of the one that the abs-max of all blocks gives.

    Returns:
      `BlockScales`, the global scale without the gain. Not differentiated anywhere in this package.
    """
    rule, format = spec.scale, spec.format
    blocks = blocks.astype(jnp.float32)
    a = absmax(blocks, axis)
    is_finite = jnp.isfinite(a)
    is_live = is_finite & (a >= SMALLEST_NORMAL)
    if rule in POWER_OF_TWO_RULES:
        exponent = _scale_exponent(blocks, a, format, rule)
        # Above 127 - emax the outermost level itself would overflow float32.
        four_thirds = rule == "absmax_floor43"
        exponent = jnp.clip(exponent, -127, 127 - format.max_exponent - four_thirds)
        codes = jnp.where(is_live, exponent + 127, 0)
        codes = jnp.where(is_finite, codes, _E8M0_NAN).astype(jnp.uint8)
        global_scale = jnp.asarray(4 / 3, jnp.float32) if four_thirds else None
        return BlockScales(codes, global_scale, is_live)
    if rule == "minmax":
        return _minmax_scales(blocks, is_finite, is_live, format, axis)
    if rule in E4M3_RULES:
        return _e4m3_scales(blocks, a, is_finite, is_live, spec, axis, global_scale)
    if rule == "rms":
        scales = root_mean_square(blocks) * np.float32(GAUSSIAN_ALPHA[format.name] / format.max)
    else:
        outermost = (format.max - format.min) / 2  # m, but for the full range
        scales = a * reciprocal(outermost / spec.margin)
    is_live = is_live & (scales >= SMALLEST_NORMAL)
    scales = jnp.where(is_live, scales, np.float32(0))
    return BlockScales(jnp.where(is_finite, scales, np.float32(np.nan)), None, is_live)


def calibrated_global_scale(absmax: float, spec: QuantSpec) -> np.float32:
    """A global scale for arrays of this abs-max under an E4M3 rule: the next power of two.

    Files hold its reciprocal, which is then exact; the scales of blocks reach from 224 to 448 at
    least, and as they are floats lose nothing by it but the lowest of their 17 binades.
    """
    wanted = absmax / _largest(spec)
    if not SMALLEST_NORMAL <= wanted < math.inf:  # inputs that are always zero: any will do
        return np.float32(1)
    mantissa, exponent = math.frexp(wanted)
    return np.float32(math.ldexp(1.0, exponent - (mantissa == 0.5)))


def divide_by_scales(
    blocks: Float[Array, "..."], scales: jax.Array, global_scale: jax.Array | None
) -> Float[Array, "..."]:
    """`blocks / (scales * global_scale)` in float32, exact for powers of two.

    Meaningless where the scale is zero or NaN: mask with `BlockScales.is_live`.
    """
    blocks = blocks.astype(jnp.float32)
    if scales.dtype == jnp.uint8:
        quotient = times_power_of_two(blocks, 127 - scales.astype(jnp.int32))
        # The only global scale of a power-of-two rule is 4/3, whose inverse float32 holds exactly.
        return quotient if global_scale is None else quotient * np.float32(0.75)
    effective = scales.astype(jnp.float32)
    if global_scale is not None:
        effective = effective * global_scale
    return blocks / jnp.where(effective == 0, np.float32(1), effective)


def multiply_by_scales(
    values: Float[Array, "..."], scales: jax.Array, global_scale: jax.Array | None
) -> Float[Array, "..."]:
    """`values * scales * global_scale` in float32, left to right; NaN where the scale is NaN.

    E8M0 scales are exact, `2**-127` included, unless the product itself is subnormal.
    """
    values = values.astype(jnp.float32)
    if scales.dtype == jnp.uint8:
        product = times_power_of_two(values, scales.astype(jnp.int32) - 127)
        product = jnp.where(is_nan_scale(scales), np.float32(np.nan), product)
    else:
        product = values * scales.astype(jnp.float32)
    return product if global_scale is None else product * global_scale


def is_nan_scale(scales: jax.Array) -> Bool[Array, "..."]:
    """True for the scale of a block that held a NaN or an infinity, whatever it is stored in."""
    if scales.dtype == jnp.uint8:
        return scales == _E8M0_NAN
    return jnp.isnan(scales.astype(jnp.float32))


def units_bound(spec: QuantSpec) -> float:
    """A power of two above the levels and above `|x / scale|` under the E4M3 rules.

    The abs-max of a block becomes `m / margin`, and at most twice that where a subnormal scale was
    rounded to half of what was asked for.
    """
    return 2.0 ** math.frexp(2 * spec.format.max / min(spec.margin, 1.0))[1]


def _scale_exponent(blocks, a, format, rule):
    """Exponent of a power-of-two scale, before it is clipped to what E8M0 holds.

    Every rounding of a logarithm is a number added to the bit pattern before the mantissa is
    shifted out: the distance from the mantissa at which it rounds up to the next power of two.
    """
    value, target_exponent, up = a, format.max_exponent, 0
    if rule == "absmax_ceil":
        max_mantissa = int(np.float32(format.max).view(np.int32)) & 0x7FFFFF
        up = 0x7FFFFF - max_mantissa  # beyond the mantissa of m
    elif rule == "absmax_ct175":
        up = 1 << 21  # from 1.75
    elif rule in ("rms_nearest", "std_floor"):
        value = root_mean_square(blocks, subtract_mean=rule == "std_floor")
        value = value * np.float32(GAUSSIAN_ALPHA[format.name] / format.max)
        target_exponent = 0
        if rule == "rms_nearest":
            up = (1 << 23) - int(np.ceil((np.sqrt(2) - 1) * 2**23))  # beyond sqrt(2)
    return ((float_bits(value) + up) >> 23) - 127 - target_exponent


def _minmax_scales(blocks, is_finite, is_live, format, axis):
    """float32 scales that span the range of each block and zero, with the code of zero."""
    low = jnp.minimum(jnp.min(blocks, axis, keepdims=True), 0)
    high = jnp.maximum(jnp.max(blocks, axis, keepdims=True), 0)
    # Halves, for the difference may overflow; halving is exact, so that fusing changes nothing.
    half_range = high * np.float32(0.5) - low * np.float32(0.5)
    scales = half_range * reciprocal(format.max / 2)
    is_live = is_live & (scales >= SMALLEST_NORMAL)
    zero_points = jnp.where(is_live, jnp.round(-low / jnp.where(is_live, scales, 1)), 0)
    scales = jnp.where(is_live, scales, np.float32(0))
    scales = jnp.where(is_finite, scales, np.float32(np.nan))
    return BlockScales(scales, None, is_live, zero_points.astype(jnp.uint8))


def _e4m3_scales(blocks, a, is_finite, is_live, spec, axis, global_scale):
    """E4M3 scales, 448 at most, and their global scale: given, or of the finite blocks' abs-max."""
    format = spec.format
    four_over_six = spec.scale == "absmax_e4m3_four_over_six"
    top = format.max / spec.margin  # what the abs-max of a block is to become
    if global_scale is None:
        amax = jnp.max(jnp.where(is_finite, a, 0))
        global_scale = amax * reciprocal(_largest(spec))
        global_scale = jnp.where(global_scale < SMALLEST_NORMAL, np.float32(1), global_scale)
    target = jnp.where(is_live, a, 0) / (global_scale * np.float32(top))
    scales = round_to_grid(target, E4M3)
    if four_over_six:
        wider = round_to_grid(target * np.float32(1.5), E4M3)
        error = _squared_error(blocks, scales, global_scale, is_live, spec, axis)
        wider_error = _squared_error(blocks, wider, global_scale, is_live, spec, axis)
        scales = jnp.where(wider_error < error, wider, scales)
    is_live = is_live & (scales > 0)
    codes = lax.bitcast_convert_type(scales.astype(E4M3.storage), jnp.uint8)
    codes = jnp.where(is_finite, jnp.where(is_live, codes, 0), _E4M3_NAN).astype(jnp.uint8)
    return BlockScales(lax.bitcast_convert_type(codes, E4M3.storage), global_scale, is_live)


def _largest(spec):
    """What the largest magnitude is to become in units of the global scale."""
    has_room = spec.scale == "absmax_e4m3_four_over_six" or spec.rounding == "eden"
    return (256.0 if has_room else E4M3.max) * (spec.format.max / spec.margin)


def _squared_error(blocks, scales, global_scale, is_live, spec, axis):
    """Squared rounding error of each block over `global_scale**2`, equal bits however compiled."""
    units = jnp.where(is_live, divide_by_scales(blocks, scales, global_scale), 0)
    error = units - round_to_grid(units, spec.format)
    error = error * np.float32(1 / units_bound(spec))  # within (-1, 1) for the sum
    return order_free_sum(error * error, axis) * (scales * scales)

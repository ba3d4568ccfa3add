"""What `rotate_quantize` computes, composed of the definitions in `lowbit_jax`."""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, PRNGKeyArray, UInt32

from lowbit_jax.numerics import E2M1, E4M3, E5M2, QuantSpec, dequantize, quantize, round_to_grid
from lowbit_jax.numerics.floats import floor_log2, power_of_two
from lowbit_jax.numerics.quantize import factor, to_units
from lowbit_jax.numerics.scales import block_scales
from lowbit_jax.numerics.spec import (
    E4M3_RULES,
    GAUSSIAN_ALPHA,
    GLOBAL_SCALE_RULES,
    POWER_OF_TWO_RULES,
    RMS_RULES,
)
from lowbit_jax.rotations.hadamard import Hadamard
from pallas_kernels.folded import Folded, fold, pack_mask

Key = PRNGKeyArray | UInt32[Array, "2"] | None

# The largest scale that a rule gives, times what it is found from: an abs-max, or alpha / 6 * rms.
_LARGEST = {
    "absmax_floor": 1 / 4,
    "absmax_floor43": 1 / 4,
    "absmax_ct175": 1 / 3.5,
    "absmax_ceil": 1 / 3,
    "rms_nearest": math.sqrt(2),
    "std_floor": 1.0,
}
_ROUNDING = 1 + 2.0**-16  # more than the sums of a transform round up by


@dataclasses.dataclass(frozen=True)
class Target:
    """What one product wants of an operand, along the axis that it sums over.

    Attributes:
      spec: Format and rule.
      rotation: Applied first; None: none.
    """

    spec: QuantSpec
    rotation: Hadamard | None = None

    @property
    def has_blocks(self) -> bool:
        """Whether blocks have power-of-two scales, which fold into one of the whole array."""
        return self.spec.scale in POWER_OF_TWO_RULES

    @property
    def is_nvfp4(self) -> bool:
        """Whether blocks have e4m3 scales, which fold into bfloat16 under one of the array."""
        return self.spec.scale in E4M3_RULES

    @property
    def transform(self) -> int:
        """Entries that are rotated together; 1 without a rotation."""
        return 1 if self.rotation is None else self.rotation.block_size

    @property
    def is_signed(self) -> bool:
        """Whether every coordinate has a random sign."""
        return self.rotation is not None and self.rotation.needs_key

    @property
    def is_random(self) -> bool:
        """Whether the rounding of elements is random."""
        return self.spec.rounding == "stochastic"


class Keys(NamedTuple):
    """Randomness of one operand; None where nothing is random."""

    rotation: Key = None  # of the signs, shared with the other operand of the product
    rounding: Key = None


NO_KEYS = Keys()


class RotatedQuantized(NamedTuple):
    """The operands of `rotate_quantize`, None where not asked for.

    Attributes:
      rows: `(m, k)`, quantized along k.
      columns: `(k, m)`, quantized along m.
      mask: uint32 `(k / 32, m)`, packed as by `pack_mask`: where the rotated rows are within their
        bound.
    """

    rows: Folded | None
    columns: Folded | None
    mask: UInt32[Array, "words m"] | None


def rotate_quantize_reference(
    x: Float[Array, "m k"],
    rows: Target | None,
    columns: Target | None,
    *,
    requantize: bool = False,
    mask_bound: float | None = None,
    row_keys: Keys = NO_KEYS,
    column_keys: Keys = NO_KEYS,
    reference: Float32[Array, ""] | None = None,
) -> RotatedQuantized:
    """See `rotate_quantize`, whose arguments these are.

    Takes all targets that `fold` does, and makes any columns of rounded rows.
    """
    folded_rows = folded_columns = mask = None
    z = x.T
    reference = finite_absmax(x) if reference is None else reference
    if rows is not None:
        y = _rotated(x, rows, row_keys)
        q = quantize(y, rows.spec, key=row_keys.rounding)
        folded_rows = _folded(q, y, rows, reference)
        if mask_bound is not None:
            mask = pack_mask(jnp.abs(to_units(y, rows.spec)) <= np.float32(mask_bound))
        if requantize:
            z = dequantize(q, x.dtype).T
            if columns is not None and requantize_obstacle(rows, columns) is None:
                reference = largest_level(rows, reference)
            else:
                reference = finite_absmax(z)
    if columns is not None:
        y = _rotated(z, columns, column_keys)
        q = quantize(y, columns.spec, key=column_keys.rounding)
        folded_columns = _folded(q, y, columns, reference)
    return RotatedQuantized(folded_rows, folded_columns, mask)


def finite_absmax(x: Float[Array, "..."]) -> Float32[Array, ""]:
    """`max |x|` over the finite entries, 0 without any."""
    return jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0)).astype(jnp.float32)


def largest_scale_of(
    target: Target, reference: Float32[Array, "*shape"]
) -> Float32[Array, "*shape"]:
    """A power of two that no scale of a block exceeds where no `|x|` exceeds the reference.

    A transform of b entries makes none larger than `sqrt(b)` times the largest, and the root mean
    square of a block of 32 no larger than `sqrt(b / 32)` times, if it makes it larger at all. The
    rules do the rest. For e2m1, whose outermost level is 6. NaN for a reference that is not finite.
    """
    spec, transform = target.spec, target.transform
    growth = _LARGEST[spec.scale] * _ROUNDING
    if spec.scale in RMS_RULES:
        assert isinstance(spec.block_size, int)  # as power-of-two scales have
        growth *= GAUSSIAN_ALPHA[spec.format.name] / spec.format.max
        growth *= math.sqrt(max(1, transform / spec.block_size))
    else:
        growth *= math.sqrt(transform)
    exponent = floor_log2(reference * np.float32(growth))
    # 2**125 is the largest scale of e2m1 whose outermost level float32 holds.
    return power_of_two(jnp.clip(exponent, -126, 125)) + reference * np.float32(0)


def largest_level(target: Target, reference: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """What the numbers that `x` is rounded to do not exceed; for scales without a global one."""
    return largest_scale_of(target, reference) * np.float32(target.spec.format.max)


def requantize_obstacle(rows: Target, columns: Target) -> str | None:
    """Why rows of this target cannot be made into these columns in one pass, or None if they can.

    Rounded rows are then those columns' x, and a bound of x is one of theirs.
    """
    spec = rows.spec
    has_global_scale = spec.scale in GLOBAL_SCALE_RULES
    if not rows.has_blocks or spec.format != E2M1 or has_global_scale:
        return (
            "only rows that bfloat16 holds, those of power-of-two scales alone, are quantized"
            f" again, got {spec}"
        )
    if not columns.has_blocks:
        return f"rounded rows become columns with power-of-two scales only, got {columns.spec}"
    return None


def tensor_scale(spec: QuantSpec, reference: Float32[Array, ""]) -> Float32[Array, ""]:
    """The one scale of an array with this abs-max."""
    return block_scales(reference.reshape(1, 1), spec, (0, 1)).scales.reshape(())


def nvfp4_scale(spec: QuantSpec, absmax: Float32[Array, ""]) -> Float32[Array, ""]:
    """The scale of a rotated array with this abs-max, which e4m3 scales are in units of."""
    global_scale = block_scales(absmax.reshape(1, 1), spec).global_scale
    assert global_scale is not None  # as the rules with e4m3 scales have
    return global_scale


def _rotated(x, target: Target, keys: Keys):
    if target.rotation is None:
        return x.astype(jnp.float32)
    return target.rotation.apply(x, key=keys.rotation)


def _folded(q, y, target: Target, reference) -> Folded:
    """`fold(q)`, with one scale that follows from the reference for the targets of kernels.

    Levels times e4m3 scales, 6 significant bits of e2m1, in bfloat16.
    """
    spec = target.spec
    if target.is_nvfp4 and spec.format == E2M1:
        values, scale = factor(q)
        assert scale is not None  # as e4m3 scales have
        return Folded(values.astype(jnp.bfloat16), scale)
    if target.has_blocks and spec.format == E2M1:
        return fold(q, largest_scale_of(target, reference))
    is_fp8_tensor = spec.block_size == "tensor" and spec.format in (E4M3, E5M2)
    if not is_fp8_tensor or target.rotation is not None or spec.needs_key:
        return fold(q)
    scale = tensor_scale(spec, reference)
    is_live = scale > 0
    units = jnp.where(is_live, y / jnp.where(is_live, scale, np.float32(1)), np.float32(0))
    values = round_to_grid(units, spec.format)
    values = jnp.where(jnp.isfinite(y), values, np.float32(np.nan))
    return Folded(values.astype(spec.format.storage), scale)

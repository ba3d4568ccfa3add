"""What `rotate_quantize` computes, composed of the definitions in `lowbit_jax`."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, PRNGKeyArray, UInt32

from lowbit_jax.numerics import QuantSpec, dequantize, quantize, round_to_grid
from lowbit_jax.numerics.quantize import to_units
from lowbit_jax.rotations.hadamard import Hadamard
from pallas_kernels.folded import Folded, fold, largest_scales, pack_mask, row_scales

Key = PRNGKeyArray | UInt32[Array, "2"] | None


@dataclasses.dataclass(frozen=True)
class Target:
    """What one product wants of an operand, along the axis that it sums over.

    Attributes:
      spec: Format and rule.
      rotation: Applied first; None: none.
    """

    spec: QuantSpec
    rotation: Hadamard | None = None


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
      row_reference: float32 `(m,)`: the largest scale of the blocks of each row, or the one scale
        of the row; None if a reference was given and none asked for.
      column_reference: float32 `(k,)`, the same of the columns.
    """

    rows: Folded | None
    columns: Folded | None
    mask: UInt32[Array, "words m"] | None
    row_reference: Float32[Array, " m"] | None
    column_reference: Float32[Array, " k"] | None


def rotate_quantize_reference(
    x: Float[Array, "m k"],
    rows: Target | None,
    columns: Target | None,
    *,
    requantize: bool = False,
    mask_bound: float | None = None,
    row_keys: Keys = NO_KEYS,
    column_keys: Keys = NO_KEYS,
    row_reference: Float32[Array, " m"] | None = None,
    column_reference: Float32[Array, " k"] | None = None,
    emit_references: bool = False,
) -> RotatedQuantized:
    """See `rotate_quantize`, whose arguments these are."""
    folded_rows = folded_columns = mask = None
    z = x.T
    if rows is not None:
        y = _rotated(x, rows, row_keys)
        q = quantize(y, rows.spec, key=row_keys.rounding)
        folded_rows = _folded(q, y, row_reference)
        row_reference = largest_scales(q) if emit_references or row_reference is None else None
        if mask_bound is not None:
            mask = pack_mask(jnp.abs(to_units(y, rows.spec)) <= np.float32(mask_bound))
        if requantize:
            z = dequantize(q, x.dtype).T
    if columns is not None:
        y = _rotated(z, columns, column_keys)
        q = quantize(y, columns.spec, key=column_keys.rounding)
        folded_columns = _folded(q, y, column_reference)
        is_found = emit_references or column_reference is None
        column_reference = largest_scales(q) if is_found else None
    return RotatedQuantized(folded_rows, folded_columns, mask, row_reference, column_reference)


def _rotated(x, target: Target, keys: Keys):
    if target.rotation is None:
        return x.astype(jnp.float32)
    return target.rotation.apply(x, key=keys.rotation)


def _folded(q, y, reference) -> Folded:
    """`fold(q)`, or of the same array with the scales that are given."""
    spec = q.spec
    if reference is None or isinstance(spec.block_size, int):
        return fold(q, reference)
    scales = row_scales(reference, spec)
    unit = 2 if spec.format.kind == "midrise" else 1
    divisor = jnp.where(scales > 0, reference, np.float32(1))[:, None]
    units = jnp.where(scales[:, None] > 0, y / divisor, np.float32(0))
    values = round_to_grid(units, spec.format) * np.float32(unit)
    scales = jnp.where(jnp.isnan(largest_scales(q)), np.float32(np.nan), scales)
    return Folded(values.astype(jnp.float8_e4m3fn), scales)

"""Low-bit operands of a product as e4m3 matrices with one scale a row, and masks packed to bits.

The FP8 tensor cores of Hopper multiply e4m3 and know no blocks. But a 4-bit code has so few
significant bits that the power-of-two scale of its block fits into the exponent that e4m3 has to
spare: an e2m1 code times `2**k` is exact in e4m3 for k from -8 to 6. So the exponents of a row's
blocks, taken relative to the largest of them, go into the values, and what is left is one scale a
row, which a product applies to its sums:

    x = values * scales[:, None],        a b^T = (values_a values_b^T) * scales_a * scales_b^T

Integers and mid-rise codes with one scale a row fold too: their levels, or twice them, are integers
up to 15.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float8e4m3fn, Float32, UInt32

from lowbit_jax.numerics.floats import floor_log2, power_of_two
from lowbit_jax.numerics.formats import E4M3, Format, decode, unpack
from lowbit_jax.numerics.qtensor import QTensor
from lowbit_jax.numerics.scales import is_nan_scale
from lowbit_jax.numerics.spec import POWER_OF_TWO_RULES, QuantSpec

WORD = 32  # entries of a mask in one word

# Of e2m1: blocks whose scales lie within 14 binades of their row's largest fold without loss.
_MIN_BINADES = 14
_LOWEST_EXPONENT = -9  # of e4m3, whose smallest number is 2**-9


class Folded(NamedTuple):
    """A matrix as an operand of a product, the axis summed over last: `values * scales[:, None]`.

    Exactly what it was folded from, except that blocks whose scale lies more than 14 binades below
    the largest of their row are rounded to multiples of `2**-9`, the smallest number of e4m3.

    Attributes:
      values: e4m3 `(rows, c)`. Of blocks with power-of-two scales: the code times the block's scale
        over the row's `scales`, at most 384 for e2m1; zeros have no sign.
      scales: float32 `(rows,)`, with the global scale. NaN for a row with a NaN or an infinity in
        any block, so that its whole row of the product is NaN; its values are arbitrary then.
    """

    values: Float8e4m3fn[Array, "rows c"]
    scales: Float32[Array, " rows"]


def foldable(spec: QuantSpec) -> str | None:
    """Why `fold` does not take arrays of this spec, or None if it does."""
    format = spec.format
    if spec.scale == "minmax" or spec.block_rows > 1:
        return f"{spec} has zero points or scales that rows share"
    if not _fits_e4m3(format):
        return f"the levels of {format} are no e4m3 numbers"
    if spec.scale in POWER_OF_TWO_RULES:
        spare = _spare_binades(format)
        if spare < _MIN_BINADES:
            return f"{format} leaves e4m3 {spare} binades for the scales, less than {_MIN_BINADES}"
    elif isinstance(spec.block_size, int):
        return f"the scales of {spec} are no powers of two"
    return None


def fold(q: QTensor, largest: Float32[Array, " rows"] | None = None) -> Folded:
    """The same matrix with one scale a row; see `Folded`.

    Args:
      q: `(rows, c)`: e2m1 or integers up to 4 bits with power-of-two scales of blocks; or, with one
        scale a row or a tensor, any format whose levels e4m3 holds: mid-rise up to 4 bits, integers
        up to 5, the small floats, e4m3 itself.
      largest: A power of two for each row to take the place of the largest scale of its blocks,
        for example that of the step before; only for scales of blocks. Values saturate in blocks
        whose scale is more than `448 / 384` times larger.

    Returns:
      Values of blocks reach for the top of e4m3: `code * 2**6` for e2m1 in the blocks with the
      largest scale of their row. Mid-rise values are odd integers, twice the level.

    Raises:
      ValueError: If the array is no matrix, or its spec does not fold.
    """
    spec = q.spec
    obstacle = foldable(spec)
    if obstacle is not None:
        raise ValueError(f"fold: {obstacle}; use dequantize.")
    if len(q.shape) != 2:
        raise ValueError(f"fold: q must be a matrix, got shape {q.shape}; reshape it or use vmap.")
    rows, c = q.shape
    format = spec.format
    codes = q.codes
    codes = unpack(codes, format.bits) if format.bits < 8 else codes.view(jnp.uint8)
    values = decode(codes, format) * np.float32(_unit(format))
    if spec.scale in POWER_OF_TWO_RULES:
        exponents = q.scales.astype(jnp.int32) - 127
        found = largest_scales(q)
        is_nan = jnp.isnan(found)
        scales = row_scales(found if largest is None else jnp.where(is_nan, found, largest), spec)
        # 2**-100 stands for all that is too small: the values round to zero.
        shifts = jnp.clip(exponents - floor_log2(scales)[:, None], -100, 127)
        values = values.reshape(rows, exponents.shape[1], -1) * power_of_two(shifts)[:, :, None]
        values = jnp.where((values == 0) | is_nan[:, None, None], 0, values)  # -0 becomes 0
        # Only a reference that was given, and is too small, lets values reach beyond e4m3.
        values = jnp.clip(values, -E4M3.max, E4M3.max).reshape(rows, c)
    else:
        scales = row_scales(largest_scales(q), spec)
    if q.global_scale is not None:
        scales = scales * q.global_scale
    return Folded(values.astype(E4M3.storage), scales)


def unfold(f: Folded) -> Float32[Array, "rows c"]:
    """`values * scales[:, None]` in float32: what `dequantize` gives, but for the sign of zero."""
    return f.values.astype(jnp.float32) * f.scales[:, None]


def largest_scales(q: QTensor) -> Float32[Array, " rows"]:
    """The largest scale of the blocks of each row, `2**-126` at least, or the scale of the row.

    NaN where one is NaN. Of a foldable spec.
    """
    if q.spec.scale not in POWER_OF_TWO_RULES:
        return jnp.broadcast_to(q.scales.reshape(-1), q.shape[:1])
    exponents = jnp.max(q.scales.astype(jnp.int32), axis=-1) - 127
    largest = power_of_two(jnp.clip(exponents, -126, 127))
    return jnp.where(jnp.any(is_nan_scale(q.scales), axis=-1), np.float32(np.nan), largest)


def row_scales(largest: Float32[Array, " rows"], spec: QuantSpec) -> Float32[Array, " rows"]:
    """`Folded.scales`, the global scale aside, from the largest scale of the blocks of each row.

    With blocks `largest * 2**-6` for e2m1, but no less than `2**-126`, the smallest normal number;
    a row of zeros has this scale. With one scale a row half of it for mid-rise, else the scale.
    """
    if spec.scale not in POWER_OF_TWO_RULES:
        return largest * np.float32(1 / _unit(spec.format))
    shift = top_shift(spec.format)
    # `maximum` hands on NaNs.
    return jnp.maximum(largest, np.float32(2.0 ** (shift - 126))) * np.float32(2.0**-shift)


def top_shift(format: Format) -> int:
    """The largest k for which every level times `2**k` is an e4m3 number; 6 for e2m1."""
    return math.frexp(E4M3.max / max(format.max, -format.min))[1] - 1


def pack_mask(mask: Bool[Array, "rows c"]) -> UInt32[Array, "words rows"]:
    """One bit an entry: bit j of word `[g, r]` is `mask[r, 32 g + j]`.

    Words of one row are a column apart, as kernels write them: contiguous along the rows.

    Raises:
      ValueError: If c is not a multiple of 32.
    """
    rows, c = mask.shape
    if c % WORD:
        raise ValueError(f"pack_mask: the last axis must be a multiple of {WORD}, got {c}; pad it.")
    bits = mask.reshape(rows, c // WORD, WORD).astype(jnp.uint32)
    return jnp.sum(bits << jnp.arange(WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32).T


def unpack_mask(words: UInt32[Array, "words rows"]) -> Bool[Array, "rows c"]:
    """The mask that `pack_mask` packed."""
    bits = (words.T[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32)) & 1
    return bits.reshape(words.shape[1], -1).astype(bool)


def _unit(format: Format) -> float:
    """What levels are multiplied by to be e4m3 numbers."""
    return 2.0 if format.kind == "midrise" else 1.0


def _fits_e4m3(format: Format) -> bool:
    levels = format.grid * _unit(format)
    with np.errstate(over="ignore"):  # which gives NaN
        return np.array_equal(levels.astype(E4M3.storage).astype(np.float64), levels)


def _spare_binades(format: Format) -> int:
    """How many times the levels can be halved, from the top of e4m3 down, and still be in it."""
    levels = format.grid[format.grid != 0]
    steps = [math.frexp(math.gcd(*(int(x * 2**20) for x in np.abs(levels))) / 2**20)[1] - 1]
    return top_shift(format) + steps[0] - _LOWEST_EXPONENT

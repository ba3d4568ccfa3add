"""Low-bit operands of a product as FP8 matrices with at most one scale a row, and packed masks.

The FP8 tensor cores of Hopper know no blocks. But a 4-bit code has so few significant bits that the
power-of-two scale of its block fits into the exponent that e5m2 has to spare: an e2m1 code times
`2**s` is exact in e5m2 for s from -15 to 13. So the scales of all blocks of a matrix, relative to
the largest of them, go into the values, as long as they lie within 29 binades, and what is left is
one scale of the matrix, which a product applies to its sums:

    x = values * scale,        a b^T = (values_a values_b^T) * (scale_a * scale_b)

Formats with one scale a row or a tensor fold too if e4m3 or e5m2 holds their levels or, for
mid-rise codes, twice them: then the values are the levels, and the scales stay what they are.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Bool, Float8e4m3fn, Float8e5m2, Float32, UInt32

from lowbit_jax.numerics.floats import floor_log2, power_of_two
from lowbit_jax.numerics.formats import E4M3, E5M2, Format, decode, unpack
from lowbit_jax.numerics.qtensor import QTensor
from lowbit_jax.numerics.scales import is_nan_scale
from lowbit_jax.numerics.spec import POWER_OF_TWO_RULES, QuantSpec

WORD = 32  # entries of a mask in one word

# Of e2m1: blocks whose scales lie within 28 binades of the largest fold without loss.
_MIN_BINADES = 28
_LOWEST_EXPONENT = -16  # of e5m2, whose smallest number is 2**-16
_LOWEST_SCALE = -108


class Folded(NamedTuple):
    """A matrix as an operand of a product, the axis summed over last: `values * scales`.

    Exactly what it was folded from, except that blocks whose scale lies more than 28 binades below
    the largest of the matrix, or whose numbers are below `2**-124`, are rounded to multiples of
    `2**-16`, the smallest number of e5m2.

    Attributes:
      values: `(rows, c)`. Of blocks with power-of-two scales: e5m2, the code times the block's
        scale over `scales`, at most 49152 for e2m1, and NaN for a block with a NaN or an infinity.
        Else e4m3, or e5m2 for codes that are. Of NVFP4, as `rotate_quantize` makes it, bfloat16:
        the level times the e4m3 scale of its block, which has 6 significant bits.
      scales: float32 `()` for the whole matrix or `(rows,)`, with the global scale. Of formats with
        one scale a row or a tensor NaN where there was a NaN or an infinity, so that all of the row
        or tensor is; its values are arbitrary then.
    """

    values: Float8e4m3fn[Array, "rows c"] | Float8e5m2[Array, "rows c"] | BFloat16[Array, "rows c"]
    scales: Float32[Array, " rows"] | Float32[Array, ""]


def foldable(spec: QuantSpec) -> str | None:
    """Why `fold` does not take arrays of this spec, or None if it does."""
    format = spec.format
    if spec.scale == "minmax" or spec.block_rows > 1:
        return f"{spec} has zero points or scales that rows share"
    if spec.scale in POWER_OF_TWO_RULES:
        if not _holds(E5M2, format):
            return f"the levels of {format} are no e5m2 numbers"
        spare = _spare_binades(format)
        if spare < _MIN_BINADES:
            return f"{format} leaves e5m2 {spare} binades for the scales, less than {_MIN_BINADES}"
    elif isinstance(spec.block_size, int):
        return f"the scales of {spec} are no powers of two"
    elif not (_holds(E4M3, format) or _holds(E5M2, format)):
        return f"the levels of {format} are no e4m3 numbers"
    return None


def fold(q: QTensor, largest: Float32[Array, ""] | None = None) -> Folded:
    """The same matrix with one scale, or one a row; see `Folded`.

    Args:
      q: `(rows, c)`: e2m1 or integers up to 4 bits with power-of-two scales of blocks; or, with one
        scale a row or a tensor, any format whose levels e4m3 or e5m2 holds: mid-rise up to 4 bits,
        integers up to 5, the small floats, these two themselves.
      largest: A power of two to take the place of the largest scale of the blocks; only for scales
        of blocks. Values saturate in blocks whose scale is larger.

    Returns:
      Values of blocks reach for the top of e5m2: `code * 2**13` for e2m1 in the blocks with the
      largest scale. Mid-rise values are odd integers, twice the level.

    Raises:
      ValueError: If the array is no matrix, or its spec does not fold.
    """
    spec = q.spec
    obstacle = foldable(spec)
    if obstacle is not None:
        raise ValueError(f"fold: {obstacle}; use dequantize.")
    if len(q.shape) != 2:
        raise ValueError(f"fold: q must be a matrix, got shape {q.shape}; reshape it or use vmap.")
    format = spec.format
    codes = q.codes
    codes = unpack(codes, format.bits) if format.bits < 8 else codes.view(jnp.uint8)
    values = decode(codes, format)
    if spec.scale in POWER_OF_TWO_RULES:
        largest = largest_scale(q) if largest is None else largest
        scales = folded_scale(largest, spec)
        values = _shifted(values, q.scales, scales)
    else:
        values = values * np.float32(_unit(format))
        scales = q.scales.reshape(() if spec.block_size == "tensor" else -1)
        scales = scales * np.float32(1 / _unit(format))
    if q.global_scale is not None:
        scales = scales * q.global_scale
    return Folded(values.astype(folded_format(spec).storage), scales)


def unfold(f: Folded) -> Float32[Array, "rows c"]:
    """`values * scales` in float32: what `dequantize` gives, but for the sign of zero."""
    return f.values.astype(jnp.float32) * (f.scales[:, None] if f.scales.ndim else f.scales)


def folded_format(spec: QuantSpec) -> Format:
    """The FP8 format of `Folded.values`."""
    if spec.scale in POWER_OF_TWO_RULES or not _holds(E4M3, spec.format):
        return E5M2
    return E4M3


def largest_scale(q: QTensor) -> Float32[Array, ""]:
    """The largest scale of the finite blocks, `2**-126` at least; of power-of-two scales."""
    codes = jnp.where(is_nan_scale(q.scales), 0, q.scales).astype(jnp.int32)
    return power_of_two(jnp.clip(jnp.max(codes) - 127, -126, 127))


def folded_scale(largest: Float32[Array, "*shape"], spec: QuantSpec) -> Float32[Array, "*shape"]:
    """`Folded.scales`, the global scale aside, from the largest scale of the blocks.

    That is `largest * 2**-13` for e2m1, but no less than `2**-108`: so that what counts as zero,
    being no normal number, is zero too.
    """
    shift = top_shift(spec.format)
    return jnp.maximum(largest * np.float32(2.0**-shift), np.float32(2.0**_LOWEST_SCALE))


def top_shift(format: Format) -> int:
    """The largest k for which every level times `2**k` is an e5m2 number; 13 for e2m1."""
    return math.frexp(E5M2.max / max(format.max, -format.min))[1] - 1


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


def _shifted(levels, scales, folded):
    """Levels in blocks times their scales over `folded`, clipped to e5m2, NaN where these are."""
    shifts = scales.astype(jnp.int32) - 127 - floor_log2(folded)
    # 2**-100 stands for all that is too small: the values round to zero.
    factors = power_of_two(jnp.clip(shifts, -100, 120))
    values = levels.reshape(*scales.shape, -1) * factors[:, :, None]
    values = jnp.clip(jnp.where(values == 0, 0, values), -E5M2.max, E5M2.max)  # -0 becomes 0
    values = jnp.where(is_nan_scale(scales)[:, :, None], np.float32(np.nan), values)
    return values.reshape(levels.shape)


def _unit(format: Format) -> float:
    """What levels are multiplied by to be integers."""
    return 2.0 if format.kind == "midrise" else 1.0


def _holds(fp8: Format, format: Format) -> bool:
    levels = format.grid * _unit(format)
    with np.errstate(over="ignore"):  # which gives NaN
        return np.array_equal(levels.astype(fp8.storage).astype(np.float64), levels)


def _spare_binades(format: Format) -> int:
    """How many times the levels can be halved, from the top of e5m2 down, and still be in it."""
    levels = format.grid[format.grid != 0]
    step = math.gcd(*(int(x * 2**20) for x in np.abs(levels))) / 2**20
    return top_shift(format) + math.frexp(step)[1] - 1 - _LOWEST_EXPONENT

"""`PackedWeight`: 4-bit weights as the kernel reads them, and the way there and back.

Each thread loads its codes with 16-byte loads straight from global memory, in the order in which
the tensor core wants them in its registers: nothing is staged in shared memory, nothing shuffled.
Of a tile of 64 rows and 64 columns thread `t = 32 w + 4 r + c` of a warpgroup (w < 4, r < 8, c < 4)
owns the rows `16 w + r` and 8 further, and the columns `16 j + 2 c`, its neighbour, and 8 further,
for the four steps j of wgmma along k. That is one word of eight codes a step (`decode.py`), in
which pair `2 q + h` is row `16 w + r + 8 h`, columns `16 j + 8 q + 2 c` and the next.

Scales are transposed, so that the rows of a tile lie side by side.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped, UInt8, UInt32

from lowbit_jax.numerics.floats import power_of_two
from lowbit_jax.numerics.formats import E4M3, pack
from lowbit_jax.numerics.formats import unpack as unpack_codes
from lowbit_jax.numerics.qtensor import QTensor
from lowbit_jax.numerics.scales import is_nan_scale
from lowbit_jax.numerics.spec import E4M3_RULES, POWER_OF_TWO_RULES, QuantSpec
from pallas_kernels.mixed_matmul import decode

LAYOUT_VERSION = 1
TILE = 64  # rows and columns that a warpgroup decodes at a time
TILE_WORDS = TILE * TILE // 8
K_UNIT = 128  # columns come in multiples of it

_E8M0_NAN = 0xFF
# The smallest reference, so that the factor of a row, 2**(reference - 128), is a normal number.
_SMALLEST_REFERENCE = 2


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the codes of a spec are decoded and scaled; static.

    Attributes:
      kind: "e2m1" or "integer".
      scales: "e8m0" or "e4m3": bytes, multiplied into the decoded numbers; "float32": multiplied
        with the sums over a group; "row": with the result.
      group: Columns that share a scale; for "row" all of them.
      offset: Of integers: what a decoded number 128 + u or 128 + 2 u lies above its level, or
        twice its level; None if each group has a zero point.
      step: Of integers: 2 where levels are halves, so that twice of them is decoded.
    """

    kind: Literal["e2m1", "integer"]
    scales: Literal["e8m0", "e4m3", "float32", "row"]
    group: int
    offset: float | None = None
    step: int = 1

    @property
    def scale_columns(self) -> int:
        """Columns that one row of the packed scales covers."""
        return self.group * (4 if self.kind == "e2m1" else 1)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "scales", "zero_points", "references", "global_scale"],
    meta_fields=["spec", "version"],
)
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A quantized matrix `(n, k)` in the order in which the kernel reads it; from `prepack`.

    Attributes:
      words: uint32 `(n / 64, k / 64, 512)`: a tile's words by thread, then by step of 16 columns.
      scales: uint32 `(k / 128, n)` (E8M0) or `(k / 64, n)` (E4M3) of four bytes, the lowest that of
        the first group; float32 `(k / group, n)` otherwise, `(1, n)` for a scale a row.
      zero_points: uint8 like the scales, or None.
      references: int16 `(n,)` for E8M0, the largest scale of a row, to which its other scales are
        relative, negated if one of them is NaN; None for other scales.
      global_scale: float32 scalar or None.
      spec: What it was quantized to.
      version: Of this layout. Files that keep a packed weight must keep it too.
    """

    words: Any
    scales: Any
    zero_points: Any
    references: Any
    global_scale: Any
    spec: QuantSpec
    version: int = LAYOUT_VERSION

    @property
    def shape(self) -> tuple[int, int]:
        """`(n, k)` of the matrix that it stands for."""
        return self.words.shape[0] * TILE, self.words.shape[1] * TILE

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of it, more or less: of all its arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def scheme_of(spec: QuantSpec, k: int) -> Scheme:
    """How the kernel decodes `k` columns of this spec.

    Raises:
      NotImplementedError: If it does not. It takes E2M1 with E8M0 scales of 32 or E4M3 scales of 16
        columns, and 4-bit integers, signed or with zero points, or mid-rise levels, with float32
        scales of 32, 64, 128 columns or (without zero points) a row.
    """
    format, size = spec.format, k if spec.block_size is None else spec.block_size
    if format.name == "e2m1":
        if spec.scale in POWER_OF_TWO_RULES and size == 32:
            return Scheme("e2m1", "e8m0", 32)
        if spec.scale in E4M3_RULES and size == 16:
            return Scheme("e2m1", "e4m3", 16)
    elif format.bits == 4 and spec.scale in ("absmax", "rms", "minmax"):
        offset, step = (143.0, 2) if format.kind == "midrise" else (136.0, 1)
        if spec.scale == "minmax":
            offset = None
        if size in (32, 64, 128):
            return Scheme("integer", "float32", size, offset, step)
        if size == k and offset is not None:
            return Scheme("integer", "row", k, offset, step)
    raise NotImplementedError(
        "mixed_matmul: weights must be E2M1 with E8M0 scales of 32 or E4M3 scales of 16, or 4-bit"
        " integers with float32 scales of 32, 64, 128 or, without zero points, a row,"
        f" got {spec}; dequantize them."
    )


def prepack(q: QTensor) -> PackedWeight:
    """The same weights in the kernel's order, each bit of them.

    `unpack(prepack(q))` is q again for every q that `quantize` returns. Of others it changes what
    does not show: codes of E4M3 blocks with scale 0 become 0, but for their sign, and the sign of
    an E4M3 scale is taken for positive.

    Args:
      q: `(n, k)`; n a multiple of 64, k of 128, spec as in `scheme_of`.

    Raises:
      ValueError: If q is no matrix.
      NotImplementedError: For other specs and shapes.
    """
    if len(q.shape) != 2:
        raise ValueError(f"prepack: q must be a matrix, got shape {q.shape}; vmap over the rest.")
    n, k = q.shape
    scheme = scheme_of(q.spec, k)
    if n % TILE or k % K_UNIT or 0 in (n, k):
        raise NotImplementedError(
            f"prepack: rows must be a multiple of {TILE} and columns of {K_UNIT}, got shape"
            f" {q.shape}; pad the weights before they are quantized."
        )
    codes = unpack_codes(q.codes, 4)
    scales = jnp.repeat(q.scales, q.spec.block_rows, axis=0)
    zero_points = references = None
    if scheme.scales == "e4m3":
        bits = lax.bitcast_convert_type(scales, jnp.uint8)
        is_zero = jnp.repeat(bits & 0x7F == 0, scheme.group, axis=1)
        codes = jnp.where(is_zero, codes & 8, codes)
        scales = _four_to_a_word(decode.normalize_e4m3(bits))
    elif scheme.scales == "e8m0":
        is_nan = is_nan_scale(scales)
        largest = jnp.max(jnp.where(is_nan, 0, scales), axis=1).astype(jnp.int32)
        reference = jnp.maximum(largest, _SMALLEST_REFERENCE)
        relative = 254 - reference[:, None] + scales.astype(jnp.int32)
        scales = _four_to_a_word(jnp.where(is_nan, _E8M0_NAN, relative).astype(jnp.uint8))
        has_nan = jnp.any(is_nan, axis=1)
        references = jnp.where(has_nan, -reference, reference).astype(jnp.int16)
    else:
        scales = scales.T
    if q.zero_points is not None:
        zero_points = jnp.repeat(q.zero_points, q.spec.block_rows, axis=0).T
    elif scheme.kind == "integer":
        codes = codes ^ np.uint8(8)  # two's complement to u = level + 8
    return PackedWeight(
        _pack_words(codes, scheme.kind), scales, zero_points, references, q.global_scale, q.spec
    )


def unpack(w: PackedWeight) -> QTensor:
    """The weights as they were before `prepack`, bit for bit.

    Raises:
      ValueError: If w has another version of the layout.
    """
    check_version("unpack", w)
    scheme = scheme_of(w.spec, w.shape[1])
    codes = _unpack_words(w.words, scheme.kind)
    scales, zero_points = w.scales, w.zero_points
    if scheme.scales == "e4m3":
        bits = decode.denormalize_e4m3(_four_of_a_word(scales))
        scales = lax.bitcast_convert_type(bits, E4M3.storage)
    elif scheme.scales == "e8m0":
        relative = _four_of_a_word(scales)
        reference = jnp.abs(w.references.astype(jnp.int32))[:, None]
        absolute = relative.astype(jnp.int32) - 254 + reference
        scales = jnp.where(relative == _E8M0_NAN, _E8M0_NAN, absolute).astype(jnp.uint8)
    else:
        scales = scales.T
    rows = slice(None, None, w.spec.block_rows)
    if zero_points is not None:
        zero_points = zero_points.T[rows]
    elif scheme.kind == "integer":
        codes = codes ^ np.uint8(8)
    return QTensor(pack(codes, 4), scales[rows], w.global_scale, w.spec, zero_points)


def row_factors(w: PackedWeight) -> Float[Array, "..."]:
    """Float32 `(n,)` or `()`: what the kernel's sums are multiplied by, with the global scale."""
    scheme = scheme_of(w.spec, w.shape[1])
    if scheme.scales == "e8m0":
        exponent = jnp.abs(w.references.astype(jnp.int32)) - 127 - decode.E8M0_FACTOR_LOG2
        factors = jnp.where(w.references < 0, np.float32(np.nan), power_of_two(exponent))
    elif scheme.scales == "e4m3":
        factors = jnp.float32(2.0**-decode.E4M3_FACTOR_LOG2)
    else:
        factors = jnp.float32(1 / scheme.step)
        if scheme.scales == "row":
            factors = factors * w.scales[0]
    return factors if w.global_scale is None else factors * w.global_scale


def check_version(who: str, w: PackedWeight) -> None:
    """Raises a ValueError if w has another version of the layout."""
    if w.version != LAYOUT_VERSION:
        raise ValueError(
            f"{who}: weights must be packed in version {LAYOUT_VERSION} of the layout, got version"
            f" {w.version}; prepack them again from the QTensor."
        )


# Axes of a tile: rows 16 w + 8 h + r, columns 16 j + 8 q + 2 c + i. Codes are stored by rows and
# columns, words by (w, r, c, j) with pair (q, h) and half i inside.
_TILE_SHAPE = (4, 2, 8, 4, 2, 4, 2)  # w h r j q c i
_TO_WORDS = (0, 4, 1, 3, 7, 5, 6, 2, 8)  # from (n, w, h, r, k, j, q, c, i)


def _pack_words(codes: UInt8[Array, "n k"], kind: str) -> UInt32[Array, "n_tiles k_tiles 512"]:
    n, k = codes.shape
    split = codes.reshape(n // TILE, *_TILE_SHAPE[:3], k // TILE, *_TILE_SHAPE[3:])
    fields = split.transpose(_TO_WORDS).astype(jnp.uint32)
    fields = fields.reshape(n // TILE, k // TILE, TILE_WORDS, 4, 2)
    return decode.e2m1_words(fields) if kind == "e2m1" else decode.integer_words(fields)


def _unpack_words(words: UInt32[Array, "n_tiles k_tiles 512"], kind: str) -> UInt8[Array, "n k"]:
    n_tiles, k_tiles, _ = words.shape
    pairs = decode.e2m1_pairs(words) if kind == "e2m1" else decode.integer_pairs(words, step=1)
    return from_thread_order(decode.codes_of_pairs(pairs, kind), n_tiles, k_tiles)


def from_thread_order(
    values: Shaped[Array, "..."], n_tiles: int, k_tiles: int
) -> Shaped[Array, "n k"]:
    """Rows and columns of values `(n_tiles, k_tiles, 512, pair, half)`, as words hold them."""
    w, h, r, j, q, c, i = _TILE_SHAPE
    fields = values.reshape(n_tiles, k_tiles, w, r, c, j, q, h, i)
    return fields.transpose(np.argsort(_TO_WORDS)).reshape(n_tiles * TILE, k_tiles * TILE)


def _four_to_a_word(codes: UInt8[Array, "n groups"]) -> UInt32[Array, "words n"]:
    n, groups = codes.shape
    fours = codes.reshape(n, groups // 4, 4).astype(jnp.uint32)
    words = fours[..., 0] | fours[..., 1] << 8 | fours[..., 2] << 16 | fours[..., 3] << 24
    return words.T


def _four_of_a_word(words: UInt32[Array, "words n"]) -> UInt8[Array, "n groups"]:
    codes = jnp.stack([words >> 8 * i & 0xFF for i in range(4)], axis=-1).astype(jnp.uint8)
    return codes.transpose(1, 0, 2).reshape(words.shape[1], -1)

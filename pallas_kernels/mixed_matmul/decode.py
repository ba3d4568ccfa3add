"""Codes of 4 bits in words of 32, two at a time made into pairs of bfloat16 numbers.

A word holds eight codes, four in each half of 16 bits. Code p of the low half and code p of the
high half make pair p: neighbours along k, which the tensor core wants in one 32-bit register. All
arithmetic below treats both halves in one instruction, and runs alike on jax arrays of any shape
in a kernel and outside. For eight codes it takes, by count of the 32-bit operations,

    e2m1      5 masks of 3 pairs that one shift brings into place, 6 for the fourth, 4 products   15
    integer   3 shifts, 4 masks with an `or` (one LOP3 each), 4 differences                       11

and per pair of scales 1 extraction (2 operations): of a thread's codes 8 share an E8M0 scale of 32
columns and 4 an E4M3 scale of 16, which makes another 0.25 or 0.5 a code.

e2m1: the bits `s eem` of a code at 15 and 8, 7, 6 of a bfloat16 are its level times `2**-126`, also
for the code 1, which makes a subnormal number: a product by a scale of about `2**126` is exact.
That scale is built from the stored byte without rounding. E8M0: the byte, taken relative to the
largest of its row, is the exponent. E4M3: made normal numbers of 5 exponent bits by `prepack`, so
that a shift and an `or` give the bfloat16 of `2**107` times it.

integer: u in 0..15 in the lowest mantissa bits below the exponent of 128 is 128 + u; subtracting
128 and the code of zero leaves the level, exactly.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8, UInt32

# Of the product of an e2m1 pair by its scales, relative to level times scale.
E4M3_FACTOR_LOG2 = -19
E8M0_FACTOR_LOG2 = 1  # and relative to the largest scale of the row

_BOTH = 0x00010001
_E2M1 = 0x81C0 * _BOTH


def e2m1_words(codes: UInt32[Array, "*shape 4 2"]) -> UInt32[Array, "*shape"]:
    """Words of e2m1 codes `(pair, half)`; see `e2m1_pairs`."""
    # Each code is cut out before its bits are moved: no array of all signs is stored on the way.
    first, second, third, fourth = (codes[..., pair, :] for pair in range(4))
    half = (
        ((first & 7) << 6 | first >> 3 << 15)
        | ((second & 7) << 3 | second >> 3 << 12)
        | (third & 7 | third >> 3 << 9)
        # What is left: bits 14, 13, 11 and 10.
        | (fourth >> 3 << 14 | (fourth >> 2 & 1) << 13 | (fourth & 3) << 10)
    )
    return half[..., 0] | half[..., 1] << 16


def e2m1_pairs(words: UInt32[Array, "*shape"]) -> list[UInt32[Array, "*shape"]]:
    """Bits of four pairs of bfloat16, each a level times `2**-126`."""
    return [
        words & _u32(_E2M1),
        words << 3 & _u32(_E2M1),
        words << 6 & _u32(_E2M1),
        words << 1 & _u32(0x8000 * _BOTH)
        | words >> 5 & _u32(0x0100 * _BOTH)
        | words >> 4 & _u32(0x00C0 * _BOTH),
    ]


def integer_words(codes: UInt32[Array, "*shape 4 2"]) -> UInt32[Array, "*shape"]:
    """Words of codes 0..15 `(pair, half)`; see `integer_pairs`."""
    half = codes[..., 0, :]
    for pair in range(1, 4):
        half = half | codes[..., pair, :] << 4 * pair
    return half[..., 0] | half[..., 1] << 16


def integer_pairs(words: UInt32[Array, "*shape"], *, step: int) -> list[UInt32[Array, "*shape"]]:
    """Bits of four pairs of bfloat16, each `128 + step * code`; step is 1 or 2."""
    mask, exponent = _u32(0xF * step * _BOTH), _u32(0x4300 * _BOTH)
    pairs = []
    for pair in range(4):
        shift = 4 * pair - (step - 1)
        moved = words << -shift if shift < 0 else words >> shift if shift else words
        pairs.append(moved & mask | exponent)
    return pairs


def codes_of_pairs(pairs: list[UInt32[Array, "*shape"]], kind: str) -> UInt8[Array, "*shape 4 2"]:
    """The codes that `e2m1_pairs` (kind "e2m1") or `integer_pairs` with step 1 made pairs of."""

    def codes(halves):
        found = halves >> 12 & 8 | halves >> 6 & 7 if kind == "e2m1" else halves & 0xF
        return found.astype(jnp.uint8)  # before they are stacked: bytes are stored, not words

    return jnp.stack([jnp.stack([codes(p), codes(p >> 16)], axis=-1) for p in pairs], axis=-2)


def e8m0_pairs(words: UInt32[Array, "*shape"], index: int) -> UInt32[Array, "*shape"]:
    """Bits of bfloat16 `2**(byte - 127)` in both halves, for byte `index` of each word."""
    return _byte(words, index) * _u32(0x80 * _BOTH)


def e4m3_pairs(words: UInt32[Array, "*shape"], index: int) -> UInt32[Array, "*shape"]:
    """Bits of bfloat16 `2**107` times the scale in byte `index`, in both halves."""
    return _byte(words, index) * _u32(0x10 * _BOTH) | _u32(0x7000 * _BOTH)


def zero_point_pairs(zero_points: UInt8[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Bits of bfloat16 `128 + zero_point` in both halves, for zero points up to 15."""
    return zero_points.astype(jnp.uint32) * _u32(_BOTH) | _u32(0x4300 * _BOTH)


def normalize_e4m3(bits: UInt8[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Bits of non-negative E4M3 numbers to 5 exponent and 3 mantissa bits without subnormals.

    Code c > 0 is `2**((c >> 3) - 10) * (1 + (c & 7) / 8)`; 0 stays 0 and NaN becomes 255.
    """
    bits = bits & 0x7F
    return jnp.where(
        bits < 8,
        jnp.asarray(_SUBNORMALS)[jnp.minimum(bits, 7)],
        jnp.where(bits == 0x7F, 255, bits + 24),
    ).astype(jnp.uint8)


def denormalize_e4m3(codes: UInt8[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """The inverse of `normalize_e4m3`."""
    subnormal = jnp.zeros_like(codes)
    for bits, code in enumerate(_SUBNORMALS):
        subnormal = jnp.where(codes == code, np.uint8(bits), subnormal)
    normal = jnp.where(codes == 255, np.uint8(0x7F), codes - np.uint8(24))
    return jnp.where(codes < 32, subnormal, normal)


# E4M3 numbers 0 to 7 times 2**-9, normalized.
_SUBNORMALS = np.array([0, 8, 16, 20, 24, 26, 28, 30], np.uint8)


def _byte(words, index):
    moved = words >> 8 * index if index else words
    return moved & _u32(0xFF) if index < 3 else moved


def _u32(value):
    return np.uint32(value)

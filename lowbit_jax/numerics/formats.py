"""Element formats: which levels a low-bit code can stand for, and how codes are stored.

Three kinds of grid, all in units of the scale:

- float: `e2m1`, `e2m3`, `e3m2`, `e4m3`, `e5m2`, the element types of the OCP Microscaling (MX)
  formats; Rouhani et al., OCP Microscaling Formats (MX) Specification v1.0 (2023), and Rouhani et
  al., Microscaling Data Formats for Deep Learning, arXiv:2310.10537, table 1. We have no use for
  the infinities of e5m2: encoding saturates.
- integer: `2**b - 1` levels `-(2**(b-1) - 1) .. 2**(b-1) - 1`, symmetric, with a zero. The code
  `-2**(b-1)` is not used. Two bits make it ternary. The full range uses that code too: the
  convention of many checkpoints, where the abs-max lies half a step beyond the largest code.
  Unsigned integers `0 .. 2**b - 1` serve blocks with a zero point.
- midrise: `2**b` levels `j + 1/2`, `j = -2**(b-1) .. 2**(b-1) - 1`, without a zero; Panferov et
  al., QuEST, arXiv:2502.05003.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from lowbit_jax.numerics.floats import float_bits, power_of_two


@dataclasses.dataclass(frozen=True)
class Format:
    """A set of levels and the code of each; plain data, hashable.

    Attributes:
      name: For example "e2m1", "int4", "ternary", "midrise4".
      kind: How codes are read: as a small float, as a two's complement integer, or as the two's
        complement integer j of the level `j + 1/2`.
      bits: Bits of one code.
      max: The outermost level, in units of the scale.
      storage: dtype of the stored codes: uint8, densely packed, below 8 bits; otherwise int8,
        float8_e4m3fn or float8_e5m2, one code an element.
      exponent_bits: Of a float.
      mantissa_bits: Of a float.
      bias: Exponent bias of a float.
      min: The lowest level; left out, `-max`.
    """

    name: str
    kind: Literal["float", "integer", "midrise"]
    bits: int
    max: float
    storage: np.dtype | type
    exponent_bits: int = 0
    mantissa_bits: int = 0
    bias: int = 0
    min: float = -math.inf

    def __post_init__(self):
        # Equal dtypes may hash apart (jnp.float8_e4m3fn and its np.dtype do).
        object.__setattr__(self, "storage", np.dtype(self.storage))
        if self.min == -math.inf:
            object.__setattr__(self, "min", -self.max)

    def __str__(self) -> str:
        return self.name

    @property
    def grid(self) -> np.ndarray:
        """All levels, ascending, float64; a signed zero counts once."""
        if self.kind == "midrise":
            return np.arange(2**self.bits) - (2**self.bits - 1) / 2
        if self.kind == "integer":
            return np.arange(self.min, self.max + 1)
        codes = np.arange(2 ** (self.bits - 1))
        exponents = codes >> self.mantissa_bits
        fractions = (codes & (2**self.mantissa_bits - 1)) / 2**self.mantissa_bits
        levels = np.where(
            exponents == 0,
            fractions * 2.0 ** (1 - self.bias),
            (1 + fractions) * 2.0 ** (exponents - self.bias),
        )
        levels = levels[levels <= self.max]  # without the codes of infinity and NaN
        return np.concatenate([-levels[:0:-1], levels])

    @property
    def last_step(self) -> float:
        """Distance between the two outermost levels."""
        return float(self.grid[-1] - self.grid[-2])

    @property
    def max_exponent(self) -> int:
        """`floor(log2(max))`, "emax" in the MX specification."""
        return math.frexp(self.max)[1] - 1


E2M1 = Format("e2m1", "float", 4, 6.0, np.dtype(np.uint8), 2, 1, 1)
E2M3 = Format("e2m3", "float", 6, 7.5, np.dtype(np.uint8), 2, 3, 1)
E3M2 = Format("e3m2", "float", 6, 28.0, np.dtype(np.uint8), 3, 2, 3)
E4M3 = Format("e4m3", "float", 8, 448.0, np.dtype(jnp.float8_e4m3fn), 4, 3, 7)
E5M2 = Format("e5m2", "float", 8, 57344.0, np.dtype(jnp.float8_e5m2), 5, 2, 15)


def integer(bits: int, *, is_full_range: bool = False) -> Format:
    """The integers from `-(2**(bits-1) - 1)` to `2**(bits-1) - 1`, with zero; bits 2 to 8.

    Args:
      bits: Of a code.
      is_full_range: Adds the level `-2**(bits-1)`. Under `absmax` the scale is then
        `2 a / (2**bits - 1)`: a positive abs-max clips by half a step, the rest errs less.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"integer: bits must be 2 to 8, got {bits}; for 1 bit use midrise(1).")
    storage = np.dtype(np.int8 if bits == 8 else np.uint8)
    name = f"int{bits}_full" if is_full_range else "ternary" if bits == 2 else f"int{bits}"
    top = float(2 ** (bits - 1) - 1)
    return Format(name, "integer", bits, top, storage, min=-top - is_full_range)


def unsigned(bits: int) -> Format:
    """The integers from 0 to `2**bits - 1`, for blocks with a zero point; bits 1 to 8."""
    if not 1 <= bits <= 8:
        raise ValueError(f"unsigned: bits must be 1 to 8, got {bits}.")
    top = float(2**bits - 1)
    return Format(f"uint{bits}", "integer", bits, top, np.dtype(np.uint8), min=0.0)


def midrise(bits: int) -> Format:
    """The `2**bits` levels `j + 1/2`, symmetric, without zero; bits 1 to 8."""
    if not 1 <= bits <= 8:
        raise ValueError(f"midrise: bits must be 1 to 8, got {bits}.")
    storage = np.dtype(np.int8 if bits == 8 else np.uint8)
    return Format(f"midrise{bits}", "midrise", bits, (2**bits - 1) / 2, storage)


def encode(values: Float[Array, "*shape"], format: Format) -> UInt8[Array, "*shape"]:
    """Codes of `values`, which must lie on the grid of `format` exactly.

    Returns:
      uint8, one code an element: the sign, exponent and mantissa bits of a float (-0 has its own
      code), the two's complement of an integer, that of j for the mid-rise level `j + 1/2`.
    """
    values = values.astype(jnp.float32)
    if format.kind != "float":
        return jnp.floor(values).astype(jnp.int32).astype(jnp.uint8) & np.uint8(2**format.bits - 1)
    if format.bits == 8:
        return lax.bitcast_convert_type(values.astype(format.storage), jnp.uint8)
    m = format.mantissa_bits
    bits = float_bits(values)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude >> (23 - m)) - ((127 - format.bias) << m)
    # Below the smallest normal number the code counts steps of 2**(1 - bias - m).
    subnormal = (jnp.abs(values) * np.float32(2.0 ** (format.bias - 1 + m))).astype(jnp.int32)
    code = jnp.where(subnormal < 2**m, subnormal, normal)
    sign = jnp.where(bits < 0, 1 << (format.bits - 1), 0)
    return (code | sign).astype(jnp.uint8)


def decode(codes: UInt8[Array, "*shape"], format: Format) -> Float[Array, "*shape"]:
    """Levels of `codes` in float32; the inverse of `encode`."""
    if format.kind != "float":
        integers = codes.astype(jnp.int32)
        if format.min < 0:  # Sign extension: codes at or above half the range are negative.
            integers = integers - jnp.where(integers >= 2 ** (format.bits - 1), 2**format.bits, 0)
        values = integers.astype(jnp.float32)
        return values + np.float32(0.5) if format.kind == "midrise" else values
    if format.bits == 8:
        return lax.bitcast_convert_type(codes, format.storage).astype(jnp.float32)
    m = format.mantissa_bits
    codes = codes.astype(jnp.int32)
    exponent = (codes >> m) & (2**format.exponent_bits - 1)
    fraction = codes & (2**m - 1)
    step = power_of_two(jnp.maximum(exponent, 1) - (format.bias + m))
    count = jnp.where(exponent == 0, fraction, fraction + 2**m)
    magnitude = count.astype(jnp.float32) * step
    return jnp.where(codes >= 2 ** (format.bits - 1), -magnitude, magnitude)


def pack(codes: UInt8[Array, "*batch k"], bits: int) -> UInt8[Array, "*batch bytes"]:
    """Codes of `bits` bits each, densely in bytes: element i begins at bit `i * bits`, low first.

    With 4 bits the even index is the low nibble, as in the checkpoints of compressed-tensors and
    in `lax.bitcast_convert_type` of a 4-bit array.

    Args:
      codes: `(*batch, k)`; only the low `bits` bits of each may be set.
      bits: 1 to 8; `k * bits` must be a multiple of 8.

    Returns:
      `(*batch, k * bits // 8)`.

    Raises:
      ValueError: If the codes do not fill whole bytes.
    """
    *batch, k = codes.shape
    if k * bits % 8:
        raise ValueError(
            f"pack: the last axis must fill whole bytes, got {k} codes of {bits} bits; pad it to a"
            f" multiple of {8 // math.gcd(8, bits)}."
        )
    if bits == 8:
        return codes
    # The pattern repeats after `period` codes; every byte is an `or` of the codes that reach it.
    period = 8 // math.gcd(8, bits)
    groups = codes.reshape(*batch, k // period, period)
    packed = []
    for byte in range(period * bits // 8):
        parts = []
        for i in range(period):
            shift = i * bits - 8 * byte
            if -bits < shift < 8:
                code = groups[..., i]
                parts.append(code << shift if shift >= 0 else code >> -shift)
        total = parts[0]
        for part in parts[1:]:
            total = total | part
        packed.append(total)
    return jnp.stack(packed, axis=-1).reshape(*batch, k * bits // 8)


def unpack(packed: UInt8[Array, "*batch bytes"], bits: int) -> UInt8[Array, "*batch k"]:
    """The codes that `pack` packed, `(*batch, bytes * 8 // bits)`.

    Raises:
      ValueError: If the bytes do not hold a whole number of periods of the packing.
    """
    *batch, n_bytes = packed.shape
    period = 8 // math.gcd(8, bits)
    period_bytes = period * bits // 8
    if n_bytes % period_bytes:
        raise ValueError(
            f"unpack: {bits}-bit codes come in groups of {period_bytes} bytes, got a last axis of"
            f" {n_bytes} bytes; it was cut or was not packed by `pack`."
        )
    if bits == 8:
        return packed
    groups = packed.reshape(*batch, n_bytes // period_bytes, period_bytes)
    codes = []
    for i in range(period):
        byte, shift = divmod(i * bits, 8)
        code = groups[..., byte] >> shift
        if shift + bits > 8:
            code = code | (groups[..., byte + 1] << (8 - shift))
        codes.append(code & np.uint8(2**bits - 1))
    return jnp.stack(codes, axis=-1).reshape(*batch, n_bytes * 8 // bits)

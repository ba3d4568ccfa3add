import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lowbit_jax.numerics import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    Format,
    decode,
    encode,
    integer,
    midrise,
    pack,
    unpack,
    unsigned,
)

FLOATS = [E2M1, E2M3, E3M2, E4M3, E5M2]
FULL = [*(integer(bits, is_full_range=True) for bits in (2, 4, 8)), *map(unsigned, (1, 4, 8))]
FORMATS = [*FLOATS, *map(integer, range(2, 9)), *FULL, *map(midrise, range(1, 9))]
NATIVE = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


decoded = jax.jit(decode, static_argnums=1)
encoded = jax.jit(encode, static_argnums=1)


@functools.partial(jax.jit, static_argnums=1)
def packed_and_back(codes, bits):
    packed = pack(codes, bits)
    return packed, unpack(packed, bits)


def all_codes(format):
    """Every code that stands for a level: not NaN, infinity, or the unused integer."""
    codes = np.arange(2**format.bits, dtype=np.uint8)
    if format.kind == "integer" and format.min == -format.max:
        return codes[codes != 2 ** (format.bits - 1)]
    if format.kind == "float":
        return codes[np.abs(codes.view(NATIVE[format.name]).astype(np.float64)) <= format.max]
    return codes


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_code_round_trips(format):
    codes = all_codes(format)
    levels = decoded(codes, format)
    np.testing.assert_array_equal(encoded(levels, format), codes)  # Exact.
    np.testing.assert_array_equal(np.unique(levels), format.grid)
    assert format.grid[-1] == format.max
    assert len(format.grid) == len(codes) - (format.kind == "float")  # -0 has its own code


@pytest.mark.parametrize("format", FLOATS, ids=str)
def test_float_codes_are_those_of_ml_dtypes(format):
    codes = np.arange(2**format.bits, dtype=np.uint8)
    expected = codes.view(NATIVE[format.name]).astype(np.float32)
    actual = np.asarray(decoded(codes, format))
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(np.signbit(actual[actual == 0]), [False, True])


def test_levels_of_the_published_tables():
    np.testing.assert_array_equal(E2M1.grid[7:], [0, 0.5, 1, 1.5, 2, 3, 4, 6])
    np.testing.assert_array_equal(integer(2).grid, [-1, 0, 1])
    np.testing.assert_array_equal(integer(4).grid, np.arange(-7, 8))
    np.testing.assert_array_equal(integer(4, is_full_range=True).grid, np.arange(-8, 8))
    np.testing.assert_array_equal(midrise(2).grid, [-1.5, -0.5, 0.5, 1.5])
    np.testing.assert_array_equal(midrise(1).grid, [-0.5, 0.5])
    assert [f.max for f in FLOATS] == [6, 7.5, 28, 448, 57344]
    assert [f.max_exponent for f in FLOATS] == [2, 2, 4, 8, 15]
    assert [f.last_step for f in [E2M1, E2M3, E4M3, integer(4), midrise(3)]] == [2, 0.5, 32, 1, 1]
    assert [f.name for f in [integer(2), integer(3), midrise(4)]] == ["ternary", "int3", "midrise4"]


def test_mid_rise_codes_are_the_twos_complement_of_j():
    # Level -3/2 of four is j = -2, 0b10.
    np.testing.assert_array_equal(encode(jnp.array(midrise(2).grid), midrise(2)), [2, 3, 0, 1])


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_dense_and_low_bits_first(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 40), dtype=np.uint8)
    packed, unpacked = packed_and_back(codes, bits)
    # A slow definition: bit i * bits + j of the row is bit j of code i.
    stream = (codes[..., None] >> np.arange(bits)) & 1
    expected = np.packbits(stream.reshape(3, -1), axis=-1, bitorder="little")
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(unpacked, codes)


def test_all_nibble_pairs_pack_with_the_even_index_low():
    pairs = np.array(list(itertools.product(range(16), repeat=2)), np.uint8)
    packed = pack(jnp.array(pairs), 4)
    np.testing.assert_array_equal(packed[:, 0], pairs[:, 0] | pairs[:, 1] << 4)
    np.testing.assert_array_equal(unpack(packed, 4), pairs)
    values = jnp.float32([0.5, 1, 3, 6])
    np.testing.assert_array_equal(pack(encode(values, E2M1), 4), [0x21, 0x75])
    by_jax = jax.lax.bitcast_convert_type(jnp.int4([1, -2]).reshape(1, 2), jnp.uint8)
    np.testing.assert_array_equal(pack(encode(jnp.float32([1, -2]), integer(4)), 4), by_jax)


def test_codes_that_do_not_fill_bytes_are_refused():
    with pytest.raises(ValueError, match=r"3 codes of 4 bits.*multiple of 2"):
        pack(jnp.zeros((2, 3), jnp.uint8), 4)
    with pytest.raises(ValueError, match="groups of 3 bytes"):
        unpack(jnp.zeros((4,), jnp.uint8), 3)
    with pytest.raises(ValueError, match="use midrise"):
        integer(1)
    with pytest.raises(ValueError, match="1 to 8, got 9"):
        midrise(9)


def test_equal_formats_hash_alike_however_the_dtype_is_written():
    other = Format("e4m3", "float", 8, 448.0, jnp.float8_e4m3fn, 4, 3, 7)
    assert other == E4M3
    assert hash(other) == hash(E4M3)
    assert integer(4) == integer(4)
    assert hash(midrise(3)) == hash(midrise(3))

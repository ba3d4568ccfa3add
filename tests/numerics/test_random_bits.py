import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowbit_jax.numerics.random_bits import mix, random_bits

ROWS, COLUMNS = 512, 2048
N = ROWS * COLUMNS
BITS = np.asarray(jax.jit(random_bits, static_argnums=1)(jax.random.key(0), (ROWS, COLUMNS)))


def python_mix(h):
    h = (h ^ (h >> 16)) * 0x21F0AAAD % 2**32
    h = (h ^ (h >> 15)) * 0xD35A2D97 % 2**32
    return h ^ (h >> 15)


@pytest.mark.parametrize("place", [(0, 0), (0, 31), (3, 32), (511, 63), (7, 64), (100, 2047)])
def test_bits_are_those_of_the_documented_equation(place):
    r, c = place
    seed = r ^ 0x9E3779B9
    for word in np.asarray(jax.random.key_data(jax.random.key(0))):
        seed = python_mix(seed ^ int(word))
    word = python_mix(seed ^ (32 * (c // 64) + c % 32))
    if c % 64 >= 32:
        word = (word << 16 | word >> 16) % 2**32
    assert BITS[place] == word


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_each_byte_is_uniform(shift):
    counts = np.bincount((BITS >> shift & 0xFF).reshape(-1), minlength=256)
    chi_square = ((counts - N / 256) ** 2 / (N / 256)).sum()
    # Statistical: mean 255, standard deviation sqrt(2 * 255) = 22.6; 6 of them either way. A hash
    # that is too regular would fall below.
    assert 255 - 6 * 22.6 < chi_square < 255 + 6 * 22.6


@pytest.mark.parametrize(
    "offset",
    [(0, 1), (0, 2), (0, 16), (0, 32), (0, 64), (0, 1024), (1, 0), (2, 0), (256, 0), (1, 1)],
)
@pytest.mark.parametrize("p", [0.5, 0.02])
def test_decisions_of_neighbours_are_independent(offset, p):
    ups = np.asarray(p * 2**32 > BITS, np.float64) - p
    ups /= np.sqrt(p * (1 - p))
    r, c = offset
    here, there = ups[: ROWS - r, : COLUMNS - c], ups[r:, c:]
    # Statistical: the mean of n products of independent variables of mean 0 and variance 1.
    assert abs((here * there).mean()) < 5 / np.sqrt(here.size)
    # And over single rows and columns the spread is that of independent bits, to 5 standard errors.
    for axis in (0, 1):
        means = ups.mean(axis) * np.sqrt(ups.shape[axis])
        kurtosis = (1 - 6 * p * (1 - p)) / (p * (1 - p)) / ups.shape[axis]
        assert abs(means.var() - 1) < 5 * np.sqrt((2 + kurtosis) / means.size)


@pytest.mark.parametrize("other", [jax.random.key(1), jax.random.fold_in(jax.random.key(0), 1)])
def test_keys_give_unrelated_bits(other):
    bits = np.asarray(random_bits(other, (ROWS, COLUMNS)))
    agreeing = np.unpackbits((bits ^ BITS).view(np.uint8).reshape(-1)).mean()
    assert abs(agreeing - 0.5) < 5 * 0.5 / np.sqrt(32 * N)


def test_one_input_bit_turns_each_output_bit_half_of_the_time():
    h = jax.random.bits(jax.random.key(2), (2**14,), jnp.uint32)
    flipped = jnp.uint32(1) << jnp.arange(32, dtype=jnp.uint32)
    turned = mix(h) ^ mix(h ^ flipped[:, None])
    share = np.asarray((turned[..., None] >> jnp.arange(32, dtype=jnp.uint32) & 1).mean(1))
    # Statistical: 1024 shares with a standard error of 1 / 256; the hash's own bias adds to them.
    assert abs(share - 0.5).max() < 8 / 256
    assert abs(share.mean() - 0.5) < 5 / 256 / 32


def test_rows_are_counted_through_the_batch_and_do_not_see_each_other():
    key = jax.random.key(0)
    np.testing.assert_array_equal(random_bits(key, (16, 32, COLUMNS)).reshape(BITS.shape), BITS)
    np.testing.assert_array_equal(random_bits(key, (3, 100)), BITS[:3, :100])
    np.testing.assert_array_equal(random_bits(key, (100,)), BITS[0, :100])
    assert random_bits(key, ()) == BITS[0, 0]
    with pytest.raises(ValueError, match=r"one key, got shape \(4,\)"):
        random_bits(jax.random.split(key, 4), (4, 8))


def test_raw_keys_vmap_and_meshes_give_the_same_bits():
    shape = (8, 96)
    raw = jax.random.key_data(jax.random.key(0))
    np.testing.assert_array_equal(random_bits(raw, shape), BITS[:8, :96])
    keys = jax.random.split(jax.random.key(3), 4)
    batched = jax.vmap(lambda key: random_bits(key, shape))(keys)
    for key, bits in zip(keys, batched, strict=True):
        np.testing.assert_array_equal(bits, random_bits(key, shape))
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    sharding = NamedSharding(mesh, PartitionSpec("a", "b"))
    sharded = jax.jit(lambda key: random_bits(key, shape), out_shardings=sharding)(keys[0])
    np.testing.assert_array_equal(sharded, batched[0])

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.numerics.floats import (
    absmax,
    floor_log2,
    order_free_sum,
    power_of_two,
    root_mean_square,
    times_power_of_two,
)

rms = jax.jit(root_mean_square, static_argnames="subtract_mean")


def test_absmax_lets_non_finite_entries_through():
    x = jnp.float32([[1, -3, 2], [0, -0.0, 0], [1, -np.inf, 2], [np.inf, np.nan, -5]])
    expected = np.float32([[3], [0], [np.inf], [np.nan]])
    np.testing.assert_array_equal(absmax(x, -1), expected)  # Exact.


def test_floor_log2_is_exact_next_to_powers_of_two():
    exponents = np.arange(-126, 128)
    powers = (2.0**exponents).astype(np.float32)
    below = np.nextafter(powers, np.float32(0))
    np.testing.assert_array_equal(floor_log2(jnp.array(powers)), exponents)
    np.testing.assert_array_equal(floor_log2(-jnp.array(below[1:])), exponents[1:] - 1)
    np.testing.assert_array_equal(power_of_two(jnp.array(exponents)), powers)


@pytest.mark.parametrize("variant", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_times_power_of_two_is_exact_where_one_factor_would_be_subnormal(variant):
    x = np.float32([1.0, -1.5, 2.0**100, 3 * 2.0**-120])
    for exponent in [-127, -126, -20, 0, 127, 200]:
        expected = x.astype(np.float64) * 2.0**exponent
        # What float32 cannot hold as a normal number is outside the claim.
        is_normal = (abs(expected) >= 2.0**-126) & (abs(expected) < 2.0**128)
        actual = variant(times_power_of_two)(jnp.array(x), jnp.int32(exponent))
        np.testing.assert_array_equal(np.asarray(actual)[is_normal], expected[is_normal])
        assert is_normal.any()


def test_sums_and_rms_do_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    x = rng.standard_t(3, (8, 1000)).astype(np.float32)
    shuffled = rng.permuted(x, axis=1)
    np.testing.assert_array_equal(rms(x), rms(shuffled))  # Exact: integers are added.
    small = x / np.float32(1.01 * abs(x).max())
    expected = small.sum(1, keepdims=True, dtype=np.float64)
    # Bound: an entry loses less than 2**-30; the sum is rounded to float32 three times.
    error = abs(np.asarray(order_free_sum(jnp.array(small)), np.float64) - expected)
    assert np.all(error < 1000 * 2.0**-30 + 3 * 2.0**-24 * 40)
    tiles = jnp.array(small.reshape(2, 4, 10, 100))
    flat = tiles.transpose(0, 2, 1, 3).reshape(2, 10, 400)
    both = order_free_sum(tiles, (-3, -1))
    np.testing.assert_array_equal(both[:, 0], order_free_sum(flat))  # Exact, as above.


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_root_mean_square_of_any_magnitude(scale):
    x = (scale * np.random.default_rng(1).normal(0.7, 1, (16, 256))).astype(np.float32)
    wide = x.astype(np.float64)
    # Bound: k * 2**-28 relative on the mean square, and a few float32 roundings.
    np.testing.assert_allclose(
        rms(x)[:, 0], np.sqrt((wide**2).mean(1)), rtol=256 * 2**-29 + 4 * 2**-24, atol=0
    )
    # Bound: subtracting the mean, twice as small after halving, at most quadruples the first term.
    np.testing.assert_allclose(
        rms(x, subtract_mean=True)[:, 0], wide.std(1), rtol=256 * 2**-27 + 8 * 2**-24, atol=0
    )


def test_long_rows_are_refused_rather_than_overflown():
    assert order_free_sum(jnp.full((1, 65536), 1 - 2.0**-24)).item() == pytest.approx(65536, 1e-6)
    with pytest.raises(NotImplementedError, match="65536 entries"):
        root_mean_square(jnp.ones((1, 65537)))

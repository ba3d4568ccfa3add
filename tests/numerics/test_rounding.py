import functools

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
    integer,
    midrise,
    round_to_grid,
    stochastic_cast,
    stochastic_round,
    unsigned,
)

FORMATS = [
    *(E2M1, E2M3, E3M2, E4M3, E5M2),
    *map(integer, (2, 3, 4, 8)),
    integer(4, is_full_range=True),
    unsigned(4),
    *map(midrise, (1, 2, 4, 8)),
]
NATIVE = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
rounded = jax.jit(round_to_grid, static_argnums=(1, 2))


def nearest_in_table(y, format):
    """Brute force: the nearest level; of two as near, the one whose code is even."""
    grid = format.grid
    # The integer, j, or the place of the magnitude among the non-negative floats.
    codes = np.floor(grid)
    if format.kind == "float":
        codes = np.abs(np.arange(len(grid)) - len(grid) // 2)
    y = np.asarray(y, np.float64)
    above = np.clip(np.searchsorted(grid, y), 1, len(grid) - 1)
    below = above - 1
    to_below, to_above = y - grid[below], grid[above] - y
    is_below_even = codes[below] % 2 == 0
    take_below = (to_below < to_above) | ((to_below == to_above) & is_below_even)
    return np.where(take_below, grid[below], grid[above])


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_nearest_is_the_nearest_level_with_ties_to_the_even_code(format):
    rng = np.random.default_rng(0)
    grid = format.grid
    midpoints = (grid[1:] + grid[:-1]) / 2
    # Every binade of a wide format gets its share of the 1e5 points, and the outside some.
    spread = rng.choice(grid, 50_000) * rng.uniform(0.5, 2, 50_000)
    y = np.float32(np.concatenate([rng.uniform(-1.2, 1.2, 50_000) * format.max, spread]))
    ties = np.float32(midpoints)
    y = np.concatenate([y, ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf)])
    y = np.concatenate([y, np.float32(grid), np.float32([1e30, -1e30])])
    y = np.where(abs(y) < 1e-30, np.float32(0), y)  # subnormals are flushed
    np.testing.assert_array_equal(rounded(y, format), nearest_in_table(y, format))  # Exact.


@pytest.mark.parametrize("format", [f for f in FORMATS if f.kind == "float"], ids=str)
def test_nearest_is_the_native_cast_inside_the_range(format):
    y = np.random.default_rng(1).uniform(-format.max, format.max, 10_000).astype(np.float32)
    y[:5000] *= np.float32(0.01)
    actual = np.asarray(rounded(y, format))
    expected = y.astype(NATIVE[format.name]).astype(np.float32)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(np.signbit(actual), np.signbit(expected))  # -0 too


def test_ties_of_e2m1():
    ties = jnp.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    expected = [0, 1, 1, 2, 2, 4, 4]
    np.testing.assert_array_equal(rounded(ties, E2M1), expected)
    np.testing.assert_array_equal(rounded(-ties, E2M1), -np.float32(expected))


def test_mid_rise_keeps_the_sign_of_a_tiny_number():
    tiny = jnp.float32([1e-30, -1e-30, 1e-9, -1e-9])
    np.testing.assert_array_equal(rounded(tiny, midrise(4)), [0.5, -0.5, 0.5, -0.5])


@functools.partial(jax.jit, static_argnums=1)
def draws(y, format, keys):
    return jax.vmap(stochastic_round, (None, None, 0))(y, format, keys)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_stochastic_rounding_is_unbiased_between_neighbours(format):
    rng = np.random.default_rng(2)
    grid = format.grid
    pairs = rng.integers(0, len(grid) - 1, 48)
    low, high = grid[pairs], grid[pairs + 1]
    y = np.float32(low + rng.uniform(0.05, 0.95, 48) * (high - low))
    keys = jax.random.split(jax.random.key(3), 4096)
    sample = np.asarray(draws(y, format, keys), np.float64)
    assert np.all((sample == low) | (sample == high))
    up = (y - low) / (high - low)
    standard_error = np.sqrt(up * (1 - up) / len(keys)) * (high - low)
    # Statistical: 13 formats of 48 points at 5 standard errors, a false alarm in about 1 of 2,800
    # seeds.
    assert np.all(abs(sample.mean(0) - y) <= 5 * standard_error)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_stochastic_rounding_moves_no_level_and_saturates(format):
    y = np.resize(np.float32(format.grid), 48)
    keys = jax.random.split(jax.random.key(4), 4096)  # the shape that is compiled already
    np.testing.assert_array_equal(draws(y, format, keys), np.broadcast_to(y, (4096, 48)))
    beyond = np.resize(np.float32([1.5, -3]) * np.float32(format.max), 48)
    saturated = np.where(beyond > 0, np.float32(format.max), np.float32(format.min))
    saturated = np.broadcast_to(saturated, (4096, 48))
    np.testing.assert_array_equal(draws(beyond, format, keys), saturated)


def test_stochastic_rounding_of_tiny_numbers_stays_next_to_zero():
    # A tiny negative number is not sent to the level below with the probability 1 - 1e-30 that
    # rounds to 1 in float32.
    y = np.resize(np.float32([-1e-30, 1e-30]), 48)
    keys = jax.random.split(jax.random.key(5), 4096)
    for format in [E2M1, integer(4)]:
        np.testing.assert_array_equal(draws(y, format, keys), 0)
    halves = np.asarray(draws(y, midrise(4), keys))
    # Statistical: 196,608 fair coins at 5 standard errors.
    assert abs(halves.mean()) <= 5 * 0.5 / halves.size**0.5
    assert set(np.unique(halves)) == {-0.5, 0.5}


def test_stochastic_rounding_without_a_key_is_refused():
    with pytest.raises(ValueError, match=r"needs a random key.*key=jax\.random\.key"):
        round_to_grid(jnp.ones(3), E2M1, "stochastic")


CASTS = [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2]
each_cast = pytest.mark.parametrize("dtype", CASTS, ids=lambda dtype: np.dtype(dtype).name)


@functools.partial(jax.jit, static_argnums=1)
def casts(x, dtype, keys):
    return jax.vmap(stochastic_cast, (None, None, 0))(x, dtype, keys)


def finite_values(dtype):
    """All finite values of a dtype, ascending, float64."""
    dtype = np.dtype(dtype)
    codes = np.arange(2 ** (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}")
    with np.errstate(invalid="ignore"):  # some of the codes are signalling NaNs
        values = codes.view(dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values)])


@each_cast
def test_casts_go_to_a_neighbour_with_the_right_frequency(dtype):
    rng = np.random.default_rng(8)
    grid = finite_values(dtype)
    tiny = np.abs(grid[grid > 0][0])
    # Half of the points among the subnormal results and the smallest normal ones, except those
    # that float32 itself holds as subnormals.
    small = rng.uniform(0, 40, 24) * max(tiny, 2.0**-126)
    middle = rng.choice([-1, 1], 24) * np.exp(
        rng.uniform(np.log(small.max()), np.log(grid[-1]), 24)
    )
    x = np.concatenate([small, middle]).astype(np.float32)
    above = np.searchsorted(grid, x)
    low, high = grid[above - 1], grid[above]
    keys = jax.random.split(jax.random.key(9), 4096)
    sample = np.asarray(casts(x, dtype, keys)).astype(np.float64)
    assert np.all((sample == low) | (sample == high))
    up = (x - low) / (high - low)
    # Statistical: 48 frequencies at 5 standard errors; one that is hardly above 0 or below 1 is
    # held to the least chance that 4096 draws can see.
    standard_error = np.sqrt(np.maximum(up * (1 - up), 1 / 4096) / 4096)
    assert np.all(abs((sample == high).mean(0) - up) <= 5 * standard_error)


@each_cast
def test_casts_move_no_value_keep_the_non_finite_and_saturate(dtype):
    values = np.random.default_rng(10).permutation(finite_values(dtype))[:4096].astype(np.float32)
    cast = jax.jit(stochastic_cast, static_argnums=1)
    exact = cast(jnp.array(values), dtype, jax.random.key(11))
    assert exact.dtype == dtype
    # Exact. The float32 subnormals among the values of bfloat16 are kept, too.
    np.testing.assert_array_equal(np.asarray(exact).astype(np.float32), values)
    eager = stochastic_cast(jnp.array(values) * 1.01, dtype, jax.random.key(12))
    assert (
        np.asarray(eager).tobytes()
        == np.asarray(cast(jnp.array(values) * 1.01, dtype, jax.random.key(12))).tobytes()
    )
    largest = finite_values(dtype)[-1]
    beyond = np.float32([np.finfo(np.float32).max, -np.finfo(np.float32).max, np.nan, np.inf])
    actual = np.asarray(cast(jnp.resize(beyond, 4096), dtype, jax.random.key(13)))[:4]
    infinity = np.nan if dtype == jnp.float8_e4m3fn else np.inf  # which has none
    expected = np.float64([largest, -largest, np.nan, infinity])
    np.testing.assert_array_equal(actual.astype(np.float64), expected)


def test_bfloat16_keeps_on_average_what_nearest_loses():
    # Schultheis and Alistarh, LLMQ, arXiv:2512.15306, rounds parameters this way.
    x = np.float32(1.0011718)
    assert jnp.bfloat16(x) == 1
    sample = np.float64(stochastic_cast(jnp.full(200_000, x), jnp.bfloat16, jax.random.key(14)))
    # Statistical: 5 standard errors; one is 6e-6.
    standard_error = sample.std() / 200_000**0.5
    assert standard_error < 7e-6
    assert abs(sample.mean() - x) < 5 * standard_error


def test_a_thousand_small_steps_in_bfloat16_add_up_on_average():
    @jax.jit
    def run(keys):
        def step(carry, key):
            stochastic, nearest = carry
            stochastic = stochastic_cast(stochastic.astype("f4") - 1e-3, jnp.bfloat16, key)
            return (stochastic, (nearest.astype("f4") - 1e-3).astype(jnp.bfloat16)), None

        start = jnp.ones(4000, jnp.bfloat16)
        return jax.lax.scan(step, (start, start), keys)[0]

    stochastic, nearest = map(np.float64, run(jax.random.split(jax.random.key(15), 1000)))
    np.testing.assert_array_equal(nearest, 1)  # half a step of bfloat16 below 1 is 2e-3
    # Statistical: the published mean is -.0009 +- .0006 and the deviation .041, which its standard
    # error of 1.1 % and the digits blur; ours at 5 standard errors.
    assert abs(stochastic.mean()) < 5 * stochastic.std() / 4000**0.5
    assert stochastic.std() == pytest.approx(0.041, rel=0.08)


def test_casts_to_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"one of bfloat16, float16, .* got float32"):
        stochastic_cast(jnp.ones(3), jnp.float32, jax.random.key(0))


def test_numpy_numbers_are_taken_as_float32():
    y = np.random.default_rng(6).uniform(-8, 8, 100)  # float64
    expected = round_to_grid(jnp.float32(y), E2M1)
    np.testing.assert_array_equal(round_to_grid(y, E2M1), expected)
    key = jax.random.key(7)
    expected = stochastic_round(jnp.float32(y), E2M1, key)
    np.testing.assert_array_equal(stochastic_round(y, E2M1, key), expected)

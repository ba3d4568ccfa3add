import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models.layers import rotary_angles
from lowbit_jax.models.rope_scaling import (
    LinearRopeScaling,
    Llama3RopeScaling,
    scale_frequencies,
)


def test_llama3_divides_low_frequencies_keeps_high_ones_and_is_continuous():
    scaling = Llama3RopeScaling(8.0, 1.0, 4.0, 8192)
    turns = np.array([0.1, 0.999999, 1.0, 2.5, 4.0, 4.000001, 100.0])
    frequency = jnp.asarray(2 * np.pi * turns / 8192, jnp.float32)
    ratio = np.asarray(scale_frequencies(frequency, scaling) / frequency, np.float64)
    # Halfway up the ramp the mean of 1/8 and 1.
    expected = [1 / 8, 1 / 8, 1 / 8, (1 / 8 + 1) / 2, 1, 1, 1]
    # Bound: at 1.0 the ramp has slope 0.875 / 3 in turns, which are rounded a few times, as is the
    # sum: 16 roundings of 2^-24, relative to 1/8.
    np.testing.assert_allclose(ratio, expected, rtol=16 * 8 * 2.0**-24)


def test_linear_scaling_interpolates_positions():
    plain = rotary_angles(16, 8, 1e4)
    stretched = rotary_angles(61, 8, 1e4, LinearRopeScaling(4.0))
    for a, b in zip(plain, stretched, strict=True):
        np.testing.assert_array_equal(a, b[::4])  # exact: a power of two commutes with rounding


def test_numbers_that_are_no_scaling_are_refused():
    with pytest.raises(ValueError, match="factor must be positive"):
        LinearRopeScaling(0.0)
    with pytest.raises(ValueError, match="below high_frequency_factor"):
        Llama3RopeScaling(8.0, 4.0, 4.0)

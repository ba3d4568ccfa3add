"""MXFP4 for training: errors, slopes and masks, against the numbers of Quartet.

Errors here are means over groups of 32 of `|error|**2 / |x|**2` unless said, slopes ratios of sums.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lowbit_jax.numerics import (
    E2M1,
    MXFP4,
    MXFP4_FITTED,
    MXFP4_FITTED_ALIGNED,
    MXFP4_FITTED_STOCHASTIC,
    QUEST_MXFP4,
    QUEST_MXFP4_FLOOR,
    QuantSpec,
    gradient_mask,
    quantize,
    quantize_values,
)
from lowbit_jax.numerics.rounding import round_to_grid
from lowbit_jax.numerics.scales import divide_by_scales, multiply_by_scales

GROUPS = 131072


@pytest.fixture(scope="module")
def groups():
    """Gaussian groups of deviation 1, and of one drawn log-uniformly from [1, 2)."""
    rng = np.random.default_rng(0)
    unit = rng.standard_normal((GROUPS, 32)).astype(np.float32)
    spread = (rng.standard_normal((GROUPS, 32)) * 2.0 ** rng.random((GROUPS, 1))).astype("f4")
    return {"unit": unit, "log-uniform": spread}


quantized = jax.jit(quantize, static_argnums=1)


@functools.partial(jax.jit, static_argnums=1)
def measure(x, spec):
    """Of each group: the ratio of squares, `<x, Q>`, `<x, x>`, and the masked entries."""
    values, _ = quantize_values(x, spec, key=jax.random.key(1))
    power = jnp.sum(x * x, axis=-1)
    masked = jnp.sum(~gradient_mask(x, spec, "clipped"), axis=-1)
    return jnp.sum((values - x) ** 2, axis=-1) / power, jnp.sum(x * values, axis=-1), power, masked


@jax.jit
def measure_at(x, multiplier):
    """`measure` with the scale that the floor rule gives `multiplier * x`.

    The exponent of `std_floor` is `floor(log2(c * multiplier * deviation))`: at sqrt(2) rounded to
    nearest (`std_nearest`, which is no rule of the library), at 2 rounded up.
    """
    scales = quantize(multiplier * x, QUEST_MXFP4_FLOOR).scales
    units = divide_by_scales(x, scales, None)
    values = multiply_by_scales(round_to_grid(units, E2M1), scales, None)
    power = jnp.sum(x * x, axis=-1)
    masked = jnp.sum(jnp.abs(units) > E2M1.max, axis=-1)
    return jnp.sum((values - x) ** 2, axis=-1) / power, jnp.sum(x * values, axis=-1), power, masked


# Error, slope and percent masked, on unit and on log-uniform deviations; of a preset or, given a
# number, of the floor rule with that multiplier.
TABLE = {
    "fitted": (MXFP4_FITTED, (0.01394, 0.9911, 0.0), (0.01367, 0.9905, 0.0)),
    "fitted stochastic": (MXFP4_FITTED_STOCHASTIC, (0.02832, 1.0, 0.0), (0.02779, 1.0, 0.0)),
    "abs-max floor": (MXFP4, (0.01337, 0.9804, None), (0.01336, 0.9777, None)),
    "forward floor": (QUEST_MXFP4_FLOOR, (0.02807, 0.9356, 7.29), (0.02239, 0.9436, 5.36)),
    "forward std_nearest": (2**0.5, (0.01279, 0.9876, 0.33), (0.01339, 0.9856, 0.83)),
    "forward ceil": (2.0, (0.01525, None, None), (0.01552, None, None)),
    "forward unrounded": (QuantSpec(E2M1, 32, "rms"), (0.01237, None, None), (0.01237, None, None)),
}


@pytest.mark.parametrize("name", TABLE)
def test_errors_slopes_and_masks_are_the_published_ones(groups, name):
    spec, *expected = TABLE[name]
    for x, (error, slope, masked) in zip(groups.values(), expected, strict=True):
        parts = measure_at(x, spec) if isinstance(spec, float) else measure(x, spec)
        ratios, along, power, out = (np.asarray(part, np.float64) for part in parts)
        # Statistical: the 1 % to which the table is stated, more than 4 standard errors.
        assert ratios.mean() == pytest.approx(error, rel=0.01)
        assert 4 * ratios.std() / GROUPS**0.5 < 0.01 * error
        if slope is not None:
            actual = along.sum() / power.sum()
            noise = np.std(along - actual * power) / GROUPS**0.5 / power.mean()
            # Statistical: 5 standard errors of ours and of the table's as large sample; half of the
            # last digit.
            assert abs(actual - slope) < 5 * np.sqrt(2) * noise + 0.00005
        if masked is not None:
            # Statistical: entries of a group are masked together, so that the standard error is
            # that of the groups; half of the last digit.
            noise = 100 / 32 * out.std() / GROUPS**0.5
            assert abs(100 / 32 * out.mean() - masked) < 5 * np.sqrt(2) * noise + 0.005


def test_errors_of_the_floor_rule_along_its_multiplier_are_the_published_ones(groups):
    # On log-uniform deviations. The multipliers are quarters of an octave in three digits.
    published = {1: 0.0224, 1.19: 0.0154, 1.41: 0.0134, 1.68: 0.0137, 2: 0.0155}
    errors = []
    for multiplier, error in published.items():
        ratios = np.asarray(measure_at(groups["log-uniform"], float(multiplier))[0], np.float64)
        # Statistical: 1 % as above, more than 4 standard errors; half of the last digit.
        assert abs(ratios.mean() - error) < 0.01 * error + 0.00005
        assert 4 * ratios.std() / GROUPS**0.5 < 0.01 * error
        errors.append(ratios.mean())
    assert errors[2] == min(errors)  # that nearest is the best of them


def test_the_nearest_rule_is_its_definition_with_the_root_mean_square(groups):
    published = ((0.01269, 0.01270), (0.01332, 0.01339))  # ratios of sums; by rms and by deviation
    for x, errors in zip(groups.values(), published, strict=True):
        wide = x.astype(np.float64)
        scale = np.sqrt((wide**2).mean(-1, keepdims=True))
        scale = 2.0 ** np.round(np.log2(2.92247856 / 6 * scale))
        values = np.clip(wide / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn) * scale
        by_rms, by_deviation = (
            [np.asarray(part, np.float64) for part in parts]
            for parts in (measure(x, QUEST_MXFP4), measure_at(x, 2**0.5))
        )
        # Exact, with the slack of the mask: no group's scale lies at a threshold.
        np.testing.assert_array_equal(by_rms[3], (abs(wide) > 6 * scale * (1 + 2.0**-22)).sum(-1))
        # Bound: 32 products of the same numbers and their sum, 64 roundings of 2**-24 of at most
        # twice the power, for no value is more than twice its x.
        bound = 128 * 2.0**-24 * (wide**2).sum(-1)
        assert np.all(abs(by_rms[1] - (values * wide).sum(-1)) <= bound)
        for (ratios, _, power, _), error in zip((by_rms, by_deviation), errors, strict=True):
            squares = ratios * power
            actual = squares.sum() / power.sum()
            # Statistical: 1 % as above, more than 4 standard errors.
            assert actual == pytest.approx(error, rel=0.01)
            noise = np.std(squares - actual * power) / GROUPS**0.5 / power.mean()
            assert 4 * noise < 0.01 * error
        assert by_rms[3].mean() < by_deviation[3].mean()  # subtracting the mean masks more


def test_the_aligned_values_have_slope_one(groups):
    for x in groups.values():
        _, plain, power, _ = (np.asarray(part, np.float64) for part in measure(x, MXFP4_FITTED))
        aligned = np.asarray(measure(x, MXFP4_FITTED_ALIGNED)[1], np.float64)
        # Bound: the gain rounds the global scale, the value and the sum of 32 in float32.
        np.testing.assert_allclose(aligned.sum(), 1.009276 * plain.sum(), rtol=2**-20)
        # Bound: the table's slopes .9911 and .9905 times the constant are within 4e-4 of 1, and the
        # slope of a sample within 1e-4 of the table's.
        assert abs(aligned.sum() / power.sum() - 1) < 5e-4


def test_the_gain_leaves_codes_and_scales_alone(groups):
    x = groups["unit"][:64]
    plain, aligned = quantized(x, MXFP4_FITTED), quantized(x, MXFP4_FITTED_ALIGNED)
    np.testing.assert_array_equal(plain.codes, aligned.codes)
    np.testing.assert_array_equal(plain.scales, aligned.scales)
    assert plain.global_scale == np.float32(4 / 3)
    # Exact: one product of two float32.
    assert aligned.global_scale == np.float32(4 / 3) * np.float32(1.009276)


def test_the_fitted_scale_never_clips_and_its_exponents_are_whole(groups):
    for x in groups.values():
        x = x[:4096] * np.float32(3.7)
        q = quantized(x, MXFP4_FITTED)
        a = abs(x).max(-1).astype(np.float64)
        exponents = np.asarray(q.scales[:, 0]).astype(int) - 127
        np.testing.assert_array_equal(exponents, np.floor(np.log2(a)) - 2)
        top = a / (4 / 3 * 2.0**exponents)
        assert np.all((top >= 3) & (top < 6))


def test_stochastic_rounding_of_the_fitted_scale_is_unbiased_in_every_entry(groups):
    x = groups["unit"][:16]
    draw = jax.vmap(lambda key: quantize_values(x, MXFP4_FITTED_STOCHASTIC, key=key)[0])
    sample = np.asarray(jax.jit(draw)(jax.random.split(jax.random.key(2), 4096)), np.float64)
    # Statistical: 512 entries at 5 standard errors, a false alarm in about 1 of 3,400 seeds. An
    # entry that rarely moves is held to the least chance that 4096 draws can see.
    step = sample.max(0) - sample.min(0)
    standard_error = np.maximum(sample.std(0) / 64, step / 4096)
    assert np.all(abs(sample.mean(0) - x) < 5 * standard_error + 1e-6)

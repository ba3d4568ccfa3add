"""Learning-rate schedules against slow float64 formulas, and their corners bit for bit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.optim import one_cycle_cosine, warmup_stable_decay

PEAK = 1.2e-3


def slow_one_cycle(count, steps, fraction):
    # As PyTorch's OneCycleLR states it: phases that end at `fraction * steps - 1` and `steps - 1`.
    corner = fraction * steps - 1
    if count <= corner:
        start, end, x = PEAK / 100, PEAK, count / corner
    else:
        start, end, x = PEAK, PEAK / 10, (count - corner) / (steps - 1 - corner)
    return end + (start - end) / 2 * (math.cos(math.pi * x) + 1)


def slow_stable(count, steps, decay):
    warmup, corner = steps // 20, steps - steps // 4
    if count < warmup:
        return PEAK / 100 + (PEAK - PEAK / 100) * count / warmup
    if count < corner:
        return PEAK
    x = (count - corner) / (steps - corner)
    return PEAK / 50 + (PEAK - PEAK / 50) * (1 - (x if decay == "linear" else math.sqrt(x)))


def assert_near(actual, expected, slope):
    # Bound: the argument of the curve carries 3 float32 roundings, each at most 2**-24 of its
    # value, times the largest slope of the curve over its unit interval, and the curve and the
    # convex combination 8 more, of terms no larger than the peak.
    assert np.abs(np.asarray(actual, np.float64) - expected).max() <= PEAK * 2**-24 * (
        3 * slope + 8
    )


@pytest.mark.parametrize(("steps", "fraction"), [(100, 0.1), (1147, 0.1), (3000, 0.3)])
def test_one_cycle_equals_the_slow_formula(steps, fraction):
    actual = one_cycle_cosine(PEAK, steps, fraction)(jnp.arange(steps))
    expected = [slow_one_cycle(count, steps, fraction) for count in range(steps)]
    assert actual.dtype == jnp.float32
    # Near the corner count - corner cancels; it moves x by 2**-24 * corner / length, which the
    # slope multiplies: corner / length is below 1/2 here, so one rounding more than bounded.
    assert_near(actual, expected, slope=math.pi / 2 + 1)


def test_one_cycle_is_exact_at_its_corners():
    schedule = one_cycle_cosine(PEAK, 100)
    corners = {0: PEAK / 100, 9: PEAK, 99: PEAK / 10, 100: PEAK / 10, 10**6: PEAK / 10}
    for count, expected in corners.items():
        assert schedule(count) == np.float32(expected)
    assert float(jnp.max(schedule(jnp.arange(100)))) == np.float32(PEAK)
    assert one_cycle_cosine(PEAK, 100, warmup_fraction=0.0)(0) == np.float32(PEAK)


@pytest.mark.parametrize("decay", ["linear", "one_minus_sqrt"])
def test_warmup_stable_decay_equals_the_slow_formula(decay):
    steps = 1000
    schedule = warmup_stable_decay(PEAK, steps, 0.05, 0.25, end_fraction=0.02, decay=decay)
    counts = jnp.arange(steps + 1)
    expected = [slow_stable(count, steps, decay) for count in range(steps + 1)]
    # Counts and corners are integers here, so x has one rounding; sqrt halves its relative error.
    assert_near(schedule(counts), expected, slope=1)
    assert_near(jax.jit(schedule)(counts), expected, slope=1)
    for count, value in ((0, PEAK / 100), (50, PEAK), (750, PEAK), (1000, 0.02 * PEAK)):
        assert schedule(count) == np.float32(value)  # Exact: corners.
    assert schedule(5000) == np.float32(0.02 * PEAK)


def test_phases_may_be_empty():
    schedule = warmup_stable_decay(PEAK, 10, warmup_fraction=0.0, decay_fraction=0.0)
    assert set(np.asarray(schedule(jnp.arange(10))).tolist()) == {float(np.float32(PEAK))}


def test_traced_counts_give_the_eager_values():
    schedule = one_cycle_cosine(PEAK, 100)
    traced = jax.jit(schedule)
    for count in (0, 5, 9, 50, 99):
        # Bound: XLA may fuse the convex combination, saving roundings of terms up to the peak.
        assert abs(float(traced(jnp.int32(count))) - float(schedule(count))) <= 4 * PEAK * 2**-24


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: one_cycle_cosine(PEAK, 0), "total_steps"),
        (lambda: one_cycle_cosine(PEAK, 10, warmup_fraction=1.0), "warmup_fraction"),
        (lambda: warmup_stable_decay(PEAK, 10, decay_fraction=-0.1), "decay_fraction"),
        (lambda: warmup_stable_decay(PEAK, 10, 0.6, 0.6), "fit into the run"),
        (lambda: warmup_stable_decay(PEAK, 10, decay="cosine"), "'cosine'"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()

import copy
import math
from dataclasses import replace
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_jax.numerics import (
    E2M1,
    E2M3,
    E4M3,
    E5M2,
    INT4,
    MXFP4,
    NVFP4,
    NVFP4_16X16,
    NVFP4_EDEN,
    NVFP4_EDEN_128,
    NVFP4_FOUR_OVER_SIX,
    QUEST_INT4,
    QUEST_MXFP4,
    QuantSpec,
    dequantize,
    integer,
    midrise,
    quantize,
    round_to_grid,
    unsigned,
)
from lowbit_jax.numerics.scales import (
    block_scales,
    calibrated_global_scale,
    multiply_by_scales,
)
from lowbit_jax.numerics.spec import check_parts

scales_of = jax.jit(block_scales, static_argnums=1)


def exact_exponent(a, format, rule):
    """The exponent by rational arithmetic: the slow definition."""
    a, m = Fraction(float(a)), Fraction(format.max)
    if rule == "absmax_ceil":
        exponent = -150
        while m * Fraction(2) ** exponent < a:
            exponent += 1
        return exponent
    exponent = -150
    while Fraction(2) ** (exponent + 1) <= a:
        exponent += 1
    if rule == "absmax_ct175" and a >= Fraction(7, 4) * Fraction(2) ** exponent:
        exponent += 1
    return exponent - format.max_exponent


@pytest.mark.parametrize("rule", ["absmax_floor", "absmax_floor43", "absmax_ceil", "absmax_ct175"])
@pytest.mark.parametrize("format", [E2M1, E5M2, integer(4)], ids=str)
def test_power_of_two_rules_are_exact_at_their_thresholds(format, rule):
    if rule == "absmax_floor43" and format.kind == "integer":
        return  # refused, see below
    mantissas = np.float32([1, 1.25, 1.4, 1.5, 1.75, 1.875])
    a = (mantissas * (2.0 ** np.float64([[-90], [-3], [0], [7], [90]]))).astype(np.float32).ravel()
    a = np.concatenate([a, np.nextafter(a, np.float32(0)), np.nextafter(a, np.float32(np.inf))])
    result = scales_of(a[:, None], QuantSpec(format, 1, rule))
    expected = [exact_exponent(value, format, rule) for value in a]
    np.testing.assert_array_equal(np.asarray(result.scales)[:, 0].astype(int) - 127, expected)
    if rule == "absmax_floor43":
        assert result.global_scale == np.float32(4 / 3)
    else:
        assert result.global_scale is None


def test_power_of_two_rules_never_clip_or_clip_where_they_say(run):
    x = np.random.default_rng(0).standard_t(3, (4, 128)).astype(np.float32)
    top = {}
    for rule in ["absmax_floor", "absmax_floor43", "absmax_ceil", "absmax_ct175"]:
        units = run(x, replace(MXFP4, scale=rule))[3]
        top[rule] = abs(np.asarray(units)).reshape(-1, 32).max(1)
    limits = {
        "absmax_floor": (4, 8),
        "absmax_floor43": (3, 6),
        "absmax_ceil": (3, 6.0001),
        "absmax_ct175": (3.5, 7),
    }
    for rule, (low, high) in limits.items():
        assert np.all((low <= top[rule]) & (top[rule] < high)), rule


def test_gaussian_rules_round_the_logarithm(run):
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((4, 128)) * 2.0 ** rng.uniform(-9, 9, (4, 1))).astype(np.float32)
    blocks = x.astype(np.float64).reshape(4, 4, 32)
    log = np.log2(2.92247856 / 6 * np.sqrt((blocks**2).mean(-1)))
    assert abs(log - np.floor(log) - 0.5).min() > 1e-5  # no block at a threshold
    np.testing.assert_array_equal(run(x, QUEST_MXFP4)[0].scales.astype(int) - 127, np.round(log))
    log = np.log2(2.92247856 / 6 * blocks.std(-1))
    spec = replace(QUEST_MXFP4, scale="std_floor")
    np.testing.assert_array_equal(run(x, spec)[0].scales.astype(int) - 127, np.floor(log))


def test_rms_scale_is_alpha_times_rms_over_the_outermost_level(run):
    x = np.random.default_rng(2).standard_normal((4, 128)).astype(np.float32)
    rms = np.sqrt((x.astype(np.float64) ** 2).mean(1))
    # Bound: fixed-point squares lose 128 * 2**-28 of the mean square, float32 a few roundings.
    tolerance = 128 * 2.0**-29 + 4 * 2.0**-24
    scales = run(x, QUEST_INT4)[0].scales[:, 0]
    np.testing.assert_allclose(scales, 2.513930578568423 * rms / 7.5, rtol=tolerance)


def test_nvfp4_puts_the_largest_block_on_the_top_of_e4m3(run):
    x = np.random.default_rng(3).standard_normal((4, 128)).astype(np.float32)
    amax = abs(x).max()
    for spec, top in [(NVFP4, 448), (NVFP4_FOUR_OVER_SIX, 256)]:
        q = run(x, spec)[0]
        assert q.scales.dtype == jnp.float8_e4m3fn
        # Bound: the constant and the product round once each.
        np.testing.assert_allclose(q.global_scale, amax / (6 * top), rtol=2**-23)
        blocks = abs(x).reshape(4, 8, 16).max(-1)
        asked = np.asarray(blocks / (6 * q.global_scale), np.float32)
        six = asked.astype(jnp.float8_e4m3fn).astype(np.float32)
        four = (asked * np.float32(1.5)).astype(jnp.float8_e4m3fn).astype(np.float32)
        actual = q.scales.astype(np.float32)
        if spec is NVFP4:
            np.testing.assert_array_equal(actual, six)
            continue
        errors = []
        for scales in (six, four):
            s = (scales * np.float64(q.global_scale))[..., None]
            wide = x.reshape(4, 8, 16) / s
            levels = np.asarray(round_to_grid(jnp.array(wide), E2M1))
            errors.append((((wide - levels) * s) ** 2).sum(-1))
        expected = np.where(errors[1] < errors[0], four, six)
        np.testing.assert_array_equal(actual, expected)  # Exact: no two errors are near a tie.
        assert (expected == four).any()
        assert (expected == six).any()


@pytest.mark.parametrize("spec", [NVFP4, NVFP4_FOUR_OVER_SIX], ids=str)
def test_under_a_given_global_scale_blocks_do_not_know_each_other(spec):
    x = np.random.default_rng(3).standard_normal((4, 64), np.float32)
    x[1] *= 40  # beyond what the scale was calibrated for
    found_before = calibrated_global_scale(float(abs(x[0]).max()), spec)
    quantized = jax.jit(lambda x: quantize(x, spec, global_scale=found_before))
    whole = quantized(x)
    assert whole.global_scale == found_before
    for row, alone in enumerate(map(quantized, x[:, None])):
        chex.assert_trees_all_equal(whole.codes[row], alone.codes[0])
        chex.assert_trees_all_equal(whole.scales[row], alone.scales[0])
    # The definition, in NumPy: the nearest e4m3 scale, 448 at most, then the nearest level.
    asked = abs(x).reshape(4, 4, 16).max(-1) / (6 * found_before)
    if spec is NVFP4:
        scales = np.minimum(asked, 448).astype(jnp.float8_e4m3fn).astype(np.float32)
        np.testing.assert_array_equal(whole.scales.astype(np.float32), scales)
    assert (whole.scales[1].astype(np.float32) == 448).all()
    found, top = np.asarray(dequantize(whole)), 448 * 6 * found_before
    assert abs(found[1]).max() == top
    rest = np.delete(np.arange(4), 1)
    # Bound: half the widest step of e2m1, 1, of a scale that was rounded by at most 1/16.
    steps = np.repeat(asked, 16, -1)[rest] * found_before * 17 / 16
    assert (abs(found - x)[rest] <= steps).all()


@given(st.floats(2.0**-60, 2.0**60))
def test_a_calibrated_global_scale_is_the_next_power_of_two(absmax):
    for spec, top in ((NVFP4, 448), (NVFP4_FOUR_OVER_SIX, 256)):
        scale = float(calibrated_global_scale(absmax, spec))
        assert math.frexp(scale)[0] == 0.5
        assert scale / 2 < absmax / (6 * top) <= scale


def test_only_formats_with_a_global_scale_are_given_one():
    assert calibrated_global_scale(0.0, NVFP4) == 1
    with pytest.raises(ValueError, match="global_scale is for absmax_e4m3"):
        quantize(jnp.ones((1, 32)), MXFP4, global_scale=1.0)


def test_every_e8m0_byte_decodes_exactly():
    codes = np.arange(256, dtype=np.uint8)
    for variant in [multiply_by_scales, jax.jit(multiply_by_scales)]:
        # A level of 2 keeps the scale 2**-127 times level normal; one of 1/2, 2**127 finite.
        small = np.asarray(variant(jnp.full(128, 2.0), jnp.array(codes[:128]), None))
        np.testing.assert_array_equal(small, 2.0 ** (codes[:128].astype(int) - 126.0))
        large = np.asarray(variant(jnp.full(128, 0.5), jnp.array(codes[128:]), None))
        np.testing.assert_array_equal(large[:-1], 2.0 ** (codes[128:255].astype(int) - 128.0))
        assert np.isnan(large[-1])


def test_subnormal_blocks_count_as_zero_and_the_smallest_scale_is_exact(run):
    x = np.zeros((4, 128), np.float32)
    x[0, :4] = [2.0**-126, 1.5 * 2.0**-126, -(2.0**-125), 3 * 2.0**-126]
    x[1, :2] = [2.0**-130, -(2.0**-149)]
    q, values, _, units = run(x, MXFP4)
    np.testing.assert_array_equal(q.scales, 0)
    np.testing.assert_array_equal(units[0, :4], [2, 3, -4, 6])
    np.testing.assert_array_equal(values, np.where(abs(x) < 2.0**-126, 0, x))
    np.testing.assert_array_equal(q.codes[1], 0)


def check(**parts):
    """`check_parts` of a spec that the type checker of the test run would not let be built."""
    spec = copy.copy(MXFP4)
    for name, value in parts.items():
        object.__setattr__(spec, name, value)
    check_parts(spec)


BAD = [
    (lambda: check(scale="rne"), "no scale rule 'rne'; choose one of absmax,"),
    (lambda: check(scale="cast"), "no scale rule 'cast'"),
    (lambda: QuantSpec(E4M3, None, "rms"), "no Gaussian clipping point for e4m3"),
    (lambda: QuantSpec(integer(4), 32, "rms_nearest"), "no Gaussian clipping point for int4"),
    (lambda: QuantSpec(midrise(4), 32, "rms_nearest"), "float and integer formats, got midrise4"),
    (lambda: QuantSpec(midrise(4), 32, "absmax_floor"), "float and integer formats"),
    (lambda: QuantSpec(integer(4), 32, "absmax_floor43"), "for float formats, got int4"),
    (lambda: QuantSpec(E2M3, 16, "absmax_e4m3"), "e2m1 or integer formats, got e2m3"),
    (lambda: QuantSpec(E2M1, None, "absmax_e4m3"), "integer block_size, got None"),
    (lambda: QuantSpec(integer(4), 16, "absmax_e4m3_four_over_six"), "e2m1 only, got int4"),
    (
        lambda: replace(NVFP4_FOUR_OVER_SIX, rounding="stochastic"),
        "with stochastic rounding is biased",
    ),
    (lambda: QuantSpec(integer(4), 32, "minmax"), "'minmax' goes with unsigned formats"),
    (lambda: QuantSpec(unsigned(4), 32), "'minmax' goes with unsigned formats"),
    (lambda: QuantSpec(E2M1, 48, "std_floor"), "power of two, got 48"),
    (lambda: QuantSpec(E2M1, "tensor", "absmax_floor"), "'tensor' goes with scale 'absmax'"),
    (lambda: QuantSpec(E2M1, 0), "positive int, None"),
    (lambda: check(block_size="row"), "positive int, None"),
    (lambda: check(rounding="up"), "'stochastic' or 'eden', got 'up'"),
    (lambda: QuantSpec(E2M1, 32, margin=0.0), "margin must be positive and finite, got 0.0"),
    (lambda: QuantSpec(E2M1, 32, margin=float("nan")), "margin must be positive and finite"),
    (lambda: replace(MXFP4, margin=2.0), "margin goes with the rules absmax, absmax_e4m3,"),
    (lambda: QuantSpec(E2M1, 32, gain=2.0), "gain goes with the rules absmax_floor43,"),
    (lambda: replace(NVFP4, gain=-1.0), "gain must be positive and finite, got -1.0"),
    (lambda: replace(NVFP4, block_rows=0), "block_rows must be a positive int, got 0"),
    (lambda: replace(MXFP4, block_rows=2), "block_rows > 1 goes with absmax, absmax_e4m3,"),
    (lambda: QuantSpec(E2M1, "tensor", block_rows=2), "got block_rows=2 with 'absmax'"),
    (lambda: replace(NVFP4_EDEN, block_rows=16), "goes with 'absmax_e4m3' and block_rows=1"),
    (lambda: replace(MXFP4, rounding="eden"), "got 'absmax_floor' and 1; use 'stochastic'"),
    (lambda: replace(NVFP4_FOUR_OVER_SIX, rounding="eden"), "with eden rounding is biased"),
    (lambda: replace(NVFP4, correction_block=16), "belongs to rounding 'eden', got 16"),
    (lambda: replace(NVFP4_EDEN, correction_block=24), "multiple of block_size=16, got 24"),
    (lambda: replace(NVFP4_EDEN, correction_block=0), "multiple of block_size=16, got 0"),
]


@pytest.mark.parametrize(("build", "message"), BAD, ids=[message for _, message in BAD])
def test_parts_that_do_not_go_together_are_refused(build, message):
    with pytest.raises(ValueError, match=r"^QuantSpec: ") as error:
        build()
    assert message in str(error.value)


def test_specs_are_equal_when_they_mean_the_same():
    assert QuantSpec(integer(4), 128) == INT4
    assert hash(QuantSpec(integer(4), 128)) == hash(INT4)
    assert replace(NVFP4_EDEN, correction_block=16) == NVFP4_EDEN
    assert replace(NVFP4_EDEN_128, correction_block=16) == NVFP4_EDEN
    assert NVFP4_EDEN.needs_key
    assert not NVFP4_16X16.needs_key
    assert str(MXFP4) == "e2m1/32 absmax_floor"
    assert str(replace(INT4, block_size=None, rounding="stochastic")) == (
        "int4/row absmax stochastic"
    )
    assert str(NVFP4_16X16) == "e2m1/16x16 absmax_e4m3"
    assert str(NVFP4_EDEN_128) == "e2m1/16 absmax_e4m3 eden/128 margin 0.988125"
    assert str(replace(NVFP4, gain=1.5)) == "e2m1/16 absmax_e4m3 gain 1.5"

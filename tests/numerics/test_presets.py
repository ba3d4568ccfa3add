"""Quantization errors against published values, closed forms and qualitative facts.

relMSE is `sum(error**2) / sum(x**2)` over the whole array, not the mean of ratios.
"""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from lowbit_jax.numerics import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    FP8_E4M3,
    FP8_E4M3_TENSOR,
    FP8_E5M2,
    FP8_E5M2_TENSOR,
    INT4,
    INT8,
    MXFP4,
    MXFP6,
    MXFP8,
    NVFP4,
    NVFP4_FOUR_OVER_SIX,
    PRESETS,
    QUEST_INT4,
    QUEST_MXFP4,
    QuantSpec,
    integer,
    midrise,
    quantize_values,
    unsigned,
)
from lowbit_jax.numerics.spec import GAUSSIAN_ALPHA

values_of = jax.jit(lambda x, spec: quantize_values(x, spec)[0], static_argnums=1)


def replace_scale(spec, scale):
    return dataclasses.replace(spec, scale=scale)


def rotate(x, size):
    """`x H` in blocks along the last axis, H Sylvester's matrix over sqrt(size)."""
    matrix = (scipy.linalg.hadamard(size) / np.sqrt(size)).astype(np.float32)
    return (x.reshape(*x.shape[:-1], -1, size) @ matrix).reshape(x.shape)


@pytest.fixture(scope="module")
def data():
    """2**20 samples: Gaussian, Laplace of unit variance, and the latter rotated."""
    rng = np.random.default_rng(0)
    shape = (256, 4096)
    normal = rng.standard_normal(shape).astype(np.float32)
    laplace = (rng.laplace(size=shape) / np.sqrt(2)).astype(np.float32)
    rotated = {f"laplace H{size}": rotate(laplace, size) for size in (16, 32, 128)}
    return {"normal": normal, "laplace": laplace, **rotated}


def error_and_standard_error(x, values):
    """relMSE, and the standard error of that ratio from the spread between rows."""
    x, values = np.asarray(x, np.float64), np.asarray(values, np.float64)
    error, power = ((values - x) ** 2).sum(-1), (x**2).sum(-1)
    ratio = error.sum() / power.sum()
    return ratio, np.std(error - ratio * power) / len(x) ** 0.5 / power.mean()


# Columns: normal, Laplace, Laplace rotated by H of the block size, by H128. Published or recomputed
# from 2**22 samples of three seeds.
ORACLES = {
    "int4/32": (dataclasses.replace(INT4, block_size=32), ".00941 .01467 .00894 .00928"),
    "int4 full/32": (
        QuantSpec(integer(4, is_full_range=True), 32),
        ".00899 .01406 .00853 .00886",
    ),
    "uint4/32 minmax": (QuantSpec(unsigned(4), 32, "minmax"), ".00653 .00890 .00628 .00646"),
    "int4/128": (INT4, ".01377 .02567 .01346 .01346"),
    "int8/128": (INT8, ".000042 .000080"),
    "mxfp4 floor": (MXFP4, ".01322 .01588 .01311 .01320"),
    "mxfp4 floor43": (replace_scale(MXFP4, "absmax_floor43"), ".01386 .01743 .01348 .01375"),
    "mxfp4 ceil": (replace_scale(MXFP4, "absmax_ceil"), ".01332 .01755 .01323 .01330"),
    "mxfp4 ct175": (replace_scale(MXFP4, "absmax_ct175"), ".01251 .01528 .01240 .01248"),
    "e2m1/32 exact": (QuantSpec(E2M1, 32), ".01022 .01051 .01027 .01024"),
    "e2m1/16 exact": (QuantSpec(E2M1, 16), ".00886 .00832 .00906 .00889"),
    "nvfp4": (NVFP4, ".00905 .00859 .00923 .00907"),
    "nvfp4 four over six": (NVFP4_FOUR_OVER_SIX, ".00756"),
    "nvint4": (QuantSpec(integer(4), 16, "absmax_e4m3"), ".00746 .01052 .00692 .00739"),
    "mxfp6 e2m3": (MXFP6, ".000805 .000931"),
    "mxfp6 e3m2": (QuantSpec(E3M2, 32, "absmax_floor"), ".00291 .00300"),
    "mxfp8 e5m2": (QuantSpec(E5M2, 32, "absmax_floor"), ".00291 .00300"),
    "mxfp8 e4m3": (MXFP8, ".000862 .000983"),
    "fp8 e4m3 tensor": (FP8_E4M3_TENSOR, ".000702 .000701"),
    "fp8 e4m3 row": (FP8_E4M3, ".000700"),
    "mxfp4 rms_nearest": (QUEST_MXFP4, ".01269"),
    "mxfp4 std_floor": (replace_scale(QUEST_MXFP4, "std_floor"), ".02701"),
    **{
        f"quest int{bits}": (PRESETS[f"QUEST_INT{bits}"], expected)
        for bits, expected in enumerate(
            [".36338", ".11885", ".03744", ".01154", ".003495", ".001040", "3.04e-4", "8.78e-5"], 1
        )
    },
}


def block(spec):
    return spec.block_size if isinstance(spec.block_size, int) else 128


@pytest.mark.parametrize("name", ORACLES)
def test_errors_are_the_published_ones(data, name):
    spec, expected = ORACLES[name]
    columns = ["normal", "laplace", f"laplace H{block(spec)}", "laplace H128"]
    for column, text in zip(columns, expected.split(), strict=False):
        actual, standard_error = error_and_standard_error(
            data[column], values_of(data[column], spec)
        )
        mantissa, _, exponent = text.partition("e")
        digit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        # Statistical, 5 standard errors of ours and the table's three times four as many samples
        # (a false alarm in about 1 of 28,000 seeds over the 62 entries), plus half of the last
        # digit printed. The one scale of a tensor, and NVFP4's, is common to all rows, which the
        # spread between them does not see: for those, and at most, the 1.5 % to which the table is
        # stated.
        tolerance = 0.015 * float(text)
        if spec.block_size != "tensor" and "e4m3" not in spec.scale:
            statistical = 5 * standard_error * np.sqrt(1 + 1 / 12) + digit / 2
            tolerance = min(tolerance, statistical)
        assert abs(actual - float(text)) <= tolerance, (column, actual, text)


# Mean squared relative error of the largest entry of a block on Laplace: plain, then after H.
TOP = {
    "int4/32": (0, 0.00120),
    "int4/128": (0, 0.00101),
    "mxfp4 floor": (0.01706, 0.00215),
    "mxfp4 floor43": (0.01055, 0.00186),
    "mxfp4 ceil": (0.01097, 0.00183),
    "mxfp4 ct175": (0.01097, 0.00174),
    "e2m1/32 exact": (0, 0.00139),
    "e2m1/16 exact": (0, 0.00166),
    "nvfp4": (0.00070, 0.00170),
    "int4 full/32": (0.00444, 0.00115),
    "uint4/32 minmax": (0.00107, 0.00080),
    "nvint4": (0.00070, 0.00131),
}


@pytest.mark.parametrize("name", TOP)
def test_errors_of_the_largest_entry_are_the_published_ones(data, name):
    spec = ORACLES[name][0]
    size = block(spec)
    x = data["laplace"]
    rotated = np.asarray(values_of(data[f"laplace H{size}"], spec))
    for values, expected in zip(
        [np.asarray(values_of(x, spec)), rotate(rotated, size)], TOP[name], strict=True
    ):
        blocks, rounded = x.reshape(-1, size), values.reshape(-1, size)
        top = abs(blocks).argmax(-1)[:, None]
        a = np.take_along_axis(blocks, top, 1).astype(np.float64)
        errors = (np.take_along_axis(rounded, top, 1) / a - 1) ** 2
        # Statistical: 5 standard errors over blocks and half of the last digit; where the abs-max
        # is a level of the grid, the float32 rounding of scale and product (2**-22) squared.
        tolerance = 5 * errors.std() / len(errors) ** 0.5 * np.sqrt(1 + 1 / 12) + 0.000005
        assert abs(errors.mean() - expected) <= (tolerance if expected else 2**-44)


def test_rotation_hurts_nvfp4_and_helps_the_others(data):
    # Egiazarian et al., arXiv:2509.23202, section 3. The gaps are 7 % and more, 10 standard errors.
    def errors(spec):
        columns = ["laplace", f"laplace H{spec.block_size}"]
        return [error_and_standard_error(data[c], values_of(data[c], spec))[0] for c in columns]

    plain, rotated = errors(NVFP4)
    assert rotated > 1.05 * plain
    nvfp4 = plain
    plain, rotated = errors(MXFP4)
    assert rotated < 0.85 * plain
    plain, rotated = errors(ORACLES["int4/32"][0])
    assert rotated < 0.65 * plain
    plain, rotated = errors(ORACLES["nvint4"][0])
    assert rotated < 0.85 * nvfp4 < plain


def test_rounding_the_exponent_in_other_ways_is_worse(data):
    # The tempting rules that are not offered, computed here: round(log2(a / 6)), and the nearest
    # power of two in linear space, as `astype(float8_e8m0fnu)` gives it.
    blocks = data["normal"].reshape(-1, 32)
    ratio = abs(blocks).max(-1, keepdims=True).astype(np.float64) / 6
    exponent = np.floor(np.log2(ratio))
    grid = E2M1.grid
    midpoints = (grid[1:] + grid[:-1]) / 2
    floor, _ = error_and_standard_error(data["normal"], values_of(data["normal"], MXFP4))
    for threshold, expected in [(np.sqrt(2), 0.01474), (1.5, 0.01740)]:
        scale = 2.0 ** np.where(ratio / 2.0**exponent >= threshold, exponent + 1, exponent)
        values = grid[np.searchsorted(midpoints, blocks / scale)] * scale  # ties have measure 0
        actual, _ = error_and_standard_error(data["normal"], values.reshape(data["normal"].shape))
        # Statistical: the 1.5 % to which the table is stated.
        assert actual == pytest.approx(expected, rel=0.015)
        assert actual > 1.1 * floor


def gaussian_moments(format, alpha):
    """MSE and `<x, Q>` of a unit normal, summed over the Voronoi cells of the grid."""
    levels = format.grid * alpha / format.max
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    probability = np.diff(scipy.stats.norm.cdf(edges))
    density = scipy.stats.norm.pdf(edges)
    first = density[:-1] - density[1:]
    correlation = (levels * first).sum()
    return 1 - 2 * correlation + (levels**2 * probability).sum(), correlation


# MSE, percent masked by "trust", percent beyond the outermost level.
CLOSED_FORM = {
    "midrise1": (0.363380, 11.05, 42.49),
    "ternary": (0.190174, 6.64, 22.09),
    "midrise2": (0.118846, 4.644, 13.53),
    "midrise3": (0.0374397, 1.907, 4.026),
    "midrise4": (0.0115429, 0.733, 1.194),
    "midrise5": (0.00349521, 0.261, 0.354),
    "midrise6": (0.00104005, 0.0873, 0.105),
    "midrise7": (3.0437e-4, 0.0284, 0.0317),
    "midrise8": (8.782e-5, 0.0096, 0.0102),
    "e2m1": (0.0126849, None, None),
}
FORMATS = {f.name: f for f in [*map(midrise, range(1, 9)), integer(2), E2M1]}


@pytest.mark.parametrize("name", CLOSED_FORM)
def test_clipping_points_give_the_gaussian_error_of_quest(name):
    format, alpha = FORMATS[name], GAUSSIAN_ALPHA[name]
    mse, trusted, clipped = CLOSED_FORM[name]
    actual, slope = gaussian_moments(format, alpha)
    # Exact up to the digits printed: six of the MSE (four from 7 bits), three of a percentage.
    assert actual == pytest.approx(mse, rel=1e-4 if mse < 1e-3 else 1e-5)
    # Bound: at the optimum <x, Q> = <Q, Q>, so slope = 1 - MSE; the published clipping points are
    # short of it by less than 1 %, which moves the slope by 2e-5 at most.
    assert slope == pytest.approx(1 - actual, abs=2e-5)
    if trusted is not None:
        half_step = alpha / format.max / 2
        tails = [200 * scipy.stats.norm.sf(alpha + half_step), 200 * scipy.stats.norm.sf(alpha)]
        np.testing.assert_allclose(tails, [trusted, clipped], rtol=6e-3)


def rows_of(rng):
    return rng.standard_normal((1024, 1024)).astype(np.float32)


def test_quest_errors_and_masks_on_rows_of_1024():
    x = rows_of(np.random.default_rng(1))
    for bits, expected in [(4, 0.01151), (3, 0.03736), (2, 0.11886)]:
        spec = PRESETS[f"QUEST_INT{bits}"]
        actual, standard_error = error_and_standard_error(x, values_of(x, spec))
        # Statistical: 4 standard errors, and as much again for the table's own run of 4096 rows
        # at half the standard error, plus half of its last digit.
        assert abs(actual - expected) < 4 * standard_error * np.sqrt(1.25) + 5e-6
    units = np.asarray(jax.jit(lambda x: quantize_values(x, QUEST_INT4)[1])(x))
    masked = 100 * (abs(units) > 8).mean()
    # Statistical: of 2**20 entries 0.733 % are masked, standard error 0.0083; stated to 0.05.
    assert masked == pytest.approx(0.733, abs=0.05)


# abs-max, mid-rise, and with a zero level, for rows of 1024 and groups of 128.
ABSMAX = {
    (None, "midrise"): (0.0177, 0.0813, 0.4589),
    (None, "integer"): (0.0203, 0.110, 0.752),
    (128, "midrise"): (0.01199, 0.0551, 0.3044),
    (128, "integer"): (0.0138, 0.0750, 0.588),
}


@pytest.mark.parametrize(("block_size", "kind"), ABSMAX)
def test_errors_of_absmax_with_and_without_a_zero_level(block_size, kind):
    x = rows_of(np.random.default_rng(2))
    make = {"midrise": midrise, "integer": integer}[kind]
    for bits, expected in zip((4, 3, 2), ABSMAX[block_size, kind], strict=True):
        actual, standard_error = error_and_standard_error(
            x, values_of(x, QuantSpec(make(bits), block_size))
        )
        # Statistical: the 3 % to which the table is stated, more than 3 standard errors.
        assert actual == pytest.approx(expected, rel=0.03)
        assert 3 * standard_error < 0.03 * expected


def test_rotation_rescues_quest_from_heavy_tails():
    x = np.random.default_rng(3).standard_t(3, (1024, 1024)).astype(np.float32)
    ratios = []
    for data in (x, rotate(x, 128)):
        wide = data.astype(np.float64)
        error = ((np.asarray(values_of(data, QUEST_INT4)) - wide) ** 2).sum(-1)
        ratios.append(error / (wide**2).sum(-1))
    raw, rotated = ratios
    # Statistical: the published means are of 4096 rows. 5 standard errors of both.
    for ratio, expected in [(raw, 0.134), (rotated, 0.0123)]:
        standard_error = ratio.std() / len(ratio) ** 0.5
        assert abs(ratio.mean() - expected) < 5 * standard_error * np.sqrt(1.25) + 5e-5
    assert rotated.mean() < 0.013


def test_presets_are_what_the_names_say():
    assert len(PRESETS) == 4 + 8 + 4 + 4 + 5 + 7
    assert {name: spec.block_size for name, spec in PRESETS.items() if name.startswith("FP8_")} == {
        "FP8_E4M3": None,
        "FP8_E5M2": None,
        "FP8_E4M3_TENSOR": "tensor",
        "FP8_E5M2_TENSOR": "tensor",
    }
    assert FP8_E5M2.format is FP8_E5M2_TENSOR.format is E5M2
    assert MXFP6.format is E2M3
    assert MXFP8.format is FP8_E4M3.format is E4M3
    assert {PRESETS[f"INT{bits}"].format.bits for bits in (2, 3, 4, 8)} == {2, 3, 4, 8}
    assert len(set(PRESETS.values())) == len(PRESETS)  # hashable, and no two alike

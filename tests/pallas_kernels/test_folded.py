import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.numerics import (
    E5M2,
    MXFP4,
    MXFP4_FITTED_ALIGNED,
    PRESETS,
    QUEST_INT4,
    QuantSpec,
    dequantize,
    integer,
    quantize,
)
from pallas_kernels.folded import (
    Folded,
    fold,
    foldable,
    folded_scale,
    pack_mask,
    unfold,
    unpack_mask,
)
from pallas_kernels.testing import assert_bitwise_equal

SPECS = {name: spec for name, spec in PRESETS.items() if foldable(spec) is None} | {
    "MXINT4": QuantSpec(integer(4), 32, "absmax_ceil"),
    "INT5 rows": QuantSpec(integer(5), None),
    "MXINT4 full": QuantSpec(integer(4, is_full_range=True), 32, "absmax_floor"),
}


def rows_of_all_sizes(rows=8, c=128, seed=0):
    x = np.random.default_rng(seed).standard_normal((rows, c), np.float32)
    return jnp.asarray(
        x * np.float32(8) ** np.arange(-rows // 2, rows // 2, dtype=np.float32)[:, None]
    )


def one_zero(x):
    return np.asarray(x) + 0.0  # -0 + 0 = 0


@functools.partial(jax.jit, static_argnums=1)
def quantized(x, spec):
    return quantize(x, spec, key=jax.random.key(1))


fold_jit, unfold_jit, dequantize_jit = jax.jit(fold), jax.jit(unfold), jax.jit(dequantize)


@pytest.mark.parametrize("name", SPECS)
def test_unfolded_is_dequantized(name):
    q = quantized(rows_of_all_sizes(), SPECS[name])
    folded = fold_jit(q)
    # Exact: powers of two moved between codes and scales; one global scale is multiplied last.
    assert_bitwise_equal(one_zero(unfold_jit(folded)), one_zero(dequantize_jit(q)))
    assert jnp.isfinite(folded.values.astype(jnp.float32)).all()


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("MXFP4_FITTED", jnp.float8_e5m2, ()),
        ("MXINT4", jnp.float8_e5m2, ()),
        ("FP8_E4M3_TENSOR", jnp.float8_e4m3fn, ()),
        ("FP8_E5M2_TENSOR", jnp.float8_e5m2, ()),
        ("FP8_E5M2", jnp.float8_e5m2, (8,)),
        ("QUEST_INT4", jnp.float8_e4m3fn, (8,)),
    ],
)
def test_blocks_and_tensors_have_one_scale_and_rows_one_each(name, dtype, shape):
    folded = fold_jit(quantized(rows_of_all_sizes(), SPECS[name]))
    assert folded.values.dtype == dtype
    assert folded.scales.shape == shape


def test_the_presets_of_this_library_that_fold_are_these():
    assert set(SPECS) & set(PRESETS) == {
        *("MXFP4", "MXFP4_FITTED", "MXFP4_FITTED_ALIGNED", "MXFP4_FITTED_STOCHASTIC"),
        *("QUEST_MXFP4", "QUEST_MXFP4_FLOOR"),
        *("FP8_E4M3", "FP8_E4M3_TENSOR", "FP8_E5M2", "FP8_E5M2_TENSOR"),
        *("QUEST_INT1", "QUEST_INT2", "QUEST_INT3", "QUEST_INT4"),
    }


def test_the_largest_block_reaches_for_the_top_of_e5m2():
    x = jnp.zeros((2, 64)).at[0, 0].set(6.0).at[1, 32].set(3.0)
    folded = fold_jit(quantized(x, MXFP4))
    assert folded.values[0, 0] == 6 * 2**13
    assert folded.values[1, 32] == 6 * 2**12
    assert folded.scales == 2.0**-13


def test_midrise_values_are_odd_integers():
    folded = fold_jit(quantized(rows_of_all_sizes(), QUEST_INT4))
    levels = np.unique(folded.values.astype(np.float32))
    np.testing.assert_array_equal(levels, np.arange(-15, 16, 2))


def test_products_of_folded_operands_are_those_of_the_format():
    """In float64, which holds sums of products of such operands."""
    a, b = (quantized(rows_of_all_sizes(8, 128, seed), MXFP4) for seed in (0, 1))
    f, g = (Folded(*(np.asarray(z, np.float64) for z in fold_jit(q))) for q in (a, b))
    product = f.values @ g.values.T * (f.scales * g.scales)
    exact = np.asarray(dequantize_jit(a), np.float64) @ np.asarray(dequantize_jit(b), np.float64).T
    np.testing.assert_array_equal(product, exact)


@pytest.mark.parametrize("binades", [28, 29, 32, 90])
def test_far_smaller_blocks_round_to_the_smallest_numbers(binades):
    x = np.random.default_rng(0).uniform(0, 6, (4, 64))
    x[:, ::32] = 6
    x[:, 32:] *= 2.0**-binades
    q = quantized(jnp.asarray(x, jnp.float32), MXFP4)
    folded = fold_jit(q)
    # Bound: e5m2 has multiples of 2**-16 at the bottom, to nearest misses by half of one.
    error = np.abs(np.asarray(unfold_jit(folded)) - np.asarray(dequantize_jit(q)))
    assert (error[:, :32] == 0).all()
    assert error.max() <= (0 if binades <= 28 else 2.0**-17 * folded.scales)
    assert (error > 0).any() == (binades > 28)


def test_zero_rows_are_zero_and_other_blocks_do_not_see_nans():
    x = rows_of_all_sizes().at[2].set(0).at[3, 5].set(jnp.nan).at[4, 70].set(-jnp.inf)
    clean = fold_jit(quantized(rows_of_all_sizes(), MXFP4_FITTED_ALIGNED))
    folded = fold_jit(quantized(x, MXFP4_FITTED_ALIGNED))
    assert_bitwise_equal(folded.scales, clean.scales)  # the largest row is finite
    values, expected = (np.array(f.values, np.float32) for f in (folded, clean))
    expected[2] = 0
    expected[3, :32] = expected[4, 64:96] = np.nan
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("fill", [0.0, jnp.nan])
def test_without_a_finite_block_the_scale_is_the_smallest(fill):
    folded = fold_jit(quantized(jnp.full((1, 32), fill), MXFP4))
    assert folded.scales == 2.0**-108
    np.testing.assert_array_equal(folded.values.astype(jnp.float32), np.full((1, 32), fill))


def test_nans_of_formats_with_a_scale_a_row_are_in_the_scales():
    x = rows_of_all_sizes().at[3, 5].set(jnp.nan)
    folded = fold_jit(quantized(x, QUEST_INT4))
    np.testing.assert_array_equal(np.isnan(folded.scales), np.arange(8) == 3)


def test_the_smallest_blocks_fold_exactly():
    x = jnp.full((1, 32), 2.0**-124)
    q = quantized(x, MXFP4)
    folded = fold_jit(q)
    assert folded.scales == 2.0**-108
    assert_bitwise_equal(unfold(folded), dequantize(q))


def test_a_given_largest_scale_leaves_headroom_or_saturates():
    x = rows_of_all_sizes(4)  # which leaves room for headroom
    q = quantized(x, MXFP4)
    own = fold_jit(q)
    roomy = fold_jit(q, own.scales * 2.0**13 * 4)
    np.testing.assert_array_equal(np.asarray(unfold(roomy)), np.asarray(unfold(own)))
    assert jnp.abs(roomy.values.astype(jnp.float32)).max() <= 49152 / 4
    tight = fold_jit(q, own.scales * 2.0**13 / 4).values.astype(jnp.float32)
    expected = np.clip(np.asarray(own.values, np.float32) * 4, -57344, 57344)
    np.testing.assert_array_equal(np.asarray(tight), expected)
    assert (np.abs(expected) == 57344).any()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (PRESETS["NVFP4"], "no powers of two"),
        (PRESETS["INT4"], "no powers of two"),
        (PRESETS["MXFP6"], "no e5m2 numbers"),
        (QuantSpec(E5M2, 32, "absmax_floor"), "0 binades"),
        (PRESETS["QUEST_INT5"], "no e4m3 numbers"),
        (PRESETS["NVFP4_16X16"], "rows share"),
    ],
    ids=str,
)
def test_what_does_not_fold_says_why(spec, message):
    assert message in foldable(spec)
    q = quantized(jnp.ones((16, 128)), spec)
    with pytest.raises(ValueError, match=message):
        fold(q)


def test_more_axes_are_refused():
    with pytest.raises(ValueError, match="must be a matrix"):
        fold(quantized(jnp.ones((2, 2, 32)), MXFP4))


def test_the_folded_scale_is_large_enough_to_flush_what_is_no_normal_number():
    scales = [folded_scale(jnp.float32(largest), MXFP4) for largest in (1, 2.0**-120, 0)]
    np.testing.assert_array_equal(scales, np.array([2.0**-13, 2.0**-108, 2.0**-108], np.float32))


pack_jit, unpack_jit = jax.jit(pack_mask), jax.jit(unpack_mask)


@hypothesis.given(st.integers(0, 4), st.integers(0, 2), st.integers(0, 31), st.integers(0, 2**31))
def test_masks_come_back_and_bit_j_is_column_j(r, g, j, seed):
    mask = np.random.default_rng(seed).random((5, 96)) < 0.5
    packed = np.asarray(pack_jit(jnp.asarray(mask)))
    assert packed.shape == (3, 5)
    assert (packed[g, r] >> j) & 1 == mask[r, 32 * g + j]
    np.testing.assert_array_equal(unpack_jit(jnp.asarray(packed)), mask)


def test_a_mask_of_no_whole_words_is_refused():
    with pytest.raises(ValueError, match="multiple of 32, got 40"):
        pack_mask(jnp.ones((2, 40), bool))

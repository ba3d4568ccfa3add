import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.numerics import MXFP4, fake_quantize
from lowbit_jax.ops import (
    DotRecipe,
    QuantizedWeight,
    explain,
    get_recipe,
    gradient_to_master,
    quantize_weight,
    quantized_dot,
)
from lowbit_jax.rotations import Hadamard

T, N, K = 128, 128, 128
KEY = jax.random.key(5)


quantize_once = jax.jit(quantize_weight, static_argnums=1)
to_master = jax.jit(gradient_to_master, static_argnums=2)


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((T, K), (N, K), (T, N))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@functools.partial(jax.jit, static_argnums=3)
def in_layer(x, w, g, recipe):
    y, vjp = jax.vjp(lambda x, w: quantized_dot(x, w, recipe, key=KEY), x, w)
    return y, *vjp(g)


@functools.partial(jax.jit, static_argnums=3)
def in_advance(x, w, g, recipe):
    quantized = quantize_weight(w, recipe)

    def dot(x, w):
        return quantized_dot(x, QuantizedWeight(w, quantized), recipe, key=KEY)

    y, vjp = jax.vjp(dot, x, w)
    dx, raw = vjp(g)
    return y, dx, gradient_to_master(raw, w, recipe)


CASES = [
    *(("quest_w4a4", "float32"), ("quest_w1a1", "float32"), ("fp8_tensorwise", "bfloat16")),
    *(("int4_weights", "bfloat16"), ("mxfp8", "float32"), ("quartet_rtn", "float32")),
    *(("nvfp4_nvidia", "bfloat16"), ("quest_w2a16", "bfloat16"), ("of the originals", "float32")),
]
# Rotated in all products, and backward from the originals; of MXFP8 the numbers do not show it,
# for values on its grid along one axis are nearly all on that along the other.
OF_THE_ORIGINALS = dataclasses.replace(get_recipe("quartet_rtn"), requantize=False)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_products_and_gradients_are_those_of_the_layer(arrays, name, dtype):
    x, w, g = arrays
    recipe = OF_THE_ORIGINALS if name == "of the originals" else get_recipe(name)
    arguments = x.astype(dtype), w, g.astype(dtype), recipe
    expected, actual = in_layer(*arguments), in_advance(*arguments)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for a, e, terms in zip(actual, expected, (K, N, T), strict=True):
        # Bound: the same operands; float32 sums of `terms` products in another order, once more
        # for the rotation back, then a rounding to 16 bits on either side of a tie.
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        last = 2**-7 if dtype == "bfloat16" else 0
        np.testing.assert_allclose(a, e, rtol=last, atol=2 * terms * 2**-24 * np.abs(e).max())


def test_float_weights_are_not_read(arrays):
    x, w, g = arrays
    recipe = get_recipe("quest_w4a4")
    quantized = quantize_once(w, recipe)

    @jax.jit
    def run(x, master, quantized, g):
        def dot(x, w):
            return quantized_dot(x, QuantizedWeight(w, quantized), recipe, key=KEY)

        y, vjp = jax.vjp(dot, x, master)
        return y, *vjp(g)

    poisoned = run(x, jnp.full_like(w, jnp.nan), quantized, g)
    chex.assert_trees_all_equal(poisoned, run(x, w, quantized, g))  # Exact: the same program.


def test_backward_keeps_codes_and_no_weights(arrays):
    x, w, _ = arrays
    for name in ("quest_w4a4", "fp8_tensorwise"):
        recipe = get_recipe(name)
        quantized = quantize_once(w, recipe)

        def vjp(x, w, recipe=recipe, quantized=quantized):
            weight = QuantizedWeight(w, quantized)
            return jax.vjp(lambda x, w: quantized_dot(x, w, recipe), x, weight)[1]

        residuals = jax.tree.leaves(jax.eval_shape(vjp, x.astype(jnp.bfloat16), w))
        of_x = x.size * 3 + 4 * T if name == "quest_w4a4" else x.size + 4  # with masks and scales
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in residuals)
        assert total == of_x + quantized.nbytes


def test_the_gradient_at_the_master_is_that_of_the_quantized_weights(arrays):
    x, w, g = arrays
    recipe = get_recipe("quest_w2a16")
    weight = QuantizedWeight(w, quantize_once(w, recipe))
    (cotangent,) = jax.vjp(jax.jit(lambda w: quantized_dot(x, w, recipe)), weight)[1](g)
    # Exact up to the order of sums: g^T (x R), no mask, no rotation back.
    expected = g.T @ recipe.rotation.apply(x)
    np.testing.assert_allclose(
        cotangent.master, expected, atol=T * 2**-23 * jnp.abs(expected).max()
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(cotangent.quantized)} <= {
        jnp.dtype("float32"),
        jax.dtypes.float0,
    }
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(cotangent.quantized) if leaf.size)


@pytest.mark.parametrize("name", ["quest_w4a4", "quest_w1a1", "quartet", "fp8_tensorwise"])
def test_gradient_to_master_is_the_derivative_of_fake_quantization(arrays, name):
    _, w, g = arrays
    recipe = get_recipe(name)

    @jax.jit
    def by_autodiff(w, g):
        def values(w):
            if recipe.rotation is not None:
                w = recipe.rotation.apply(w)
            options = {"estimator": recipe.estimator, "clip_scale": recipe.clip_scale}
            return fake_quantize(w, recipe.y_w, **options)

        return jax.vjp(values, w)[1](g)[0]

    actual = to_master(g, w, recipe)
    expected = by_autodiff(w, g)
    # Bound: rotated back by sums of up to 128 signed terms, divided by its root.
    np.testing.assert_allclose(actual, expected, atol=(128 + 2) * 2**-24 * jnp.abs(g).max() * 12)
    if recipe.rotation is None:
        np.testing.assert_array_equal(actual, g)  # Exact: no mask either.
    else:
        assert jnp.any(jnp.abs(recipe.rotation.apply(actual)) < 1e-5)  # something was masked


@pytest.mark.parametrize("name", ["quartet", "quartet2", "fp8_tensorwise", "nvfp4_nvidia"])
def test_stacked_matrices_are_quantized_one_by_one(arrays, name):
    _, w, g = arrays
    recipe = get_recipe(name)
    stacked = jnp.stack([w, 3 * w, w[::-1]]).reshape(3, 1, N, K)  # of unlike abs-max
    gradients = jnp.stack([g, 2 * g, g[::-1]]).reshape(3, 1, N, K)
    together = quantize_once(stacked, recipe)
    assert together.shape == stacked.shape
    masters = to_master(gradients, stacked, recipe)
    for i in range(3):
        one = quantize_once(stacked[i, 0], recipe)
        # Exact: the same arithmetic on the same numbers.
        chex.assert_trees_all_equal(jax.tree.map(lambda leaf, i=i: leaf[i, 0], together), one)
        np.testing.assert_array_equal(
            masters[i, 0], to_master(gradients[i, 0], stacked[i, 0], recipe)
        )


def test_gradient_keeps_its_dtype_and_is_computed_in_float32(arrays):
    _, w, g = arrays
    recipe = get_recipe("quest_w4a4")
    low = g.astype(jnp.bfloat16)
    actual = to_master(low, w, recipe)
    wide = to_master(low.astype(jnp.float32), w, recipe)
    chex.assert_type(actual, jnp.bfloat16)
    np.testing.assert_array_equal(actual, wide.astype(jnp.bfloat16))  # Exact: one rounding.


def test_without_quantized_weights_the_gradient_passes():
    g = jnp.ones((4, 8))
    for recipe in (DotRecipe(), DotRecipe(y_x=MXFP4, rotation=Hadamard(32))):
        assert gradient_to_master(g, g, recipe) is g


def test_random_weights_need_a_key_and_follow_it(arrays):
    _, w, _ = arrays
    recipe = get_recipe("int4_weights_sr")
    with pytest.raises(ValueError, match="needs a random key, got key=None"):
        quantize_weight(w, recipe)
    first, again, other = (quantize_once(w, recipe, key=jax.random.key(i)) for i in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert jnp.any(first.codes != other.codes)
    stacked = quantize_once(jnp.stack([w, w]), recipe, key=jax.random.key(0))
    assert jnp.any(stacked.codes[0] != stacked.codes[1])


def test_what_cannot_be_quantized_apart_is_refused(arrays):
    x, w, _ = arrays
    recipe = get_recipe("quest_w4a4")
    quantized = quantize_once(w, recipe)
    with pytest.raises(
        ValueError, match=r"must be matrices \(\*layers, n, k\), got shape \(128,\)"
    ):
        quantize_weight(w[0], recipe)
    with pytest.raises(ValueError, match="must quantize weights, got bf16"):
        quantize_weight(w, get_recipe("bf16"))
    random = dataclasses.replace(recipe, rotation=Hadamard(128, randomized=True))
    with pytest.raises(NotImplementedError, match="drawn for each product, got randomized"):
        quantize_weight(w, random)
    with pytest.raises(NotImplementedError, match="cannot be quantized in advance"):
        quantized_dot(x, QuantizedWeight(w, quantized), random, key=KEY)
    with pytest.raises(ValueError, match=r"must have the shape of the weights, got \(2, 128\)"):
        gradient_to_master(w[:2], w, recipe)
    with pytest.raises(ValueError, match=r"quantized to midrise3/row rms.*got midrise4/row rms"):
        quantized_dot(x, QuantizedWeight(w, quantized), get_recipe("quest_w3a3"))
    with pytest.raises(
        ValueError, match=r"one matrix twice, got \(64, 128\) and, quantized, \(128"
    ):
        quantized_dot(x, QuantizedWeight(w[:64], quantized), recipe)
    with pytest.raises(ValueError, match=r"x must be \(\*batch, k\) and w \(n, k\)"):
        quantized_dot(x, QuantizedWeight(w[None], quantize_once(w[None], recipe)), recipe)


def test_explain_shows_the_format_of_codes(arrays):
    x, w, _ = arrays
    recipe = get_recipe("quest_w4a4")
    weight = QuantizedWeight(w, quantize_once(w, recipe))
    (row,) = explain(lambda x, w: quantized_dot(x, w, recipe), x, weight).rows
    assert (row.product, row.b_format) == ("y", "midrise4/row rms")

"""One x times several weights: the products of each alone, x quantized and kept once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.ops import (
    QuantizedWeight,
    explain,
    get_recipe,
    operands,
    quantize_weight,
    quantized_dot,
    quantized_dots,
)

KEY = jax.random.key(3)


def arguments(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (2, 32, 128), dtype)
    ws = {"q": (32, keys[1]), "k": (64, keys[2])}
    ws = {name: 0.1 * jax.random.normal(key, (n, 128)) for name, (n, key) in ws.items()}
    gs = {name: jax.random.normal(keys[3], (2, 32, len(w)), dtype) for name, w in ws.items()}
    return x, ws, gs


@functools.partial(jax.jit, static_argnames="recipe")
def together(x, ws, gs, recipe):
    ys, pull = jax.vjp(lambda x, ws: quantized_dots(x, ws, recipe, key=KEY), x, ws)
    return ys, *pull(gs)


@functools.partial(jax.jit, static_argnames="recipe")
def alone(x, w, g, recipe):
    y, pull = jax.vjp(lambda x, w: quantized_dot(x, w, recipe, key=KEY), x, w)
    return y, *pull(g)


@pytest.mark.parametrize("name", ["quest_w4a4:dx=mxfp8,dw=mxfp8", "fp8_tensorwise", "bf16"])
def test_results_are_those_of_each_weight_alone_and_gradients_of_x_add_up(name):
    recipe = get_recipe(name)
    x, ws, gs = arguments()
    ys, dx, dws = together(x, ws, gs, recipe)
    expected = {name: alone(x, ws[name], gs[name], recipe) for name in ws}
    for name, (y, _, dw) in expected.items():
        # Exact: the same operands.
        np.testing.assert_array_equal(ys[name], y)
        np.testing.assert_array_equal(dws[name], dw)
    terms = np.stack([np.asarray(one[1], np.float64) for one in expected.values()])
    # Bound: the sum is rotated back, or its terms are, by 128 additions of entries that err by
    # 2**-24 of the largest, times 128**-0.5; a sum of two more.
    largest = np.abs(terms).max()
    np.testing.assert_allclose(dx, terms.sum(0), rtol=0, atol=128 * 2**-24 * 128**0.5 * largest)


def test_x_is_quantized_once(monkeypatch):
    shapes = []

    def counted(rows, *args, **kwargs):
        shapes.append(rows.shape)
        return factored_and_mask(rows, *args, **kwargs)

    factored_and_mask = operands.factored_and_mask
    monkeypatch.setattr(operands, "factored_and_mask", counted)
    x, ws, gs = arguments()
    jax.eval_shape(
        functools.partial(together.__wrapped__, recipe=get_recipe("quest_w4a4")),
        x,
        ws,
        gs,
    )
    assert sorted(shapes) == [(32, 128), (64, 128), (64, 128)]  # both weights; x has 64 tokens


def test_weights_quantized_in_advance_mix_with_others():
    recipe = get_recipe("quest_w4a4")
    x, ws, gs = arguments()
    codes = jax.jit(quantize_weight, static_argnums=1)(ws["k"], recipe)
    quantized = ws | {"k": QuantizedWeight(ws["k"], codes)}
    ys, dx, dws = together(x, quantized, gs, recipe)
    expected, expected_dx, _ = together(x, ws, gs, recipe)
    # Exact: the same operands.
    np.testing.assert_array_equal(ys["k"], expected["k"])
    np.testing.assert_array_equal(dx, expected_dx)
    assert isinstance(dws["k"], QuantizedWeight)


def test_each_weight_draws_its_own_random_numbers_and_x_one_set():
    x, ws, gs = arguments()
    ws = {"a": ws["k"], "b": ws["k"]}
    gs = {"a": gs["k"], "b": gs["k"]}
    ys, dx, dws = together(x, ws, gs, get_recipe("quartet:y=bf16"))
    _, dx_of_one, _ = together(x, {"a": ws["a"]}, {"a": gs["a"]}, get_recipe("quartet:y=bf16"))
    assert jnp.any(dx != 2 * dx_of_one)
    np.testing.assert_array_equal(ys["a"], ys["b"])
    assert jnp.any(dws["a"] != dws["b"])  # of one gradient, rounded twice
    ys, _, _ = together(x, ws, gs, get_recipe("fp8_weights_sr"))
    assert jnp.any(ys["a"] != ys["b"])


def test_products_run_in_scopes_of_their_names():
    x, ws, gs = arguments()
    rows = explain(functools.partial(together, recipe=get_recipe("quest_w4a4")), x, ws, gs).rows
    found = sorted((row.product, row.where.rsplit("/", 1)[-1], row.count) for row in rows)
    assert found == [(product, name, 1) for product in ("dw", "dx", "y") for name in ("k", "q")]


def test_no_weights_are_refused():
    with pytest.raises(ValueError, match="weights must hold one matrix at least"):
        quantized_dots(jnp.ones((2, 64)), {}, get_recipe("bf16"))

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.numerics import (
    FP8_E4M3,
    INT4,
    MXFP4,
    NVFP4_EDEN,
    NVFP4_FOUR_OVER_SIX,
    NVFP4_STOCHASTIC,
    PRESETS,
    QUEST_INT1,
    QUEST_INT4,
    QUEST_MXFP4,
    QUEST_MXFP4_FLOOR,
    QuantSpec,
    fake_quantize,
    gradient_mask,
    integer,
    quantize_and_mask,
    quantize_values,
)
from lowbit_jax.numerics.estimators import check_estimator

SHAPE = (4, 128)
STATIC = ("spec", "estimator", "clip_scale")


def pulled_back(x, g, spec, estimator="straight_through", clip_scale=1.0, key=None):
    """The values of `fake_quantize` and the cotangent `g` pulled back through it."""

    def call(x):
        return fake_quantize(x, spec, estimator=estimator, clip_scale=clip_scale, key=key)

    values, pullback = jax.vjp(call, x)
    return values, pullback(g)[0]


vjp = jax.jit(pulled_back, static_argnames=STATIC)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x = rng.standard_t(4, SHAPE).astype(np.float32)  # heavy tails, so that something clips
    return jnp.array(x), jnp.array(rng.standard_normal(SHAPE), jnp.float32)


def in_units_of_scale(x, spec):
    return np.asarray(jax.jit(quantize_values, static_argnums=1)(x, spec)[1])


@pytest.mark.parametrize("spec", [QUEST_INT4, QUEST_INT1, QUEST_MXFP4], ids=str)
def test_clipped_entries_get_no_gradient_and_the_others_the_cotangent(data, spec):
    x, g = data
    units = abs(in_units_of_scale(x, spec))
    limits = {
        ("straight_through", 1.0): np.inf,
        ("clipped", 1.0): spec.format.max,
        ("clipped", 1.3): 1.3 * spec.format.max,
        ("trust", 1.0): spec.format.max + spec.format.last_step / 2,
    }
    for (estimator, clip_scale), limit in limits.items():
        values, dx = vjp(x, g, spec, estimator, clip_scale)
        assert abs(units - limit).min() > 1e-5  # no entry on the boundary
        np.testing.assert_array_equal(dx, np.where(units <= limit, g, 0))  # Exact.
        np.testing.assert_array_equal(values, vjp(x, g, spec)[0])  # the mask moves no value
    assert (units > limits["trust", 1.0]).any()


def test_trust_is_an_error_of_at_most_half_a_step(data):
    x, g = data
    values, dx = vjp(x, g, QUEST_INT4, "trust")
    step = np.asarray(jax.jit(quantize_values, static_argnums=1)(x, QUEST_INT4)[0])
    step = np.diff(np.unique(abs(step[0]))).min()
    error = abs(np.asarray(values[0] - x[0]))
    boundary = abs(error - step / 2) < 1e-5
    expected = error <= step / 2
    np.testing.assert_array_equal((np.asarray(dx[0]) != 0)[~boundary], expected[~boundary])
    assert not expected.all()


@pytest.mark.parametrize("spec", [INT4, QuantSpec(integer(3), 32), FP8_E4M3, MXFP4], ids=str)
def test_the_largest_entry_under_absmax_is_not_clipped(data, spec):
    x, _ = data
    _, mask = jax.jit(quantize_and_mask, static_argnums=(1, 2))(x, spec, "clipped")
    units = abs(in_units_of_scale(x, spec))
    if spec is MXFP4:
        np.testing.assert_array_equal(mask, units <= 6)  # Exact: floor clips.
        assert not np.all(mask)
    else:
        assert np.all(mask)
        # 4096 more abs-maxima, scaled to hit every rounding of scale and quotient.
        many = jnp.linspace(1, 2, 4096 * 128, dtype=jnp.float32).reshape(4096, 128)
        assert np.all(jax.jit(quantize_and_mask, static_argnums=(1, 2))(many, spec, "clipped")[1])


@pytest.mark.parametrize(
    "spec",
    [QUEST_MXFP4_FLOOR, NVFP4_FOUR_OVER_SIX, NVFP4_STOCHASTIC, NVFP4_EDEN],
    ids=str,
)
def test_the_mask_alone_is_that_of_the_rounded_values(data, spec):
    x = data[0].at[1, 3].set(jnp.nan).at[2].set(0.0)
    masks = jax.jit(gradient_mask, static_argnums=(1, 2, 3))
    both = jax.jit(quantize_and_mask, static_argnums=(1, 2, 3))
    for estimator, clip_scale in [("clipped", 0.7), ("trust", 1.0)]:
        for seed in range(2):  # no mask depends on the key
            key = jax.random.key(seed)
            _, expected = both(x, spec, estimator, clip_scale, key=key)
            # Exact: the same comparison of the same units.
            np.testing.assert_array_equal(masks(x, spec, estimator, clip_scale), expected)
    assert not np.all(masks(x, spec, "clipped", 0.7))
    assert gradient_mask(x, spec, "straight_through") is None
    # Nothing is rounded: this is the scope of the rounding of `quantize`.
    jaxpr = jax.make_jaxpr(lambda x: gradient_mask(x, spec, "clipped"))(x)
    assert "lowbit_quantize" not in jaxpr.pretty_print(name_stack=True)
    jaxpr = jax.make_jaxpr(lambda x: quantize_values(x, spec, key=jax.random.key(0)))(x)
    assert "lowbit_quantize" in jaxpr.pretty_print(name_stack=True)


def test_gradients_are_in_the_dtype_of_the_input(data):
    x, g = (a.astype(jnp.bfloat16) for a in data)
    values, dx = vjp(x, g, QUEST_INT4, "trust")
    assert values.dtype == dx.dtype == jnp.bfloat16
    wide_values, wide_dx = vjp(x.astype(jnp.float32), g.astype(jnp.float32), QUEST_INT4, "trust")
    np.testing.assert_array_equal(values, wide_values.astype(jnp.bfloat16))  # one last rounding
    np.testing.assert_array_equal(dx.astype(jnp.float32), wide_dx)  # Exact.


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_the_key_has_a_float0_cotangent(data, make_key):
    x, g = data
    spec = dataclasses.replace(MXFP4, rounding="stochastic", scale="absmax_floor43")
    key = make_key(0)

    def loss(x, key):
        return jnp.sum(g * fake_quantize(x, spec, key=key))

    dx, dkey = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(x, key)
    assert dkey.dtype == jax.dtypes.float0
    assert dkey.shape == key.shape
    np.testing.assert_array_equal(dx, g)
    batch = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(x, jax.random.split(key, 2))
    np.testing.assert_array_equal(batch, jnp.stack([g, g]))


def test_estimators_apply_under_vmap_scan_and_remat(data):
    x, g = data
    expected = vjp(x, g, QUEST_INT4, "trust")[1]

    def loss(x):
        def step(total, row_and_g):
            row, g = row_and_g
            quantize = jax.checkpoint(lambda r: fake_quantize(r, QUEST_INT4, estimator="trust"))
            return total + jnp.sum(quantize(row) * g), None

        return jax.lax.scan(step, 0.0, (x, g))[0]

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(x), expected)
    mapped = jax.jit(jax.vmap(lambda r, g: pulled_back(r, g, QUEST_INT4, "trust")[1]))(x, g)
    np.testing.assert_array_equal(mapped, expected)


def test_lengths_that_fill_no_bytes_are_allowed_here():
    x = jnp.array(np.random.default_rng(1).standard_normal((2, 9)), jnp.float32)
    assert fake_quantize(x, PRESETS["QUEST_INT3"]).shape == (2, 9)


def test_unknown_estimators_and_missing_keys_are_refused():
    stochastic = dataclasses.replace(MXFP4, rounding="stochastic")
    with pytest.raises(ValueError, match="needs a random key"):
        fake_quantize(jnp.ones((2, 32)), stochastic)
    with pytest.raises(ValueError, match="no estimator 'ste'; choose one of straight_through"):
        check_estimator("ste")

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models.layers import rms_norm, rotary_angles, rotate_positions, swiglu

U = 2.0**-24  # unit roundoff of float32
EPS = 1e-5


def naive_rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPS) * scale


def naive_swiglu(gate, up):
    return gate / (1 + jnp.exp(-gate)) * up


def naive_rotation(x):
    cos, sin = rotary_angles(x.shape[-3], x.shape[-1], 1e4)
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotate(x):
    return rotate_positions(x, *rotary_angles(x.shape[-3], x.shape[-1], 1e4))


def arguments(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    x, y = (jax.random.normal(k, (2, 5, 4, 16), dtype) for k in keys[:2])
    return x, y, 1 + 0.3 * jax.random.normal(keys[2], (16,))


CASES = {
    "rms_norm": (lambda x, y, s: rms_norm(x, s, EPS), lambda x, y, s: naive_rms_norm(x, s)),
    "swiglu": (lambda x, y, s: swiglu(x, y), lambda x, y, s: naive_swiglu(x, y)),
    "rotate_positions": (lambda x, y, s: rotate(x), lambda x, y, s: naive_rotation(x)),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_the_plain_formula(name):
    function, naive = CASES[name]
    args = arguments()
    g = jax.random.normal(jax.random.key(1), args[0].shape)

    @functools.partial(jax.jit, static_argnums=0)
    def run(f, args, g):
        y, vjp = jax.vjp(f, *args)
        return [y, *vjp(g)]

    for actual, expected in zip(run(function, args, g), run(naive, args, g), strict=True):
        # Bound, in norm and to first order: each side makes fewer than 16 operations an entry and
        # sums at most 2 * 5 * 4 terms. Zero where an argument is not used.
        assert jnp.linalg.norm(actual - expected) <= 2 * (16 + 40) * U * jnp.linalg.norm(expected)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_rounded_once(name):
    function, _ = CASES[name]
    x, y, scale = arguments(jnp.bfloat16)
    actual = function(x, y, scale)
    exact = function(x.astype(jnp.float32), y.astype(jnp.float32), scale)
    assert actual.dtype == jnp.bfloat16
    # Exact: the float32 result, rounded.
    np.testing.assert_array_equal(actual, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("name", CASES)
def test_backward_keeps_no_float32_activation(name):
    function, _ = CASES[name]
    args = arguments(jnp.bfloat16)
    _, vjp = jax.vjp(function, *args)
    for kept in jax.tree.leaves(vjp):
        assert kept.dtype == jnp.bfloat16 or kept.size < args[0].size // 2


def test_the_scale_of_a_norm_gets_a_float32_gradient():
    x, _, scale = arguments(jnp.bfloat16)
    gradient = jax.grad(lambda s: rms_norm(x, s, EPS).astype(jnp.float32).sum())(scale)
    assert gradient.dtype == jnp.float32


def test_a_norm_commutes_with_powers_of_two():
    x, _, scale = arguments()
    # Exact with eps = 0: every operation scales.
    np.testing.assert_array_equal(rms_norm(4 * x, scale, 0.0), rms_norm(x, scale, 0.0))


def test_rotation_multiplies_complex_pairs():
    x, _, _ = arguments()
    pairs = np.asarray(x[..., :8], np.float64) + 1j * np.asarray(x[..., 8:], np.float64)
    angle = np.arange(5)[:, None] * 1e4 ** -(np.arange(0, 16, 2) / 16)
    turned = pairs * np.exp(1j * angle)[:, None]
    # Bound: an angle below 8 is off by a few of its own roundings, 4 * 8 U; pairs are below 8.
    np.testing.assert_allclose(
        rotate(x), np.concatenate([turned.real, turned.imag], -1), rtol=0, atol=8 * 40 * U
    )


def test_scores_depend_on_distance_alone():
    q, k = (jax.random.normal(jax.random.key(i), (16,)) for i in (2, 3))
    q, k = (rotate(jnp.broadcast_to(x, (9, 1, 16)))[:, 0] for x in (q, k))
    scores = np.asarray(q @ k.T)
    for distance in range(-8, 9):
        diagonal = np.diagonal(scores, distance)
        # Bound: as above, for sums of 16 products of values below 4.
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=0, atol=16 * 16 * 60 * U)

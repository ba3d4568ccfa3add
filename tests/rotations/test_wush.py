"""WUSH: its algebra in float64, and that no block transform has a smaller objective."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from lowbit_jax.rotations.wush import BlockTransform, block_moments, wush

B = 32


@functools.cache
def layer():
    """Block 0 of a layer of 512 channels: `(X, w)`, correlated, of unlike channels."""
    rng = np.random.default_rng(0)
    k, n, tokens, rank = 512, 256, 1024, 64
    x = rng.normal(size=(tokens, rank)) @ rng.normal(size=(rank, k)) / np.sqrt(rank)
    x = (x + 0.5 * rng.normal(size=(tokens, k))) * np.exp(0.8 * rng.normal(size=k))
    w = 0.7 * rng.normal(size=(n, rank)) @ rng.normal(size=(rank, k)) / np.sqrt(rank)
    w = (w + rng.laplace(size=(n, k)) / np.sqrt(2)) * np.exp(0.3 * rng.normal(size=k)) / np.sqrt(k)
    return x[:, :B], w[:, :B]


def moments():
    x, w = layer()
    return x.T @ x / len(x), w.T @ w / len(w)


def transform(damping=0.0, dtype="float64", **options):
    """T of the block, computed in float64."""
    mx, _ = moments()
    with jax.enable_x64(True):
        w = jnp.asarray(layer()[1])
        t = wush(w, jnp.asarray(mx)[None], damping=damping, dtype=jnp.dtype(dtype), **options)
        return np.float64(t.matrices[0])


def objectives(t):
    """First-order errors of floating point and of integers: `sum ab` and `sum a sum b / B`."""
    mx, mw = moments()
    inverse = np.linalg.inv(t)
    a, b = np.diag(t @ mx @ t.T), np.diag(inverse.T @ mw @ inverse)
    return np.sum(a * b), np.sum(a) * np.sum(b) / B


def singular_values():
    mx, mw = moments()
    return np.linalg.svd(scipy.linalg.cholesky(mw) @ scipy.linalg.cholesky(mx).T, compute_uv=False)


# Bound of the three that follow: a few dozen float64 operations on matrices of condition below
# 1e4; without damping an inverse loses that factor.
FLOAT64 = 1e-11


def test_both_moments_become_equal_with_a_constant_diagonal():
    mx, mw = moments()
    t = transform()
    inverse = np.linalg.inv(t)
    of_x, of_w = t @ mx @ t.T, inverse.T @ mw @ inverse
    np.testing.assert_allclose(of_x, of_w, atol=FLOAT64 * np.max(of_x))
    np.testing.assert_allclose(np.diag(of_x), np.trace(of_x) / B, rtol=FLOAT64)
    s = singular_values()
    np.testing.assert_allclose(np.trace(of_x), np.sum(s), rtol=FLOAT64)


def test_it_is_the_formula_of_the_paper():
    mx, mw = moments()
    of_x, of_w = np.linalg.cholesky(mx), np.linalg.cholesky(mw)
    u, s, vt = np.linalg.svd(of_w.T @ of_x)
    paper = np.diag(s**-0.5) @ u.T @ of_w.T  # without H, whose rows the signs of u flip
    ours = scipy.linalg.hadamard(B) / np.sqrt(B) @ transform()
    np.testing.assert_allclose(np.abs(ours), np.abs(paper), atol=FLOAT64 * np.max(np.abs(paper)))
    for_weights = np.diag(s**-0.5) @ vt @ of_x.T
    np.testing.assert_allclose(for_weights, np.linalg.inv(paper).T, atol=FLOAT64 * 100)


def test_it_attains_the_bound_that_no_block_transform_passes():
    bound = np.sum(singular_values()) ** 2 / B
    np.testing.assert_allclose(objectives(transform()), bound, rtol=FLOAT64)
    np.testing.assert_allclose(bound, 0.310198, atol=5e-7)  # printed digits, as those below
    rng = np.random.default_rng(0)
    best = transform()
    others = [np.eye(B), scipy.linalg.hadamard(B) / np.sqrt(B), transform(has_hadamard=False)]
    others += [scipy.stats.ortho_group.rvs(B, random_state=rng)]
    others += [np.linalg.inv(np.eye(B) + 0.05 * rng.normal(size=(B, B))) @ best for _ in range(100)]
    values = np.array([objectives(t) for t in others])
    assert np.all(values >= bound * (1 - 1e-9))
    np.testing.assert_allclose(values[:2], [[0.59704, 0.67397], [0.67195, 0.67397]], rtol=1e-4)
    # Without H the floating-point objective is the sum of squares; the other does not change.
    wus = [np.sum(singular_values() ** 2), bound]
    np.testing.assert_allclose(values[2], wus, rtol=1e-9)
    np.testing.assert_allclose(wus[0], 0.59146, rtol=1e-4)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_float32_attains_the_bound_as_well(condition):
    rng, b = np.random.default_rng(1), 64
    q, p = (scipy.stats.ortho_group.rvs(b, random_state=rng) for _ in range(2))
    spectrum = np.geomspace(1, 1 / condition, b)
    mx = q * spectrum @ q.T
    w = rng.normal(size=(256, b)) @ (p * np.sqrt(spectrum)) @ p.T
    with jax.enable_x64(True):
        exact = wush(jnp.asarray(w), jnp.asarray(mx)[None], dtype=jnp.float64).matrices[0]
    found = wush(jnp.asarray(w, jnp.float32), jnp.asarray(mx, jnp.float32)[None]).matrices[0]
    mw = w.T @ w / len(w)
    inverses = [np.linalg.inv(np.float64(t)) for t in (found, exact)]
    sums = [
        np.trace(np.float64(t) @ mx @ np.float64(t).T) * np.trace(inverse.T @ mw @ inverse)
        for t, inverse in zip((found, exact), inverses, strict=True)
    ]
    # Bound: eigenvectors are off by 2^-24 over gaps that the damping of 1 % keeps above 1e-4.
    np.testing.assert_allclose(*sums, rtol=1e-3)


def test_the_product_is_what_it_was():
    x, w = (jnp.asarray(np.tile(a, 2), jnp.float32) for a in layer())
    mx = jnp.asarray(moments()[0], jnp.float32)
    for dtype, bound in (("float32", 1e-3), ("bfloat16", 1e-3)):
        t = wush(w, jnp.stack([mx, mx]), dtype=jnp.dtype(dtype))
        chex.assert_type(t.matrices, dtype)
        y, moved = x @ w.T, t.apply(x) @ t.apply_to_weights(w).T
        # Bound: roundings of 2^-24 times the condition of T, below 1e3 with damping, of sums whose
        # terms are no larger than some 10 times the result; T in bfloat16 is no worse, for the
        # weights are derived from the rounded one.
        assert np.linalg.norm(moved - y) < bound * np.linalg.norm(y)
        np.testing.assert_allclose(t.inverse(t.apply(x)), x, atol=bound * np.max(np.abs(x)))
        w_back = t.inverse_of_weights(t.apply_to_weights(w))
        np.testing.assert_allclose(w_back, w, atol=bound * np.max(np.abs(w)))


def test_equal_moments_make_it_a_scaled_rotation():
    w = np.linalg.qr(np.random.default_rng(0).normal(size=(B, B)))[0]
    t = wush(jnp.asarray(w, jnp.float32), 4 * jnp.eye(B)[None]).matrices[0]
    scale = jnp.trace(t @ t.T) / B
    # Bound: a few float32 operations on orthogonal matrices of 32.
    np.testing.assert_allclose(t @ t.T, scale * jnp.eye(B), atol=1e-5 * float(scale))


def test_scales_move_between_the_operands_by_themselves():
    x, w = (jnp.asarray(a, jnp.float32) for a in layer())
    mx = jnp.asarray(moments()[0], jnp.float32)[None]
    plain, scaled = wush(w, mx), wush(w / 16, 256 * mx)
    # Bound: exact but for the compiler's choice of how to round.
    np.testing.assert_allclose(scaled.apply(16 * x), plain.apply(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        scaled.apply_to_weights(w / 16), plain.apply_to_weights(w), rtol=1e-4, atol=1e-5
    )


def test_few_rows_few_tokens_and_dead_channels_have_a_transform():
    x, w = (jnp.asarray(a, jnp.float32) for a in layer())
    few = x[:8].T @ x[:8] / 8  # rank 8 of 32
    dead = few.at[3].set(0).at[:, 3].set(0)
    blocks = jnp.stack([few, dead, jnp.zeros((B, B))])
    for rows in (w[:4], jnp.zeros_like(w), w):
        rows = jnp.tile(rows, 3)
        t = jax.jit(wush)(rows, blocks)
        chex.assert_shape(t.matrices, (3, B, B))
        assert np.isfinite(t.matrices).all()
        back = t.inverse(t.apply(jnp.tile(x, 3)))
        # Bound: the condition of T with a damping of 1 %, of moments and of singular values.
        np.testing.assert_allclose(back, jnp.tile(x, 3), atol=1e-2 * float(jnp.max(jnp.abs(x))))


def test_it_is_a_pytree_that_passes_through_jit():
    t = BlockTransform(jnp.stack([jnp.eye(4), 2 * jnp.eye(4)]))
    assert t.block_size == 4
    y = jax.jit(lambda t, x: t.apply(x))(t, jnp.ones((3, 8), jnp.bfloat16))
    np.testing.assert_array_equal(y, jnp.tile(jnp.array([1.0] * 4 + [2.0] * 4), (3, 1)))
    chex.assert_type(y, jnp.float32)


def test_what_does_not_fit_is_refused():
    t = BlockTransform(jnp.stack([jnp.eye(4)] * 2))
    with pytest.raises(ValueError, match=r"last axis must be 2 blocks of 4, got shape \(3, 12\)"):
        t.apply(jnp.ones((3, 12)))
    with pytest.raises(ValueError, match="must divide the width of the layer, got 32 and 48"):
        block_moments(jnp.eye(48), 32)
    with pytest.raises(ValueError, match=r"go with moments \(k // B, B, B\)"):
        wush(jnp.ones((4, 12)), jnp.ones((2, 4, 4)))
    with pytest.raises(ValueError, match="power of two"):
        wush(jnp.ones((4, 12)), jnp.ones((2, 6, 6)))

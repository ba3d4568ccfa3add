"""Magnitude, Wanda and SparseGPT on layers with correlated inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.numerics import MXFP4, QUEST_INT4, dequantize, unsigned
from lowbit_jax.numerics.spec import QuantSpec
from lowbit_jax.ptq.gptq import gptq
from lowbit_jax.ptq.magnitude import magnitude
from lowbit_jax.ptq.sparsegpt import sparsegpt
from lowbit_jax.ptq.wanda import wanda
from lowbit_jax.sparsity import NM, Unstructured

N, K, TOKENS = 128, 256, 2048
UINT4 = QuantSpec(unsigned(4), 32, "minmax")
SOLVERS = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt}
# Relative squared errors of the outputs, means of seeds 0 to 2, from a float64 program of another
# kind (rows of the inverse's Cholesky factor); the last is least squares on SparseGPT's mask.
REFERENCE = {
    Unstructured(0.5): (0.034, 0.0070, 0.0031, 0.0018),
    Unstructured(0.7): (0.125, 0.033, 0.0179, 0.0099),
    Unstructured(0.9): (0.419, 0.166, 0.129, 0.092),
    NM(2, 4): (0.082, 0.0239, 0.0090, 0.0059),
}


@functools.cache
def layer(seed):
    """`(w, H)`: inputs of rank 32 with noise, channels of unlike size; Laplacian weights."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(TOKENS, K // 8)) @ rng.normal(size=(K // 8, K)) / np.sqrt(K // 8)
    x = (x + 0.5 * rng.normal(size=(TOKENS, K))) * np.exp(0.8 * rng.normal(size=K))
    w = rng.laplace(size=(N, K))
    return jnp.asarray(w, jnp.float32), jnp.asarray(x.T @ x / TOKENS, jnp.float32)


def least_squares(w, h, mask):
    """Relative error of the best weights on `mask`, row by row in float64."""
    w, h = np.float64(w), np.float64(h)
    lost = total = 0.0
    for row, stays in zip(w, mask, strict=True):
        best = np.zeros_like(row)
        best[stays] = np.linalg.solve(h[np.ix_(stays, stays)], h[stays] @ row)
        lost, total = lost + (row - best) @ h @ (row - best), total + row @ h @ row
    return lost / total


@pytest.mark.parametrize("pattern", REFERENCE, ids=str)
def test_errors_are_the_references_and_strictly_ordered(pattern):
    errors = []
    for seed in range(3):
        w, h = layer(seed)
        solved = {name: solve(w, h, pattern) for name, solve in SOLVERS.items()}
        for values, info in solved.values():
            # Bound: floors of 256 in a row and of 16,384 in a block.
            assert 0 <= pattern.sparsity - float(jnp.mean(values == 0)) < 1 / K
            assert int(info.failures) == 0
        row = [float(info.error) for _, info in solved.values()]
        errors.append([*row, least_squares(w, h, np.asarray(solved["sparsegpt"][0]) != 0)])
    assert np.all(np.diff(errors, axis=1) < 0)  # for each seed
    # Bound: the reference is printed with two digits, the last of which may be off by a half.
    np.testing.assert_allclose(np.mean(errors, axis=0), REFERENCE[pattern], rtol=0.03)


def by_inverse(w, h, removed, size):
    """SparseGPT in float64 by the Cholesky factor of the damped inverse, as its authors do."""
    w, h = np.float64(w).copy(), np.float64(h)
    h = h + 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    for start in range(0, len(h), size):
        block = slice(start, start + size)
        scores = (w[:, block] / np.diag(u)[block]) ** 2
        goes = removed(scores)
        for j in range(start, start + size):
            q = np.where(goes[:, j - start], 0, w[:, j])
            w[:, j:] -= np.outer((w[:, j] - q) / u[j, j], u[j, j:])
            w[:, j] = q
    return w


def smallest(scores, n_of_m):
    """True for the n smallest of each m that follow one another."""
    groups = scores.reshape(-1, n_of_m[1])
    ranks = np.argsort(np.argsort(groups, axis=1), axis=1)
    return (ranks < n_of_m[0]).reshape(scores.shape)


def test_it_is_the_authors_recursion():
    w, h = layer(0)
    w = w[:32]
    with jax.enable_x64(True):
        wide = jnp.asarray(np.float64(w)), jnp.asarray(np.float64(h))
        half, _ = sparsegpt(*wide, Unstructured(0.5), columns_per_block=64)
        two, _ = sparsegpt(*wide, NM(2, 4))
        half, two = np.asarray(half), np.asarray(two)
    # Bound: two float64 factorisations of a matrix of condition below 1e5.
    expected = by_inverse(w, h, lambda s: smallest(s, (s.size // 2, s.size)), 64)
    np.testing.assert_allclose(half, expected, atol=1e-9)
    expected = by_inverse(w, h, lambda s: smallest(s, (2, 4)), 4)
    np.testing.assert_allclose(two, expected, atol=1e-9)


@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
def test_without_sparsity_nothing_changes(solve):
    w, h = layer(0)
    values, info = solve(w, h, Unstructured(0.0))
    np.testing.assert_array_equal(values, w)  # Exact: no error is made, so none is carried.
    assert float(info.error) == 0


def test_uncorrelated_inputs_of_one_size_make_it_magnitude():
    w, _ = layer(0)
    h = 3 * jnp.eye(K)
    expected, _ = magnitude(w, h, NM(2, 4))
    np.testing.assert_array_equal(wanda(w, h, NM(2, 4))[0], expected)  # Exact: the same order.
    np.testing.assert_array_equal(sparsegpt(w, h, NM(2, 4))[0], expected)  # Exact: M is I.


@pytest.mark.parametrize("spec", [MXFP4, UINT4], ids=str)
def test_quantizing_without_sparsity_is_gptq(spec):
    w, h = layer(0)
    q, info = sparsegpt(w, h, Unstructured(0.0), spec=spec)
    expected, expected_info = gptq(w, h, spec, order="front")
    # Bound: the same sums of 256 float32 terms in another order may round a few weights apart.
    assert np.mean(np.asarray(dequantize(q) != dequantize(expected))) < 1e-3
    np.testing.assert_allclose(info.error, expected_info.error, rtol=1e-3)


def test_survivors_are_quantized_in_one_pass():
    w, h = layer(0)
    for spec in (MXFP4, UINT4):
        q, info = sparsegpt(w, h, NM(2, 4), spec=spec)
        values = np.asarray(dequantize(q))
        assert np.all(np.sum(values.reshape(-1, 4) != 0, axis=-1) <= 2)
        # Rounding what was pruned before cannot make up for it.
        apart, _ = gptq(sparsegpt(w, h, NM(2, 4))[0], h, spec, order="front")
        kept = np.where(values != 0, dequantize(apart), 0)
        lost = w - kept
        total = float(jnp.sum((w @ h) * w))
        assert float(info.error) < float(jnp.sum((lost @ h) * lost)) / total


def test_a_width_without_a_divisor_near_128_is_solved_in_smaller_blocks():
    w, h = layer(0)
    w, h = w[:8, :132], h[:132, :132]
    values, _ = sparsegpt(w, h, Unstructured(0.5))
    for block in (values[:, :66], values[:, 66:]):
        assert int(jnp.sum(block == 0)) == 8 * 33


def test_a_hessian_that_cannot_be_factored_is_said_so():
    w, h = layer(0)
    w, h = w[:8, :64], h[:64, :64]
    dead = h.at[5].set(0).at[:, 5].set(0)
    values, info = sparsegpt(w, dead, NM(2, 4))
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(values[:, 5], 0)  # what no input reaches costs nothing
    assert int(info.failures) == 0
    singular, info = sparsegpt(w, jnp.ones_like(h), NM(2, 4), damping=-0.005)
    assert int(info.failures) > 0
    assert float(info.damping) > 0
    assert np.isfinite(singular).all()
    _, info = sparsegpt(w, h.at[3, 3].set(jnp.nan), NM(2, 4))
    assert np.isnan(info.error)


def test_what_does_not_fit_is_refused():
    w, h = layer(0)
    with pytest.raises(ValueError, match=r"weights \(n, k\) go with a Hessian \(k, k\)"):
        sparsegpt(w, h[:64, :64], NM(2, 4))
    with pytest.raises(ValueError, match="needs a width that is a multiple of 4, got 62"):
        sparsegpt(w[:, :62], h[:62, :62], NM(2, 4))
    with pytest.raises(ValueError, match="needs a level at zero"):
        sparsegpt(w, h, NM(2, 4), spec=QUEST_INT4)

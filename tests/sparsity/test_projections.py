import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from lowbit_jax.numerics import FP8_E4M3_TENSOR, INT4, MXFP4, NVFP4, QUEST_INT4, quantize_values
from lowbit_jax.rotations import Hadamard
from lowbit_jax.sparsity import identity, onto_grid

QUEST = onto_grid(QUEST_INT4, Hadamard(64))


def weights(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_is_full_hadamard_in_the_original_basis():
    w = weights(8, 128)
    h = np.kron(np.eye(2), scipy.linalg.hadamard(64) / 8)
    rotated = np.asarray(w, np.float64) @ h
    values = np.asarray(jax.jit(lambda w: quantize_values(w, QUEST_INT4)[0])(np.float32(rotated)))
    # Bound: 64 products and sums back, each rounding by 2^-24 of at most 64 * 4 / 8, and the
    # scale's own few roundings; entries next to a threshold, which could round apart by a whole
    # step of about 0.3 sigma, there are none of with this seed.
    np.testing.assert_allclose(jax.jit(QUEST)(w), values @ h, atol=64 * 2**-24 * 32)
    assert np.max(np.abs(np.asarray(w) - values @ h)) > 0.1  # it did round


@pytest.mark.parametrize(
    "projection",
    [QUEST, onto_grid(MXFP4, Hadamard(32)), onto_grid(INT4), onto_grid(NVFP4)],
    ids=["quest", "mxfp4", "int4", "nvfp4"],
)
def test_power_of_two_scaling_commutes(projection):
    w = weights(4, 128)
    project = jax.jit(projection)
    for power in (-20, 3):
        # Exact: every operation scales with its argument.
        np.testing.assert_array_equal(project(w * 2.0**power), project(w) * 2.0**power)


def test_leading_axes_are_independent():
    w = weights(3, 2, 4, 128)
    project = jax.jit(QUEST)
    loop = jnp.stack([jnp.stack([project(w[i, j]) for j in range(2)]) for i in range(3)])
    # Bound: the sums of 64 terms below 4 may be taken in another order.
    np.testing.assert_allclose(project(w), loop, atol=64 * 2**-22)
    tensor = jax.jit(onto_grid(FP8_E4M3_TENSOR))
    scaled = w.at[0, 0].multiply(1000.0)  # one scale a matrix: the others must not notice
    np.testing.assert_array_equal(tensor(scaled)[1:], tensor(w)[1:])  # Exact: the same input.


def test_keeps_dtype_and_computes_in_float32():
    w = weights(4, 128).astype(jnp.bfloat16)
    projected = jax.jit(QUEST)(w)
    chex.assert_type(projected, jnp.bfloat16)
    # Exact: the float32 result, rounded once.
    expected = jax.jit(QUEST)(w.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(projected, expected)


def test_passes_no_gradient():
    w = weights(4, 64)
    for projection in (QUEST, identity):
        np.testing.assert_array_equal(
            jax.jit(jax.grad(lambda w, p=projection: jnp.sum(p(w) ** 2)))(w), jnp.zeros_like(w)
        )


def test_without_rotation_it_is_dequantize_of_quantize():
    w = weights(4, 128)
    np.testing.assert_array_equal(  # Exact: the same definition.
        jax.jit(onto_grid(INT4))(w), jax.jit(lambda w: quantize_values(w, INT4)[0])(w)
    )
    np.testing.assert_array_equal(identity(w), w)


def test_absmax_grid_projection_is_idempotent_and_quest_is_not():
    w = weights(64, 128)
    project = jax.jit(onto_grid(MXFP4))
    np.testing.assert_array_equal(project(project(w)), project(w))  # Exact: powers of two.
    once = jax.jit(QUEST)(w)
    shrinkage = jnp.linalg.norm(jax.jit(QUEST)(once)) / jnp.linalg.norm(once)
    assert shrinkage < 0.999  # sqrt(1 - MSE) = 0.9942 in expectation over Gaussian data


def test_equal_projections_hash_alike():
    assert onto_grid(QUEST_INT4, Hadamard(64)) == QUEST
    assert hash(onto_grid(QUEST_INT4, Hadamard(64))) == hash(QUEST)
    assert onto_grid(QUEST_INT4) != QUEST


def test_what_is_no_function_of_the_argument_is_refused():
    with pytest.raises(ValueError, match=r"rounding='stochastic'.*dataclasses.replace"):
        onto_grid(dataclasses.replace(MXFP4, rounding="stochastic"))
    with pytest.raises(ValueError, match="no key to draw signs from, got randomized Hadamard 32"):
        onto_grid(MXFP4, Hadamard(32, randomized=True))
    with pytest.raises(ValueError, match="must be floating point, got int8"):
        onto_grid(MXFP4)(jnp.ones((4, 32), jnp.int8))
    with pytest.raises(ValueError, match="multiple of block_size=64"):
        QUEST(jnp.ones((4, 96)))

"""Stacked matrices are quantized as each of them alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.numerics import FP8_E4M3_TENSOR, INT4, MXFP4, NVFP4, dequantize, quantize
from lowbit_jax.numerics.matrices import dequantize_matrices, quantize_matrices

SPECS = {"nvfp4": NVFP4, "mxfp4": MXFP4, "int4": INT4, "fp8_tensor": FP8_E4M3_TENSOR}


def compiled(function):
    return jax.jit(function, static_argnums=1)


def stack():
    """(2, 3, 4, 128), each matrix a hundred times larger than the one before it."""
    w = np.random.default_rng(0).normal(size=(2, 3, 4, 128)).astype(np.float32)
    return jnp.asarray(w * (100.0 ** np.arange(6)).reshape(2, 3, 1, 1).astype(np.float32))


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)  # Exact: the same definition.


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_matrix_is_quantized_as_alone_and_can_be_cut_out(spec):
    w = stack()
    q = compiled(quantize_matrices)(w, spec)
    assert q.shape == w.shape
    quantize_alone, dequantize_alone = compiled(quantize), jax.jit(dequantize)
    q, values = jax.device_get((q, jax.jit(dequantize_matrices)(q)))
    for at in np.ndindex(2, 3):
        alone = quantize_alone(np.asarray(w)[at], spec)
        assert_equal(jax.tree.map(lambda part, at=at: part[at], q), alone)
        np.testing.assert_array_equal(values[at], dequantize_alone(alone))


def test_what_was_quantized_as_a_whole_is_dequantized_as_a_whole():
    q = compiled(quantize)(stack(), NVFP4)
    np.testing.assert_array_equal(jax.jit(dequantize_matrices)(q), jax.jit(dequantize)(q))
    one = stack()[0, 0]
    assert_equal(compiled(quantize_matrices)(one, NVFP4), compiled(quantize)(one, NVFP4))


def test_matrices_draw_different_random_bits():
    spec = dataclasses.replace(INT4, rounding="stochastic")
    w = jnp.broadcast_to(stack()[0, 0], (2, 4, 128))
    q = compiled(quantize_matrices)(w, spec, key=jax.random.key(0))
    assert jnp.mean(q.codes[0] != q.codes[1]) > 0.1

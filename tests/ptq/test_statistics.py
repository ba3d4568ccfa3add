import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.numerics import INT8, MXFP4, NVFP4, QTensor, dequantize, quantize
from lowbit_jax.numerics.formats import unsigned
from lowbit_jax.numerics.spec import QuantSpec
from lowbit_jax.ptq.statistics import code_statistics, input_statistics, weight_statistics

RNG = np.random.default_rng(0)
MINMAX = QuantSpec(unsigned(4), 32, "minmax")
INT8_32 = dataclasses.replace(INT8, block_size=32)


def test_numbers_of_weights_are_those_of_their_definition():
    w = RNG.laplace(1e-13, 1e-12, (16, 64))  # whose fourth powers float32 does not hold
    found = weight_statistics(jnp.asarray(w, jnp.float32))
    centred = w - w.mean()
    # Bound: float32 sums of 1024 terms.
    kurtosis = (centred**4).mean() / (centred**2).mean() ** 2
    np.testing.assert_allclose(found["weight_kurtosis"], kurtosis, rtol=1e-4)
    ratio = np.abs(w).max() / np.sqrt((w**2).mean())
    np.testing.assert_allclose(found["weight_max_to_rms"], ratio, rtol=1e-4)
    assert weight_statistics(jnp.zeros((4, 4))) == {"weight_kurtosis": 0, "weight_max_to_rms": 0}


def test_numbers_of_inputs_leave_out_channels_that_are_always_zero():
    x = RNG.standard_normal((512, 8)) * [1, 2, 3, 0, 50, 0, 4, 5]
    power = (x**2).mean(0)
    matrix = jnp.asarray(x.T @ x / 512, jnp.float32)
    found = input_statistics(matrix, jnp.float32(np.abs(x).max()))
    live = np.sort(power[power > 0])
    np.testing.assert_allclose(found["input_max_to_median"], live[-1] / live[2], rtol=1e-5)
    ratio = np.abs(x).max() / np.sqrt(power.mean())
    np.testing.assert_allclose(found["input_max_to_rms"], ratio, rtol=1e-5)
    dead = input_statistics(jnp.zeros((8, 8)), jnp.float32(0))
    assert dead == {"input_max_to_rms": 0, "input_max_to_median": 0}


@pytest.mark.parametrize("spec", [MXFP4, NVFP4, INT8_32, MINMAX], ids=str)
def test_numbers_of_codes_are_those_of_the_values(spec):
    w = RNG.standard_normal((8, 64)) * (RNG.random((8, 64)) < 0.7)
    w[2] = 0  # blocks of zeros, whose scales do not count
    q = quantize(jnp.asarray(w, jnp.float32), spec)
    found = code_statistics({"kept": (np.float32(1), jax.tree.map(np.asarray, q))})
    values = np.asarray(dequantize(q), np.float64)
    np.testing.assert_allclose(found["zero_codes"], (values == 0).mean(), rtol=1e-6)
    scales = [float(s) for s in steps(q) if s > 0]
    for name, expected in (("min", min(scales)), ("max", max(scales))):
        np.testing.assert_allclose(found[f"scale_{name}"], expected, rtol=1e-6)
    middle = sorted(scales)[(len(scales) - 1) // 2]
    np.testing.assert_allclose(found["scale_median"], middle, rtol=1e-6)
    blocks = values.reshape(-1, spec.block_size)
    units = blocks / np.where(steps(q) > 0, steps(q), 1)[:, None]
    if spec != MINMAX:
        outermost = np.isclose(np.abs(units), spec.format.max, rtol=1e-5).mean()
        np.testing.assert_allclose(found["limit_codes"], outermost, rtol=1e-6)
    else:  # the smallest and the largest of each block of weights, at least
        assert found["limit_codes"] >= 2 / spec.block_size * 7 / 8


def steps(q):
    """The scale of each block, by hand."""
    scales = np.asarray(q.scales)
    if scales.dtype == np.uint8:
        scales = np.where(scales == 0, 0, 2.0 ** (scales.astype(int) - 127))
    scales = scales.astype(np.float64)
    return (scales * (1 if q.global_scale is None else float(q.global_scale))).reshape(-1)


def test_what_keeps_no_codes_has_no_numbers():
    assert code_statistics({"mask": np.ones(4)}) == {}
    zeros = quantize(jnp.zeros((2, 32)), MXFP4)
    assert isinstance(zeros, QTensor)
    found = code_statistics(zeros)
    assert found["scale_min"] == found["scale_median"] == found["scale_max"] == 0
    assert found["zero_codes"] == 1

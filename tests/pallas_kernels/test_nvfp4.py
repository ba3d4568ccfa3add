"""The choices of NVFP4 where they are closest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.numerics import NVFP4_FOUR_OVER_SIX
from pallas_kernels.compat import mosaic_obstacle
from pallas_kernels.rotate_quantize import Target, rotate_quantize, rotate_quantize_reference
from pallas_kernels.testing import run_interpreted

pytestmark = pytest.mark.skipif(mosaic_obstacle() is not None, reason=str(mosaic_obstacle()))


def test_four_and_six_of_equal_error_are_told_apart_as_in_the_reference():
    # Few different numbers, so that the errors of both scales are often equal, but for rounding.
    integers = jax.random.randint(jax.random.key(0), (128, 128), -9, 10).astype(jnp.bfloat16)
    normal = jax.random.normal(jax.random.key(5), (128, 128), jnp.bfloat16)
    x = jnp.where(jax.random.uniform(jax.random.key(9), (128, 128)) < 0.5, integers, normal)
    target = Target(NVFP4_FOUR_OVER_SIX)
    got, expected = (
        run(functools.partial(fn, rows=target, columns=None), x)
        for run, fn in (
            (run_interpreted, functools.partial(rotate_quantize, interpret=True)),
            (lambda fn, x: jax.jit(fn)(x), rotate_quantize_reference),
        )
    )
    # Exact; zeros have no sign.
    np.testing.assert_array_equal(
        *(np.asarray(made.rows.values, np.float32) for made in (got, expected))
    )
    np.testing.assert_array_equal(got.rows.scales, expected.rows.scales)

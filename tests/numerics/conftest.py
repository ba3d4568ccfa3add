"""One compiled function a spec, shared by every test of the folder."""

import functools

import jax
import pytest

from lowbit_jax.numerics import dequantize, quantize, quantize_values


@pytest.fixture(scope="session")
def run():
    """`run(x, spec, key=key(0)) -> (QTensor, dequantized, values, units)`, jitted."""

    @functools.partial(jax.jit, static_argnums=1)
    def everything(x, spec, key):
        q = quantize(x, spec, key=key)
        return q, dequantize(q), *quantize_values(x, spec, key=key)

    one_key = jax.random.key(0)
    return lambda x, spec, key=one_key: everything(x, spec, key)

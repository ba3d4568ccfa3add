"""One compiled function a spec, shared by every test of the folder."""

import jax
import pytest

from lowbit_jax.numerics import dequantize, quantize, quantize_values


@pytest.fixture(scope="session")
def run():
    """`run(x, spec, key=None) -> (QTensor, dequantized, values, units)`, jitted."""

    def everything(x, spec, key=None):
        q = quantize(x, spec, key=key)
        return q, dequantize(q), *quantize_values(x, spec, key=key)

    return jax.jit(everything, static_argnums=1)

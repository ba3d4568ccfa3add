"""Solvers on a GPU leave what they leave on a CPU, up to float32 sums in another order."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.numerics import INT4, MXFP4, NVFP4, QTensor, dequantize
from lowbit_jax.ptq.elsa import ElsaSettings
from lowbit_jax.ptq.gptq import gptq
from lowbit_jax.ptq.magnitude import magnitude
from lowbit_jax.ptq.microscaled import mr_gptq
from lowbit_jax.ptq.rtn import rtn
from lowbit_jax.ptq.sparsegpt import sparsegpt
from lowbit_jax.ptq.wanda import wanda
from lowbit_jax.ptq.wush import wush_quantize
from lowbit_jax.sparsity import NM, Unstructured

pytestmark = pytest.mark.gpu
INT4_32 = dataclasses.replace(INT4, block_size=32)
HALF = Unstructured(0.5)
SOLVERS = {
    "rtn": functools.partial(rtn, spec=MXFP4),
    "gptq act-order": functools.partial(gptq, spec=INT4_32, order="activation"),
    "gptq min-pivot": functools.partial(gptq, spec=INT4_32, order="min_pivot"),
    "mr_gptq mxfp4": functools.partial(mr_gptq, spec=MXFP4),
    "mr_gptq nvfp4": functools.partial(mr_gptq, spec=NVFP4),
    "wush": functools.partial(wush_quantize, spec=MXFP4),
    "wush 128": functools.partial(wush_quantize, spec=dataclasses.replace(INT4, block_size=128)),
    "wush nvfp4": functools.partial(wush_quantize, spec=NVFP4, solver="rtn"),
    "sparsegpt": functools.partial(sparsegpt, pattern=HALF),
    "sparsegpt 2:4": functools.partial(sparsegpt, pattern=NM(2, 4), spec=INT4_32),
    "wanda": functools.partial(wanda, pattern=HALF, per="row"),
    "magnitude": functools.partial(magnitude, pattern=HALF),
}


def on(kind, fn, *args):
    device = jax.devices(kind)[0]
    with jax.default_device(device):
        return jax.tree.map(np.asarray, fn(*jax.device_put(args, device)))


@functools.cache
def layer():
    """Weights `(256, 512)` and the Hessian of correlated inputs of unlike channels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2048, 64)) @ rng.normal(size=(64, 512)) / 8
    x = (x + 0.5 * rng.normal(size=(2048, 512))) * np.exp(0.5 * rng.normal(size=512))
    w = rng.normal(size=(256, 512))
    return w.astype(np.float32), (x.T @ x / 2048).astype(np.float32)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_loses_as_much_on_a_gpu(name):
    (cpu, of_cpu), (gpu, of_gpu) = (on(kind, SOLVERS[name], *layer()) for kind in ("cpu", "gpu"))
    assert 0 < of_cpu.error < 0.5
    # A rounding that turns over changes what follows it: other codes, of the same quality.
    np.testing.assert_allclose(of_gpu.error, of_cpu.error, rtol=0.01)
    np.testing.assert_array_equal(of_gpu.failures, of_cpu.failures)
    if name == "rtn":
        np.testing.assert_array_equal(gpu.codes, cpu.codes)
    values = [np.asarray(dequantize(jax.tree.map(jnp.asarray, q))) if isinstance(q, QTensor) else q
              for q in (cpu, gpu)]  # fmt: skip
    if name in ("wanda", "magnitude"):
        np.testing.assert_array_equal(*values)
    if name == "sparsegpt 2:4":
        zeros = (values[1].reshape(256, -1, 4) == 0).sum(-1)
        assert (zeros >= 2).all()


def test_elsa_reaches_the_same_loss():
    w, h = layer()
    target = w @ h

    def run(h, target):
        optimizer = ElsaSettings(HALF, steps=20, interval=5, learning_rate=0.02).optimizer()

        def loss(w):
            return jnp.mean(jnp.square(w["w"] @ h - target))

        def step(carry, _):
            w, state = carry
            value, gradient = jax.value_and_grad(loss)(w)
            updates, state = optimizer.update(gradient, state, w)
            return (jax.tree.map(jnp.add, w, updates), state), value

        start = {"w": jnp.zeros_like(target)}
        return jax.lax.scan(step, (start, optimizer.init(start)), None, 20)[1]

    with jax.default_matmul_precision("highest"):
        losses = [on(kind, jax.jit(run), h, target) for kind in ("cpu", "gpu")]
    assert losses[0][-1] < 0.9 * losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)

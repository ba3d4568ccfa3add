"""Evaluation through the kernel: which models it takes, and that it is taken."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from lowbit_jax.models import Llama, LlamaConfig
from lowbit_jax.models.llama import QUANTIZABLE_PATHS
from lowbit_jax.numerics import FP8_E4M3, MXFP4, NVFP4, quantize_matrices
from lowbit_jax.ops import CodedWeight, explain
from lowbit_jax.ptq.products import describe_products, kernel_obstacle, through_kernel
from pallas_kernels.compat import mosaic_obstacle

pytestmark = pytest.mark.skipif(mosaic_obstacle() is not None, reason=str(mosaic_obstacle()))
CONFIG = LlamaConfig(48, 128, 2, 2, d_ff=256)


def abstract(spec, config=CONFIG, **fields):
    """Shapes of a model of codes."""

    def made():
        params = Llama(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        flat, treedef = jax.tree.flatten_with_path(nn.meta.unbox(params))
        return treedef.unflatten(
            CodedWeight(quantize_matrices(leaf, spec), **fields)
            if "/".join(part.key for part in path) in QUANTIZABLE_PATHS
            else leaf
            for path, leaf in flat
        )

    return Llama(config), jax.eval_shape(made)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr("lowbit_jax.ops.dispatch.cuda_capability", lambda: (9, 0))


@pytest.mark.parametrize("spec", [MXFP4, NVFP4], ids=str)
def test_all_products_of_codes_go_through_the_kernel(hopper, spec):
    model, params = abstract(spec)
    assert kernel_obstacle(model, params) is None
    chosen = Llama(dataclasses.replace(model.config, implementation="mixed_matmul"))
    packed = jax.eval_shape(lambda params: through_kernel(model, params)[1], params)
    said = describe_products(chosen, packed, 100, 2)
    assert said == "mixed_matmul (asked for by name)"
    rows = explain(
        lambda p: chosen.apply({"params": p}, jnp.zeros((2, 100), jnp.int32)), packed
    ).rows
    # Seven matrices in each of two layers, 200 rows, 64 at a time.
    assert sum(row.count for row in rows) == 7 * 2 * 4


@pytest.mark.parametrize(
    ("spec", "changed", "fields", "said"),
    [
        (MXFP4, {"d_ff": 192}, {}, "multiple of"),
        (MXFP4, {"dtype": "float32"}, {}, "x must be bfloat16"),
        (FP8_E4M3, {}, {}, "weights must be E2M1"),
        (MXFP4, {}, {"activations": MXFP4}, "inputs are quantized"),
    ],
)
def test_what_the_kernel_does_not_cover_is_said(hopper, spec, changed, fields, said):
    model, params = abstract(spec, dataclasses.replace(CONFIG, **changed), **fields)
    assert said in kernel_obstacle(model, params)
    assert "mixed_matmul (asked" not in describe_products(model, params, 100, 1)


def test_without_such_a_gpu_or_codes_there_is_an_obstacle():
    model, params = abstract(MXFP4)
    assert "CUDA" in kernel_obstacle(model, params)
    assert describe_products(model, params, 100, 1).startswith("dequantize (not mixed_matmul")
    floats = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert kernel_obstacle(model, floats) == "no weights of codes"
    assert describe_products(model, floats, 100, 1) == ""

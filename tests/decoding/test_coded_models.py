"""Text from a model whose matrices are codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowbit_jax.decoding import generate
from lowbit_jax.models import Llama, LlamaConfig
from lowbit_jax.numerics import MXFP4, QTensor
from lowbit_jax.ops import CodedWeight, explain, map_coded, pack_weights
from lowbit_jax.rotations import Hadamard
from pallas_kernels.compat import kernel_names, lower_for_hopper, mosaic_obstacle

CONFIG = LlamaConfig(48, 128, 2, 2, d_ff=256, dtype="float32", qkv_bias=True)
HALF = LlamaConfig(48, 128, 2, 2, d_ff=256, qkv_bias=True)
PROMPT = np.array([[1, 2, 3, 4]])


def apply_of(config, params, tokens):
    return Llama(config).apply({"params": params}, tokens)


@pytest.fixture(scope="module")
def params():
    """Random parameters; matrices are random codes, of inputs after a Hadamard transform."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if "_proj" in jax.tree_util.keystr(path) and leaf.ndim == 3:
            *rows, k = leaf.shape
            codes = rng.integers(0, 256, (*rows, k // 2), np.uint8)
            scales = rng.integers(120, 124, (*rows, k // 32), np.uint8)
            q = QTensor(codes, scales, None, MXFP4)
            return CodedWeight(q, rotation=Hadamard(32))
        is_norm = "scale" in jax.tree_util.keystr(path)
        return (1 if is_norm else 0) + 0.3 * rng.standard_normal(leaf.shape, np.float32)

    tokens = jax.ShapeDtypeStruct((1, 4), np.int32)
    shapes = jax.eval_shape(Llama(CONFIG).init, jax.random.key(0), tokens)["params"]
    return jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(shapes))


def test_the_tokens_are_those_of_the_weights_that_the_codes_stand_for(params):
    fn = functools.partial(apply_of, CONFIG)
    floats = jax.jit(functools.partial(map_coded, CodedWeight.dequantized))(params)
    kwargs = {"steps": 8, "temperature": 0.0, "window": 6}
    # Where there is no GPU, packed codes are unpacked.
    found = generate(fn, pack_weights(params), PROMPT, **kwargs)
    assert len(set(np.asarray(found)[0, 4:].tolist())) > 2
    # Exact, unless two logits are as close as float32 sums: with this seed none are.
    np.testing.assert_array_equal(found, generate(fn, floats, PROMPT, **kwargs))


@pytest.mark.skipif(mosaic_obstacle() is not None, reason=str(mosaic_obstacle()))
def test_few_tokens_go_through_the_kernel_and_many_do_not(params, monkeypatch):
    monkeypatch.setattr("lowbit_jax.ops.dispatch.cuda_capability", lambda: (9, 0))
    packed = jax.eval_shape(pack_weights, params)

    def step(params, tokens, config=HALF):
        fn = functools.partial(apply_of, config)
        return generate(fn, params, tokens, steps=2, temperature=0.0)

    tokens = jax.ShapeDtypeStruct((1, 6), jnp.int32)
    rows = explain(step, packed, tokens).rows
    assert {(row.path, row.a_shape[0]) for row in rows} == {("mixed_matmul", 8)}
    assert {row.where.split("/")[-1] for row in rows} >= {"q_proj", "up_proj"}
    assert kernel_names(lower_for_hopper(step, packed, tokens)) == ["lowbit_mixed_matmul"]
    tokens = jax.ShapeDtypeStruct((8, 6), jnp.int32)
    assert {row.path for row in explain(step, packed, tokens).rows} == {"dequantize"}
    by_name = LlamaConfig(48, 128, 2, 2, d_ff=256, qkv_bias=True, implementation="mixed_matmul")
    named = functools.partial(step, config=by_name)
    assert {row.path for row in explain(named, packed, tokens).rows} == {"mixed_matmul"}
    rows = explain(named, packed, jax.ShapeDtypeStruct((16, 6), jnp.int32)).rows
    assert {(row.path, row.a_shape[0]) for row in rows} == {("mixed_matmul", 64)}

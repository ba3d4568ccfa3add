"""Methods by name: the model that they leave computes what their codes say."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowbit_jax.models import Llama, LlamaConfig
from lowbit_jax.numerics import dequantize, quantize
from lowbit_jax.numerics.presets import INT4, MXFP4, NVFP4
from lowbit_jax.ops.recipes import get_recipe
from lowbit_jax.ptq.calibrate import compress_blocks
from lowbit_jax.ptq.methods import (
    Method,
    activation_rules,
    bits_per_weight,
    compression_of,
    quantized_params,
)
from lowbit_jax.rotations import Hadamard

MODEL = Llama(LlamaConfig(48, 64, 2, 2, d_ff=128, dtype="float32"))
BATCHES = [np.random.default_rng(i).integers(0, 48, (4, 32), np.int32) for i in range(2)]
INT4_32 = dataclasses.replace(INT4, block_size=32)


@pytest.fixture(scope="module")
def params():
    init = jax.jit(MODEL.init)(jax.random.key(0), BATCHES[0])["params"]
    return jax.tree.map(lambda x: 5 * np.asarray(x), nn.meta.unbox(init))


@pytest.fixture(scope="module")
def compressed(params):
    """Blocks of a method, made once."""
    found = {}

    def of(method):
        if method not in found:
            found[method] = list(compress_blocks(MODEL, params, BATCHES, compression_of(method)))
        return found[method]

    return of


def test_rtn_is_quantization_of_every_matrix(params, compressed):
    method = Method("rtn", MXFP4)
    blocks = compressed(method)
    after = quantized_params(params, blocks, compression_of(method))
    for part, name in (("attention", "k_proj"), ("mlp", "down_proj")):
        for index in range(2):
            w = params["layers"][part][name]["weight"][index]
            expected = dequantize(quantize(w, MXFP4))
            chex.assert_trees_all_equal(after["layers"][part][name]["weight"][index], expected)
    chex.assert_trees_all_equal(after["embedding"], params["embedding"])
    assert bits_per_weight(blocks) == 4 + 8 / 32


@pytest.mark.parametrize("rotation", [None, 32])
def test_what_the_model_multiplies_by_are_the_codes_of_rotated_inputs(params, compressed, rotation):
    method = Method("gptq", INT4_32, rotation=rotation)
    kept = compressed(method)[0].kept["mlp/up_proj"]
    w = compression_of(method).weight("mlp/up_proj", kept)
    x = jax.random.normal(jax.random.key(0), (8, 64))
    turned = x if rotation is None else Hadamard(rotation).apply(x)
    codes = dequantize(jax.tree.map(jnp.asarray, kept))
    # Bound: 64 products in float32, rotated in another order.
    chex.assert_trees_all_close(x @ w.T, turned @ codes.T, rtol=0, atol=1e-4)


def test_solvers_lower_the_error_of_the_outputs(compressed):
    def errors(method):
        return np.array([r.error for block in compressed(method) for r in block.reports])

    nearest = errors(Method("rtn", INT4_32))
    solved = errors(Method("gptq", INT4_32))
    # The first block has the same inputs under both.
    assert (solved[:7] < nearest[:7]).all()
    assert solved.mean() < 0.8 * nearest.mean()
    rotated = errors(Method("mr_gptq", MXFP4))
    assert rotated[:7].mean() < errors(Method("rtn", MXFP4))[:7].mean()


@pytest.mark.parametrize("solver", ["wush", "wush_rtn"])
def test_wush_keeps_its_transforms_and_counts_them(compressed, solver):
    method = Method(solver, MXFP4)
    blocks = compressed(method)
    q, transform = blocks[0].kept["attention/o_proj"]
    w = compression_of(method).weight("attention/o_proj", (q, transform))
    x = jax.random.normal(jax.random.key(0), (8, 64))
    expected = transform.apply(x) @ dequantize(jax.tree.map(jnp.asarray, q)).T
    # Bound: 64 products in float32, of a transform whose condition is below a hundred.
    chex.assert_trees_all_close(x @ w.T, expected, rtol=0, atol=1e-3)
    assert bits_per_weight(blocks) > 4.25


def test_activations_are_quantized_in_the_basis_of_the_weights():
    assert activation_rules(Method("rtn", NVFP4)) == ()
    ((_, recipe),) = activation_rules(Method("mr_gptq", MXFP4, activations=MXFP4))
    assert recipe.y_x == MXFP4
    assert recipe.y_w is None
    assert recipe.rotation == Hadamard(32)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"solver": "awq"}, "solver must be one of rtn, gptq"),
        ({"solver": "wush", "rotation": 32}, "leave both None"),
        ({"solver": "wush", "activations": MXFP4}, "leave both None"),
        ({"activations": get_recipe("quartet").dx_g}, "round to nearest"),
    ],
)
def test_impossible_methods_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Method(**{"solver": "rtn", "spec": MXFP4, **fields})

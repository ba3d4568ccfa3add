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
from lowbit_jax.numerics.scales import calibrated_global_scale
from lowbit_jax.ops import CodedWeight, coded_dot, map_coded
from lowbit_jax.ops.recipes import get_recipe
from lowbit_jax.ptq.calibrate import compress_blocks
from lowbit_jax.ptq.methods import (
    Method,
    activation_rules,
    bits_per_weight,
    calibration_model,
    compression_of,
    quantized_model,
    quantized_params,
    with_activations,
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
            model, compression = calibration_model(MODEL, method), compression_of(method)
            found[method] = list(compress_blocks(model, params, BATCHES, compression))
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


@jax.jit
def logits(params):
    return MODEL.apply({"params": params}, BATCHES[0])


def float_params(coded):
    return map_coded(CodedWeight.dequantized, coded)


@pytest.mark.parametrize("solver", ["mr_gptq", "wush_rtn"])
def test_codes_give_the_logits_of_their_weights_in_the_original_basis(params, compressed, solver):
    method = Method(solver, MXFP4)
    model, coded = quantized_model(MODEL, params, compressed(method), method)
    assert model == MODEL
    expected = logits(jax.jit(float_params)(coded))
    # Bound: two layers of products below 100 in float32, transforms of condition below a hundred.
    chex.assert_trees_all_close(logits(coded), expected, rtol=0, atol=5e-3)
    assert float(jnp.std(expected)) > 0.5
    after = quantized_params(params, compressed(method), compression_of(method))
    chex.assert_trees_all_close(jax.jit(float_params)(coded), after, rtol=0, atol=1e-5)
    # Codes, scales and transforms, and no matrix in float32.
    matrices = sum(leaf.nbytes for leaf in jax.tree.leaves(coded["layers"]))
    assert 8 * matrices < 9 * bits_per_weight(compressed(method)) * 2 * (4 * 64**2 + 3 * 64 * 128)


def test_quantized_inputs_of_codes_are_those_of_the_recipes(params, compressed):
    method = Method("mr_gptq", MXFP4, activations=MXFP4)
    blocks = compressed(method)
    _, coded = quantized_model(MODEL, params, blocks, method)
    recipes = Llama(dataclasses.replace(MODEL.config, recipe_rules=activation_rules(method)))
    floats = quantized_params(params, blocks, compression_of(method))
    expected = jax.jit(lambda p: recipes.apply({"params": p}, BATCHES[0]))(floats)
    found = logits(coded)
    # Statistical: of some 10^5 inputs one or two lie within float32 errors of a boundary and are
    # rounded the other way; what depends on them are tokens of one or two of the four sequences.
    difference = np.abs(found - expected) / float(jnp.std(expected))
    assert np.quantile(difference, 0.5) < 1e-5
    plain = logits(jax.tree.map(jnp.asarray, with_activations(coded, None)))
    assert np.quantile(np.abs(plain - expected) / float(jnp.std(expected)), 0.5) > 1e-2


@pytest.mark.parametrize("rotation", [None, 16])
def test_inputs_in_nvfp4_get_the_global_scale_of_the_calibration(params, compressed, rotation):
    method = Method("rtn", NVFP4, activations=NVFP4, rotation=rotation)
    blocks = compressed(method)
    _, coded = quantized_model(MODEL, params, blocks, method)
    for part, name in (("attention", "q_proj"), ("mlp", "down_proj")):
        weight = coded["layers"][part][name]["weight"]
        absmax = [block.input_absmax[f"{part}/{name}"] for block in blocks]
        expected = [calibrated_global_scale(value, NVFP4) for value in absmax]
        np.testing.assert_array_equal(weight.input_global_scale, expected)
    one, two = (np.asarray(logits_of(coded, BATCHES[0][:n])) for n in (1, 4))
    # Bound: float32 sums of other shapes, a few of which move an input over a boundary; the abs-max
    # of a batch would move them all, see below.
    spread = float(np.std(two))
    assert np.quantile(np.abs(one[0] - two[0]), 0.5) < 1e-5 * spread
    batchwise = jax.tree.map(jnp.asarray, map_coded(without_scale, coded))
    one, two = (np.asarray(logits_of(batchwise, BATCHES[0][:n])) for n in (1, 4))
    assert np.quantile(np.abs(one[0] - two[0]), 0.5) > 1e-4 * spread
    assert with_activations(coded, MXFP4)["layers"]["mlp"]["up_proj"]["weight"].activations == MXFP4


def without_scale(w):
    return dataclasses.replace(w, input_global_scale=None)


@jax.jit
def logits_of(params, tokens):
    return MODEL.apply({"params": params}, tokens)


def test_wush_rounds_inputs_in_its_own_basis_while_it_is_calibrated(params, compressed):
    method = Method("wush_rtn", MXFP4, activations=MXFP4)
    blocks, plain = compressed(method), compressed(Method("wush_rtn", MXFP4))
    # Exact: the first block gets inputs that nothing has rounded yet; the second one's are rounded.
    chex.assert_trees_all_equal(blocks[0].kept, plain[0].kept)
    assert [r.error for r in blocks[1].reports] != [r.error for r in plain[1].reports]
    _, coded = quantized_model(MODEL, params, blocks, method)
    x = jax.random.normal(jax.random.key(0), (8, 64))
    up = coded["layers"]["mlp"]["up_proj"]["weight"]
    w = jax.tree.map(lambda leaf: jnp.asarray(leaf[1]), up)
    rounded = dequantize(quantize(w.transform.apply(x), MXFP4))
    # Bound: 64 products below 10 in float32.
    expected = rounded @ dequantize(w.quantized).T
    chex.assert_trees_all_close(jax.jit(coded_dot)(x, w), expected, rtol=0, atol=1e-3)


def test_other_parameters_of_a_method_compile_nothing(params, compressed):
    traced = []

    @jax.jit
    def traced_logits(params):
        traced.append(1)
        return MODEL.apply({"params": params}, BATCHES[0])

    for solver in ("rtn", "gptq"):
        method = Method(solver, INT4_32)
        _, coded = quantized_model(MODEL, params, compressed(method), method)
        traced_logits(coded)
    assert len(traced) == 1


def test_models_of_codes_refuse_what_would_be_ignored(params, compressed):
    method = Method("rtn", MXFP4)
    with pytest.raises(ValueError, match="needs a block for each of 2 layers, got 1"):
        quantized_model(MODEL, params, compressed(method)[:1], method)
    _, coded = quantized_model(MODEL, params, compressed(method), method)
    ruled = calibration_model(MODEL, Method("rtn", MXFP4, activations=MXFP4))
    with pytest.raises(ValueError, match="codes are multiplied without a recipe"):
        jax.eval_shape(lambda p: ruled.apply({"params": p}, BATCHES[0]), coded)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"solver": "awq"}, "solver must be one of rtn, gptq"),
        ({"solver": "wush", "rotation": 32}, "leave it None"),
        ({"activations": get_recipe("quartet").dx_g}, "round to nearest"),
    ],
)
def test_impossible_methods_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Method(**{"solver": "rtn", "spec": MXFP4, **fields})

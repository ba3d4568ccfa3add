"""A weight of codes says what its arrays stand for, packed or not, one or stacked."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.numerics import MXFP4, NVFP4, dequantize, quantize, quantize_matrices
from lowbit_jax.ops import CodedWeight, get_recipe, map_coded, pack_weights
from lowbit_jax.rotations import Hadamard
from lowbit_jax.rotations.wush import BlockTransform

W = jax.random.normal(jax.random.key(0), (2, 64, 128))
quantized = jax.jit(quantize_matrices, static_argnums=1)
dequantized = jax.jit(CodedWeight.dequantized)
multiplied = jax.jit(lambda x, w: w.apply(x) @ dequantize(w.quantized).T)


def transform(layers=()):
    """Far from orthogonal, well conditioned."""
    noise = np.random.default_rng(1).standard_normal((*layers, 4, 32, 32), np.float32)
    return BlockTransform(jnp.asarray(2 * np.eye(32, dtype=np.float32) + 0.1 * noise))


@pytest.mark.parametrize("spec", [MXFP4, NVFP4], ids=str)
def test_a_stack_stands_for_its_matrices_packed_and_not(spec):
    stack = CodedWeight(quantized(W, spec))
    assert stack.shape == W.shape
    packed = jax.jit(CodedWeight.packed)(stack)
    assert packed.is_packed
    assert packed.shape == W.shape
    assert packed.spec == spec
    # Exact: the same codes.
    chex.assert_trees_all_equal(jax.jit(CodedWeight.codes)(packed), stack.quantized)
    expected = jax.jit(lambda w: dequantize(quantize(w, spec)))
    whole = dequantized(packed)
    for index in range(2):
        one = jax.tree.map(lambda leaf, i=index: leaf[i], packed)
        assert one.shape == (64, 128)
        chex.assert_trees_all_equal(whole[index], expected(W[index]))
        chex.assert_trees_all_equal(dequantized(one), whole[index])
    # Of the scales of E8M0 the kernel keeps a reference a row, two bytes.
    assert stack.nbytes <= packed.nbytes <= stack.nbytes + 2 * 64 * 2


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="as compiled for a CPU")
def test_a_stack_is_packed_and_unpacked_in_the_memory_of_one_matrix():
    pack, unpack = jax.jit(CodedWeight.packed), jax.jit(CodedWeight.codes)
    stack = jax.eval_shape(lambda: CodedWeight(quantize_matrices(jnp.zeros((4, 256, 512)), MXFP4)))
    for convert, given in ((pack, stack), (unpack, jax.eval_shape(pack, stack))):
        # Bound: a byte for each code of one matrix, and less than that again for its scales.
        memory = convert.lower(given).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 2 * 256 * 512


def test_the_original_basis_is_that_of_inputs_before_the_transform():
    x = jax.random.normal(jax.random.key(2), (3, 128))
    q = quantized(W, MXFP4)
    for options in ({"rotation": Hadamard(64)}, {"transform": transform((2,))}):
        stack = CodedWeight(q, **options)
        whole = dequantized(stack)
        for index in range(2):
            one = jax.tree.map(lambda leaf, i=index: leaf[i], stack)
            expected = multiplied(x, one)
            # Bound: 128 products below 10 in float32, and a transform of condition below 4.
            chex.assert_trees_all_close(x @ whole[index].T, expected, rtol=0, atol=2e-3)


def test_weights_of_a_tree_are_packed_and_the_rest_is_not_touched():
    q = quantized(W, MXFP4)
    tree = {"a": CodedWeight(q, rotation=Hadamard(32)), "b": np.ones(3)}
    packed = pack_weights(tree)
    assert packed["a"].is_packed
    assert packed["a"].rotation == Hadamard(32)
    assert packed["b"] is tree["b"]
    assert pack_weights(packed)["a"].is_packed
    with pytest.raises(ValueError, match="must hold a CodedWeight, got none"):
        map_coded(lambda w: w, {"b": np.ones(3)})
    ragged = CodedWeight(quantized(W[:, :63], MXFP4))
    with pytest.raises(NotImplementedError, match="rows must be a multiple of 64"):
        pack_weights({"a": ragged})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"transform": transform(), "rotation": Hadamard(32)}, "one transform"),
        ({"rotation": Hadamard(32, randomized=True)}, "nothing random"),
        ({"activations": get_recipe("quartet").dx_g}, "nothing random"),
    ],
)
def test_what_cannot_be_applied_to_every_input_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        CodedWeight(quantize(W[0], MXFP4), **fields)

import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.numerics import QuantSpec, integer
from lowbit_jax.ptq.entropy_coded import hptq, huffman_bits
from lowbit_jax.ptq.gptq import gptq
from lowbit_jax.ptq.hessian import layer_error
from lowbit_jax.ptq.rtn import rtn

SIZE, TOKENS = 256, 2048


def layer(seed):
    """Inputs of low rank plus noise, whose channels differ in scale, and Laplace weights."""
    rng = np.random.default_rng(seed)
    rank = SIZE // 8
    x = rng.standard_normal((TOKENS, rank)) @ rng.standard_normal((rank, SIZE)) / rank**0.5
    x = (x + 0.5 * rng.standard_normal((TOKENS, SIZE))) * np.exp(0.8 * rng.standard_normal(SIZE))
    w = rng.laplace(size=(SIZE, SIZE)) / np.sqrt(2 * SIZE)
    return jnp.asarray(w, jnp.float32), jnp.asarray(x.T @ x / TOKENS, jnp.float32)


def test_layer_errors_are_those_of_an_independent_implementation():
    w, matrix = layer(0)
    for bits, expected, expected_nearest in [(3.125, 0.0037, 0.0179), (4.125, 0.00085, 0.0043)]:
        coded, info = hptq(w, matrix, bits)
        # Bound: bisected to 1e-5 of the scale; the average length moves by its logarithm.
        assert bits - 0.01 < huffman_bits(coded.integers) <= bits
        # Statistical: two seeds there differed by 10 %.
        np.testing.assert_allclose(info.error, expected, rtol=0.15)
        nearest, _ = hptq(w, jnp.eye(SIZE), bits)
        error = layer_error(w, nearest.integers * nearest.scale, matrix)
        np.testing.assert_allclose(error, expected_nearest, rtol=0.15)
        np.testing.assert_array_equal(  # Exact: no error is passed on.
            nearest.integers, np.round(np.asarray(w) / np.asarray(nearest.scale))
        )


@pytest.mark.parametrize(("bits", "nearest", "solved"), [(3, 0.131, 0.026), (4, 0.0265, 0.00515)])
def test_a_code_loses_a_fifth_of_what_clipped_integers_of_as_many_bits_lose(bits, nearest, solved):
    w, matrix = layer(0)
    spec = QuantSpec(integer(bits), 128)  # with its scales bits + 1/8
    found = [float(solve(w, matrix, spec)[1].error) for solve in (rtn, gptq)]
    # Statistical: as above.
    np.testing.assert_allclose(found, (nearest, solved), rtol=0.15)
    _, info = hptq(w, matrix, bits + 1 / 8)
    assert float(info.error) < 0.2 * found[1] < 0.2 * found[0]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([5], 1), ([3, 1], 1), ([4, 2, 1, 1], 1.75), ([1] * 8, 3), ([2, 1, 1], 1.5)],
)
def test_huffman_bits_of_known_codes(counts, expected):
    integers = np.repeat(np.arange(len(counts)) - 2, counts)
    assert huffman_bits(jnp.asarray(integers)) == expected  # Exact: small integers.


def test_huffman_bits_lie_within_a_bit_of_the_entropy():
    integers = np.random.default_rng(0).geometric(0.3, 4096)
    p = np.unique(integers, return_counts=True)[1] / integers.size
    entropy = -np.sum(p * np.log2(p))
    assert entropy <= huffman_bits(jnp.asarray(integers)) < entropy + 1  # Bound: Huffman's.


def test_too_few_bits_and_broken_hessians_are_refused():
    w, matrix = layer(1)
    with pytest.raises(ValueError, match="hptq: a Huffman code takes at least 1 bit"):
        hptq(w, matrix, 0.5)
    with pytest.raises(ValueError, match="hptq: weights and Hessian must be finite"):
        hptq(w, matrix.at[0, 0].set(jnp.nan), 3.0)


@pytest.mark.parametrize("bits", [1.0, 1.05, 1.5])
def test_few_bits_suffice_where_errors_grow_beyond_the_weights(bits):
    # Inputs of rank two: what columns hand on is larger than any weight.
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 2)) @ rng.standard_normal((2, 64))
    x += 1e-2 * rng.standard_normal((256, 64))
    w = jnp.asarray(rng.standard_normal((32, 64)), jnp.float32)
    coded, _ = hptq(w, jnp.asarray(x.T @ x / 256, jnp.float32), bits)
    assert huffman_bits(coded.integers) <= bits

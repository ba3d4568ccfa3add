import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from lowbit_jax.rotations import Hadamard, Rotation, hadamard_matrix, hadamard_transform

SIZES = [16, 32, 64, 128, 256, 512]


def test_matrix_is_sylvesters():
    for n in [2, 4, *SIZES]:
        matrix = hadamard_matrix(n)
        assert matrix.dtype == np.int8
        np.testing.assert_array_equal(matrix, scipy.linalg.hadamard(n))  # Exact.


@pytest.mark.parametrize("method", ["matrix", "butterfly"])
@pytest.mark.parametrize("n", SIZES)
def test_transform_is_orthogonal(n, method):
    transform = jax.jit(lambda x: hadamard_transform(x, n, method))
    once = np.asarray(transform(jnp.eye(n)), np.float64)
    # Bound: each entry is 1/sqrt(n) with at most 2^-24 relative rounding, which counts twice.
    assert np.max(np.abs(once @ once.T - np.eye(n))) < 2e-7
    # Exact: one product of +-1 with the rounded 1/sqrt(n).
    expected = scipy.linalg.hadamard(n).astype(np.float32) * np.float32(1 / n**0.5)
    np.testing.assert_array_equal(once, expected)
    # Bound: as above, and the second transform adds n terms of 1/n in sequence, each sum rounding
    # by 2^-24 relative to at most 1; butterflies add them in log2(n) rounds.
    additions = n if method == "matrix" else np.log2(n)
    assert np.max(np.abs(transform(jnp.float32(once)) - np.eye(n))) < (additions + 4) * 2**-24


@pytest.mark.parametrize("n", [2, 128])
def test_butterflies_equal_the_matrix(n):
    # Multiples of 2^-7 up to 4: sums of 128 need 7 + 10 bits, so float32 holds each exactly.
    x = jax.random.randint(jax.random.key(n), (3, 2, 2 * n), -512, 513) / 128
    matrix, butterfly = (
        jax.jit(hadamard_transform, static_argnums=(1, 2))(x, n, method)
        for method in ("matrix", "butterfly")
    )
    np.testing.assert_array_equal(matrix, butterfly)  # Exact: no sum rounds.
    expected = np.asarray(x, np.float64).reshape(3, 2, 2, n) @ scipy.linalg.hadamard(n)
    expected = (expected / n**0.5).reshape(x.shape)
    # Bound: the scale and the product with it round once each, 2^-24 relative.
    np.testing.assert_allclose(matrix, expected, rtol=2**-23)


def test_blocks_do_not_mix():
    x = jnp.zeros((1, 64)).at[0, 17].set(1.0)
    rotated = hadamard_transform(x, 16)
    assert jnp.all(rotated[0, 16:32] != 0)
    assert jnp.all(rotated[0, :16] == 0)
    assert jnp.all(rotated[0, 32:] == 0)


def test_a_transposed_matrix_of_one_block_a_row_runs_in_half_precision():
    # XLA on the CPU folds the transposition into a product for which it has no code.
    x = jax.random.normal(jax.random.key(0), (128, 64)).astype(jnp.bfloat16)
    rotated = jax.jit(lambda x: hadamard_transform((2 * x).T, 128))(x)
    wide = jax.jit(lambda x: hadamard_transform(2 * x.T, 128))(x.astype(jnp.float32))
    # Bound: sums of 128 terms in another order.
    np.testing.assert_allclose(rotated, wide, atol=128 * 2**-24 * jnp.abs(wide).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_input_is_rotated_exactly_as_float32(dtype):
    # Multiples of 1/8 up to 16 are exact in both dtypes, and so are their sums in float32.
    x = jax.random.randint(jax.random.key(0), (5, 256), -128, 129) / 8
    half = hadamard_transform(x.astype(dtype), 128)
    chex.assert_type(half, jnp.float32)
    np.testing.assert_array_equal(half, hadamard_transform(x, 128))  # Exact: no sum rounds.
    chex.assert_type(hadamard_transform(x, 128, dtype=dtype), dtype)


@pytest.mark.parametrize("rotation", [Hadamard(16), Hadamard(32, randomized=True)], ids=str)
def test_rotation_keeps_products_and_inverts(rotation):
    assert isinstance(rotation, Rotation)
    x, w = jax.random.normal(jax.random.key(0), (2, 7, 64))
    key = jax.random.key(1)
    apply = jax.jit(lambda x: rotation.apply(x, key=key))
    # Bound: entries are below 4 and each of two transforms makes at most 32 + 2 roundings of
    # sums below 4 sqrt(32): 2 * 34 * 23 * 2^-24 < 1e-4.
    np.testing.assert_allclose(rotation.inverse(apply(x), key=key), x, atol=1e-4)
    # Bound: 64 terms of at most 4 * 4, each operand off by 1e-4 / 2 relative to 4 as above.
    np.testing.assert_allclose(apply(x) @ apply(w).T, x @ w.T, atol=64 * 2 * 4 * 5e-5)
    chex.assert_trees_all_equal(jax.vmap(apply)(x), apply(x))  # Exact: rows are independent.


def test_signs_multiply_the_input():
    rotation, key = Hadamard(16, randomized=True), jax.random.key(3)
    one = jnp.eye(16)  # row i: only coordinate i, so its sign factors out of the whole output row
    ratio = rotation.apply(one, key=key) / hadamard_transform(one, 16)
    assert jnp.all(jnp.abs(ratio) == 1)
    assert jnp.all(ratio == ratio[:, :1])  # one sign an input row, none an output column
    assert len(np.unique(ratio)) == 2


def test_signs_differ_between_keys_and_blocks():
    rotation = Hadamard(16, randomized=True)
    first, second = (rotation.apply(jnp.ones((64,)), key=jax.random.key(i)) for i in range(2))
    assert jnp.any(first != second)
    assert jnp.any(first[:16] != first[16:32])


def test_equal_rotations_hash_alike():
    assert Hadamard(32) == Hadamard(32)
    assert hash(Hadamard(32)) == hash(Hadamard(32))
    assert Hadamard(32) != Hadamard(32, randomized=True)


@pytest.mark.parametrize("size", [0, 1, 3, 48, -16])
def test_bad_block_sizes_are_refused(size):
    with pytest.raises(ValueError, match="power of two"):
        Hadamard(size)
    with pytest.raises(ValueError, match="power of two"):
        hadamard_matrix(size)
    with pytest.raises(ValueError, match="power of two"):
        hadamard_transform(jnp.ones((2, 96)), size)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"multiple of block_size=16, got shape \(2, 40\)"):
        Hadamard(16).apply(jnp.ones((2, 40)))
    with pytest.raises(ValueError, match="multiple of block_size=16"):
        Hadamard(16).inverse(jnp.ones((2, 40)))
    with pytest.raises(ValueError, match="key=None"):
        Hadamard(16, randomized=True).apply(jnp.ones((2, 32)))
    with pytest.raises(ValueError, match="key=None"):
        Hadamard(16, randomized=True).inverse(jnp.ones((2, 32)))
    with pytest.raises(ValueError, match="must be floating point, got int32"):
        Hadamard(16).apply(jnp.ones((2, 32), jnp.int32))


def test_empty_batches_and_numpy_arrays_are_rotated():
    chex.assert_shape(Hadamard(16).apply(jnp.ones((0, 32))), (0, 32))
    x = np.arange(32.0)  # float64
    np.testing.assert_array_equal(Hadamard(16).apply(x), Hadamard(16).apply(jnp.float32(x)))

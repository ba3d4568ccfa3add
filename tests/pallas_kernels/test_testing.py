import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.testing import assert_bitwise_equal


def test_equal_trees_pass_nans_included():
    tree = {"a": jnp.array([1.0, jnp.nan]), "b": jnp.zeros((2, 0), jnp.bfloat16)}
    assert_bitwise_equal(tree, jax.tree.map(np.asarray, tree))


def test_the_first_difference_is_named():
    a = np.zeros((2, 3), np.float32)
    b = a.copy()
    b[1, 2] = 1.0
    with pytest.raises(AssertionError, match=r"\['x'\]: 1 of 6 elements .* at \(1, 2\): 0.0"):
        assert_bitwise_equal({"x": a}, {"x": b})


def test_signed_zeros_differ():
    with pytest.raises(AssertionError, match="1 of 1"):
        assert_bitwise_equal(jnp.array([0.0]), jnp.array([-0.0]))


@pytest.mark.parametrize("other", [np.zeros(2, np.int32), np.zeros(3, np.float32)])
def test_another_dtype_or_shape_is_an_error(other):
    with pytest.raises(AssertionError, match="is not"):
        assert_bitwise_equal(np.zeros(2, np.float32), other)

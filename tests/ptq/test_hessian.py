import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowbit_jax.ptq.hessian import Hessian, add_inputs, damped, empty_hessian, layer_error, merge

K = 8
EPSILON = 2.0**-24  # float32 to nearest

add = jax.jit(add_inputs)


def inputs(tokens, seed=0):
    return np.random.default_rng(seed).standard_normal((tokens, K)).astype(np.float32)


def check_is_mean(hessian, x):
    exact = x.astype(np.float64).T @ x / len(x)
    # Bound: n products, summed, and a product and a sum for each batch of the running mean: no more
    # than 2 n roundings of terms whose absolute values add up to `spread`.
    spread = np.abs(x.astype(np.float64)).T @ np.abs(x) / len(x)
    assert np.all(np.abs(hessian.matrix - exact) <= 2 * len(x) * EPSILON * spread)
    assert hessian.count == len(x)


@hypothesis.given(st.lists(st.sampled_from([1, 3, 16]), min_size=1, max_size=6), st.randoms())
def test_batches_of_any_size_in_any_order_give_the_mean_over_all_tokens(sizes, random):
    x = inputs(sum(sizes))
    batches = np.split(x, np.cumsum(sizes)[:-1])
    random.shuffle(batches)
    hessian = empty_hessian(K)
    for batch in batches:
        hessian = add(hessian, batch)
    check_is_mean(hessian, x)


def test_leading_axes_are_tokens():
    x = inputs(24)
    chex.assert_trees_all_equal(
        add(empty_hessian(K), x.reshape(2, 3, 4, K)), add(empty_hessian(K), x)
    )


def test_merging_what_was_accumulated_apart_gives_the_mean_over_both():
    x = inputs(40)
    parts = [add(empty_hessian(K), part) for part in np.split(x, [10])]
    check_is_mean(merge(*parts), x)
    chex.assert_trees_all_equal(merge(parts[0], empty_hessian(K)), parts[0])  # Exact: times 1.
    both_empty = merge(empty_hessian(K), empty_hessian(K))
    chex.assert_trees_all_equal(both_empty, empty_hessian(K))


def test_half_precision_inputs_count_as_their_upcast():
    x = jnp.asarray(inputs(16), jnp.bfloat16)
    chex.assert_trees_all_equal(  # Exact: products of bfloat16 are taken in float32.
        add(empty_hessian(K), x), add(empty_hessian(K), x.astype(jnp.float32))
    )


def test_inputs_that_are_cut_over_devices_give_the_whole_mean():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    x = inputs(32)
    on_mesh = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    check_is_mean(add(empty_hessian(K), on_mesh), x)


@pytest.mark.parametrize(
    "x", [jnp.zeros((3, K + 1)), jnp.zeros(()), jnp.zeros((3, K), jnp.int32)], ids=repr
)
def test_inputs_of_another_layer_are_refused(x):
    with pytest.raises(ValueError, match=r"add_inputs: x must be floating point"):
        add_inputs(empty_hessian(K), x)


def test_damping_is_relative_and_dead_inputs_get_one():
    matrix = jnp.diag(jnp.array([4.0, 0.0, 8.0, 0.0])).at[0, 2].set(1.0).at[2, 0].set(1.0)
    expected = np.array([[4.25, 0, 1, 0], [0, 1.25, 0, 0], [1, 0, 8.25, 0], [0, 0, 0, 1.25]])
    # Exact: a mean of 3, and a fraction that float32 holds to a quarter.
    np.testing.assert_array_equal(damped(matrix, 0.25 / 3), expected.astype(np.float32))
    np.testing.assert_array_equal(damped(jnp.zeros((3, 3))), np.eye(3))
    np.testing.assert_array_equal(damped(jnp.eye(3) * 5, 0.0), 5 * np.eye(3))


def test_layer_error_is_that_of_the_outputs():
    x, rng = inputs(64), np.random.default_rng(1)
    w, noise = rng.standard_normal((2, 5, K))
    hessian = add(empty_hessian(K), x)
    w_hat = (w + 0.1 * noise).astype(np.float32)
    w = w.astype(np.float32)
    expected = np.sum((x @ (w - w_hat).T) ** 2) / np.sum((x @ w.T) ** 2)
    # Bound: sums of 64 tokens and 8 inputs and 5 outputs; where H was summed, terms cancel by no
    # more than its condition, below 5 here.
    np.testing.assert_allclose(
        layer_error(w, w_hat, hessian.matrix), expected, rtol=5 * (64 + 8 + 5) * 2 * EPSILON
    )
    assert layer_error(w, w, hessian.matrix) == 0
    assert layer_error(0 * w, 0 * w, hessian.matrix) == 0
    assert jnp.isnan(layer_error(w, w_hat * jnp.nan, hessian.matrix))


def test_a_hessian_is_a_pytree_of_float32():
    hessian = jax.eval_shape(add_inputs, empty_hessian(K), inputs(3))
    assert isinstance(hessian, Hessian)
    assert [leaf.dtype for leaf in jax.tree.leaves(hessian)] == [jnp.float32] * 2


def test_errors_of_other_shapes_are_refused():
    w, matrix = jnp.ones((3, 8)), jnp.eye(8)
    for arguments in ((w, w, jnp.eye(4)), (w, w[:2], matrix), (w[0], w[0], matrix)):
        with pytest.raises(ValueError, match=r"layer_error: two matrices \(n, k\)"):
            layer_error(*arguments)

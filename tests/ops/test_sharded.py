"""Layers within `jax.shard_map`: tokens over devices, weights the same on all."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lowbit_jax.ops import dispatch, explain, get_recipe, quantized_dot
from lowbit_jax.parallel import make_mesh
from lowbit_jax.rotations import Hadamard
from pallas_kernels.compat import kernel_names, lower_for_hopper, mosaic_obstacle
from pallas_kernels.testing import run_interpreted

TOKENS = PartitionSpec("data")
# Signs are drawn along the tokens, which are others for each device: here there are none.
RECIPE = dataclasses.replace(get_recipe("quartet_rtn"), backward_rotation=Hadamard(32))

needs_mosaic = pytest.mark.skipif(mosaic_obstacle() is not None, reason=str(mosaic_obstacle()))


def products(x, w, g, implementation=None):
    """The three products of a layer; `shard_map` sums the gradient of the weights."""
    dot = functools.partial(
        quantized_dot, recipe=RECIPE, key=jax.random.key(7), implementation=implementation
    )
    y, pull = jax.vjp(dot, x, w)
    return y, *pull(g)


def sharded(num_devices, implementation=None):
    mesh = jax.make_mesh(
        (num_devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:num_devices]
    )
    return jax.shard_map(
        functools.partial(products, implementation=implementation),
        mesh=mesh,
        in_specs=(TOKENS, PartitionSpec(), TOKENS),
        out_specs=(TOKENS, TOKENS, PartitionSpec()),
    )


def arguments(tokens, n, k):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, k), jnp.bfloat16)
    w = 0.05 * jax.random.normal(keys[1], (n, k))
    return x, w, jax.random.normal(keys[2], (tokens, n), jnp.bfloat16)


def test_gradients_of_tokens_over_devices_are_those_of_one():
    args = arguments(128, 64, 64)
    y, dx, dw = jax.jit(sharded(2))(*args)
    y_expected, dx_expected, dw_expected = jax.jit(products)(*args)
    # Exact: blocks lie in one row, or in 32 tokens of one device.
    np.testing.assert_array_equal(y, y_expected)
    np.testing.assert_array_equal(dx, dx_expected)
    # Bound: sums of 4-bit products are exact in float32; their 32 terms in the transform back, and
    # its result, are rounded in another order.
    norm = np.linalg.norm(dw_expected.reshape(64, 2, 32), axis=-1).max()
    np.testing.assert_allclose(dw, dw_expected, rtol=0, atol=2 * 33 * 2**-24 * norm)


def test_gradients_add_up_where_only_the_key_is_another_on_each_device():
    recipe = get_recipe("quartet:y=bf16")
    x, w, g = arguments(64, 64, 64)

    def gradient(x, w, g, index):
        key = jax.random.fold_in(jax.random.key(0), index)
        _, pull = jax.vjp(lambda w: quantized_dot(x, w, recipe, key=key), w)
        return pull(g)[0]

    def on_each(x, w, g):
        index = jax.lax.axis_index("data")
        return gradient(x, w, jax.lax.pcast(g, "data", to="varying"), index)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    specs = (PartitionSpec(),) * 3
    got = jax.jit(jax.shard_map(on_each, mesh=mesh, in_specs=specs, out_specs=PartitionSpec()))
    first, second = (jax.jit(gradient)(x, w, g, index) for index in range(2))
    assert jnp.any(first != second)
    np.testing.assert_array_equal(got(x, w, g), first + second)  # Exact: a sum of two.


@needs_mosaic
def test_kernels_take_the_shard_of_a_device():
    # The interpreter knows one device.
    args = arguments(64, 64, 64)
    y, dx, dw = run_interpreted(sharded(1), *args)
    y_expected, dx_expected, dw_expected = jax.jit(products)(*args)
    # Exact: sums of so few 4-bit products fit float32, in any order.
    np.testing.assert_array_equal(y, y_expected)
    np.testing.assert_array_equal(dx, dx_expected)
    # Bound: 2**-17 of each of the entries that are rotated back, and float32 sums.
    norm = np.linalg.norm(dw_expected.reshape(64, 2, 32), axis=-1).max()
    np.testing.assert_allclose(dw, dw_expected, rtol=0, atol=2**-16 * norm)


@needs_mosaic
def test_kernels_are_chosen_inside_shard_map_and_not_outside(monkeypatch):
    monkeypatch.setattr(dispatch, "cuda_capability", lambda: (9, 0))
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments(1024, 256, 256)]
    inside = sharded(4)
    assert [row.path for row in explain(inside, *shapes).rows] == ["hopper"] * 3
    names = kernel_names(lower_for_hopper(inside, *shapes))
    assert names == ["lowbit_rotate_quantize", "lowbit_scaled_matmul"]
    on_mesh = NamedSharding(make_mesh(4), PartitionSpec("data"))
    cut = [shape.update(sharding=on_mesh) for shape in shapes]
    for row in explain(products, *cut).rows:
        assert row.path == "dequantize"
        assert "jit may partition products over 4 devices, but no kernels" in row.reason

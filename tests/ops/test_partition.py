"""Layers in programs that `jax.jit` partitions: kernels on the tokens of each device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lowbit_jax.numerics.presets import MXFP4
from lowbit_jax.ops import dispatch, explain, get_recipe, quantized_dot
from lowbit_jax.parallel import make_mesh
from pallas_kernels.compat import kernel_names, lower_for_hopper, mosaic_obstacle
from pallas_kernels.partition import Partition
from pallas_kernels.rotate_quantize import Target, rotate_quantize
from pallas_kernels.rotate_quantize.tuning import Config
from pallas_kernels.testing import parts_in_turn, run_interpreted

needs_mosaic = pytest.mark.skipif(mosaic_obstacle() is not None, reason=str(mosaic_obstacle()))

TOKENS = PartitionSpec(("data", "fsdp"))


def products(x, w, g, recipe, partition=None, implementation=None, seed=7):
    """The three products of a layer."""
    dot = functools.partial(
        quantized_dot, recipe=recipe, key=jax.random.key(seed), partition=partition,
        implementation=implementation,
    )  # fmt: skip
    y, pull = jax.vjp(dot, x, w)
    return y, *pull(g)


def arguments(tokens, n, k):
    keys = jax.random.split(jax.random.key(tokens), 3)
    x = jax.random.normal(keys[0], (tokens, k), jnp.bfloat16)
    w = 0.05 * jax.random.normal(keys[1], (n, k))
    return x, w, jax.random.normal(keys[2], (tokens, n), jnp.bfloat16)


def in_parts(monkeypatch, count):
    """A partition whose parts one device computes, for the interpreter knows one."""
    monkeypatch.setattr(jax, "shard_map", parts_in_turn)
    return Partition(make_mesh(count), ("data",))


@needs_mosaic
@pytest.mark.parametrize(
    ("name", "count", "n", "k", "block"),
    [("quartet", 2, 32, 96, 32), ("quest_w4a4", 2, 40, 128, 128), ("rtn_w4a4", 4, 24, 64, 16)],
)
def test_kernels_on_parts_of_the_tokens_make_the_bits_of_one_device(
    name, count, n, k, block, monkeypatch
):
    # Quartet rounds both operands of dw at random, by bits of places along the tokens, and masks.
    recipe = get_recipe(name)
    x, w, g = arguments(128 * count, n, k)
    layer = functools.partial(products, recipe=recipe)
    partition = in_parts(monkeypatch, count)
    y, dx, dw = run_interpreted(functools.partial(layer, partition=partition), x, w, g)
    reference = jax.jit(functools.partial(layer, implementation="dequantize"))
    # Of QuEST's rows the kernel sums squares in another order than XLA.
    one_device = functools.partial(run_interpreted, layer) if name == "quest_w4a4" else reference
    y_expected, dx_expected, dw_expected = one_device(x, w, g)
    # Exact: sums of so few 4-bit products fit float32, in any order; scales follow from all rows.
    np.testing.assert_array_equal(y, y_expected)
    np.testing.assert_array_equal(dx, dx_expected)
    # Bound: where a kernel rotates the gradient back, 2**-17 of each of the entries of a block of
    # the gradient that one part gives, which the transform makes 2**-17 times the block's norm;
    # twice that for float32 sums. XLA's product of bfloat16 operands rounds float32 sums alone.
    of_part = np.arange(len(x))[:, None] // 128 == np.arange(count)[:, None, None]
    partial = [reference(x, w, g * jnp.asarray(mask, g.dtype))[2] for mask in of_part]
    norms = sum(np.linalg.norm(p.reshape(-1, block), axis=1) for p in partial)
    error = np.abs(np.asarray(dw - dw_expected, np.float64)).reshape(-1, block)
    assert (error <= 2**-16 * norms[:, None]).all()
    if name == "quartet":  # by other random bits it is another
        other = jax.jit(functools.partial(layer, implementation="dequantize", seed=8))(x, w, g)[2]
        assert np.abs(other - dw_expected).mean() > 100 * error.mean()


@needs_mosaic
def test_operands_of_nvfp4_on_parts_of_the_tokens_are_those_of_one_device(monkeypatch):
    # MS-EDEN along the tokens: rotated with random signs, scales rounded by random bits of places,
    # under one scale of all parts. Weights of dyadic numbers rotate exactly in any order.
    recipe = get_recipe("quartet2")
    x, w, g = arguments(256, 128, 32)
    x, w, g = x.at[200, 3].set(40), jnp.round(64 * w) / 64, jnp.round(4 * g) / 4
    layer = functools.partial(products, recipe=recipe, implementation="hopper_bf16")
    expected = run_interpreted(layer, x, w, g)
    partition = in_parts(monkeypatch, 2)
    got = run_interpreted(functools.partial(layer, partition=partition), x, w, g)
    for name, a, b in zip(("y", "dx", "dw"), got, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@needs_mosaic
def test_one_scale_a_tensor_is_that_of_all_parts(monkeypatch):
    recipe = get_recipe("fp8_tensorwise_e4m3")
    x, w, g = arguments(256, 72, 160)
    x, g = x.at[200, 3].set(40), g.at[7, 5].set(30)  # the largest of all in one part each
    layer = functools.partial(products, recipe=recipe, implementation="fp8")
    expected = run_interpreted(layer, x, w, g)
    partition = in_parts(monkeypatch, 2)
    y, dx, dw = run_interpreted(functools.partial(layer, partition=partition), x, w, g)
    # Exact: the same operands; each entry is a sum over k or n by itself.
    np.testing.assert_array_equal(y, expected[0])
    np.testing.assert_array_equal(dx, expected[1])
    # Bound: sums of 256 terms in another order, of numbers rounded to within a quarter.
    terms = np.abs(np.asarray(g, np.float64)).T @ np.abs(np.asarray(x, np.float64))
    assert (np.abs(dw - expected[2]) <= 2 * 256 * 2**-24 * 1.25**2 * terms).all()


def test_tokens_are_cut_over_both_axes_of_a_real_mesh():
    # Operands by XLA, float8 products on the part of each of four devices.
    recipe = get_recipe("fp8_tensorwise_e4m3")
    args = arguments(512, 64, 96)
    layer = functools.partial(products, recipe=recipe, implementation="fp8")
    expected = jax.jit(layer)(*args)
    mesh = make_mesh(2, 2)
    places = [NamedSharding(mesh, spec) for spec in (TOKENS, PartitionSpec(), TOKENS)]
    cut = jax.jit(functools.partial(layer, partition=Partition(mesh, ("data", "fsdp"))))
    got = cut(*map(jax.device_put, args, places))
    x, w, g = (np.abs(np.asarray(z, np.float64)) for z in args)
    for a, b, terms in zip(got, expected, (x @ w.T, g @ w, g.T @ x), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        # Bound: sums of at most 512 terms in another order, of numbers rounded to within a quarter;
        # then a rounding to bfloat16 on either side of a tie, but for dw.
        order = 2 * 512 * 2**-24 * 1.25**2 * terms
        assert np.all(np.abs(a - b) <= order + (a.shape[0] == 512) * 2**-7 * np.abs(b))


@needs_mosaic
@pytest.mark.parametrize(
    ("name", "path"),
    [("quartet", "hopper"), ("fp8_tensorwise", "fp8"), ("quartet2", "hopper_bf16")],
)
def test_plain_jit_on_a_mesh_lowers_to_kernels_for_hopper(name, path, monkeypatch):
    monkeypatch.setattr(dispatch, "cuda_capability", lambda: (9, 0))
    mesh = make_mesh(2, 2)
    layer = functools.partial(
        products, recipe=get_recipe(name), partition=Partition(mesh, ("data", "fsdp"))
    )
    shapes = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
        for a, spec in zip(
            arguments(1024, 256, 384), (TOKENS, PartitionSpec(), TOKENS), strict=True
        )
    ]
    assert [row.path for row in explain(layer, *shapes).rows] == [path] * 3
    module = lower_for_hopper(layer, *shapes)
    names = ["lowbit_rotate_quantize", "lowbit_scaled_matmul"]
    assert kernel_names(module) == names[: 1 + (path == "hopper")]
    assert "256x384xbf16" in module  # x of one device, which a kernel reads


def test_a_partition_that_cannot_be_is_refused():
    mesh = make_mesh(2, 2)
    with pytest.raises(ValueError, match=r"different ones of the mesh .* got \('data', 'data'\)"):
        Partition(mesh, ("data", "data"))
    with pytest.raises(ValueError, match="different ones of the mesh"):
        Partition(mesh, ("model",))
    x = jnp.zeros((320, 64))
    with pytest.raises(ValueError, match=r"each of 2 devices .* multiple of 128 rows, got x of"):
        rotate_quantize(x, Target(MXFP4), None, partition=Partition(mesh, ("data",)))
    partition, config = Partition(mesh, ("data", "fsdp")), Config(tile_m=256)
    with pytest.raises(ValueError, match="each of 4 devices must have whole tiles of 256 rows"):
        rotate_quantize(
            jnp.zeros((512, 64)), Target(MXFP4), None, partition=partition, config=config
        )

"""Layers through the kernels for Hopper, interpreted on the CPU, against the reference path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.ops import (
    QuantizedWeight,
    dispatch,
    explain,
    get_recipe,
    quantize_weight,
    quantized_dot,
)
from pallas_kernels.compat import (
    hopper_obstacle,
    interpreter,
    kernel_names,
    lower_for_hopper,
    mosaic_obstacle,
)
from pallas_kernels.testing import run_interpreted

pytestmark = pytest.mark.skipif(mosaic_obstacle() is not None, reason=str(mosaic_obstacle()))


def arguments(tokens, n, k, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(tokens + n + k), 3)
    x = jax.random.normal(keys[0], (tokens, k), dtype)
    w = 0.05 * jax.random.normal(keys[1], (n, k))
    return x, w, jax.random.normal(keys[2], (tokens, n), dtype)


def products(x, w, g, recipe, implementation=None, once=False):
    """The three products of a layer."""
    if once:
        w = QuantizedWeight(w, quantize_weight(w, recipe))
    dot = functools.partial(
        quantized_dot, recipe=recipe, key=jax.random.key(7), implementation=implementation
    )
    y, pull = jax.vjp(dot, x, w)
    dx, dw = pull(g)
    return y, dx, dw.master if once else dw


def assert_products_agree(got, expected):
    for name, a, b in zip(("y", "dx", "dw"), got, expected, strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if name == "dw":
            # Bound: the float32 gradient is split into two bfloat16 terms to be rotated back, which
            # leaves 2**-17 of each of the 32 or 128 entries of a block. The transform makes
            # 2**-17 times the norm of the block of it, at most; twice that for float32 sums.
            block = 32 if a.shape[1] % 128 else 128
            norms = np.linalg.norm(b.reshape(-1, block), axis=1, keepdims=True)
            assert (np.abs(a - b).reshape(-1, block) <= 2**-16 * norms).all()
        else:
            # Exact: sums of so few 4-bit products fit float32, in any order.
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("quartet", (96, 32, 96)),
        ("quartet_floor_rtn:y=bf16", (64, 32, 64)),
        ("quest_w4a4", (72, 40, 128)),
        ("rtn_w4a4", (9, 24, 64)),
    ],
)
def test_products_and_gradients_are_those_of_the_reference(name, shape):
    recipe = get_recipe(name)
    args = arguments(*shape)
    reference = functools.partial(products, recipe=recipe, implementation="dequantize")
    through_kernels = functools.partial(products, recipe=recipe)
    assert_products_agree(run_interpreted(through_kernels, *args), jax.jit(reference)(*args))
    with interpreter():
        paths = [row.path for row in explain(through_kernels, *args).rows]
    assert paths == {
        "quartet": ["hopper", "hopper", "hopper"],
        "quartet_floor_rtn:y=bf16": ["dequantize", "hopper", "hopper"],
    }.get(name, ["hopper", "dequantize", "dequantize"])


def test_evaluation_takes_any_number_of_tokens_and_makes_nothing_for_a_gradient():
    recipe = get_recipe("quartet_rtn")
    x, w, _ = arguments(2 * 9, 24, 64)
    x = x.reshape(2, 9, 64)

    def forward(x, w, implementation):
        key = jax.random.key(0)
        return quantized_dot(x, w, recipe, key=key, implementation=implementation)

    got = run_interpreted(functools.partial(forward, implementation="hopper"), x, w)
    # Exact: sums of so few 4-bit products fit float32, in any order.
    np.testing.assert_array_equal(got, jax.jit(forward, static_argnums=2)(x, w, "dequantize"))


def test_weights_quantized_in_advance_are_folded_from_their_codes():
    recipe = get_recipe("quartet")
    args = arguments(64, 64, 64)
    got = run_interpreted(functools.partial(products, recipe=recipe, once=True), *args)
    reference = functools.partial(products, recipe=recipe, implementation="dequantize", once=True)
    assert_products_agree(got, jax.jit(reference)(*args))


def test_explain_names_the_shapes_of_the_kernels_products():
    x, w, g = arguments(128, 256, 384)
    with interpreter():
        rows = explain(functools.partial(products, recipe=get_recipe("quartet")), x, w, g).rows
    assert [(row.product, row.a_shape, row.b_shape) for row in rows] == [
        ("y", (128, 384), (256, 384)),
        ("dx", (128, 256), (384, 256)),
        ("dw", (256, 128), (384, 128)),
    ]


def test_kernels_asked_for_by_name_are_refused_where_they_cannot_run():
    x, w, _ = arguments(8, 32, 128)
    with pytest.raises(NotImplementedError, match="no CUDA device"):
        quantized_dot(x, w, get_recipe("quest_w4a4"), implementation="hopper")
    for name, dtype, said in (
        ("quest_w4a16", jnp.bfloat16, "both operands must be quantized"),
        ("quartet2", jnp.bfloat16, "no powers of two"),
        ("quest_w4a4", jnp.float16, "must be bfloat16 or float32, got float16"),
    ):
        with interpreter(), pytest.raises(NotImplementedError, match=said):
            quantized_dot(
                x.astype(dtype), w, get_recipe(name), implementation="hopper", key=jax.random.key(0)
            )


def test_layers_lower_for_hopper_under_scan_and_remat(monkeypatch):
    # The interpreter does not know checkpoints, and no device is needed to lower.
    monkeypatch.setattr(dispatch, "cuda_capability", lambda: (9, 0))
    dot = functools.partial(
        quantized_dot, recipe=get_recipe("quartet"), key=jax.random.key(0), implementation="hopper"
    )

    def loss(x, ws):
        layer = jax.checkpoint(lambda x, w: (dot(x, w), None))
        return jnp.sum(jax.lax.scan(layer, x, ws)[0].astype(jnp.float32))

    x = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16)
    ws = jax.ShapeDtypeStruct((2, 128, 128), jnp.float32)
    module = lower_for_hopper(jax.grad(loss, (0, 1)), x, ws)
    assert kernel_names(module) == ["lowbit_rotate_quantize", "lowbit_scaled_matmul"]


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["quartet", "quartet_rtn", "quartet_floor"])
def test_every_gradient_of_a_layer_on_the_gpu_is_that_of_the_reference(name, seed):
    if obstacle := hopper_obstacle(dispatch.cuda_capability()):
        pytest.skip(obstacle)
    recipe = get_recipe(name)
    x, w, g = arguments(2048, 1024 + 128 * seed, 1536)
    got, expected = (
        jax.jit(functools.partial(products, recipe=recipe, implementation=path))(x, w, g)
        for path in ("hopper", "dequantize")
    )
    for name, a, b in zip(("y", "dx", "dw"), got, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        # Bound: a sum in another order may turn a bfloat16 result by a unit of 2**-8, and a rotated
        # entry that lies within 2**-20 of a tie by a step, which is 1 entry in 2**18.
        assert np.linalg.norm(a - b) <= 2**-9 * np.linalg.norm(b), name

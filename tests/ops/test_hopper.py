"""Layers through the kernels for Hopper, interpreted on the CPU, against the reference path."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.numerics import FP8_E4M3_TENSOR, quantize
from lowbit_jax.ops import (
    QuantizedWeight,
    dispatch,
    explain,
    get_recipe,
    quantize_weight,
    quantized_dot,
)
from lowbit_jax.ops.call import Call, split_keys
from lowbit_jax.ops.operands import backward_operand, forward_operand, gradient_operands
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
        if name != "dw":
            # Exact: sums of so few 4-bit products fit float32, in any order.
            np.testing.assert_array_equal(a, b, err_msg=name)
            continue
        block = 32 if a.shape[1] % 128 else 128
        error, b = np.abs(a - b).reshape(-1, block), b.reshape(-1, block)
        norms = np.linalg.norm(b, axis=1, keepdims=True)
        # Bound: the float32 gradient is split into two bfloat16 terms to be rotated back, which
        # leaves 2**-17 of each of the 32 or 128 entries of a block. The transform makes
        # 2**-17 times the norm of the block of it, at most; twice that for float32 sums.
        assert (error <= 2**-16 * norms).all()


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
    got, expected = run_interpreted(through_kernels, *args), jax.jit(reference)(*args)
    assert_products_agree(got, expected)
    with interpreter():
        paths = [row.path for row in explain(through_kernels, *args).rows]
    assert (
        paths
        == {
            "quartet": ["hopper", "hopper", "hopper"],
            "quartet_floor_rtn:y=bf16": ["dequantize", "hopper", "hopper"],
            "quest_w4a4": ["hopper", "dequantize", "dequantize"],
            "rtn_w4a4": ["hopper", "dequantize", "dequantize"],
        }[name]
    )


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


def test_nvfp4_operands_from_the_kernel_are_those_of_the_quantizer():
    recipe = get_recipe("quartet2")
    x, _, g = arguments(128, 128, 80)
    x, g = x.at[:, 3].set(0).at[5, 16:32].set(0), g.at[7].set(0)
    keys = split_keys(jax.random.key(0))

    def operands(x, g, implementation):
        dtypes, weights = (np.dtype(jnp.bfloat16),) * 2, ((np.dtype(np.float32), False),)
        call = Call(recipe, implementation, *dtypes, shape=(128, 128, 80), weights=weights)
        q, residual = forward_operand(x, "x", keys, call, keeps=True)
        again = backward_operand(residual.saved, "dw", keys, call)
        return q, again, *gradient_operands(g, keys, call)

    got = run_interpreted(functools.partial(operands, implementation="hopper_bf16"), x, g)
    expected = jax.jit(operands, static_argnums=2)(x, g, "dequantize")
    for name, a, b in zip(("y_x", "dw_x", "dx_g", "dw_g"), got, expected, strict=True):
        assert a.values.dtype == b.values.dtype == jnp.bfloat16
        # Exact: by the same definition, and none of these blocks is at a boundary.
        np.testing.assert_array_equal(
            a.values.astype(jnp.float32), b.values.astype(jnp.float32), err_msg=name
        )
        # Bound: the scale of the forward pass multiplies each of 128 numbers before they are
        # rotated, or the abs-max of their sums at last: 2**-24 for each, and of 7 additions.
        np.testing.assert_allclose(a.scale, b.scale, rtol=2**-20 if name == "dw_x" else 0, atol=0)


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


@pytest.fixture
def one_hopper(monkeypatch):
    """To lower for, which needs no device."""
    monkeypatch.setattr(dispatch, "cuda_capability", lambda: (9, 0))


@pytest.mark.parametrize(
    ("name", "paths", "num_quantizers", "num_products"),
    [
        # One pass for both products that take an array, whose scale XLA finds.
        ("quartet", ["hopper"] * 3, 3, 3),
        ("fp8_tensorwise", ["fp8"] * 3, 3, 0),
        # One pass finds the scales of rows, one makes the operand.
        ("quest_w4a4", ["hopper", "dequantize", "dequantize"], 4, 1),
        ("rtn_w4a4", ["hopper", "dequantize", "dequantize"], 4, 1),
    ],
)
def test_kernels_are_chosen_on_hopper(name, paths, num_quantizers, num_products, one_hopper):
    layer = functools.partial(products, recipe=get_recipe(name))
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments(256, 384, 512)]
    assert [row.path for row in explain(layer, *shapes).rows] == paths
    module = lower_for_hopper(layer, *shapes)
    calls = module.count("custom_call @mosaic_gpu")
    assert calls == num_quantizers + num_products
    names = ["lowbit_rotate_quantize", "lowbit_scaled_matmul"]
    assert kernel_names(module) == names[: 1 + (num_products > 0)]


def test_float8_products_on_hopper_take_no_transpose_and_make_no_float32_activations(one_hopper):
    layer = functools.partial(products, recipe=get_recipe("fp8_tensorwise_e4m3"))
    tokens, n, k = 4096, 1024, 1536
    args = arguments(tokens, n, k)
    program = jax.make_jaxpr(layer)(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args))

    def equations(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns") and eqn.primitive.name != "mpmd_map":
                    yield from equations(inner)

    found = list(equations(program.jaxpr))
    dots = [eqn for eqn in found if eqn.primitive.name == "dot_general"]
    assert [(eqn.outvars[0].aval.shape, eqn.outvars[0].aval.dtype.name) for eqn in dots] == [
        ((tokens, n), "bfloat16"),
        ((tokens, k), "bfloat16"),
        ((n, k), "float32"),
    ]
    for eqn in dots:  # contraction-last, as tensor cores take float8
        assert eqn.params["dimension_numbers"] == (((1,), (1,)), ((), ()))
        assert eqn.invars[0].aval.dtype.itemsize == eqn.invars[1].aval.dtype.itemsize == 1
    assert not [e for e in found if e.primitive.name == "transpose" and e.outvars[0].aval.ndim == 2]


def test_float8_operands_from_the_kernel_are_those_of_the_quantizer():
    # Exact: the same scale, and quotients of the same rounding.
    recipe = get_recipe("fp8_tensorwise_e4m3")
    x, w, _ = arguments(96, 72, 160)
    keys = split_keys(None)

    def operands(z, name):
        dtypes, weights = (np.dtype(jnp.bfloat16),) * 2, ((np.dtype(np.float32), False),)
        call = Call(recipe, "fp8", *dtypes, shape=(96, 72, 160), weights=weights)
        q, residual = forward_operand(z, name, keys, call, keeps=True)
        product = "dw" if name == "x" else "dx"
        return q, backward_operand(residual.saved, product, keys, call)

    zero, broken = jnp.zeros_like(x), x.at[5, 7].set(jnp.inf)
    for z, name in ((x, "x"), (w, "w"), (zero, "x"), (broken, "x")):
        of_one = functools.partial(operands, name=name)
        got = a, b = run_interpreted(of_one, z)
        expected = a_expected, _ = jax.jit(of_one)(jnp.where(jnp.isfinite(z), z, 0))
        np.testing.assert_array_equal(a.scale, a_expected.scale)
        np.testing.assert_array_equal(b.scale, a_expected.scale)
        assert a.scale.shape == b.scale.shape == ()
        for operand, reference, values in zip(got, expected, (z, z.T), strict=True):
            assert operand.values.dtype == jnp.float8_e4m3fn
            codes = np.asarray(operand.values, np.float32)
            # An infinity becomes NaN, with those that are multiplied together with it.
            is_nan = np.isnan(codes)
            assert is_nan[~np.isfinite(values)].all()
            assert is_nan.sum() <= (64 if z is broken else 0)
            expected_codes = np.asarray(reference.values, np.float32)
            np.testing.assert_array_equal(codes[~is_nan], expected_codes[~is_nan])


def test_layers_of_float8_through_the_quantizer_are_those_of_the_reference():
    args = arguments(96, 72, 160)
    for name in ("fp8_tensorwise_e4m3", "fp8_tensorwise"):
        layer = functools.partial(products, recipe=get_recipe(name), implementation="fp8")
        got, expected = run_interpreted(layer, *args), jax.jit(layer)(*args)
        x, w, g = (np.abs(np.asarray(z, np.float64)) for z in args)
        terms = x @ w.T, g @ w, g.T @ x
        for a, b, magnitudes in zip(got, expected, terms, strict=True):
            assert a.dtype == b.dtype
            rounding = 2**-7 if a.dtype == jnp.bfloat16 else 0
            # Bound: at most 160 terms in another order, each rounded to a format with steps of a
            # quarter; then a rounding to bfloat16 on either side of a tie, but for dw.
            order = 2 * 160 * 2**-24 * 1.25**2 * magnitudes
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            assert np.all(np.abs(a - b) <= order + rounding * np.abs(b))


def test_layers_lower_for_hopper_under_scan_and_remat(one_hopper):
    # The interpreter does not know checkpoints.
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


def test_what_a_checkpoint_drops_is_not_made(one_hopper):
    # Columns for the backward pass: only the second forward pass makes them, next to the rows.
    dot = functools.partial(quantized_dot, recipe=get_recipe("fp8_tensorwise_e4m3"))

    def loss(x, w):
        return jnp.sum(jax.checkpoint(dot)(x, w).astype(jnp.float32) ** 2)

    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments(256, 384, 512)[:2]]
    module = lower_for_hopper(jax.grad(loss, (0, 1)), *shapes)
    calls = [line for line in module.splitlines() if "custom_call @mosaic_gpu" in line]
    num_operands = [len(re.findall("f8E4M3FN", line.split("->")[-1])) for line in calls]
    assert num_operands == [1, 1, 2, 2, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fp8_tensorwise", "fp8_tensorwise_e4m3"])
def test_float8_products_are_three_calls_of_cublas_without_a_float32_activation(name):
    if obstacle := hopper_obstacle(dispatch.cuda_capability()):
        pytest.skip(obstacle)
    args = arguments(4096, 1024, 1536)
    layer = functools.partial(products, recipe=get_recipe(name))
    compiled = jax.jit(layer).lower(*args).compile().as_text()
    assert len(re.findall(r'custom_call_target="__cublas\$lt\$matmul\$f8"', compiled)) == 3
    # Scales are not rounded on their way.
    assert not re.search(r"= bf16\[[1,]*\]\S* convert\(", compiled)
    entry = compiled[compiled.index("ENTRY") :]
    for size in ("4096,1024", "4096,1536"):
        assert f"f32[{size}]" not in entry


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("size", "n"),
    [(256, 1024), (2040, 2048), (2048, 2048)],
    ids=["XLA splits the sums", "XLA pads", "one call"],
)
def test_cublas_scales_in_float32_and_rounds_once(size, n):
    capability = dispatch.cuda_capability()
    if capability is None or capability < (8, 9):
        pytest.skip("needs FP8 tensor cores")
    # The product of the scales is 1 + 0.99 * 2**-8, which bfloat16 would round to 1.
    x = jnp.eye(size, dtype=jnp.bfloat16)
    largest = 448 * 448 * (1 + 0.99 * 2**-8)
    w = jax.random.uniform(jax.random.key(0), (n, size), minval=-largest, maxval=largest)
    w = w.at[0, 0].set(largest)
    recipe = get_recipe("fp8_tensorwise_e4m3")
    y = jax.jit(lambda x, w: quantized_dot(x, w, recipe, implementation="fp8"))(x, w)
    (q, w_scale), x_scale = quantize_values_and_scale(w), np.float32(1 / 448)
    exact = 448 * np.asarray(q, np.float64).T * np.float64(w_scale) * np.float64(x_scale)
    error = np.abs(np.asarray(y, np.float64) - exact)
    # Bound: half a unit of bfloat16, and three roundings of float32 scales.
    half_unit = np.ldexp(1.0, np.frexp(exact)[1] - 9)
    assert (error <= half_unit + 2**-21 * np.abs(exact)).all()


def quantize_values_and_scale(w):
    q = quantize(w, FP8_E4M3_TENSOR)
    return q.codes.astype(jnp.float32), q.scales


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "name",
    [
        *("quartet", "quartet_rtn", "quartet_floor", "quest_w4a4"),
        *("quartet2", "quartet2_no46", "quartet2_sr", "nvfp4_nvidia"),
    ],
)
def test_every_gradient_of_a_layer_on_the_gpu_is_that_of_the_reference(name, seed):
    if obstacle := hopper_obstacle(dispatch.cuda_capability()):
        pytest.skip(obstacle)
    recipe = get_recipe(name)
    x, w, g = arguments(2048, 1024 + 128 * seed, 1536)
    is_nvfp4 = name.startswith(("quartet2", "nvfp4"))
    implementation = "hopper_bf16" if is_nvfp4 else "hopper"
    if name == "quest_w4a4":  # its backward products are not for the kernels, and refused by name
        implementation = None
    got, expected = (
        jax.jit(functools.partial(products, recipe=recipe, implementation=path))(x, w, g)
        for path in (implementation, "dequantize")
    )
    for name, a, b in zip(("y", "dx", "dw"), got, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        # Bound: a sum in another order may turn a bfloat16 result by a unit of 2**-8, and a rotated
        # entry that lies within 2**-20 of a tie by a step, which is 1 entry in 2**18. Of NVFP4's
        # blocks 1 in 2**15 may have another scale, larger or smaller by an eighth or a half.
        assert np.linalg.norm(a - b) <= 2**-9 * np.linalg.norm(b), name

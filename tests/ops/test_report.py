import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lowbit_jax.ops import ProductRow, explain, quantized_dot
from lowbit_jax.ops.recipes import BF16, FP8_TENSORWISE, QUEST_W4A4

X, W = jax.ShapeDtypeStruct((2, 4, 128), jnp.bfloat16), jax.ShapeDtypeStruct((8, 128), jnp.float32)
QUEST = functools.partial(quantized_dot, recipe=QUEST_W4A4)


def loss(x, w):
    return jnp.sum(quantized_dot(x, w, FP8_TENSORWISE).astype(jnp.float32))


def summary(explanation):
    return [(row.where, row.product, row.count) for row in explanation.rows]


def test_plain_function_has_one_forward_product():
    assert explain(QUEST, X, W).rows == (
        ProductRow(
            where="",
            product="y",
            a_shape=(8, 128),
            b_shape=(8, 128),
            a_format="midrise4/row rms",
            b_format="midrise4/row rms",
            path="dequantize",
            reason="not fp8: both operands must be e4m3 or e5m2 with one scale a tensor;"
            " not hopper: no CUDA device; not hopper_bf16: midrise4/row rms has no e4m3 scales",
            count=1,
        ),
    )


def test_gradient_has_three_products_with_their_formats():
    rows = explain(jax.grad(loss, (0, 1)), X, W).rows
    assert [(r.product, r.a_shape, r.b_shape, r.a_format, r.b_format) for r in rows] == [
        ("y", (8, 128), (8, 128), "e4m3/tensor absmax", "e4m3/tensor absmax"),
        ("dx", (8, 8), (128, 8), "e5m2/tensor absmax", "e4m3/tensor absmax"),
        ("dw", (8, 8), (128, 8), "e5m2/tensor absmax", "e4m3/tensor absmax"),
    ]
    assert {row.path for row in rows} == {"dequantize" if jax.default_backend() != "gpu" else "fp8"}


def test_path_asked_for_by_name_is_reported():
    fn = functools.partial(quantized_dot, recipe=FP8_TENSORWISE, implementation="fp8")
    (row,) = explain(fn, X, W).rows
    assert (row.path, row.reason) == ("fp8", "asked for by name")
    (row,) = explain(functools.partial(quantized_dot, recipe=BF16), X, W).rows
    assert (row.a_format, row.reason) == ("-", "operands not quantized: a plain product")


def test_jitted_and_already_called_functions_are_read():
    fn = jax.jit(jax.grad(loss, (0, 1)))
    expected = explain(jax.grad(loss, (0, 1)), X, W)
    assert explain(fn, X, W) == expected
    fn(jnp.ones(X.shape, X.dtype), jnp.ones(W.shape))
    assert explain(fn, X, W) == expected
    assert explain(lambda x, w: fn(x, w), X, w=W) == expected


def test_vmap_shows_batch_axes():
    (row,) = explain(jax.vmap(QUEST, (0, None)), X, W).rows
    assert (row.a_shape, row.b_shape) == ((2, 4, 128), (8, 128))
    rows = explain(jax.vmap(jax.grad(loss), (0, None)), X, W).rows
    assert [row.product for row in rows] == ["y", "dx", "dw"]


def test_scans_multiply_the_count():
    square = jax.ShapeDtypeStruct((5, 128, 128), jnp.float32)

    def scanned(x, ws, remat):
        def body(x, w):
            with jax.named_scope("block"):
                return jnp.tanh(QUEST(x, w)), None

        body = jax.checkpoint(body) if remat else body
        with jax.named_scope("model"):
            return jnp.sum(jax.jit(lambda x: jax.lax.scan(body, x, ws)[0])(x))

    forward = functools.partial(scanned, remat=False)
    assert summary(explain(jax.jit(forward), X, square)) == [("model/block", "y", 5)]
    assert summary(explain(jax.grad(forward, (0, 1)), X, square)) == [
        ("model/block", product, 5) for product in ("y", "dx", "dw")
    ]
    # With checkpoints the backward pass runs the forward products once more.
    backward = jax.grad(functools.partial(scanned, remat=True), (0, 1))
    assert summary(explain(backward, X, square)) == [
        ("model/block", "y", 10),
        ("model/block", "dx", 5),
        ("model/block", "dw", 5),
    ]


def test_while_loops_have_no_count():
    def fn(x, w):
        y = jax.lax.while_loop(lambda x: jnp.sum(x) < 1, lambda x: QUEST(x, w), x)
        return jax.lax.cond(jnp.sum(y) > 0, lambda y: QUEST(y, w), lambda y: y, y)

    square = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    (row,) = explain(fn, X, square).rows
    assert row.count is None  # alike but for the count, one of which is unknown
    assert " ?  " in str(explain(fn, X, square))


def test_other_products_are_not_listed():
    explanation = explain(lambda x, w: x @ w.T, X, W)
    assert explanation.rows == ()
    assert "no product" in str(explanation)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name in ("up", "down"):
            recipe = dataclasses.replace(QUEST_W4A4, y_x=None)
            x = nn.Dense(128, use_bias=False, dot_general=recipe.dot_general, name=name)(x)
        return x


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Block(name="block")(x)


@pytest.mark.parametrize("gradient", [False, True])
def test_linen_modules_give_the_path(gradient):
    params = {"block": {name: {"kernel": jnp.ones((128, 128))} for name in ("up", "down")}}

    def fn(params, x):
        return jnp.sum(Model().apply({"params": params}, x))

    explanation = explain(jax.grad(fn) if gradient else fn, params, X)
    forward = [("Model/block/up", "y", 1), ("Model/block/down", "y", 1)]
    # The first layer's input needs no gradient, but custom_vjp computes both.
    backward = [
        (f"Model/block/{name}", product, 1) for name in ("down", "up") for product in ("dx", "dw")
    ]
    assert summary(explanation) == forward + (backward if gradient else [])
    lines = str(explanation).splitlines()
    assert lines[0].split() == ["where", "product", "shapes", "formats", "path", "count", "reason"]
    assert len(lines) == 2 + len(explanation.rows)
    assert lines[2].startswith("Model/block/up    y        (8, 128) x (128, 128)  - x midrise4/row")

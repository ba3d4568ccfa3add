import jax
import jax.numpy as jnp

from lowbit_jax.ops import Explanation, explain, get_recipe, quantized_dot
from lowbit_jax.ops.report import ProductRow
from lowbit_jax.train.summary import paths_table


def row(product, path, reason, count, formats=("e2m1", "e2m1")):
    return ProductRow("", product, (2, 2), (2, 2), *formats, path, reason, count)


def test_paths_are_counted_by_product_and_reason():
    rows = (
        row("y", "hopper", "it fits", 7),
        row("dx", "hopper", "it fits", 5),
        row("y", "dequantize", "too small", 2),
        row("dx", "hopper", "it fits", 2),
        row("dw", "dequantize", "a plain product", 9, ("-", "-")),
    )
    assert paths_table(Explanation(rows)) == [
        "7 y, 7 dx a step by the path 'hopper' (it fits)",
        "2 y a step by the path 'dequantize' (too small)",
    ]


def test_without_quantized_products_there_is_nothing_to_say():
    rows = (row("y", "dequantize", "a plain product", 1, ("-", "-")),)
    assert paths_table(Explanation(rows)) == []


def test_a_traced_function_is_explained_as_the_function_is():
    def layer(x, w):
        return quantized_dot(x, w, get_recipe("quest_w4a4")).sum()

    args = jnp.ones((8, 128)), jnp.ones((32, 128))
    gradient = jax.grad(layer, argnums=(0, 1))
    traced = explain(jax.jit(gradient).trace(*args))
    assert traced == explain(jax.jit(gradient), *args)
    assert [r.product for r in traced.rows] == ["y", "dx", "dw"]

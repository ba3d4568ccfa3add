"""Layers whose products are left to block-scaled units, on a CPU, against the reference path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.ops import QuantizedWeight, dispatch, explain, get_recipe, quantize_weight
from lowbit_jax.ops.quantized_dot import quantized_dot

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax.nn.scaled_matmul has no CPU version before 0.11"
)


def products(x, w, g, recipe, implementation, once=False):
    """The three products of a layer."""
    if once:
        w = QuantizedWeight(w, quantize_weight(w, recipe))
    dot = functools.partial(
        quantized_dot, recipe=recipe, key=jax.random.key(7), implementation=implementation
    )
    y, pull = jax.vjp(dot, x, w)
    dx, dw = pull(g)
    return y, dx, dw.master if once else dw


@pytest.mark.parametrize(("name", "once"), [("quartet_rtn", True), ("quartet2", False)])
def test_products_and_gradients_are_those_of_the_reference(name, once, monkeypatch):
    monkeypatch.setattr(dispatch, "cuda_capability", lambda: (10, 0))
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 64, 128))
    w = 0.05 * jax.random.normal(keys[1], (256, 128))
    g = jax.random.normal(keys[2], (2, 64, 256))
    layer = functools.partial(products, recipe=get_recipe(name), once=once)
    by_units = functools.partial(layer, implementation="blackwell")
    rows = explain(by_units, x, w, g).rows
    assert [(row.product, row.path, row.a_shape, row.b_shape) for row in rows] == [
        ("y", "blackwell", (128, 128), (256, 128)),
        ("dx", "blackwell", (128, 256), (128, 256)),
        ("dw", "blackwell", (256, 128), (128, 128)),
    ]
    got = jax.jit(by_units)(x, w, g)
    expected = jax.jit(functools.partial(layer, implementation="dequantize"))(x, w, g)
    flat_x, flat_g = (np.abs(np.asarray(z).reshape(128, -1)) for z in (x, g))
    terms = flat_x @ np.abs(w).T, flat_g @ np.abs(w), flat_g.T @ flat_x
    for a, b, magnitudes in zip(got, expected, terms, strict=True):
        assert a.dtype == b.dtype == jnp.float32
        # Bound: float32 sums of up to 256 terms in another order. Operands and results are rotated
        # in blocks of 128 at most, which keeps norms and so makes no entry larger than theirs.
        norm = 1.25**2 * np.linalg.norm(magnitudes, axis=-1).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=2 * (256 + 128) * 2**-24 * norm)

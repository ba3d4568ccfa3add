import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowbit_jax.models import QuantizedLinear, resolve_recipes
from lowbit_jax.models.linear import multiply_all
from lowbit_jax.ops import QuantizedWeight, get_recipe, quantize_weight, quantized_dot

W4, W8, BF16 = get_recipe("quest_w4a4"), get_recipe("quest_w8a8"), get_recipe("bf16")
PATHS = ("layers/attention/q_proj/weight", "layers/mlp/up_proj/weight")


def test_the_first_matching_rule_wins():
    rules = ((".*/mlp/.*", W8), (".*", W4))
    resolved = resolve_recipes(rules, PATHS)
    assert resolved == {PATHS[0]: (".*", W4), PATHS[1]: (".*/mlp/.*", W8)}
    # A general rule in front takes all; the special one behind it is shadowed, not an error.
    assert {recipe for _, recipe in resolve_recipes(rules[::-1], PATHS).values()} == {W4}


def test_without_a_rule_nothing_is_quantized():
    assert resolve_recipes((), PATHS) == dict.fromkeys(PATHS, (None, BF16))


@pytest.mark.parametrize("pattern", ["layers/mlp", ".*/gate_proj/weight", "head/weight"])
def test_a_rule_that_matches_nothing_is_an_error(pattern):
    with pytest.raises(ValueError, match="every rule must match"):
        resolve_recipes(((pattern, W4),), PATHS)


def test_multiplies_by_its_recipe():
    layer = QuantizedLinear(8, W4, ("mlp", "embed"))
    x = jax.random.normal(jax.random.key(0), (3, 128))
    params = jax.jit(layer.init)(jax.random.key(1), x)["params"]
    assert params["weight"].names == ("mlp", "embed")
    weight = nn.meta.unbox(params)["weight"]
    assert (weight.shape, weight.dtype) == ((8, 128), jnp.float32)
    actual = jax.jit(layer.apply)({"params": params}, x)
    # Exact: the same function.
    expected = jax.jit(quantized_dot, static_argnums=2)(x, weight, W4)
    np.testing.assert_array_equal(actual, expected)


def test_a_bias_is_added_to_the_product_of_each_layer_that_has_one():
    class Pair(nn.Module):
        has_bias: bool

        @nn.compact
        def __call__(self, x):
            names = {"a": self.has_bias, "b": False}
            layers = [
                QuantizedLinear(8, BF16, ("heads", "embed"), has_bias=has_bias, name=name)
                for name, has_bias in names.items()
            ]
            return multiply_all(x, layers)

    x = jax.random.normal(jax.random.key(0), (3, 16), jnp.bfloat16)
    boxed = Pair(True).init(jax.random.key(1), x)["params"]
    assert boxed["a"]["bias"].names == ("heads",)
    params = nn.meta.unbox(boxed)
    assert "bias" not in params["b"]
    np.testing.assert_array_equal(params["a"]["bias"], np.zeros(8))
    bias = params["a"]["bias"] + jnp.arange(8.0)
    plain = Pair(False).apply({"params": params}, x)
    a, b = Pair(True).apply({"params": params | {"a": params["a"] | {"bias": bias}}}, x)
    # Exact: the sum of the same product and the bias, in bfloat16.
    np.testing.assert_array_equal(a, plain[0] + bias.astype(jnp.bfloat16))
    np.testing.assert_array_equal(b, plain[1])


def test_takes_weights_quantized_in_advance():
    layer = QuantizedLinear(8, W4, ("mlp", "embed"))
    x, w = jax.random.normal(jax.random.key(0), (3, 128)), jnp.cos(jnp.arange(8 * 128) ** 2.0)
    w = w.reshape(8, 128)
    weight = QuantizedWeight(w, jax.jit(quantize_weight, static_argnums=1)(w, W4))
    apply = jax.jit(lambda weight: layer.apply({"params": {"weight": weight}}, x))
    # Exact: the same operands in the same product.
    np.testing.assert_array_equal(apply(weight), apply(w))
    transposed = QuantizedWeight(w.T, weight.quantized)
    with pytest.raises(ValueError, match=r"weight must be \(8, 128\), got .* of \(128, 8\)"):
        apply(transposed)

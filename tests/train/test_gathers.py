"""What the third stage of ZeRO sends where weights are used, and that products are the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.bench.scaling_row import sent_bytes
from lowbit_jax.models import Llama, LlamaConfig, QuantizedLinear, llama_rules, logical_axes
from lowbit_jax.ops import get_recipe
from lowbit_jax.parallel import batch_sharding, make_layout, make_mesh, parameters_of, shardings
from lowbit_jax.train.placement import placed_use
from lowbit_jax.train.step import loss_function

D, F, VOCAB = 128, 256, 64
WEIGHTS = 4 * D * D + 3 * D * F  # of a layer
AXES = ("mlp", "embed")


@pytest.mark.parametrize(
    ("recipe", "dtype", "bits"),
    [
        ("quartet_rtn", "bfloat16", {"u8": 4.25}),
        ("int4_weights", "bfloat16", {"u8": 4, "u32": 1}),
        ("fp8_tensorwise", "bfloat16", {"u8": 8}),
        ("nvfp4_nvidia", "float32", {"u8": 4 + 8 / 256}),
        ("bf16", "bfloat16", {"u16": 16}),
        ("bf16", "float32", {"f32": 32}),
    ],
)
def test_codes_and_scales_are_gathered_or_the_dtype_of_the_products(recipe, dtype, bits):
    config = LlamaConfig(
        VOCAB, D, 1, 4, d_ff=F, dtype=dtype, recipe_rules=llama_rules(get_recipe(recipe))
    )
    model, layout = Llama(config), make_layout(make_mesh(1, 4), 3)
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=batch_sharding(layout.mesh))
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])
    owners = parameters_of(shapes, logical_axes(model))
    places = shardings(shapes, owners, layout, layout.stage.parameters)
    params = jax.tree.map(lambda x, place: x.update(sharding=place), shapes, places)
    loss = loss_function(model, layout)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    text = jax.jit(loss).lower(params, (tokens, tokens), key).compile().as_text()
    table = "u16" if dtype == "bfloat16" else "f32"
    expected = {table: 2 * VOCAB * D * jnp.dtype(dtype).itemsize}
    for name, per_weight in bits.items():
        expected[name] = expected.get(name, 0) + WEIGHTS * per_weight / 8
    assert sent_bytes(text)["all-gather"] == expected


class Net(nn.Module):
    """A matrix."""

    recipe: str

    @nn.compact
    def __call__(self, x):
        return QuantizedLinear(F, get_recipe(self.recipe), AXES)(x)


@pytest.mark.parametrize(
    "name", ["quartet_rtn:dx=bf16,dw=bf16", "quest_w4a4", "mxfp8", "fp8_tensorwise"]
)
def test_products_and_gradients_are_those_of_whole_weights(name):
    # Recipes with a mask, a rotation, and the original quantized once more for dx.
    net = Net(name)
    layout = make_layout(make_mesh(1, 4), 3)
    x, g = (jax.random.normal(jax.random.key(i), (128, n)) for i, n in enumerate((D, F)))
    params = nn.meta.unbox(jax.jit(net.init)(jax.random.key(2), x)["params"])

    def products(params, x, g, layout):
        with placed_use(layout, jnp.float32):
            y, pull = jax.vjp(lambda p, x: net.apply({"params": p}, x), params, x)
        (dparams, dx) = pull(g)
        return y, dx, jax.tree.leaves(dparams)[0]

    expected = jax.jit(products, static_argnums=3)(params, x, g, None)
    rows = jax.sharding.NamedSharding(layout.mesh, jax.sharding.PartitionSpec("fsdp"))
    got = jax.jit(products, static_argnums=3)(*jax.device_put((params, x, g), rows), layout)
    w = np.abs(jax.tree.leaves(params)[0])
    x, g = np.abs(x), np.abs(g)
    for a, b, terms in zip(got, expected, (x @ w.T, g @ w, g.T @ x), strict=True):
        # Bound: sums of 256 terms at most, in another order, each term the product of two numbers
        # that rounding makes at most 4 times the largest of their kind; and for the transforms.
        assert np.all(np.abs(a - b) <= 2 * (256 + 128) * 2**-24 * 16 * terms.max())
    assert got[2].sharding.shard_shape(w.shape) == (F // 4, D)

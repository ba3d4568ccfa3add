import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowbit_jax.numerics import MXFP4, QUEST_INT8, quantize_values
from lowbit_jax.ops import (
    RECIPES,
    DotRecipe,
    get_recipe,
    quantized_dot,
    recipes,
    weight_projection,
)
from lowbit_jax.rotations import Hadamard
from lowbit_jax.sparsity import identity, onto_grid

K, N = 64, 32
RECIPE = DotRecipe(y_x=QUEST_INT8, y_w=QUEST_INT8, rotation=Hadamard(32), estimator="trust")
RANDOM = DotRecipe(y_x=dataclasses.replace(MXFP4, rounding="stochastic"))


@pytest.mark.parametrize(
    ("method", "w_bits", "a_bits"),
    [("quest", b, b) for b in (8, 4, 3, 2, 1)]
    + [("quest", b, 16) for b in (4, 3, 2, 1)]
    + [("rtn", b, b) for b in (8, 4, 3, 2, 1)],
)
def test_names_give_bits(method, w_bits, a_bits):
    name = f"{method}_w{w_bits}a{a_bits}"
    recipe = get_recipe(name)
    assert recipe is getattr(recipes, name.upper())
    assert str(recipe) == name
    assert recipe.y_w.format.name == f"midrise{w_bits}"
    assert recipe.y_w.block_size is None
    assert recipe.y_w.scale == ("rms" if method == "quest" else "absmax")
    assert recipe.y_x == (None if a_bits == 16 else recipe.y_w)
    assert recipe.rotation == (Hadamard(128) if method == "quest" else None)
    masks = {"rtn": "straight_through", "quest": "clipped" if w_bits == 1 else "trust"}
    assert recipe.estimator == masks[method]
    assert recipe.clip_scale == (1.30 if name.startswith("quest_w1") else 1.0)
    assert [recipe.dx_g, recipe.dx_w, recipe.dw_x, recipe.dw_g] == [None] * 4


@pytest.mark.parametrize("bits", [4, 3, 2, 1])
def test_quest_without_hadamard_differs_by_the_rotation_and_the_clip_of_one_bit(bits):
    with_hadamard = get_recipe(f"quest_w{bits}a{bits}")
    clip_scale = 1.25 if bits == 1 else 1.0
    expected = dataclasses.replace(with_hadamard, rotation=None, clip_scale=clip_scale)
    assert get_recipe(f"quest_w{bits}a{bits}_no_hadamard") == expected


RANDOM_RECIPES = {
    *("quartet", "quartet_rtn", "quartet_aligned", "quartet_floor", "quartet_floor_rtn"),
    *("quartet2", "quartet2_no46", "quartet2_sr", "quartet2_sr_no46", "quartet2_eden128"),
    *("nvfp4_nvidia", "nvfp4_nvidia_46", "fp8_weights_sr", "int4_weights_sr"),
}


def test_table_is_complete():
    assert len(RECIPES) == 43
    assert len(set(RECIPES.values())) == 43  # no two names for one recipe
    for name, recipe in RECIPES.items():
        assert get_recipe(name.upper()) is recipe
        assert recipe is getattr(recipes, name.upper())
        assert recipe.needs_key == (name in RANDOM_RECIPES)
        assert recipe.is_identity == (name == "bf16")


def formats(recipe):
    return [tuple(str(spec) for spec in recipe.formats_of(p)) for p in ("y", "dx", "dw")]


def test_formats_of_the_published_recipes():
    fitted, quest = "e2m1/32 absmax_floor43", "e2m1/32 rms_nearest"
    nvfp4, four_over_six = "e2m1/16 absmax_e4m3", "e2m1/16 absmax_e4m3_four_over_six"
    stochastic, eden = f"{nvfp4} stochastic margin 1.0625", f"{nvfp4} eden margin 0.988125"
    expected = {
        "quartet": [(quest,) * 2] + [(f"{fitted} stochastic",) * 2] * 2,
        "quartet_rtn": [(quest,) * 2] + [(fitted,) * 2] * 2,
        "quartet_aligned": [(quest,) * 2] + [(f"{fitted} gain 1.00928",) * 2] * 2,
        "quartet_floor": [("e2m1/32 std_floor",) * 2] + [(f"{fitted} stochastic",) * 2] * 2,
        "quartet2": [(four_over_six,) * 2] + [(eden,) * 2] * 2,
        "quartet2_no46": [(nvfp4,) * 2] + [(eden,) * 2] * 2,
        "quartet2_sr": [(four_over_six,) * 2] + [(stochastic,) * 2] * 2,
        # The second operand of dx is what the forward product multiplied by.
        "nvfp4_nvidia": [
            (nvfp4, "e2m1/16x16 absmax_e4m3"),
            (stochastic, "e2m1/16x16 absmax_e4m3"),
            (stochastic, nvfp4),
        ],
        "mxfp8": [("e4m3/32 absmax_ceil",) * 2] * 3,
        "fp8_weights": [("None", "e4m3/row absmax"), ("None", "e4m3/row absmax"), ("None", "None")],
        "int4_weights": [("None", "int4/32 absmax"), ("None", "int4/32 absmax"), ("None", "None")],
        "mxfp4_forward": [(quest,) * 2, ("None", quest), ("None", quest)],
    }
    assert {name: formats(get_recipe(name)) for name in expected} == expected


def test_rotations_of_the_published_recipes():
    def of(name):
        return [str(get_recipe(name).rotation_of(p)) for p in ("y", "dx", "dw")]

    assert of("quartet") == ["Hadamard 32"] + ["randomized Hadamard 32"] * 2
    assert of("quartet2") == ["None"] + ["randomized Hadamard 128"] * 2
    assert of("nvfp4_nvidia") == ["None", "None", "randomized Hadamard 16"]
    assert of("mxfp4_forward") == ["Hadamard 32", "None", "None"]
    assert of("mxfp8") == ["None"] * 3
    estimators = {name: RECIPES[name].estimator for name in ("quartet", "quartet2", "nvfp4_nvidia")}
    assert list(estimators.values()) == ["clipped", "straight_through", "straight_through"]
    assert not RECIPES["nvfp4_nvidia"].requantize
    assert not RECIPES["mxfp8"].requantize


def test_a_text_composes_products():
    assert get_recipe("quartet:dx=bf16,dw=bf16") == recipes.MXFP4_FORWARD
    assert get_recipe("quartet2_no46:dx=bf16,dw=bf16") == recipes.NVFP4_FORWARD
    backward = get_recipe("QUARTET: y = bf16")
    assert str(backward) == "quartet:y=bf16"
    assert formats(backward) == [("None", "None"), *formats(recipes.QUARTET)[1:]]
    assert backward.rotation_of("y") is None
    assert backward.estimator == "straight_through"
    # Each product from elsewhere is the elsewhere.
    for name in ("quartet2", "nvfp4_nvidia", "mxfp8"):
        assert get_recipe(f"bf16:dw={name},y={name},dx={name}") == get_recipe(name)
    mixed = get_recipe("quest_w4a4:dx=fp8_tensorwise,dw=fp8_tensorwise")
    gradients, quest = str(recipes.FP8_TENSORWISE.dx_g), str(recipes.QUEST_W4A4.y_w)
    assert formats(mixed) == [(quest, quest), (gradients, quest), (gradients, quest)]
    # Composed in steps, in any order, with the products last given.
    steps = recipes.QUARTET.with_products(dw=recipes.QUARTET_RTN).with_products(
        y=recipes.BF16, dw=recipes.BF16
    )
    assert str(steps) == "quartet:y=bf16,dw=bf16"
    assert steps == get_recipe(str(steps))
    unnamed = dataclasses.replace(recipes.QUARTET, name="")
    assert unnamed.with_products(y=recipes.BF16).name == ""


def test_products_of_conflicting_recipes_are_refused():
    with pytest.raises(ValueError, match=r"one rotation.*Hadamard 32.*Hadamard 128"):
        get_recipe("quartet:dw=quartet2")
    with pytest.raises(ValueError, match=r"one rotation.*Hadamard 32.*and None"):
        get_recipe("quartet:dw=fp8_tensorwise")
    assert not get_recipe("quartet:dx=fp8_tensorwise").rotates_dx  # dw alone can be rotated
    with pytest.raises(ValueError, match=r"requantize=True of .* and False of mxfp8"):
        recipes.DotRecipe(dx_w=MXFP4).with_products(dw=recipes.MXFP8)


@pytest.mark.parametrize(
    "text", ["quartet:", "quartet:z=bf16", "quartet:dx", "quartet:dx=bf16,dx=bf16"]
)
def test_texts_that_cannot_be_read_are_refused(text):
    with pytest.raises(ValueError, match="after the colon of a name come products"):
        get_recipe(text)


def test_float8_is_e4m3_forward_and_e5m2_for_gradients():
    recipe = recipes.FP8_TENSORWISE
    names = [spec.format.name for spec in (recipe.y_x, recipe.y_w, recipe.dx_g, recipe.dw_g)]
    assert names == ["e4m3", "e4m3", "e5m2", "e5m2"]
    assert recipe.dx_w is recipe.dw_x is None


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no recipe 'quest_w5a5'; there are bf16, fp8_tensorwise"):
        get_recipe("quest_w5a5")
    with pytest.raises(ValueError, match="no recipe 'fp7'; there are"):
        get_recipe("quartet:dx=fp7")
    with pytest.raises(ValueError, match="clip_scale must be positive"):
        DotRecipe(clip_scale=0.0)


def test_equal_recipes_hash_alike_whatever_their_names():
    same = dataclasses.replace(recipes.QUEST_W4A4, name="mine")
    assert same == recipes.QUEST_W4A4
    assert hash(same) == hash(recipes.QUEST_W4A4)
    assert recipes.QUEST_W4A4 != recipes.QUEST_W3A3
    assert str(dataclasses.replace(recipes.NVFP4_FORWARD, name="", y_x=None)).startswith(
        "DotRecipe(y_w=e2m1/16"
    )


def test_keys_are_needed_exactly_by_what_is_random_and_used():
    signs = Hadamard(32, randomized=True)
    assert RANDOM.needs_key
    assert dataclasses.replace(RECIPE, rotation=signs).needs_key
    assert DotRecipe(dw_g=MXFP4, backward_rotation=signs).needs_key
    assert not DotRecipe(rotation=signs, backward_rotation=signs).needs_key
    assert not DotRecipe(dw_g=MXFP4, rotation=signs).needs_key


def test_weight_projection_is_what_the_product_uses():
    assert weight_projection(recipes.BF16) is identity
    assert weight_projection(recipes.QUEST_W4A4) == onto_grid(
        recipes.QUEST_W4A4.y_w, recipes.QUEST_W4A4.rotation
    )
    w = jax.random.normal(jax.random.key(0), (N, K))
    plain = dataclasses.replace(recipes.RTN_W4A4, y_x=None)
    y = jax.jit(lambda w: quantized_dot(jnp.eye(K), w, plain))(w)
    # Exact: sums of one term.
    np.testing.assert_array_equal(jax.jit(weight_projection(plain))(w), y.T)


def test_dot_general_equals_quantized_dot_for_any_layout():
    x, w = jax.random.normal(jax.random.key(0), (3, 2, K)), jnp.cos(jnp.arange(N * K) ** 2.0)
    w = w.reshape(N, K)
    recipe = recipes.RTN_W8A8
    expected = jax.jit(lambda x, w: quantized_dot(x, w, recipe))(x, w)
    dot_general = jax.jit(recipe.dot_general, static_argnums=(2, 3, 4))
    layouts = [
        (x, w.T, (((2,), (0,)), ((), ()))),
        (x, w, (((-1,), (1,)), ((), ()))),
        (x.transpose(2, 0, 1), w, (((0,), (1,)), ((), ()))),
        (x.reshape(3, 2, 8, 8), w.T.reshape(8, 8, N), (((2, 3), (0, 1)), ((), ()))),
        (x.reshape(3, 2, 8, 8).swapaxes(2, 3), w.reshape(N, 8, 8), (((3, 2), (1, 2)), ((), ()))),
    ]
    for lhs, rhs, numbers in layouts:
        # Exact: the same product after moving axes.
        np.testing.assert_array_equal(dot_general(lhs, rhs, numbers), expected)
    y = dot_general(x.astype(jnp.bfloat16), w.T, layouts[0][2], None, jnp.float32)
    chex.assert_type(y, jnp.float32)  # sums not rounded to bfloat16
    assert jnp.any(y != y.astype(jnp.bfloat16))


def test_dot_general_refuses_what_it_does_not_cover():
    x, w = jnp.ones((2, K)), jnp.ones((K, N))
    plain = (((1,), (0,)), ((), ()))

    def check(error, message, recipe=RECIPE, numbers=plain, **kwargs):
        with pytest.raises(error, match=message):
            jax.eval_shape(lambda x, w: recipe.dot_general(x, w, numbers, **kwargs), x, w)

    batched = (((1,), (0,)), ((0,), (1,)))
    check(NotImplementedError, "batch axes are not covered.*jax.vmap", numbers=batched)
    check(NotImplementedError, "default_matmul_precision", precision="highest")
    check(NotImplementedError, "with_sharding_constraint", out_sharding="data")
    check(ValueError, r"contracted axes must agree, got \[2\]", numbers=(((0,), (0,)), ((), ())))
    check(ValueError, "no key to give.*functools.partial", recipe=RANDOM)


class Mlp(nn.Module):
    recipe: DotRecipe

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(K, dot_general=self.recipe.dot_general, name="up")(x)
        return nn.Dense(N, dot_general=self.recipe.dot_general, name="down")(nn.silu(x))


def mlp_by_hand(params, x):
    for name in ("up", "down"):
        x = quantized_dot(x, params[name]["kernel"].T, RECIPE) + params[name]["bias"]
        x = nn.silu(x) if name == "up" else x
    return x


def test_linen_dense_takes_the_recipe():
    x = jax.random.normal(jax.random.key(0), (4, K))
    model = Mlp(RECIPE)
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]

    def loss(params, apply):
        def body(carry, x):  # scan over examples, checkpointed
            return carry + jnp.sum(jax.checkpoint(apply)(params, x) ** 2), None

        return jax.lax.scan(body, 0.0, x[:, None])[0]

    expected, actual = (
        jax.jit(jax.value_and_grad(functools.partial(loss, apply=apply)))(params)
        for apply in (mlp_by_hand, lambda params, x: model.apply({"params": params}, x))
    )
    chex.assert_trees_all_equal(actual, expected)  # Exact: the same program.
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(actual))
    # Row scales do not mix examples: vmap over them is the whole batch. Bound: sums of 64 terms
    # below 1 in another order, 64 * 2^-23 < 1e-5, twice.
    whole = jax.jit(mlp_by_hand)(params, x)
    mapped = jax.jit(jax.vmap(lambda x: model.apply({"params": params}, x)))(x)
    np.testing.assert_allclose(mapped, whole, atol=2e-5)


def test_nnx_linear_takes_the_recipe():
    x = jax.random.normal(jax.random.key(0), (4, K))
    layer = nnx.Linear(K, N, dot_general=RECIPE.dot_general, rngs=nnx.Rngs(0))

    @nnx.jit
    def value_and_grad(layer, x):
        return nnx.value_and_grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)

    value, grads = value_and_grad(layer, x)
    _, state = nnx.split(layer)
    by_hand = jax.jit(jax.value_and_grad(lambda w: jnp.sum(quantized_dot(x, w.T, RECIPE) ** 2)))(
        state["kernel"][...]
    )
    # Bound: the same operands, since the bias is zero; a float32 sum of 128 squares of sums of 64.
    np.testing.assert_allclose(value, by_hand[0], rtol=(128 + 2 * 64) * 2**-24)
    scale = np.max(np.abs(by_hand[1]))
    np.testing.assert_allclose(grads["kernel"][...], by_hand[1], atol=256 * 2**-24 * scale)


def test_a_random_recipe_takes_its_key_by_partial():
    x = jax.random.normal(jax.random.key(0), (4, K))
    key = jax.random.key(2)
    layer = nn.Dense(N, use_bias=False, dot_general=functools.partial(RANDOM.dot_general, key=key))
    params = {"params": {"kernel": jnp.eye(K, N)}}
    apply = jax.jit(layer.apply)
    by_hand = jax.jit(lambda x: quantized_dot(x, jnp.eye(N, K), RANDOM, key=key))
    np.testing.assert_array_equal(apply(params, x), by_hand(x))  # Exact: sums of one term.
    nearest = dataclasses.replace(RANDOM.y_x, rounding="nearest")
    nearest = jax.jit(lambda x: quantize_values(x, nearest)[0])(x)
    assert jnp.any(apply(params, x) != nearest[:, :N])

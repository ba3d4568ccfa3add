import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from lowbit_jax.models import QuantizedLinear
from lowbit_jax.numerics import QTensor
from lowbit_jax.ops import (
    DotRecipe,
    QuantizedWeight,
    get_recipe,
    gradient_to_master,
    quantize_weight,
    quantized_dot,
)
from lowbit_jax.optim import (
    attach_quantized,
    match_paths,
    quantize_params,
    quartet,
    quartet_gradients,
)

LAYERS, WIDTH, PARTS = 2, 64, 4


class Layer(nn.Module):
    """Two matrices, one of them no square, and a residual connection."""

    recipe: DotRecipe

    @nn.compact
    def __call__(self, x, key):
        keys = jax.random.split(key)
        up = QuantizedLinear(2 * WIDTH, self.recipe, ("mlp", "embed"), name="up_proj")
        down = QuantizedLinear(WIDTH, self.recipe, ("embed", "mlp"), name="down_proj")
        return x + down(jnp.tanh(up(x, key=keys[0])), key=keys[1]), None


class Net(nn.Module):
    """A scan over layers, each of which may be recomputed in the backward pass."""

    recipe: DotRecipe
    remat: bool = False

    @nn.compact
    def __call__(self, x, key):
        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        scan = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(self.recipe, name="layers")(x, jax.random.split(key, LAYERS))[0]


MATRICES = match_paths(r"layers/.*_proj/weight")


@pytest.fixture(scope="module")
def batch():
    return jax.random.normal(jax.random.key(1), (PARTS * 32, WIDTH))


@pytest.fixture(scope="module")
def params(batch):
    init = jax.jit(Net(get_recipe("bf16")).init)
    variables = init(jax.random.key(0), batch, jax.random.key(0))
    # Times 8, so that the layers matter.
    return jax.tree.map(lambda p: 8 * p, nn.meta.unbox(variables)["params"])


def mean_loss_and_gradient(params, batch, recipe, micro_batches, *, once, remat=False):
    """As a training step does it, with weights quantized once or in every layer call."""
    quantized = quantize_params(params, recipe, MATRICES) if once else None

    def loss_fn(params, part, key):
        if quantized is not None:
            params = attach_quantized(params, quantized)
        y = Net(recipe, remat).apply({"params": params}, part, key)
        return jnp.mean((y - jnp.roll(part, 1, axis=-1)) ** 2)

    def accumulate(total, part_and_key):
        return jax.tree.map(
            jnp.add, total, jax.value_and_grad(loss_fn)(params, *part_and_key)
        ), None

    parts = batch.reshape(micro_batches, -1, WIDTH)
    keys = jax.random.split(jax.random.key(2), micro_batches)
    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
    total, _ = jax.lax.scan(accumulate, zeros, (parts, keys))
    loss, grads = jax.tree.map(lambda t: t / micro_batches, total)
    if once:
        to_master = quartet_gradients(recipe, MATRICES)
        grads, _ = to_master.update(grads, to_master.init(params), params)
    return loss, grads


@pytest.mark.parametrize(
    ("name", "micro_batches", "remat", "devices"),
    [
        ("mxfp4_forward", 1, False, 1),
        ("quartet", PARTS, True, 1),
        # Here sums in another order turn no rounding.
        ("mxfp4_forward", PARTS, True, 4),
    ],
)
def test_once_a_step_is_the_same_training_step(params, batch, name, micro_batches, remat, devices):
    @functools.partial(jax.jit, static_argnames="once")
    def run(params, once):
        recipe = get_recipe(name)
        return mean_loss_and_gradient(params, batch, recipe, micro_batches, once=once, remat=remat)

    mesh = jax.make_mesh((devices,), ("fsdp",), (jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    placed = jax.device_put(params, sharding) if devices > 1 else params
    (loss, grads), (expected_loss, expected) = run(placed, once=True), run(params, once=False)
    # Bound: equal operands in all products, whose sums of up to 128 terms, at most 6 products deep,
    # may be taken in another order, and so may those over micro-batches and of the rotation back;
    # a rounding that went the other way would show as 1e-2.
    assert abs(loss - expected_loss) <= 6 * 128 * 2**-24 * expected_loss
    for a, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=6 * (128 + 32 + 4) * 2**-24 * jnp.abs(e).max())


def rounded_entries(jaxpr, shapes, count=1, scope=""):
    """Entries of matrices of `shapes` that a program rounds to a grid, loops multiplied out."""
    total = 0
    for eqn in jaxpr.eqns:
        inner_scope = f"{scope}/{eqn.source_info.name_stack}"
        if eqn.primitive.name == "round" and "lowbit_quantize" in inner_scope:
            shape = eqn.outvars[0].aval.shape
            total += count * math.prod(shape) * (shape[-2:] in shapes)
        inner_count = count * eqn.params["length"] if eqn.primitive.name == "scan" else count
        for value in eqn.params.values():
            for program in value if isinstance(value, tuple | list) else [value]:
                if hasattr(program, "eqns"):
                    program = getattr(program, "jaxpr", program)
                    total += rounded_entries(program, shapes, inner_count, inner_scope)
    return total


def test_weights_are_rounded_once_a_step_and_not_in_every_micro_batch(params, batch):
    weights = jax.tree.leaves(params)
    assert [w.shape for w in weights] == [(LAYERS, WIDTH, 2 * WIDTH), (LAYERS, 2 * WIDTH, WIDTH)]
    entries = sum(w.size for w in weights)
    shapes = {w.shape[1:] for w in weights}  # activations have 32 rows

    def count(once):
        run = functools.partial(mean_loss_and_gradient, once=once, remat=True)
        recipe = get_recipe("mxfp4_forward")
        program = jax.make_jaxpr(run, static_argnums=(2, 3))(params, batch, recipe, PARTS)
        return rounded_entries(program.jaxpr, shapes)

    assert count(once=True) == entries
    assert count(once=False) == entries * PARTS * 2  # micro-batches; forward and recomputed


def two_layers(weights, x, recipe):
    hidden = jnp.tanh(quantized_dot(x, weights["up"], recipe))
    return jnp.mean(quantized_dot(hidden, weights["down"], recipe) ** 2)


@pytest.fixture(scope="module")
def weights():
    keys = jax.random.split(jax.random.key(3), 2)
    return {
        name: jax.random.normal(k, (64, 64)) / 8
        for name, k in zip(("up", "down"), keys, strict=True)
    }


def master_gradient(weights, x, recipe, place=lambda quantized: quantized):
    quantized = place(quantize_params(weights, recipe))
    loss = lambda w: two_layers(attach_quantized(w, quantized), x, recipe)  # noqa: E731
    tx = quartet_gradients(recipe)
    return tx.update(jax.grad(loss)(weights), tx.init(weights), weights)[0]


def test_sharded_weights_give_the_same_gradients_and_codes_are_what_is_gathered(weights):
    recipe = get_recipe("mxfp4_forward")
    x = jax.random.normal(jax.random.key(4), (32, 64))
    expected = jax.jit(jax.grad(two_layers), static_argnums=2)(weights, x, recipe)  # in the layers
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    rows, everywhere = (jax.NamedSharding(mesh, s) for s in (spec("data"), spec()))

    def replicated(quantized):
        return jax.lax.with_sharding_constraint(quantized, everywhere)

    @functools.partial(jax.jit, in_shardings=(rows, rows), out_shardings=rows)
    def sharded(weights, x):
        return master_gradient(weights, x, recipe, replicated)

    actual = sharded(*jax.device_put((weights, x), rows))
    for name in weights:
        assert actual[name].sharding.is_equivalent_to(rows, 2)
        # Bound: sums of 32 or 64 terms in another order, three products deep.
        scale = jnp.abs(expected[name]).max()
        np.testing.assert_allclose(actual[name], expected[name], atol=3 * 64 * 2**-23 * scale)
    program = sharded.lower(weights, x).compile().as_text()
    gathered = re.findall(r"(\w+)\[[\d,]*\]\S* all-gather\(", program)
    assert gathered
    assert set(gathered) == {"u8"}  # codes and exponents


def test_without_quantized_weights_it_is_adamw(weights):
    gradients = jax.tree.map(jnp.cos, weights)
    tx, adamw = quartet(1e-2, get_recipe("bf16")), optax.adamw(1e-2, 0.9, 0.95, weight_decay=0.1)
    actual, _ = jax.jit(tx.update)(gradients, tx.init(weights), weights)
    expected, _ = jax.jit(adamw.update)(gradients, adamw.init(weights), weights)
    chex.assert_trees_all_equal(actual, expected)  # Exact: the same arithmetic.
    assert all(q is None for q in quantize_params(weights, get_recipe("bf16")).values())


def test_the_chain_clips_and_decays_the_gradients_of_the_master_weights(weights):
    recipe = get_recipe("quest_w2a2_no_hadamard")
    gradients = jax.tree.map(lambda w: 100 * jnp.cos(w), weights)
    tx = quartet(
        1e-2, recipe, weight_decay=0.5, max_grad_norm=1.0, decay_mask={"up": True, "down": False}
    )
    actual, _ = jax.jit(tx.update)(gradients, tx.init(weights), weights)

    @jax.jit
    def by_hand(gradients):
        masters = {n: gradient_to_master(g, weights[n], recipe) for n, g in gradients.items()}
        factor = 1 / jnp.sqrt(sum(jnp.sum(g**2) for g in masters.values()))
        # The first step of Adam: m / (1 - b1) = g and v / (1 - b2) = g^2.
        steps = {n: factor * g / (jnp.abs(factor * g) + 1e-8) for n, g in masters.items()}
        return {n: -1e-2 * (s + (0.5 * weights[n] if n == "up" else 0)) for n, s in steps.items()}

    # Bound: some 10 roundings each; where g is masked both are exactly the decay.
    chex.assert_trees_all_close(actual, by_hand(gradients), rtol=20 * 2**-23, atol=1e-9)
    masked = by_hand(gradients)["down"] == 0
    assert 0 < masked.mean() < 0.2
    assert jnp.all(actual["down"][masked] == 0)


def test_masks_choose_the_leaves(weights):
    recipe = get_recipe("quest_w4a4_no_hadamard")
    params = {"layers": weights, "norm": jnp.ones(64)}
    default = quantize_params(params, recipe)
    assert default["norm"] is None
    assert all(isinstance(q, QTensor) for q in default["layers"].values())
    for mask in (match_paths("layers/up"), {"layers": {"up": True, "down": False}, "norm": False}):
        quantized = quantize_params(params, recipe, mask)
        assert isinstance(quantized["layers"]["up"], QTensor)
        assert quantized["layers"]["down"] is quantized["norm"] is None
        attached = attach_quantized(params, quantized)
        assert isinstance(attached["layers"]["up"], QuantizedWeight)
        assert attached["layers"]["down"] is weights["down"]
        tx = quartet_gradients(recipe, mask)
        gradients = jax.tree.map(lambda p: 10 * jnp.ones_like(p), params)
        updates, state = tx.update(gradients, tx.init(params), params)
        np.testing.assert_array_equal(updates["layers"]["down"], gradients["layers"]["down"])
        assert jnp.any(updates["layers"]["up"] != gradients["layers"]["up"])
        assert not jax.tree.leaves(state)


def test_several_recipes_attach_one_after_the_other(weights):
    recipes = {"up": get_recipe("quest_w4a4_no_hadamard"), "down": get_recipe("fp8_tensorwise")}
    params = weights
    for name, recipe in recipes.items():
        params = attach_quantized(params, quantize_params(weights, recipe, match_paths(name)))
    for name, recipe in recipes.items():
        assert params[name].master is weights[name]
        assert params[name].quantized.spec == recipe.y_w


def test_random_weights_draw_from_the_key_and_leaves_differ(weights):
    recipe = get_recipe("int4_weights_sr")
    same = {"a": weights["up"], "b": weights["up"]}
    quantized = jax.jit(lambda key: quantize_params(same, recipe, key=key))(jax.random.key(0))
    assert jnp.any(quantized["a"].codes != quantized["b"].codes)
    with pytest.raises(ValueError, match="needs a random key"):
        quantize_params(same, recipe)


def test_gradients_reach_only_the_parameters_and_none_stays_none(weights):
    recipe = get_recipe("quest_w4a4_no_hadamard")
    x = jax.random.normal(jax.random.key(5), (4, 64))

    def loss(weights):  # quantized inside the loss, as someone might
        return two_layers(attach_quantized(weights, quantize_params(weights, recipe)), x, recipe)

    gradients = jax.jit(jax.grad(loss))(weights)
    outside = {name: quantize_weight(w, recipe) for name, w in weights.items()}
    expected = jax.jit(jax.grad(lambda w: two_layers(attach_quantized(w, outside), x, recipe)))
    chex.assert_trees_all_close(gradients, expected(weights), atol=1e-6)
    tx = quartet_gradients(recipe)
    updates, _ = tx.update(gradients | {"up": None}, tx.init(weights), weights)
    assert updates["up"] is None
    with pytest.raises(ValueError, match=r"needs the parameters.*update\(.., params\)"):
        tx.update(gradients, tx.init(weights))

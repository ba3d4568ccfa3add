"""Training steps on meshes of eight devices, against one device."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params

from lowbit_jax.models import Llama, LlamaConfig, llama_rules
from lowbit_jax.numerics import FP8_E4M3
from lowbit_jax.ops.quantized_dot import quantized_dot
from lowbit_jax.ops.recipes import get_recipe, weight_projection
from lowbit_jax.optim import (
    add_cage_post_correction,
    attach_quantized,
    eco,
    match_paths,
    quantize_leaves,
    quantize_params,
)
from lowbit_jax.parallel import make_layout, make_mesh
from lowbit_jax.train.checkpoint import restore_latest, save_checkpoint
from lowbit_jax.train.placement import make_placement
from lowbit_jax.train.state import abstract_state, create_state
from lowbit_jax.train.step import StepPlan, loss_function, make_train_step

LAYERS, D, F, BATCH, STEPS = 2, 128, 256, 64, 3
PLAN = StepPlan(micro_batches=2, needs_key=True)
CASES = {(2, 2, 2): 3, (1, 8, 1): 2}  # stages of ZeRO; test_meshes.py has the other meshes
AXES = {
    "layers": {"up": ("layers", "mlp", "embed"), "down": ("layers", "embed", "mlp")},
    "head": ("vocab", "embed"),
}
QUEST, QUARTET = get_recipe("quest_w4a4"), get_recipe("quartet")
STOCHASTIC = dataclasses.replace(FP8_E4M3, rounding="stochastic")
# Weights on their way to a grid, in bfloat16, and as codes alone; moments in bfloat16.
TX = optax.chain(
    eco(3e-3, STOCHASTIC, mask=match_paths("head"), moment_dtype=jnp.bfloat16),
    optax.masked(
        add_cage_post_correction(weight_projection(QUEST), 5.0, 3e-3),
        {"layers": {"up": True, "down": False}, "head": False},
    ),
)


def loss_fn(params, batch, key):
    """QuEST, then Quartet, which rounds gradients at random, in each of two layers."""
    x, y = batch

    def layer(x, weights_and_key):
        w, key = weights_and_key
        hidden = jnp.tanh(quantized_dot(x, w["up"], QUEST))
        return x + quantized_dot(hidden, w["down"].astype(jnp.float32), QUARTET, key=key), None

    x, _ = lax.scan(layer, x, (params["layers"], jax.random.split(key, LAYERS)))
    return jnp.mean(jnp.square(x @ params["head"].T - y))


def create(key):
    up, down, head = jax.random.split(key, 3)
    params = {
        "layers": {
            "up": 0.1 * jax.random.normal(up, (LAYERS, F, D)),
            "down": (0.1 * jax.random.normal(down, (LAYERS, D, F))).astype(jnp.bfloat16),
        },
        "head": 0.1 * jax.random.normal(head, (64, D)),
    }
    return create_state(params, TX, lambda p: quantize_leaves(p, FP8_E4M3, match_paths("head")))


def make_batch(step):
    x = np.random.default_rng(step).normal(size=(BATCH, D)).astype(np.float32)
    return x, np.roll(x, 1, axis=1)[:, :64].copy()


def run(step_fn, state, batches=None):
    """Loss and gradient norm of each step, and the parameters after the first."""
    measured = []
    for step in range(STEPS):
        state, metrics = step_fn(state, make_batch(step))
        measured.append((float(metrics.loss), float(metrics.grad_norm)))
        if step == 0:
            params = jax.device_get(state.params)
    return np.array(measured), params, state


@pytest.fixture(scope="module")
def start():
    return jax.device_get(jax.jit(create)(jax.random.key(0)))


@pytest.fixture(scope="module")
def on_one_device(start):
    """What `run` gives on one device, and how far rounding moves it."""
    step_fn = make_train_step(loss_fn, TX, PLAN)
    expected, params, _ = run(step_fn, jax.device_put(start))
    up = start.params["layers"]["up"]

    def perturbed(seed):
        # Sums of n = D terms in another order differ by some sqrt(n) * 2**-24 of their terms' size.
        noise = np.random.default_rng(seed).normal(size=up.shape) * D**0.5 * 2.0**-24
        layers = {**start.params["layers"], "up": (up * (1 + noise)).astype(np.float32)}
        state = start._replace(params={**start.params, "layers": layers})
        return run(step_fn, jax.device_put(state))[0] - expected

    noise = np.sqrt(np.mean([perturbed(seed) ** 2 for seed in range(6)], axis=0))
    return expected, params, noise


@pytest.fixture(scope="module", params=CASES, ids=lambda mesh: "x".join(map(str, mesh)))
def on_mesh(request, start):
    """What `run` gives on a mesh, and the placement."""
    placement = make_placement(
        start, AXES, make_mesh(*request.param), CASES[request.param], micro_batches=2
    )
    step_fn = make_train_step(loss_fn, TX, PLAN, placement=placement)
    results = run(step_fn, jax.device_put(start, placement.state))
    assert step_fn._cache_size() == 1  # the state that a step returns is one that it takes
    return *results, placement


def test_losses_are_those_of_one_device(on_mesh, on_one_device):
    measured, _, _, _ = on_mesh
    expected, _, noise = on_one_device
    # Statistical: other orders of sums turn a rounding to 4 bits here and there, which then grows.
    # Six runs with perturbed weights tell by how much; 10 of their standard deviations are passed
    # by one value in 10,000. To that a bound: the loss is a sum of BATCH * 64 squares.
    bound = BATCH * 64 * 2.0**-24 * expected
    assert np.all(np.abs(measured - expected) <= 10 * noise + bound)
    # A step moves them by far more.
    assert np.all((10 * noise + bound)[:-1] < 0.1 * np.abs(np.diff(expected, axis=0)))


def test_random_bits_do_not_depend_on_the_mesh(on_mesh, on_one_device):
    _, params, state, placement = on_mesh
    _, expected, _ = on_one_device
    # Statistical: a sum that moves by an ulp of float32 meets another threshold in one of 2**16
    # roundings to bfloat16 or of 2**20 to E4M3; other bits would turn a tenth of them.
    for path in (("layers", "down"), ("head", "codes")):
        got, wanted = (
            p[path[0]][path[1]] if path[0] == "layers" else p["head"].codes
            for p in (params, expected)
        )
        assert (np.asarray(got) != np.asarray(wanted)).mean() < 1e-2
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(placement.state), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_a_state_is_made_where_it_lies_and_is_the_same(start):
    placement = make_placement(start, AXES, make_mesh(1, 8, 1), 3)
    compiled = jax.jit(create, out_shardings=placement.state).lower(jax.random.key(0)).compile()
    state = compiled(jax.random.key(0))
    chex.assert_trees_all_equal(jax.device_get(state), start)  # Exact: the same random bits.
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes < sum(leaf.nbytes for leaf in jax.tree.leaves(start)) / 7
    assert memory.temp_size_in_bytes < sum(leaf.nbytes for leaf in jax.tree.leaves(start)) / 2


def test_a_checkpoint_is_restored_onto_other_meshes(start, tmp_path):
    state = jax.device_put(start, jax.devices()[0])
    for step, (mesh, zero) in enumerate(CASES.items()):
        save_checkpoint(tmp_path, state._replace(step=jnp.int32(step)), {})
        placement = make_placement(start, AXES, make_mesh(*mesh), zero)
        target = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            abstract_state(start),
            placement.state,
        )
        state, _ = restore_latest(tmp_path, target, warn=pytest.fail)
        for leaf, place in zip(
            jax.tree.leaves(state), jax.tree.leaves(placement.state), strict=True
        ):
            assert leaf.sharding == place
        expected = start._replace(step=np.int32(step))
        chex.assert_trees_all_equal(jax.device_get(state), expected)  # Exact: stored bytes.


@pytest.mark.parametrize("recipe", ["bf16", "rtn_w4a4"])
def test_a_layer_gathers_its_own_weights_as_codes_where_it_has_them(recipe):
    """`rtn_w4a4` quantizes once a step here: the layers have codes of uint8."""
    recipe = get_recipe(recipe)
    model = Llama(
        LlamaConfig(64, 128, LAYERS, 4, d_ff=F, dtype="float32", recipe_rules=llama_rules(recipe))
    )
    tokens = np.zeros((8, 16), np.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    params = nn.meta.unbox(params)
    layout = make_layout(make_mesh(1, 4, 2), 3, {"heads": 4, "kv_heads": 4})
    matrices = match_paths(r"layers/.*_proj/weight")

    def gradient(params):
        def loss(params):
            attached = attach_quantized(params, quantized)
            return loss_function(model, layout)(attached, (tokens, tokens), None)

        quantized = quantize_params(params, recipe, matrices)
        return jax.grad(loss)(params)

    moved = constraints(jax.make_jaxpr(gradient)(params).jaxpr)
    up = ((F, D), jnp.float32) if recipe.y_w is None else ((F, D // 2), jnp.uint8)
    # Used: cut by tensor alone. The gradient: summed into the part of each device.
    assert (*up, ("tensor", None)) in moved
    assert ((F, D), jnp.float32, (("tensor", "fsdp"), None)) in moved
    assert ((8, 16, D), jnp.float32, (("data", "fsdp"),)) in moved


def constraints(jaxpr):
    """Shape, dtype and spec of all that a program places, loops included."""
    found = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "sharding_constraint":
            aval = eqn.outvars[0].aval
            found.add((aval.shape, aval.dtype.type, tuple(eqn.params["sharding"].spec)))
        for inner in jaxprs_in_params(eqn.params):
            found |= constraints(inner)
    return found

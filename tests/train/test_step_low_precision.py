"""Training steps on weights that are stored as codes or in bfloat16, or quantized once a step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowbit_jax.numerics import FP8_E4M3, QTensor
from lowbit_jax.ops.quantized_dot import quantized_dot
from lowbit_jax.ops.recipes import get_recipe
from lowbit_jax.optim import (
    apply_updates_low_precision,
    dequantize_leaves,
    eco,
    match_paths,
    quantize_leaves,
)
from lowbit_jax.train.checkpoint import restore_latest, save_checkpoint
from lowbit_jax.train.offender import first_offender
from lowbit_jax.train.state import abstract_state, create_state
from lowbit_jax.train.step import StepPlan, make_train_step

LAYERS, WIDTH, BATCH = 2, 32, 8
STACKED = match_paths("layers/weight")
TX = eco(1e-2, FP8_E4M3, mask=STACKED, decay_mask=STACKED, max_grad_norm=1.0)


def make_loss(layer_recipe="bf16", head_recipe="bf16"):
    recipes = get_recipe(layer_recipe), get_recipe(head_recipe)

    def loss_fn(params, batch, key):
        """A small residual network."""
        x, y = batch
        for layer in range(LAYERS):
            w = jax.tree.map(lambda leaf: leaf[layer], params["layers"]["weight"])  # noqa: B023
            x = x + jnp.tanh(quantized_dot(x, w, recipes[0]))
        return jnp.mean(jnp.square(quantized_dot(x, params["head"]["weight"], recipes[1]) - y))

    return loss_fn


LOSS = make_loss()


def make_params():
    a, b = jax.random.split(jax.random.key(0))
    return {
        "layers": {"weight": 0.3 * jax.random.normal(a, (LAYERS, WIDTH, WIDTH))},
        "head": {"weight": jax.random.normal(b, (32, WIDTH))},
    }


def make_batch(step):
    x = np.random.default_rng(step).normal(size=(BATCH, WIDTH)).astype(np.float32)
    return x, x[:, ::-1].copy()


def coded_state():
    return jax.jit(
        lambda: create_state(make_params(), TX, lambda p: quantize_leaves(p, FP8_E4M3, STACKED))
    )()


@pytest.fixture(scope="module")
def coded_step():
    return make_train_step(LOSS, TX)


def run(step_fn, state, steps):
    for step in steps:
        state, metrics = step_fn(state, make_batch(step))
    return state, metrics


def test_codes_take_the_steps_of_a_plain_loop_written_out(coded_step):
    state, metrics = run(coded_step, coded_state(), range(2))

    @jax.jit
    def plain(params, opt_state, batch):
        loss, grads = jax.value_and_grad(LOSS)(dequantize_leaves(params), batch, None)
        updates, opt_state = TX.update(grads, opt_state, params)
        return apply_updates_low_precision(params, updates), opt_state, loss

    params, opt_state = coded_state().params, TX.init(coded_state().params)
    for step in range(2):
        params, opt_state, loss = plain(params, opt_state, make_batch(step))
    # Bound: sums of WIDTH terms, a few products deep, in another compilation.
    np.testing.assert_allclose(metrics.loss, loss, rtol=4 * WIDTH * 2**-23)
    codes, expected = (p["layers"]["weight"].codes for p in (state.params, params))
    assert isinstance(state.params["layers"]["weight"], QTensor)
    # Exact, as to nearest no sum is within float32's rounding of the middle of a step: a chance of
    # 2**-15 an entry.
    np.testing.assert_array_equal(codes, expected)
    assert (codes != coded_state().params["layers"]["weight"].codes).mean() > 0.1


def test_the_step_compiles_once_and_donates_codes(coded_step):
    state = coded_state()
    codes = state.params["layers"]["weight"].codes
    run(coded_step, state, range(3))
    assert codes.is_deleted()
    assert coded_step._cache_size() == 1


def test_a_step_that_is_not_finite_leaves_the_codes_and_is_named_by_weight_and_layer(coded_step):
    state, _ = run(coded_step, coded_state(), range(1))
    before = jax.device_get(state)
    x, y = make_batch(1)
    state, metrics = coded_step(state, (x * np.nan, y))
    assert not np.isfinite(metrics.loss)
    chex.assert_trees_all_equal(state.params, before.params)  # Exact: kept, not recomputed.
    chex.assert_trees_all_equal(state.opt_state, before.opt_state)
    weight = state.params["layers"]["weight"]
    scales = weight.scales.at[1, 3, 0].set(jnp.nan)
    spoilt = QTensor(weight.codes, scales, None, weight.spec)
    state = state._replace(params={**state.params, "layers": {"weight": spoilt}})
    state, metrics = coded_step(state, make_batch(2))
    said = first_offender(metrics, state.params)
    assert said.startswith("parameter layers/weight, layer 1;")


def test_codes_come_back_from_a_checkpoint_and_go_on_to_the_same_bits(coded_step, tmp_path):
    placement = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = jax.device_put(coded_state(), placement)
    target = abstract_state(state)
    state, _ = run(coded_step, state, range(2))
    save_checkpoint(tmp_path, state, {})
    restored, _ = restore_latest(tmp_path, target, warn=pytest.fail)
    chex.assert_trees_all_equal(restored, state)  # Exact: stored, not computed.
    spoilt = restored._replace(params=jax.tree.map(
        lambda leaf: leaf * jnp.nan if leaf.dtype == jnp.float32 else leaf, restored.params
    ))  # fmt: skip
    with pytest.raises(ValueError, match=r"not finite in .*layers/weight/scales"):
        save_checkpoint(tmp_path, spoilt, {})
    unbroken, _ = run(coded_step, state, range(2, 4))
    resumed, _ = run(coded_step, restored, range(2, 4))
    chex.assert_trees_all_equal(resumed, unbroken)  # Exact: the same program on the same bits.


def test_bfloat16_weights_feel_updates_below_their_precision():
    tx = optax.sgd(1e-4)
    state = create_state({"w": jnp.ones(4096, jnp.bfloat16)}, tx)
    step_fn = make_train_step(lambda p, b, k: jnp.sum(p["w"].astype(jnp.float32)) + b, tx)
    for _ in range(50):
        state, _ = step_fn(state, jnp.float32(0))
    assert state.params["w"].dtype == jnp.bfloat16
    moved = 1 - np.asarray(state.params["w"], np.float64)
    # Statistical: 5 standard errors of the mean of 4096 walks, a false alarm in 2 million seeds.
    assert abs(moved.mean() - 50e-4) < 5 * moved.std() / 4096**0.5
    # Statistical: a binomial spread, for each step draws anew; with the same bits every time each
    # weight would move always or never. The deviation of 4096 samples is good to 2 %.
    p = 1e-4 * 2**8
    assert moved.std() == pytest.approx(2**-8 * (50 * p * (1 - p)) ** 0.5, rel=0.1)


ONCE = (("layers/weight", get_recipe("quartet:dx=bf16,dw=bf16")),
        ("head/weight", get_recipe("fp8_weights")))  # fmt: skip


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_weights_quantized_once_a_step_give_the_gradients_of_the_layers(micro_batches):
    loss_fn = make_loss(*(str(recipe) for _, recipe in ONCE))
    results = []
    for once in ((), ONCE):
        tx = optax.sgd(1.0)  # its update shows the gradient itself
        step_fn = make_train_step(loss_fn, tx, StepPlan(micro_batches, weights_once=once))
        state, metrics = step_fn(create_state(make_params(), tx), make_batch(0))
        chex.assert_trees_all_equal_structs(state.params, make_params())
        results.append(jax.device_get((state.params, metrics)))
    (in_layer, a), (once, b) = results
    # Bound: the same terms in another order, LAYERS + 1 products deep, each of WIDTH or BATCH
    # terms and rotated in blocks of 32; gradients are O(1). No weight lies on the edge of its mask.
    tolerance = (LAYERS + 1) * (WIDTH + BATCH + 5) * 2**-23
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance), once, in_layer)
    np.testing.assert_allclose(b.loss, a.loss, rtol=tolerance)
    np.testing.assert_allclose(b.grad_norm, a.grad_norm, rtol=tolerance)


def test_weights_quantized_once_a_step_draw_new_bits_every_step():
    recipe, tx = get_recipe("fp8_weights_sr"), optax.sgd(0.0)

    def loss_fn(params, batch, key):  # its own bits are the same every time
        y = quantized_dot(batch[0], params["head"]["weight"], recipe, key=jax.random.key(0))
        return jnp.mean(jnp.square(y - batch[1]))

    plan = StepPlan(needs_key=True, weights_once=(("head/weight", recipe),))
    step_fn = make_train_step(loss_fn, tx, plan)

    def loss_at(step):
        state = create_state(make_params(), tx)._replace(step=jnp.int32(step))
        return float(step_fn(state, make_batch(0))[1].loss)

    assert loss_at(0) == loss_at(0)
    assert len({loss_at(step) for step in range(4)}) == 4


def quantizers(jaxpr, inside_scan=False):
    """For each equation of a quantizer, whether it is in a loop."""
    for eqn in jaxpr.eqns:
        if "lowbit_quantize" in str(eqn.source_info.name_stack):
            yield inside_scan
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from quantizers(inner, inside_scan or eqn.primitive.name == "scan")


@pytest.mark.parametrize("once", [False, True])
def test_micro_batches_share_one_quantization(once):
    loss_fn, tx = make_loss("int4_weights", "int4_weights"), optax.sgd(1.0)
    recipe = get_recipe("int4_weights")
    weights = (("layers/weight", recipe), ("head/weight", recipe)) if once else ()
    step_fn = make_train_step(loss_fn, tx, StepPlan(4, weights_once=weights))
    traced = step_fn.trace(create_state(make_params(), tx), make_batch(0))
    places = set(quantizers(traced.jaxpr.jaxpr))
    assert places == {not once}  # in the loop over micro-batches, or before it

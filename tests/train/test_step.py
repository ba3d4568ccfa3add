import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowbit_jax.train.checkpoint import restore_latest, save_checkpoint
from lowbit_jax.train.offender import first_offender
from lowbit_jax.train.state import abstract_state, create_state
from lowbit_jax.train.step import StepPlan, make_train_step

LAYERS, WIDTH, BATCH = 3, 8, 8


@jax.custom_vjp
def poison(x, bad):
    """Identity whose gradient is NaN where `bad`."""
    return x


poison.defvjp(lambda x, bad: (x, bad), lambda bad, g: (jnp.where(bad, jnp.nan, g), None))


def loss_fn(params, batch, key):
    """A small residual network; an input of 1e9 in column 0 poisons the gradient of layer 1."""
    x, y = batch
    bad = (x[:, 0] > 1e8).any()
    x = jnp.where(x > 1e8, 0, x)
    for layer in range(LAYERS):
        w = params["layers"]["weight"][layer]
        w = poison(w, bad & (layer == 1))
        x = x + jnp.tanh(x @ w.T)
    if key is not None:
        x = x + jax.random.normal(key, x.shape)
    return jnp.mean(jnp.square(x @ params["head"]["weight"].T - y))


def make_params(seed=0):
    a, b = jax.random.split(jax.random.key(seed))
    return {
        "layers": {"weight": 0.3 * jax.random.normal(a, (LAYERS, WIDTH, WIDTH))},
        "head": {"weight": jax.random.normal(b, (1, WIDTH))},
    }


def make_batch(step):
    x = np.random.default_rng(step).normal(size=(BATCH, WIDTH)).astype(np.float32)
    return x, x[:, :1]


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


@pytest.fixture(scope="module")
def train_step():
    return make_train_step(loss_fn, TX, StepPlan(), learning_rate=optax.linear_schedule(1, 0, 4))


def run(step_fn, state, steps):
    losses = []
    for step in steps:
        state, metrics = step_fn(state, make_batch(step))
        losses.append(float(metrics.loss))
    return state, losses


def test_equals_a_plain_loop_written_out(train_step):
    state, metrics = train_step(create_state(make_params(), TX), make_batch(0))
    params = make_params()
    loss, grads = jax.jit(jax.value_and_grad(lambda p: loss_fn(p, make_batch(0), None)))(params)
    updates, _ = TX.update(grads, TX.init(params), params)
    expected = optax.apply_updates(params, updates)
    # Bound: the same float32 operations in another compilation. Each entry moves by at most
    # 1e-2 * (1 + weight decay); Adam's first step is sign-like, so rounding of the gradient
    # leaves a relative error of some ulps there: 1e-2 * 2**-17 in absolute terms.
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=2**-22, atol=1e-2 * 2**-17),
        state.params,
        expected,
    )
    np.testing.assert_allclose(metrics.loss, loss, rtol=2**-20)
    # The norm of each layer apart, and their root sum of squares; 64 terms of float32.
    norms = np.linalg.norm(np.asarray(grads["layers"]["weight"]).reshape(LAYERS, -1), axis=1)
    np.testing.assert_allclose(metrics.leaf_norms["layers"]["weight"], norms, rtol=64 * 2**-23)
    np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(grads), rtol=64 * 2**-23)
    assert (int(state.step), float(metrics.learning_rate)) == (1, 1.0)


def test_compiles_once_also_after_a_restore(tmp_path):
    step_fn = make_train_step(loss_fn, TX)
    placement = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = jax.device_put(create_state(make_params(), TX), placement)
    target = abstract_state(state)
    state, _ = run(step_fn, state, range(3))
    save_checkpoint(tmp_path, state, {})
    state, losses = run(step_fn, state, range(3, 5))
    restored, _ = restore_latest(tmp_path, target, warn=pytest.fail)
    restored, again = run(step_fn, restored, range(3, 5))
    assert step_fn._cache_size() == 1
    assert again == losses  # Exact: the same state, the same program.
    chex.assert_trees_all_equal(restored, state)


def test_the_old_state_is_donated(train_step):
    state = create_state(make_params(), TX)
    train_step(state, make_batch(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_accumulated_gradients_equal_those_of_the_whole_batch(micro_batches):
    results = []
    for parts in (1, micro_batches):
        # sgd: its update shows the gradient itself
        step_fn = make_train_step(loss_fn, optax.sgd(1.0), StepPlan(micro_batches=parts))
        state, metrics = step_fn(create_state(make_params(), optax.sgd(1.0)), make_batch(0))
        results.append((jax.device_get(state.params), float(metrics.loss)))
    (whole, loss), (cut, cut_loss) = results
    # Bound: sums of BATCH terms in another order differ by at most BATCH * eps times the sum of
    # absolute terms; each term passes LAYERS + 1 products of WIDTH terms with their own
    # WIDTH * eps. Terms are O(10) here, gradients O(1) to O(10).
    tolerance = (BATCH + (LAYERS + 1) * WIDTH) * 2**-23 * 10
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=tolerance), cut, whole)
    assert abs(loss - cut_loss) <= tolerance * loss


def test_a_batch_that_does_not_divide_is_refused():
    step_fn = make_train_step(loss_fn, TX, StepPlan(micro_batches=3))
    with pytest.raises(ValueError, match="multiple of micro_batches=3"):
        step_fn(create_state(make_params(), TX), make_batch(0))
    with pytest.raises(ValueError, match="micro_batches must be at least 1"):
        make_train_step(loss_fn, TX, StepPlan(micro_batches=0))


def test_random_bits_follow_from_seed_and_step_alone():
    plan = StepPlan(micro_batches=2, seed=5, needs_key=True)
    tx = optax.sgd(0.0)  # the parameters stay, so that only the key differs
    step_fn = make_train_step(loss_fn, tx, plan)

    def loss_at(step):
        state = create_state(make_params(), tx)._replace(step=jnp.int32(step))
        return float(step_fn(state, make_batch(0))[1].loss)

    assert loss_at(0) == loss_at(0)
    assert len({loss_at(step) for step in range(4)}) == 4
    # Micro-batches draw different bits: two equal halves see the noise of two keys.
    x, y = make_batch(0)
    twice = (np.concatenate([x[:4], x[:4]]), np.concatenate([y[:4], y[:4]]))
    whole = float(step_fn(create_state(make_params(), tx), twice)[1].loss)
    key = jax.random.fold_in(jax.random.key(5), 0)
    halves = [
        float(loss_fn(make_params(), (x[:4], y[:4]), jax.random.fold_in(key, part)))
        for part in range(2)
    ]
    # Bound: that of the test of accumulated gradients, which the noise exceeds by far.
    tolerance = (BATCH + (LAYERS + 1) * WIDTH) * 2**-23 * 10 * whole
    assert abs(whole - sum(halves) / 2) <= tolerance
    assert abs(halves[0] - halves[1]) > 100 * tolerance


def test_a_poisoned_gradient_changes_nothing_and_is_named_by_path_and_layer(train_step):
    state, _ = run(train_step, create_state(make_params(), TX), range(2))
    before = jax.device_get(state)
    x, y = make_batch(2)
    x = x.copy()
    x[0, 0] = 1e9
    state, metrics = train_step(state, (x, y))
    assert np.isfinite(metrics.loss)
    assert not np.isfinite(metrics.grad_norm)
    for new, old in zip(
        jax.tree.leaves((state.params, state.opt_state)),
        jax.tree.leaves((before.params, before.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(new, old)  # Exact: kept, not recomputed.
    assert int(state.step) == 3
    said = first_offender(metrics, state.params)
    assert said.startswith("gradient of layers/weight, layer 1;")


def test_a_poisoned_parameter_is_named_before_the_gradients_that_it_spoils(train_step):
    params = make_params()
    params["layers"]["weight"] = params["layers"]["weight"].at[2, 3, 4].set(jnp.nan)
    state, metrics = train_step(create_state(params, TX), make_batch(0))
    assert not np.isfinite(metrics.loss)
    said = first_offender(metrics, state.params)
    assert said.startswith("parameter layers/weight, layer 2;")


def test_a_poisoned_input_is_put_down_to_the_forward_pass(train_step):
    x, y = make_batch(0)
    x = x.copy()
    x[1, 1] = np.nan
    state, metrics = train_step(create_state(make_params(), TX), (x, y))
    assert first_offender(metrics, state.params).startswith("the forward pass")

"""What every optimizer must do: a table to which each new one adds a line."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from lowbit_jax.ops import get_recipe
from lowbit_jax.optim import (
    MOMENT_E4M3_128,
    adamw_low_precision,
    cage,
    eco,
    elsa,
    elsa_low_precision,
    match_paths,
    quartet,
)

STEPS = 1500  # of the descents
SHORT = 4  # of everything else
# Bound: two compilations of one step round differently by fewer than 32 roundings of 2**-24 of its
# largest term; SHORT steps add up to less than this.
RTOL = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer: `make(learning_rate, **options)`."""

    make: Callable[..., optax.GradientTransformation]
    options: dict[str, Any]
    static: tuple[str, ...]  # what optax.inject_hyperparams must not touch
    rosenbrock_rate: float = 0.1  # the peak; Adam's steps have the size of the learning rate
    update_dtype: str = "bfloat16"  # of the updates of bfloat16 weights

    @functools.cached_property
    def at_constant_rate(self):
        """The optimizer that the tests share, and with it what was compiled."""
        return self(1e-2)

    def __call__(self, learning_rate):
        return self.make(learning_rate, **self.options)


def onto_quarters(x):
    return jnp.round(4 * x) / 4


def cage_case(order):
    options = {
        "projection": onto_quarters,
        "total_steps": SHORT,  # one silent step, then another strength at each count up to 0.3
        "strength": 0.3,
        "silence": 1 / SHORT,
        "order": order,
        "weight_decay": 0.0,
    }
    return Case(cage, options, ("projection", "total_steps", "silence"))


def tree_onto_quarters(tree, importance=None):
    return jax.tree.map(onto_quarters, tree)


def onto_4096ths(x, key):
    return jnp.floor(4096 * x + jax.random.uniform(key, x.shape, x.dtype)) / 4096


def eco_case(optimizer):
    # A function as quantizer, so that the minima of the descents lie on its grid. tests/optim/
    # test_eco.py has weights that exist only as codes, which optax.apply_updates cannot add to.
    options = {"spec": onto_4096ths, "optimizer": optimizer, "weight_decay": 0.0}
    return Case(eco, options, ("spec", "moment_dtype", "seed"))


def elsa_case(make, **fields):
    # At a strength for which the pull does not stop the descent of Rosenbrock's valley.
    options = {
        "projection": tree_onto_quarters, "strength": 1e-3, "interval": 2, "max_grad_norm": None
    }  # fmt: skip
    return Case(
        make, options, ("projection", "interval", "is_objective_aware", "max_grad_norm"), **fields
    )


CASES = {f"cage_{order}": cage_case(order) for order in ("fused", "coupled", "post")} | {
    "eco_adam": eco_case("adam"),
    # A step of SGD is as long as its gradient, which on Rosenbrock's function has a curvature of
    # 1,000: with momentum it diverges from 2 (1 + b1) / (1 - b1) / 1000 = 0.038 on.
    "eco_sgd": dataclasses.replace(eco_case("sgd"), rosenbrock_rate=0.03),
    # At one bit the mask hides gradients of matrices; vectors, as in the descents, are not rounded.
    "quartet": Case(
        quartet, {"recipe": get_recipe("quest_w1a1_no_hadamard"), "weight_decay": 0.0}, ("recipe",)
    ),
    "elsa": elsa_case(elsa),
    "elsa_low_precision": elsa_case(elsa_low_precision, update_dtype="float32"),
    # Its updates are float32 on purpose: apply_updates_low_precision adds them, then rounds.
    "adamw_low_precision": Case(
        adamw_low_precision,
        {"m": MOMENT_E4M3_128, "v": "bfloat16", "weight_decay": 0.0},
        ("seed",),
        update_dtype="float32",
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


def problem(dtype=jnp.float32):
    """Parameters, and SHORT gradients stacked: multiples of 1/8, so that means of two are exact."""
    rng = np.random.default_rng(0)
    params = {"dense": {"weight": rng.normal(size=(8, 4))}, "bias": rng.normal(size=(8,))}
    gradients = jax.tree.map(
        lambda p: rng.integers(-16, 17, size=(SHORT, *p.shape)) / 8 + 1 / 16, params
    )
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, gradients))


def at(gradients, step):
    return jax.tree.map(lambda g: g[step], gradients)


@functools.cache
def step_of(tx):
    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, updates

    return step


def train(tx, params, gradients, state=None, start=0, stop=SHORT):
    """One compiled step called `stop - start` times; it must not compile again."""
    step = step_of(tx)
    state = tx.init(params) if state is None else state
    for t in range(start, stop):
        params, state, _ = step(params, state, at(gradients, t))
        compiled = step._cache_size() if t == start else compiled
    assert step._cache_size() == compiled
    return params, state


def assert_trees_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=RTOL * float(jnp.abs(e).max()))


def assert_trees_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)


def parabola(x):
    return jnp.sum((x["x"] - jnp.array([1.0, -0.75, 0.25])) ** 2)


def rosenbrock(x):
    a, b = x["x"][..., :1], x["x"][..., 1:]
    return jnp.sum((1.0 - a) ** 2 + 100.0 * (b - a**2) ** 2)


@pytest.mark.parametrize(
    ("loss", "start"),
    [(parabola, [-1.0, 2.0, 1.0]), (rosenbrock, [0.0, 0.0])],
    ids=["parabola", "rosenbrock"],
)
def test_descends_to_the_minimum(case, loss, start):
    # Both minima lie on the grid, where f and the residual vanish together.
    peak = case.rosenbrock_rate if loss is rosenbrock else 0.1
    tx = case(optax.cosine_decay_schedule(peak, STEPS))

    @jax.jit
    def descend(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, STEPS)[0][0]

    params = {"x": jnp.array(start)}
    # A claim, not a tolerance: the loss falls ten-thousandfold.
    assert loss(descend(params)) <= 1e-4 * loss(params)


def test_compiled_equals_op_by_op_and_compiles_once(case):
    params, gradients = problem()
    tx = case(optax.linear_schedule(1e-2, 1e-3, SHORT))
    compiled, _ = train(tx, params, gradients)
    state = tx.init(params)
    for t in range(SHORT):
        updates, state = tx.update(at(gradients, t), state, params)
        params = optax.apply_updates(params, updates)
    assert_trees_close(compiled, params)


def test_bfloat16_stays_bfloat16(case):
    params, gradients = problem(jnp.bfloat16)
    tx = case.at_constant_rate
    _, _, updates = step_of(tx)(params, tx.init(params), at(gradients, 0))
    trained, _ = train(tx, params, gradients)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(case.update_dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("bfloat16")}
    assert all(np.isfinite(np.float32(leaf)).all() for leaf in jax.tree.leaves(trained))


def test_masked_leaves_pass_through_and_the_others_train_as_alone(case):
    params, gradients = problem()
    masked = optax.masked(case.at_constant_rate, match_paths("dense/.*"))
    updates, _ = masked.update(at(gradients, 0), masked.init(params), params)
    np.testing.assert_array_equal(updates["bias"], gradients["bias"][0])  # Exact: untouched.
    alone = case.at_constant_rate
    expected, _ = alone.update(
        {"dense": at(gradients, 0)["dense"]},
        alone.init({"dense": params["dense"]}),
        {"dense": params["dense"]},
    )
    assert_trees_close(updates["dense"], expected["dense"])


def test_partition_trains_each_group_as_alone(case):
    params, gradients = problem()
    groups = {"slow": case(1e-3), "fast": case.at_constant_rate}
    tx = optax.partition(groups, {"dense": "slow", "bias": "fast"})
    trained, _ = train(tx, params, gradients)
    for name, group in (("dense", "slow"), ("bias", "fast")):
        alone, _ = train(groups[group], {name: params[name]}, {name: gradients[name]})
        assert_trees_close(trained[name], alone[name])


def test_multi_steps_takes_one_step_with_the_mean_gradient(case):
    params, gradients = problem()
    trained, _ = train(optax.MultiSteps(case.at_constant_rate, 2), params, gradients)
    means = jax.tree.map(lambda g: (g[::2] + g[1::2]) / 2, gradients)
    expected, _ = train(case.at_constant_rate, params, means, stop=SHORT // 2)
    assert_trees_close(trained, expected)


def test_injected_learning_rate_can_be_changed_between_steps(case):
    params, gradients = problem()
    tx = optax.inject_hyperparams(case.make, static_args=case.static)(
        learning_rate=1e-2, **case.options
    )
    state = tx.init(params)
    for rate, plain in ((1e-2, case.at_constant_rate), (2.5e-3, case(2.5e-3))):
        state.hyperparams["learning_rate"] = jnp.float32(rate)
        actual, _ = train(tx, params, gradients, state)
        expected, _ = train(plain, params, gradients)
        assert_trees_close(actual, expected)


def test_sharded_parameters_and_state_train_as_on_one_device(case):
    params, gradients = problem()
    count = max(n for n in (1, 2, 4, 8) if n <= jax.device_count())
    mesh = jax.make_mesh(
        (count,), ("shard",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:count]
    )
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("shard"))
    across = jax.device_put(params, rows)
    tx = case.at_constant_rate
    state = jax.jit(tx.init)(across)
    for t in range(SHORT):
        across, state, _ = step_of(tx)(across, state, jax.device_put(at(gradients, t), rows))
    shapes = {leaf.shape for leaf in jax.tree.leaves(across)}
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape in shapes]
    assert len(moments) >= len(shapes)
    for leaf in jax.tree.leaves(across) + moments:
        assert leaf.sharding.is_equivalent_to(rows, leaf.ndim)
    assert_trees_close(across, train(tx, params, gradients)[0])


def test_a_checkpoint_resumes_bit_for_bit(case, tmp_path):
    params, gradients = problem()
    tx = case(optax.linear_schedule(1e-2, 1e-3, SHORT))
    unbroken = train(tx, params, gradients)
    half = train(tx, params, gradients, stop=SHORT // 2)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(half))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "half", half)
        checkpointer.wait_until_finished()
        fresh = (params, tx.init(params))
        restored = checkpointer.restore(tmp_path / "half", fresh)
    assert_trees_equal(restored, half)  # Exact: bytes on disk.
    resumed = train(tx, restored[0], gradients, restored[1], start=SHORT // 2)
    assert_trees_equal(resumed, unbroken)  # Exact: the same compiled step.

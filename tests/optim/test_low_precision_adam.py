"""AdamW with moments in few bits against Adam in float32."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from lowbit_jax.numerics import FP8_E4M3, dequantize
from lowbit_jax.optim.low_precision import (
    apply_updates_low_precision,
    dequantize_leaves,
    quantize_leaves,
)
from lowbit_jax.optim.low_precision_adam import (
    MOMENT_E4M3_128,
    adamw_low_precision,
    scale_by_adam_low_precision,
)
from lowbit_jax.optim.masks import match_paths

values_of = jax.jit(dequantize_leaves)
MOMENTS = {"float32": "float32", "bfloat16": "bfloat16", "e4m3": MOMENT_E4M3_128}


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)


def test_float32_moments_are_adamw_bit_for_bit():
    params = {"w": normal((4, 8)), "b": normal(8)}
    mask = match_paths("w")
    options = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.1}
    ours = adamw_low_precision(
        optax.linear_schedule(1e-2, 1e-3, 5),
        decay_mask=mask,
        max_grad_norm=1.0,
        m="float32",
        v="float32",
        **options,
    )
    known = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.linear_schedule(1e-2, 1e-3, 5), mask=mask, **options),
    )
    paths = []
    for tx in (ours, known):
        p, state = params, tx.init(params)
        for t in range(3):  # op by op: compiled, products and sums may be contracted
            gradient = jax.tree.map(lambda x, t=t: normal(x.shape, t), params)
            updates, state = tx.update(gradient, state, p)
            p = optax.apply_updates(p, updates)
        paths.append(p)
    assert_equal(*paths)  # Exact: the same operations.


@pytest.fixture(scope="module")
def stationary_losses():
    """Mean loss of `x**2 / 2` under Adam with gradient noise, after each kind of moments.

    32,768 coordinates with the same noise; the mean over the last 300 of 600 steps, for each
    coordinate.
    """
    shape, steps = (256, 128), 600

    def run(tx):
        def step(carry, t):
            x, state = carry
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), t), shape)
            updates, state = tx.update(x + noise, state)
            x = x - 0.02 * updates
            return (x, state), jnp.where(t >= 300, x**2 / 2, 0)

        def mean(carry, t):
            inner, total = carry
            inner, loss = step(inner, t)
            return (inner, total + loss / 300), None

        x = jnp.zeros(shape)
        return jax.lax.scan(mean, ((x, tx.init(x)), x), jnp.arange(steps))[0][1]

    kinds = {
        "float32": ("float32", "float32"),
        "bfloat16": ("bfloat16", "bfloat16"),
        "e4m3": (MOMENT_E4M3_128, "bfloat16"),
    }
    return {
        name: np.asarray(
            jax.jit(run, static_argnums=0)(scale_by_adam_low_precision(m=m, v=v)), np.float64
        )
        for name, (m, v) in kinds.items()
    }


@pytest.mark.parametrize(("kind", "u"), [("bfloat16", 2.0**-8), ("e4m3", 2.0**-4)])
def test_rounded_moments_cost_no_more_than_their_noise(stationary_losses, kind, u):
    known, ours = stationary_losses["float32"], stationary_losses[kind]
    # Bound: stochastic rounding adds to m noise of variance at most u**2 m**2, u half a relative
    # step; that is a gradient noise of (b1 / (1 - b1))**2 = 81 times as much. Between steps m is
    # an average of gradients with variance (1 - b1) / (1 + b1) = 1/19 of theirs and the mean x,
    # which is small. The loss is linear in the variance of the noise. The second moment's own
    # noise, (2**-8)**2 / (1 - b2**2) = 1.6e-4 of its square, moves steps by 3/8 of that.
    allowed = 81 / 19 * u**2 + 3 / 8 * 1.6e-4
    difference = (ours - known).ravel()
    # Statistical: 5 standard errors of the paired difference over the coordinates.
    error = 5 * difference.std() / math.sqrt(difference.size)
    assert error < 0.01 * known.mean()
    assert -error <= difference.mean() <= allowed * known.mean() + error


def test_rounding_errors_of_moments_are_independent_over_time():
    burn_in, steps, gradient, other = 400, 2000, normal((8, 128)), normal((8, 128), 1)
    tx = scale_by_adam_low_precision(m=MOMENT_E4M3_128)

    def mean_moment(gradient, is_constant):
        def step(carry, t):
            state, total = carry
            _, new = tx.update(jnp.where(t < burn_in / 2, other, gradient), state)
            # The seed of the negative control is the same at every step.
            new = new._replace(count=jnp.where(is_constant, 0, new.count))
            return (new, total + jnp.where(t < burn_in, 0, dequantize(new.m) / steps)), None

        start = (tx.init(gradient), jnp.zeros_like(gradient))
        return jax.lax.scan(step, start, jnp.arange(burn_in + steps))[0][1]

    mean_moment = jax.jit(mean_moment)
    # Statistical: m's mean misses the gradient by 10 times the mean of the rounding errors, whose
    # standard deviation is half a step of E4M3 or less, 2**-4 of the magnitude (here of up to
    # twice the gradient) or 2**-10 / 448 of the largest: 1024 entries at 5 standard errors.
    largest = jnp.abs(gradient).max(axis=1, keepdims=True)
    deviation = 2 * jnp.maximum(2.0**-4 * jnp.abs(gradient), 2.0**-10 / 448 * largest)
    allowed = 5 * 10 * deviation / math.sqrt(steps)
    assert jnp.all(jnp.abs(mean_moment(gradient, False) - gradient) <= allowed)
    assert jnp.mean(jnp.abs(mean_moment(gradient, True) - gradient) > allowed) > 0.5


@pytest.mark.parametrize("kind", ["bfloat16", "e4m3"])
def test_leaves_layers_and_steps_draw_different_bits(kind):
    gradient = jnp.broadcast_to(normal((8, 128)), (2, 8, 128))
    tx = scale_by_adam_low_precision(m=MOMENTS[kind])
    params = {"a": gradient, "b": gradient}
    start, update = tx.init(params), jax.jit(tx.update)
    drawn = []
    for count in range(2):  # of the same moments
        _, state = update(params, start._replace(count=jnp.int32(count)))
        trees = [state.m] if kind == "e4m3" else [state.m, state.v]
        drawn += [np.asarray(x) for tree in trees for x in
                  jax.tree.leaves(values_of(tree))]  # fmt: skip
    layers = [x[layer].astype(np.float32) for x in drawn for layer in range(2)]
    for i, x in enumerate(layers):
        # Statistical: values between two steps of the grid; alike bits would give alike arrays.
        assert all(np.any(x != y) for y in layers[:i])


def test_a_bfloat16_second_moment_decays_on_average():
    b2, steps, lanes = 0.999, 500, 4096
    tx = scale_by_adam_low_precision(b2=b2)

    @jax.jit
    def run(gradient):
        state = tx.update(gradient, tx.init(gradient))[1]
        step = lambda state, _: (tx.update(jnp.zeros_like(gradient), state)[1], None)  # noqa: E731
        return jax.lax.scan(step, state, None, steps)[0].v

    v = np.asarray(run(jnp.ones(lanes)), np.float64)
    # Statistical: 5 standard errors.
    assert abs(v.mean() - 1e-3 * b2**steps) <= 5 * v.std() / math.sqrt(lanes)
    nearest = jnp.bfloat16(1e-3)
    assert nearest == (b2 * nearest.astype(jnp.float32)).astype(jnp.bfloat16)  # stands still


@pytest.mark.parametrize(
    ("m", "v", "bits"),
    [("float32", "float32", 64), ("bfloat16", "bfloat16", 32), ("e4m3", "bfloat16", 24.25)],
)
def test_bytes_per_parameter(m, v, bits):
    params = {"w": normal((4, 256)), "stack": normal((2, 4, 128))}
    state = jax.eval_shape(scale_by_adam_low_precision(m=MOMENTS[m], v=v).init, params)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.m, state.v)))
    assert 8 * held == bits * 2048  # Exact: 8 + 32/128 + 16 for E4M3.


def test_leaves_that_blocks_do_not_fit_have_a_scale_a_row():
    params = {"odd": jnp.ones((3, 100)), "bias": jnp.ones(7), "scalar": jnp.ones(())}
    m = jax.eval_shape(scale_by_adam_low_precision(m=MOMENT_E4M3_128).init, params).m
    assert m["odd"].scales.shape == (3, 1)
    assert m["bias"].scales.shape == (1,)
    assert m["scalar"].dtype == jnp.float32


def test_other_moments_are_refused():
    with pytest.raises(ValueError, match=r"v must be .* got 'e4m3'; fewer bits"):
        scale_by_adam_low_precision(v="e4m3")
    with pytest.raises(ValueError, match=r"m must be .* got 'float16'"):
        scale_by_adam_low_precision(m="float16")


# --- weights, moments and updates together -------------------------------------------------------


@functools.cache
def quantized_problem():
    params = {"w": normal((8, 128)), "b": normal((8, 128), 1).astype(jnp.bfloat16)}
    target = jax.tree.map(lambda p: p.astype(jnp.float32) + 0.05, params)
    to_codes = jax.jit(lambda params: quantize_leaves(params, FP8_E4M3, match_paths("w")))
    return to_codes(params), target


TX = adamw_low_precision(1e-3, m=MOMENT_E4M3_128, weight_decay=0.01)


def loss(values, target):
    return sum(
        jnp.sum((v.astype(jnp.float32) - t) ** 2)
        for v, t in zip(jax.tree.leaves(values), jax.tree.leaves(target), strict=True)
    )


@pytest.fixture(scope="module")
def train_step():
    def step(carry, t, target):
        params, state = carry
        gradient = jax.grad(loss)(dequantize_leaves(params), target)
        updates, state = TX.update(gradient, state, params)
        key = jax.random.fold_in(jax.random.key(0), t)
        return apply_updates_low_precision(params, updates, key=key), state

    return jax.jit(step)


def test_weights_in_few_bits_learn_with_moments_in_few_bits(train_step):
    params, target = quantized_problem()
    before = values_of(params)
    carry = (params, jax.jit(TX.init)(params))
    for t in range(100):
        carry = train_step(carry, t, target)
    assert train_step._cache_size() == 1
    assert jax.tree.structure(carry[0]) == jax.tree.structure(params)
    after = values_of(carry[0])
    for name in ("w", "b"):
        # A claim: 100 steps of at most 1e-3 arrive at a target 0.05 away on average, though each
        # is smaller than half the distance between most weights and their neighbours.
        moved = after[name].astype(jnp.float32) - before[name].astype(jnp.float32)
        assert abs(moved.mean() - 0.05) < 0.02


def test_a_checkpoint_resumes_bit_for_bit(train_step, tmp_path):
    params, target = quantized_problem()
    half = (params, jax.jit(TX.init)(params))
    for t in range(2):
        half = train_step(half, t, target)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "half", half)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "half", jax.tree.map(jnp.zeros_like, half))
    assert_equal(restored, half)  # Exact: bytes on disk.
    unbroken, resumed = half, restored
    for t in range(2, 4):
        unbroken = train_step(unbroken, t, target)
        resumed = train_step(resumed, t, target)
    assert_equal(resumed, unbroken)  # Exact: the same compiled step.


def test_sharded_training_is_that_of_one_device(train_step):
    mesh = jax.make_mesh((4,), ("shard",), (jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("shard"))
    params, target = quantized_problem()
    alone = (params, jax.jit(TX.init)(params))
    params, target_rows = jax.device_put((params, target), rows)
    across = (params, jax.jit(TX.init)(params))
    for t in range(2):
        alone, across = train_step(alone, t, target), train_step(across, t, target_rows)
    assert across[0]["b"].sharding.is_equivalent_to(rows, 2)
    # Statistical: compiled for several devices, sums may be contracted otherwise, which flips a
    # rounding once in 2**20 or so; 2,048 weights, two steps.
    for a, e in zip(jax.tree.leaves(across), jax.tree.leaves(alone), strict=True):
        assert np.mean(np.asarray(a, np.float32) != np.asarray(e, np.float32)) < 0.01


def test_the_moments_share_no_buffer():
    # A step that donates its state may not be handed one buffer twice.
    state = scale_by_adam_low_precision(m="float32", v="float32").init({"w": jnp.ones(4)})
    donate = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    assert float(donate(state).m["w"][0]) == 1

"""ADMM on a planted problem, against closed forms, and its limiting cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowbit_jax.optim import (
    SPLIT_E4M3,
    AdmmState,
    adam_second_moments,
    admm,
    admm_finish,
    admm_strength,
    constraint_gap,
    elsa,
    elsa_low_precision,
    find_admm_state,
    match_paths,
)
from lowbit_jax.sparsity import Unstructured, onto_pattern

SEEDS, STEPS = 8, 2000
N, D, K = 160, 256, 16
PROJECTION = onto_pattern(Unstructured(1 - K / D))


def linear_decay(steps=STEPS):
    return optax.linear_schedule(2e-2, 0.0, steps)


# --- the planted problem: n < d, so that dense minimisers are not sparse -------------------------


@functools.cache
def planted():
    """`(A, b, x*, dense start)` of all seeds, stacked; the start is a dense minimiser."""
    problems = []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        a = rng.normal(size=(N, D))
        truth = np.zeros(D)
        support = rng.choice(D, K, replace=False)
        truth[support] = rng.uniform(0.5, 1.5, K) * rng.choice([-1, 1], K)
        b = a @ truth + 0.01 * rng.normal(size=N)
        problems.append((a, b, truth, 0.3 * rng.normal(size=D)))
    a, b, truth, start = (
        jnp.asarray(np.stack(p), jnp.float32) for p in zip(*problems, strict=True)
    )
    adam = optax.adam(linear_decay(), b1=0.9, b2=0.95)
    return a, b, truth, descend(adam, a, b, start)[0]


def loss(x, a, b):
    return jnp.mean((a @ x - b) ** 2) / 2


def descend(tx, a, b, start):
    """Parameters and state of every seed after STEPS steps."""

    @jax.jit
    @jax.vmap
    def run(a, b, x):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(jax.grad(loss)(x, a, b), state, x)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(step, (x, tx.init(x)), None, STEPS)[0]

    return run(a, b, start)


def recovered(x, truth):
    """Fraction of the planted support among the K largest entries of each seed."""
    found = jax.vmap(PROJECTION.masks)(x) & (x != 0)
    return np.mean(found[truth != 0].reshape(len(x), K), axis=1)


@pytest.mark.parametrize(
    ("make", "options"),
    [(elsa, {"strength": s, "interval": i}) for s in (0.01, 0.1, 1.0) for i in (8, 32)]
    + [
        (elsa, {"strength": 0.1, "interval": 8, "is_objective_aware": True}),
        (elsa, {"strength": admm_strength(0.0, 0.1, STEPS), "interval": 8}),
        (elsa_low_precision, {"strength": 0.1, "interval": 8}),
        (elsa_low_precision, {"strength": 0.1, "interval": 8, "u": SPLIT_E4M3}),
    ],
    ids=lambda x: getattr(x, "__name__", None) or "-".join(str(v)[:5] for v in x.values()),
)
def test_elsa_recovers_the_whole_support_of_every_seed(make, options):
    a, b, truth, dense = planted()
    options = {"is_objective_aware": False, "max_grad_norm": None} | options
    tx = make(linear_decay(), PROJECTION, **options)
    x, state = descend(tx, a, b, dense)
    aware = options["is_objective_aware"]
    x = jax.vmap(lambda x, s: admm_finish(x, s, PROJECTION, is_objective_aware=aware))(x, state)
    np.testing.assert_array_equal(jnp.sum(x != 0, axis=-1), K)
    np.testing.assert_array_equal(recovered(x, truth), 1.0)
    zero = jax.vmap(loss)(jnp.zeros_like(x), a, b)
    # Published behaviour, not a tolerance: a thousandth of the loss of x = 0 (reference: 1e-5; the
    # slowest, lam .01 with interval 8, 6e-4).
    assert np.all(jax.vmap(loss)(x, a, b) < 1e-3 * zero)


def test_magnitude_of_the_dense_minimiser_does_not():
    _, _, truth, dense = planted()
    assert np.max(recovered(dense, truth)) < 0.8  # reference: mean .375
    assert np.mean(recovered(dense, truth)) < 0.5


# --- limiting cases ------------------------------------------------------------------------------


def small(seed=0, steps=6):
    rng = np.random.default_rng(seed)
    params = {"weight": rng.normal(size=(4, 8)), "bias": rng.normal(size=8)}
    gradients = [{k: rng.normal(size=p.shape) for k, p in params.items()} for _ in range(steps)]
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, gradients))


def op_by_op(tx, params, gradients):
    state = tx.init(params)
    for gradient in gradients:
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


HALF = onto_pattern(Unstructured(0.5))
PLAIN = {"interval": 2, "max_grad_norm": None, "is_objective_aware": False}


def test_without_strength_it_is_adam_bit_for_bit():
    params, gradients = small()
    expected, _ = op_by_op(optax.adam(1e-2, b2=0.95), params, gradients)
    actual, _ = op_by_op(elsa(1e-2, HALF, strength=0.0, **PLAIN), params, gradients)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)  # Exact: 0 is added.


@pytest.mark.parametrize("is_objective_aware", [False, True])
def test_it_is_a_slow_loop_of_its_equations(is_objective_aware):
    params, gradients = small()
    strengths = [0.3, 0.0, 0.5, 0.2]  # at the start and after 2, 4 and 6 steps
    tx = elsa(
        optax.linear_schedule(1e-2, 0.0, 10),
        HALF,
        strength=lambda count: jnp.asarray(strengths)[count // 2],
        **(PLAIN | {"is_objective_aware": is_objective_aware}),
    )
    actual, state = op_by_op(tx, params, gradients)

    x = {k: np.float64(p) for k, p in params.items()}
    zero = {k: np.zeros_like(p) for k, p in x.items()}
    z, u, m, v = project(x, None), dict(zero), dict(zero), dict(zero)
    strength = 0.3
    for t, gradient in enumerate(gradients, start=1):
        for k in x:
            g = np.float64(gradient[k]) + strength * (x[k] - z[k] + u[k])
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.95 * v[k] + 0.05 * g * g
            step = (m[k] / (1 - 0.9**t)) / (np.sqrt(v[k] / (1 - 0.95**t)) + 1e-8)
            x[k] = x[k] - 1e-2 * (1 - (t - 1) / 10) * step
        if t % 2 == 0:
            target = {k: x[k] + u[k] for k in x}
            z = project(target, v if is_objective_aware else None)
            new = strengths[t // 2]
            ratio = strength / new if strength and new else 1.0
            u = {k: (target[k] - z[k]) * ratio for k in x}
            strength = new
    for k in x:
        # Bound: six steps of a few dozen roundings of 2^-24 of numbers below 4.
        np.testing.assert_allclose(actual[k], x[k], atol=2e-5)
        np.testing.assert_allclose(state.u[k], u[k], atol=2e-5)
        np.testing.assert_array_equal(np.asarray(state.z[k]) == 0, z[k] == 0)
    np.testing.assert_allclose(state.strength, 0.2)


def project(x, importance):
    """The larger half of each leaf, by sorting."""
    out = {}
    for k, leaf in x.items():
        score = np.abs(leaf) if importance is None else importance[k] * leaf**2
        goes = np.argsort(score.ravel())[: leaf.size // 2]
        out[k] = leaf.copy()
        out[k].ravel()[goes] = 0
    return out


def test_a_sparse_minimum_is_a_fixed_point():
    params, _ = small()
    params = HALF(params)
    nothing = jax.tree.map(jnp.zeros_like, params)
    after, state = op_by_op(elsa(1e-2, HALF, strength=0.5, **PLAIN), params, [nothing] * 4)
    jax.tree.map(np.testing.assert_array_equal, after, params)  # Exact: 0 / (0 + eps).
    jax.tree.map(np.testing.assert_array_equal, state.z, params)
    assert float(constraint_gap(after, state)) == 0


def test_rescaling_keeps_the_unscaled_dual():
    params, gradients = small(steps=2)
    states = []
    for second in (0.4, 0.1):
        strength = optax.piecewise_constant_schedule(0.4, {1: second / 0.4})
        states.append(op_by_op(elsa(1e-2, HALF, strength=strength, **PLAIN), params, gradients)[1])
    for a, b in zip(jax.tree.leaves(states[0].u), jax.tree.leaves(states[1].u), strict=True):
        # Bound: lam u = lam' u' but for the roundings of one quotient and one product each.
        np.testing.assert_allclose(0.4 * a, 0.1 * b, rtol=2**-21)


def test_float32_storage_makes_low_precision_elsa():
    params, gradients = small()
    float32 = {"z": "float32", "u": "float32", "m": "float32", "v": "float32"}
    expected, _ = op_by_op(elsa(1e-2, HALF, strength=0.5, **PLAIN), params, gradients)
    actual, _ = op_by_op(
        elsa_low_precision(1e-2, HALF, strength=0.5, **PLAIN, **float32), params, gradients
    )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)  # Exact: the same optimizer.


def test_leaves_outside_the_mask_move_as_under_adam_and_have_no_duals():
    params, gradients = small()
    mask = match_paths("weight")
    tx = elsa(1e-2, HALF, strength=0.5, mask=mask, **PLAIN)
    after, state = op_by_op(tx, params, gradients)
    expected, _ = op_by_op(optax.adam(1e-2, b2=0.95), params, gradients)
    np.testing.assert_array_equal(after["bias"], expected["bias"])
    assert np.any(after["weight"] != expected["weight"])
    assert [x.shape for x in jax.tree.leaves((state.z, state.u))] == [(4, 8)] * 2
    final = admm_finish(after, state, HALF, mask=mask)
    np.testing.assert_array_equal(final["bias"], after["bias"])
    assert int(jnp.sum(final["weight"] == 0)) == 16
    gap = jnp.linalg.norm(after["weight"] - state.z["weight"]) / jnp.linalg.norm(after["weight"])
    np.testing.assert_allclose(constraint_gap(after, state), gap, rtol=1e-6)


def test_clipping_does_not_see_the_pull():
    params, gradients = small(steps=1)
    clip = {"max_grad_norm": 0.1}
    _, state = op_by_op(elsa(1e-2, HALF, strength=0.5, **(PLAIN | clip)), params, gradients)
    norm = float(optax.tree.norm(gradients[0]))
    for k, p in params.items():
        expected = 0.1 / norm * gradients[0][k] + 0.5 * (p - HALF(p))
        moment = find_admm_state(state).inner[0].mu[k]
        # Bound: a handful of roundings of numbers below 2.
        np.testing.assert_allclose(moment, 0.1 * expected, atol=1e-6)


def test_strengths_over_the_run():
    at = jnp.array([0, 50, 100, 200])
    table = {
        "constant": [0.1, 0.1, 0.1, 0.1],
        "linear": [0.1, 0.2, 0.3, 0.3],
        "cosine": [0.1, 0.2, 0.3, 0.3],
        "exponential": [0.1, 0.03**0.5, 0.3, 0.3],
    }
    for kind, expected in table.items():
        # Bound: a few float32 roundings.
        np.testing.assert_allclose(admm_strength(0.1, 0.3, 100, kind)(at), expected, rtol=1e-6)
    np.testing.assert_allclose(admm_strength(0.1, 0.3, 100)(25), 0.2 - 0.1 / 2**0.5, rtol=1e-6)
    np.testing.assert_allclose(admm_strength(0.0, 0.3, 100, "exponential")(0), 1e-12, rtol=1e-6)


def test_what_cannot_work_is_refused():
    params, gradients = small()
    tx = elsa(1e-2, HALF)
    with pytest.raises(ValueError, match="admm: needs the parameters, got None"):
        tx.update(gradients[0], tx.init(params))
    with pytest.raises(ValueError, match="interval must be at least 1, got 0"):
        elsa(1e-2, HALF, interval=0)
    with pytest.raises(ValueError, match="z must be 'float32', 'bfloat16' or a QuantSpec"):
        elsa(1e-2, HALF, z="float8")
    with pytest.raises(ValueError, match="kind must be one of"):
        admm_strength(0.0, 1.0, 10, "sudden")
    with pytest.raises(ValueError, match="total_steps must be at least 1, got 0"):
        admm_strength(0.0, 1.0, 0)
    with pytest.raises(ValueError, match="needs the state of one Adam, got 0"):
        adam_second_moments(optax.sgd(0.1).init(params))
    with pytest.raises(ValueError, match="one AdmmState in it, got 0"):
        find_admm_state(optax.adam(0.1).init(params))
    sgd = admm(optax.sgd(0.1), HALF, 0.1, interval=1)  # any optimizer, without importance
    _, state = op_by_op(sgd, params, gradients[:1])
    assert isinstance(state, AdmmState)

"""CAGE against closed forms, a slow loop of its equations, and tables of its known behaviour."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowbit_jax.optim import (
    add_cage_correction,
    add_cage_post_correction,
    cage,
    cage_strength,
    cage_strength_for_total,
    match_paths,
    one_cycle_cosine,
)

ORDERS = ("fused", "coupled", "post")
ROUNDING = 2.0**-24  # of float32, relative


def onto_quarters(x):
    return jnp.round(4 * x) / 4


def onto_quest_int4(x):
    """16 mid-rise levels per row, the outermost at 2.5139 rms of the row (QuEST, 4 bit)."""
    limit = 2.513930578568423 * jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True))
    step = 2 * limit / 15
    return (jnp.floor(jnp.clip(x, -limit, limit) / step) + 0.5) * step


def run(tx, params, gradients):
    """`tx` along the stacked `gradients`; returns the parameters after each step."""

    @jax.jit
    def scan(params, gradients):
        def step(carry, gradient):
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, tx.init(params)), gradients)[1]

    return scan(params, gradients)


def run_op_by_op(tx, params, gradients):
    """As `run`, one operation at a time.

    In a compiled step XLA contracts products and sums of one chain and not of another, which
    rounds differently: a property of the compiler, not of the updates.
    """
    state, path = tx.init(params), []
    for gradient in zip(*gradients.values(), strict=True):
        updates, state = tx.update(dict(zip(gradients, gradient, strict=True)), state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return jax.tree.map(lambda *ps: np.stack(ps), *path)


def random_problem(steps, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    params = {"weight": rng.normal(size=(3, 8)), "bias": rng.normal(size=8)}
    gradients = {name: rng.normal(size=(steps, *p.shape)) for name, p in params.items()}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, gradients))


# --- limiting cases -----------------------------------------------------------------------------

STEPS = 10


@pytest.fixture(scope="module")
def adamw():
    tx = optax.adamw(1e-2, b1=0.9, b2=0.95, weight_decay=0.1)
    return run_op_by_op(tx, *random_problem(STEPS))


@pytest.mark.parametrize("order", ORDERS)
def test_without_strength_and_during_the_silence_it_is_adamw_bit_for_bit(order, adamw):
    problem = random_problem(STEPS)
    make = functools.partial(cage, 1e-2, onto_quarters, total_steps=STEPS, order=order)
    off = run_op_by_op(make(strength=0.0), *problem)
    on = run_op_by_op(make(mask=match_paths("weight")), *problem)
    for name in ("weight", "bias"):
        np.testing.assert_array_equal(off[name], adamw[name])  # Exact: adds zeros.
    np.testing.assert_array_equal(on["weight"][:8], adamw["weight"][:8])  # Exact: t <= 0.8 T.
    assert np.all(on["weight"][8] != adamw["weight"][8])
    np.testing.assert_array_equal(on["bias"], adamw["bias"])  # Exact: outside the mask.


@pytest.mark.parametrize("order", ORDERS)
def test_identity_projection_is_adamw_bit_for_bit(order, adamw):
    tx = cage(1e-2, lambda x: x, total_steps=STEPS, silence=0.0, order=order)
    actual = run_op_by_op(tx, *random_problem(STEPS))
    for name in ("weight", "bias"):
        np.testing.assert_array_equal(actual[name], adamw[name])  # Exact: adds zeros.


# --- the equations ------------------------------------------------------------------------------


def slow_cage(params, gradients, order, rate, lambdas, *, decay, max_norm):
    """The three orders written out in NumPy, one step after another."""
    b1, b2, eps = 0.9, 0.95, 1e-8
    x = {name: np.array(p) for name, p in params.items()}
    m = {name: np.zeros_like(p) for name, p in x.items()}
    v = {name: np.zeros_like(p) for name, p in x.items()}

    def residual(name):  # only "weight" carries a quantizer
        return x[name] - np.round(4 * x[name]) / 4 if name == "weight" else 0.0

    for t in range(1, len(lambdas) + 1):
        g = {name: np.array(gradients[name][t - 1]) for name in x}
        norm = np.sqrt(sum(np.sum(g[name] ** 2) for name in x))
        for name in x:
            g[name] = g[name] * min(1.0, max_norm / norm)
            if order == "coupled":
                g[name] = g[name] + lambdas[t - 1] * residual(name)
            m[name] = b1 * m[name] + (1 - b1) * g[name]
            v[name] = b2 * v[name] + (1 - b2) * g[name] ** 2
            u = m[name] / (1 - b1**t) / (np.sqrt(v[name] / (1 - b2**t)) + eps)
            if order == "fused":
                u = u + lambdas[t - 1] * residual(name)
            x[name] = (1 - rate(t - 1) * decay[name]) * x[name] - rate(t - 1) * u
            if order == "post":
                x[name] = x[name] - rate(t) * lambdas[t - 1] * residual(name)
    return x


@pytest.mark.parametrize("order", ORDERS)
def test_equals_the_written_out_steps(order):
    steps = 10
    schedule = one_cycle_cosine(0.05, steps, 0.3)
    with jax.enable_x64(True):
        params, gradients = random_problem(steps, dtype=np.float64)
        tx = cage(
            schedule,
            onto_quarters,
            total_steps=steps,
            strength=5.0,
            silence=0.4,
            order=order,
            mask=match_paths("weight"),
            decay_mask={"weight": True, "bias": False},
            max_grad_norm=1.0,
        )
        actual = run(tx, params, gradients)
        expected = slow_cage(
            params,
            gradients,
            order,
            lambda count: float(schedule(count)),
            [0, 0, 0, 0, *(5 * np.arange(1, 7) / 6)],
            decay={"weight": 0.1, "bias": 0.0},
            max_norm=1.0,
        )
    for name in params:
        assert actual[name].dtype == jnp.float64
        # Bound: float64 but for both schedules, which XLA rounds to float32, at most 8 times: 10
        # steps of at most rate * (|u| + 5 * 1/8) <= 0.05 * 5 each; a moved x moves the rest by
        # less than as much again.
        np.testing.assert_allclose(
            actual[name][-1], expected[name], rtol=0, atol=2 * 10 * 0.25 * 8 * ROUNDING
        )


def test_clipping_does_not_reach_the_correction():
    params, gradients = random_problem(1)
    huge = jax.tree.map(lambda g: 1e6 * g[0], gradients)
    tx = optax.chain(optax.clip_by_global_norm(1e-6), add_cage_correction(onto_quarters, 2.0))
    updates, _ = tx.update(huge, tx.init(params), params)
    for name, p in params.items():
        # Bound: the clipped gradient has a norm of 1e-6, and one rounding of at most |u| = 1/4.
        np.testing.assert_allclose(
            updates[name], 2 * (p - onto_quarters(p)), rtol=0, atol=1.001e-6 + ROUNDING
        )


def test_first_step_couples_or_decouples():
    # g = 0: Adam normalises a coupled residual to its sign, a decoupled one keeps its size.
    x = {"weight": jnp.asarray([[0.05, -0.1, 0.12, 0.2]])}
    residual = x["weight"] - onto_quarters(x["weight"])
    zero = jax.tree.map(jnp.zeros_like, x)
    updates = {}
    for order in ("coupled", "fused"):
        tx = cage(
            1e-2,
            onto_quarters,
            total_steps=1,
            strength=3.0,
            silence=0.0,
            order=order,
            eps=1e-30,
            weight_decay=0.0,
        )
        updates[order] = tx.update(zero, tx.init(x), x)[0]["weight"]
    # Bound: bias correction, root and quotient, fewer than 8 relative roundings.
    np.testing.assert_allclose(updates["coupled"], -1e-2 * jnp.sign(residual), rtol=8 * ROUNDING)
    np.testing.assert_allclose(updates["fused"], -3e-2 * residual, rtol=8 * ROUNDING)


def test_post_correction_is_the_second_step_taken_separately():
    params, gradients = random_problem(1)
    updates = jax.tree.map(lambda g: -0.1 * g[0], gradients)
    rate, strength = one_cycle_cosine(1e-1, 50), cage_strength(7.0, 50, silence=0.0)
    tx = add_cage_post_correction(onto_quarters, strength, rate)
    state = tx.init(params)._replace(count=jnp.int32(20))
    actual, new_state = tx.update(updates, state, params)
    assert new_state.count == 21
    for name, p in params.items():
        y = p + updates[name]
        expected = y - rate(21) * strength(20) * (y - onto_quarters(y))
        # Bound: (p + u) - c against p + (u - c): two roundings of values up to |p| + |u| < 4.
        np.testing.assert_allclose(p + actual[name], expected, rtol=0, atol=2 * 4 * ROUNDING)


def test_two_groups_of_leaves_may_have_two_projections():
    params, _ = random_problem(1)
    tx = optax.chain(
        optax.masked(add_cage_correction(onto_quarters, 1.0), match_paths("weight")),
        optax.masked(add_cage_correction(jnp.round, 1.0), match_paths("bias")),
    )
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    # Exact: the difference to a grid point is the same expression.
    np.testing.assert_array_equal(
        updates["weight"], params["weight"] - onto_quarters(params["weight"])
    )
    np.testing.assert_array_equal(updates["bias"], params["bias"] - jnp.round(params["bias"]))


def test_bfloat16_residuals_are_taken_in_float32_and_rounded_once():
    rng = np.random.default_rng(0)
    p, u = jnp.asarray(rng.normal(size=(2, 4096)), jnp.bfloat16)
    tx = add_cage_correction(onto_quest_int4, 0.7)
    actual, _ = tx.update(u, tx.init(p), p)
    wide = p.astype(jnp.float32)
    expected = u.astype(jnp.float32) + 0.7 * (wide - onto_quest_int4(wide))
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(actual, expected.astype(jnp.bfloat16))  # Exact: same definition.


# --- schedules ----------------------------------------------------------------------------------


def test_strength_follows_the_released_schedule():
    ramp = cage_strength(10.0, 100)
    for t, expected in ((1, 0), (80, 0), (81, 0.5), (90, 5), (100, 10), (150, 10)):
        # Bound: quotient and product, two relative roundings.
        np.testing.assert_allclose(ramp(t - 1), expected, rtol=2 * ROUNDING)
    constant = cage_strength(10.0, 100, kind="constant")
    assert [float(constant(t - 1)) for t in (80, 81, 100)] == [0.0, 10.0, 10.0]


@pytest.mark.parametrize("kind", ["linear_ramp", "constant"])
@pytest.mark.parametrize(("steps", "silence"), [(100, 0.29), (7, 0.0), (30000, 0.55), (50, 0.98)])
def test_strength_equals_the_slow_formula_at_every_step(steps, silence, kind):
    actual = cage_strength(3.0, steps, silence, kind)(jnp.arange(steps))
    t = np.arange(1, steps + 1)
    # The comparison in float64, as the released code makes it: t / T <= s is silent.
    height = (t / steps - silence) / (1 - silence) if kind == "linear_ramp" else 1.0
    expected = np.where(t / steps <= silence, 0.0, 3.0 * height)
    # Bound: 4 relative roundings to float32; the reference cancels too, to 2**-52 of 1 / (1 - s).
    np.testing.assert_allclose(actual, expected, rtol=4 * ROUNDING, atol=3e-14)


@pytest.mark.parametrize(
    ("steps", "peak", "strength", "silence", "total", "half_digit"),
    [
        (11_444, 1.2e-3, 10, 0.8, 1.62, 5e-3),
        (19_073, 1.2e-3, 10, 0.8, 2.70, 5e-3),
        (38_146, 6e-4, 10, 0.8, 2.70, 5e-3),
        (76_293, 3e-4, 10, 0.8, 2.70, 5e-3),
        (38_146, 6e-4, 10, 0.9, 1.20, 5e-3),
        (11_444, 1.2e-3, 2.5, 0.95, 0.087, 5e-4),
        (3_000, 1.2e-3, 10, 0.8, 0.425, 5e-4),
        (1_000, 3e-3, 10, 0.8, 0.355, 5e-4),
    ],
)
def test_total_strengths_of_known_runs(steps, peak, strength, silence, total, half_digit):
    rate = one_cycle_cosine(peak, steps)
    per_unit = 1 / cage_strength_for_total(1.0, rate, steps, silence)
    # Bound: half a unit of the last digit to which the totals are known.
    assert abs(strength * per_unit - total) <= half_digit


@pytest.mark.parametrize("order", ["fused", "post"])
def test_total_strength_sets_the_contraction(order):
    # Without gradient and decay, against a fixed grid, the residual shrinks by
    # prod(1 - rate lambda); "post" takes each rate one step later.
    steps, total, schedule = 400, 2.0, one_cycle_cosine(1e-2, 400)

    def rate(count):
        return schedule(count + (order == "post"))

    with jax.enable_x64(True):
        x = jnp.asarray([0.1, -0.62, 0.3])
        tx = cage(
            schedule,
            onto_quarters,
            total_steps=steps,
            total_strength=total,
            order=order,
            weight_decay=0.0,
        )
        actual = np.asarray(run(tx, x, jnp.zeros((steps, 3)))[-1]) - [0.0, -0.5, 0.25]
    strength = cage_strength_for_total(total, rate, steps)
    counts = np.arange(steps)
    products = np.float64(cage_strength(strength, steps)(counts)) * np.float64(rate(counts))
    contraction = np.prod(1 - products)
    # Bound: float64 but for the schedules, 8 float32 roundings of terms adding up to 2, twice as
    # the compiled schedule and the one here round apart.
    np.testing.assert_allclose(
        actual, np.array([0.1, -0.12, 0.05]) * contraction, rtol=2 * 8 * 2 * ROUNDING
    )
    # Bound: -log(1 - a) - a lies in [0, a^2] for a <= 1/2; 1e-6 for the rounding above.
    assert -1e-6 <= -np.log(contraction) - total <= total * products.max() + 1e-6


# --- known behaviour ----------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [False, True])
def test_fixed_grid_without_gradient_contracts_by_the_product(wide):
    steps = 300
    with jax.enable_x64(wide):
        rate = one_cycle_cosine(2e-2, steps)
        strength = cage_strength(5.0, steps, silence=0.5)
        tx = optax.chain(
            add_cage_correction(onto_quarters, strength), optax.scale_by_learning_rate(rate)
        )
        x = jax.random.uniform(jax.random.key(0), (512,), minval=-1.0, maxval=1.0)
        grid = onto_quarters(x)
        path = run(tx, x, jnp.zeros((steps, 512)))
        assert path.dtype == (jnp.float64 if wide else jnp.float32)
        np.testing.assert_array_equal(onto_quarters(path), jnp.broadcast_to(grid, path.shape))
        counts = np.arange(steps)
        factor = np.prod(1 - np.float64(strength(counts)) * np.float64(rate(counts)))
        assert 0.05 < factor < 0.5  # neither nothing nor everything happens
        residual = np.float64(x) - np.float64(grid)
        final = np.float64(path[-1]) - np.float64(grid)
    if wide:
        # Bound: float64 but for the schedules, 8 float32 roundings in each product of rate and
        # strength, twice as the compiled one and the one here round apart; log(factor), -1.5, is
        # minus the sum of these products to first order.
        rtol = 2 * 8 * ROUNDING * -np.log(factor)
        np.testing.assert_allclose(final, residual * factor, rtol=rtol)
    else:
        # Bound: each step rounds x, at most 1, once, and its update, at most 1e-2, a few times.
        np.testing.assert_allclose(final, residual * factor, rtol=0, atol=1.1 * steps * ROUNDING)


def test_points_of_a_fixed_grid_do_not_move():
    x = jnp.arange(-40, 41) / 4
    tx = add_cage_correction(onto_quarters, 10.0)
    updates, _ = tx.update(jnp.zeros_like(x), tx.init(x), x)
    np.testing.assert_array_equal(updates, jnp.zeros_like(x))  # Exact: x - x.


def test_a_grid_that_follows_the_rms_keeps_a_residual_and_shrinks_the_weights():
    x = jax.random.normal(jax.random.key(0), (512, 1024))
    tx = optax.chain(add_cage_correction(onto_quest_int4, 1.0), optax.scale(-1.35e-3))

    @jax.jit
    def train(x):
        def step(_, x):
            return x + tx.update(jnp.zeros_like(x), tx.init(x), x)[0]

        return jax.lax.fori_loop(0, 2000, step, x)

    def rms(x):
        return float(jnp.sqrt(jnp.mean(x**2)))

    y = train(x)
    # Statistical: single rows vary by .021 and .0125, so 512 of them know the two ratios to .001
    # and .0006; the known values are given to .01 and .002. A fixed grid would leave exp(-2.7) =
    # .067 of the residual and all of the rms.
    assert abs(rms(y - onto_quest_int4(y)) / rms(x - onto_quest_int4(x)) - 0.096) <= 0.01
    assert abs(rms(y) / rms(x) - 0.981) <= 0.002


# Rows: condition numbers 1, 10, 100. Columns: STRENGTHS. Means of f(P(x)) over 100 seeds of an
# independent NumPy implementation, and where known their standard errors.
STRENGTHS = (0.0, 0.3, 1.0, 3.0, 10.0)
QUADRATIC = np.array(
    [
        [0.3255, 0.2637, 0.1877, 0.1835, 0.1927],
        [0.1254, 0.0901, 0.0757, 0.0806, 0.0915],
        [0.0730, 0.0581, 0.0510, 0.0562, 0.0617],
    ]
)
BEST_GRID_POINT = np.array([0.1660, 0.0651, 0.0364])


@pytest.fixture(scope="module")
def noisy_quadratic():
    """SGD on `f = sum(h (x - a)^2) / 2`, gradients at `P(x)`: f(P(x)), rms of x - P(x), f(P(a))."""
    seeds, d, steps = 100, 64, 2000

    @jax.jit
    def experiment(key):
        start_key, target_key, noise_key = jax.random.split(key, 3)
        x = 0.1 * jax.random.normal(start_key, (seeds, d))
        a = jax.random.normal(target_key, (seeds, d))
        curvature = jnp.logspace(0.0, -jnp.arange(3.0), d, axis=-1)  # (3, d)
        strengths = jnp.asarray(STRENGTHS)

        def f(h, x):
            return 0.5 * jnp.sum(h * (x - a) ** 2, axis=-1)

        def optimizer(strength):
            return optax.chain(
                add_cage_correction(onto_quarters, cage_strength(strength, steps, silence=0.5)),
                optax.scale_by_learning_rate(optax.linear_schedule(0.1, 0.01, steps)),
            )

        def one_step(h, strength, x, state, noise):
            gradient = h * (onto_quarters(x) - a) + 0.3 * jnp.sqrt(h) * noise
            updates, state = optimizer(strength).update(gradient, state, x)
            return optax.apply_updates(x, updates), state

        all_steps = jax.vmap(one_step, (None, 0, 0, 0, None))
        all_steps = jax.vmap(all_steps, (0, None, 0, 0, None))

        def scan_step(carry, key):
            noise = jax.random.normal(key, (seeds, d))
            return all_steps(curvature, strengths, *carry, noise), None

        x = jnp.broadcast_to(x, (3, len(STRENGTHS), seeds, d))
        state = optimizer(1.0).init(x)
        state = jax.tree.map(lambda s: jnp.broadcast_to(s, (*x.shape[:2], *s.shape)), state)
        (x, _), _ = jax.lax.scan(scan_step, (x, state), jax.random.split(noise_key, steps))
        h = curvature[:, None, None]
        rms = jnp.sqrt(jnp.mean((x - onto_quarters(x)) ** 2, axis=(-1, -2)))
        return f(h, onto_quarters(x)), rms, f(h, onto_quarters(a))[:, 0]

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, experiment(jax.random.key(0)))


def test_noisy_quadratic_reproduces_the_known_losses(noisy_quadratic):
    losses, _, best = noisy_quadratic
    assert losses.dtype == np.float64
    for actual, expected in ((losses, QUADRATIC), (best, BEST_GRID_POINT)):
        # Statistical: two independent means over 100 seeds differ by sqrt(2) standard errors, of
        # which ours is measured; 18 cells at 4 of them raise a false alarm once in 900 seeds.
        # 5e-5 is half a digit of the table.
        allowed = 4 * 2**0.5 * actual.std(-1, ddof=1) / actual.shape[-1] ** 0.5 + 5e-5
        assert np.all(np.abs(actual.mean(-1) - expected) <= allowed)


def test_noisy_quadratic_standard_errors_are_the_known_ones(noisy_quadratic):
    errors = noisy_quadratic[0].std(-1, ddof=1) / 10
    known = {(0, 0): 0.005, (0, 4): 0.003, (1, 0): 0.002, (1, 2): 0.001, (2, 0): 0.0015}
    for cell, expected in known.items():
        # Statistical: 100 seeds know a standard error to 7 %, twice; the known ones have 1 digit,
        # half of which is up to 50 % of .001.
        assert 0.5 * expected <= errors[cell] <= 1.7 * expected


def test_noisy_quadratic_prefers_a_correction_and_loses_its_residual(noisy_quadratic):
    losses, rms, _ = noisy_quadratic
    means = losses.mean(-1)
    # Statistical: .58, .60 and .70 are known, each with a standard error below .02.
    assert np.all(means[:, 2] < 0.75 * means[:, 0])
    assert np.all(np.diff(rms, axis=1) < 0)
    # Statistical: .112 and .011 are known to half a unit, 6,400 entries know a rms to 1 %.
    np.testing.assert_allclose(rms[0, [0, -1]], [0.112, 0.011], rtol=0.03, atol=5e-4)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cage_strength(1.0, 0), "total_steps"),
        (lambda: cage_strength(1.0, 10, silence=1.0), "silence"),
        (lambda: cage_strength(1.0, 10, kind="cosine"), "'cosine'"),
        (lambda: cage_strength_for_total(-1.0, 1e-3, 10), "total_strength"),
        (lambda: cage_strength_for_total(1.0, 0.0, 10), "positive sum"),
        (lambda: cage(1e-3, onto_quarters), "needs total_steps"),
        (lambda: cage(1e-3, onto_quarters, total_steps=5, order="before"), "'before'"),
        (
            lambda: cage(
                1e-3, onto_quarters, strength=optax.constant_schedule(1), total_strength=2
            ),
            "drop one",
        ),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "tx",
    [add_cage_correction(onto_quarters, 1.0), add_cage_post_correction(onto_quarters, 1.0, 1e-3)],
    ids=["correction", "post"],
)
def test_update_without_params_says_so(tx):
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))


def test_a_projection_that_changes_the_shape_is_refused():
    tx = add_cage_correction(jnp.mean, 1.0)
    with pytest.raises(ValueError, match=r"keep the shape, got \(3,\) -> \(\)"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones(3))

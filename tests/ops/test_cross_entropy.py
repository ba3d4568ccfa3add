import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, PartitionSpec

from lowbit_jax.ops.cross_entropy import (
    DEFAULT_CHUNK_BYTES,
    default_chunks,
    linear_cross_entropy,
)

M, D, V = 24, 16, 50


@pytest.fixture(scope="module")
def problem():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (M, D))
    weight = jax.random.normal(keys[1], (V, D))
    return hidden, weight, jax.random.randint(keys[2], (M,), 0, V)


def float64_loss_and_gradients(hidden, weight, targets):
    """Closed form in NumPy: loss, d hidden, d weight."""
    h, w, y = (np.asarray(x, np.float64) for x in (hidden, weight, targets))
    y = y.astype(int)
    logits = h @ w.T
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    g = np.exp(log_p)
    g[np.arange(len(y)), y] -= 1
    g /= len(y)
    return -log_p[np.arange(len(y)), y].mean(), g @ w, g.T @ h


@pytest.mark.parametrize("chunks", [1, 2, 3, 24])
def test_float32_loss_and_gradients_equal_the_closed_form(problem, chunks):
    hidden, weight, targets = problem
    loss_fn = jax.jit(
        jax.value_and_grad(
            lambda h, w: linear_cross_entropy(h, w, targets, chunks=chunks), argnums=(0, 1)
        )
    )
    loss, gradients = loss_fn(hidden, weight)
    expected_loss, *expected = float64_loss_and_gradients(hidden, weight, targets)
    # Bound: a logit is a sum of D products, so it is off by at most D * u * sum |h w|, u = 2^-24;
    # the loss moves by at most twice the worst logit error, plus a rounding for each of the few
    # operations on values below 32: 16 u * 32.
    u = 2.0**-24
    logit_error = D * u * np.max(np.abs(hidden) @ np.abs(weight).T)
    assert abs(loss - expected_loss) <= 2 * logit_error + 16 * u * 32
    # A probability moves by a factor of at most exp(2 * logit_error) and 8 roundings, and a product
    # adds `length` roundings. The magnitudes summed: over a row of g at most 2 / M, over a column
    # at most M * 1 / M.
    for actual, wanted, other, length, mass in zip(
        gradients, expected, (weight, hidden), (V, M), (2 / M, 1), strict=True
    ):
        bound = (2 * logit_error + (8 + length) * u) * mass * np.max(np.abs(other))
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("cut", [(0, 2), (2,), (0, 1, 2), (0,)], ids=str)
def test_within_shard_map_each_device_has_the_loss_of_its_tokens(problem, cut):
    # What is not cut is the same on both devices, and gets the sum of their gradients.
    whole, rows = PartitionSpec(), PartitionSpec("data")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    parts = [x.reshape(2, -1, *x.shape[1:]) for x in problem]  # the vocabulary too
    args = [
        x if i in cut else part[0] for i, (x, part) in enumerate(zip(problem, parts, strict=True))
    ]
    specs = tuple(rows if i in cut else whole for i in range(3))

    def on_each(hidden, weight, targets):
        targets = targets % (V // 2)
        loss, grads = jax.value_and_grad(
            lambda h, w: linear_cross_entropy(h, w, targets, chunks=2), argnums=(0, 1)
        )(hidden, weight)
        return loss[None], grads

    got = jax.shard_map(on_each, mesh=mesh, in_specs=specs, out_specs=(rows, specs[:2]))
    losses, gradients = jax.jit(got)(*args)
    expected = [
        float64_loss_and_gradients(h, w, y % (V // 2))
        for h, w, y in (
            [part[device] if i in cut else part[0] for i, part in enumerate(parts)]
            for device in range(2)
        )
    ]
    # Bound: that of the first test for each device, and for gradients of mass 1 at most, of which
    # two may be added up.
    u = 2.0**-24
    h, w = (np.abs(np.asarray(x)) for x in problem[:2])
    logit_error = D * u * np.max(h @ w.T)
    np.testing.assert_allclose(
        losses, [loss for loss, _, _ in expected], rtol=0, atol=2 * logit_error + 16 * u * 32
    )
    for index, other in enumerate((w, h)):
        wanted = [found[1 + index] for found in expected]
        wanted = np.concatenate(wanted) if index in cut else sum(wanted)
        bound = (2 * logit_error + (8 + V) * u) * 2 * np.max(other)
        np.testing.assert_allclose(gradients[index], wanted, rtol=0, atol=bound)


def test_chunks_change_the_order_of_summation_only(problem):
    hidden, weight, targets = problem
    whole = linear_cross_entropy(hidden, weight, targets, chunks=1)
    for chunks in (2, 4, 12):
        split = linear_cross_entropy(hidden, weight, targets, chunks=chunks)
        # Bound: M positive terms summed in another order differ by at most M u of their sum.
        assert abs(split - whole) <= M * 2.0**-24 * 2 * whole


@pytest.mark.parametrize("chunks", [1, 3])
def test_the_loss_without_gradients_is_the_loss_with(problem, chunks):
    hidden, weight, targets = problem
    plain = jax.jit(lambda h: linear_cross_entropy(h, weight, targets, chunks=chunks))
    loss, _ = jax.jit(jax.value_and_grad(plain))(hidden)
    # Bound: the mean is a division in one and a product with 1 / M in the other: two roundings.
    np.testing.assert_allclose(plain(hidden), loss, rtol=3 * 2.0**-24)


def test_gradients_scale_with_the_cotangent(problem):
    hidden, weight, targets = problem
    _, vjp = jax.vjp(lambda h, w: linear_cross_entropy(h, w, targets, chunks=2), hidden, weight)
    one, four = vjp(jnp.float32(1)), vjp(jnp.float32(4))
    # Exact: a power of two.
    chex.assert_trees_all_equal(jax.tree.map(lambda x: 4 * x, one), four)


def test_bfloat16_differs_by_the_rounding_of_the_operands(problem):
    hidden, weight, targets = problem
    h16, w32 = hidden.astype(jnp.bfloat16), weight
    loss, (dh, dw) = jax.value_and_grad(
        lambda h, w: linear_cross_entropy(h, w, targets, chunks=2), argnums=(0, 1)
    )(h16, w32)
    assert (loss.dtype, dh.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    # The same function on the rounded operands, in float32.
    rounded = (h16.astype(jnp.float32), weight.astype(jnp.bfloat16).astype(jnp.float32))
    expected_loss, expected_dh, expected_dw = float64_loss_and_gradients(*rounded, targets)
    # Bound: products of bfloat16 are exact in float32, so the loss sees float32 rounding alone, as
    # derived in the first test.
    u = 2.0**-24
    logit_error = D * u * np.max(np.abs(rounded[0]) @ np.abs(rounded[1]).T)
    assert abs(loss - expected_loss) <= 2 * logit_error + 16 * u * 32
    # Bound: the gradient g of the logits is rounded to bfloat16, by at most 2^-9 of each (the 1 %
    # covers float32), and d hidden once more. |g| sums to at most 2 / M in a row, 1 in a column.
    half = 2.0**-9 * 1.01
    dh_bound = half * (2 / M * np.max(np.abs(rounded[1])) * (1 + half) + np.abs(expected_dh))
    assert np.all(np.abs(np.asarray(dh, np.float64) - expected_dh) <= dh_bound)
    assert np.all(np.abs(dw - expected_dw) <= half * np.max(np.abs(rounded[0])))


def test_logits_far_apart_stay_finite():
    # exp(1000) overflows: the logsumexp must be shifted.
    hidden = jnp.array([[1000.0], [-1000.0]])
    weight = jnp.array([[1.0], [-1.0], [0.0]])
    targets = jnp.array([0, 0])
    loss, gradient = jax.value_and_grad(
        lambda h: linear_cross_entropy(h, weight, targets, chunks=1)
    )(hidden)
    # Exact: probabilities are 0 and 1; losses 0 and 2000; d/dh of the second: (w1 - w0) / 2.
    assert loss == 1000.0
    np.testing.assert_array_equal(gradient, [[0.0], [-1.0]])


def test_never_holds_all_the_logits(problem):
    hidden, weight, targets = problem

    def shapes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (tuple(v.aval.shape) for v in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from shapes(inner)

    for chunks, present in ((1, True), (4, False)):
        jaxpr = jax.make_jaxpr(
            jax.grad(lambda h, c=chunks: linear_cross_entropy(h, weight, targets, chunks=c))
        )(hidden)
        assert ((M, V) in set(shapes(jaxpr.jaxpr))) == present


def test_default_chunks_are_the_fewest_that_fit():
    # 16,384 x 32,000 float32 logits are 1.95 GiB: two chunks fit in 1 GiB, one does not.
    assert default_chunks(16_384, 32_000) == 2
    assert default_chunks(7, 10) == 1
    # 3 x 5 tokens of which 2 would fit: 3 is the next divisor.
    assert default_chunks(15, DEFAULT_CHUNK_BYTES // 4 // 8) == 3
    # More than one chunk a token is impossible.
    assert default_chunks(2, DEFAULT_CHUNK_BYTES) == 2


@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "chunks", "message"),
    [
        ((2, 3, 4), (5, 4), (6,), 1, "must be matrices of one width"),
        ((6, 4), (5, 3), (6,), 1, "must be matrices of one width"),
        ((6, 4), (5, 4), (5,), 1, "one target a token"),
        ((6, 4), (5, 4), (6,), 4, "must divide the number of tokens"),
        ((6, 4), (5, 4), (6,), 0, "must divide the number of tokens"),
    ],
)
def test_a_wrong_call_says_how_to_fix_it(hidden, weight, targets, chunks, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(
            jnp.zeros(hidden), jnp.zeros(weight), jnp.zeros(targets, jnp.int32), chunks=chunks
        )

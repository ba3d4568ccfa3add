import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.ops.attention import attention, choose_implementation

B, T, H, D = 2, 6, 4, 8


def inputs(heads_kv, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(heads_kv), 3)
    shapes = ((B, T, H, D), (B, T, heads_kv, D), (B, T, heads_kv, D))
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def slow_attention(q, k, v):
    """Loops over batch, head and position, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    y = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(*q.shape[:3]):
        scores = k[b, : t + 1, h // group] @ q[b, t, h] / np.sqrt(q.shape[3])
        p = np.exp(scores - scores.max())
        y[b, t, h] = (p / p.sum()) @ v[b, : t + 1, h // group]
    return y


@pytest.mark.parametrize("heads_kv", [1, 2, 4])
def test_equals_a_loop_over_positions(heads_kv):
    q, k, v = inputs(heads_kv)
    expected = slow_attention(q, k, v)
    # Bound: a score sums D products and is off by at most (D + 2) u of their magnitudes, u = 2^-24;
    # that moves a weight by at most twice as much; exp, sum and division add T + 4 roundings, the
    # second product T.
    u = 2.0**-24
    score = (D + 2) * u * D**0.5 * np.max(np.abs(q)) * np.max(np.abs(k))
    bound = (2 * score + (2 * T + 4) * u) * np.max(np.abs(v))
    np.testing.assert_allclose(jax.jit(attention)(q, k, v), expected, rtol=0, atol=bound)


def test_bfloat16_differs_by_the_rounding_of_weights_and_result():
    q, k, v = inputs(2, jnp.bfloat16)
    y = jax.jit(attention)(q, k, v)
    assert y.dtype == jnp.bfloat16
    # Bound: operands are the same, scores are float32; the weights are rounded to 8 bits, 2^-9 of
    # each and they sum to 1, and so is the result. 1 % more covers float32.
    bound = 2 * 2.0**-9 * 1.01 * np.max(np.abs(np.asarray(v, np.float64)))
    np.testing.assert_allclose(
        np.asarray(y, np.float64), slow_attention(q, k, v), rtol=0, atol=bound
    )


def test_the_future_is_not_seen():
    q, k, v = inputs(2)
    y = jax.jit(attention)(q, k, v)
    changed = jax.jit(attention)(q, k.at[:, 4:].set(1e3), v.at[:, 4:].set(-1e3))
    # Exact: masked weights are exactly zero.
    np.testing.assert_array_equal(changed[:, :4], y[:, :4])
    assert not np.array_equal(changed[:, 4:], y[:, 4:])


def test_cudnn_by_name_never_falls_back():
    q, k, v = inputs(2)
    with pytest.raises(NotImplementedError, match="'cudnn' cannot run here"):
        attention(q, k, v, implementation="cudnn")  # float32: refused on every device


def test_the_choice_gives_its_reason():
    assert choose_implementation(jnp.float32, 64) == (
        "xla",
        "cuDNN takes bfloat16 and float16, not float32",
    )
    assert choose_implementation(jnp.bfloat16, 64, "xla") == ("xla", "asked for by name")


@pytest.mark.parametrize(
    ("capability", "head_dim", "chosen"),
    [
        (None, 64, "xla"),
        ((7, 5), 64, "xla"),
        ((8, 0), 128, "cudnn"),
        ((8, 0), 256, "xla"),
        ((9, 0), 256, "cudnn"),
        ((9, 0), 264, "xla"),
        ((9, 0), 60, "xla"),
    ],
)
def test_cudnn_is_chosen_where_it_runs(monkeypatch, capability, head_dim, chosen):
    monkeypatch.setattr("lowbit_jax.ops.attention.cuda_capability", lambda: capability)
    assert choose_implementation(jnp.bfloat16, head_dim)[0] == chosen


@pytest.mark.gpu
@pytest.mark.parametrize("heads_kv", [2, 4])
def test_cudnn_equals_xla(heads_kv):
    keys = jax.random.split(jax.random.key(0), 4)
    q, g = (jax.random.normal(k, (2, 128, 4, 64), jnp.bfloat16) for k in keys[:2])
    k, v = (jax.random.normal(k, (2, 128, heads_kv, 64), jnp.bfloat16) for k in keys[2:])

    def run(name):
        y, vjp = jax.vjp(lambda *x: attention(*x, implementation=name), q, k, v)
        return y, *vjp(g)

    for a, e in zip(run("cudnn"), run("xla"), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        # Bound, in norm: both round weights, their gradients and the result to bfloat16, 2^-9 each,
        # and gradients pass three such roundings in either program.
        assert np.linalg.norm(a - e) <= 6 * 2.0**-9 * np.linalg.norm(e)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((6, 4, 8), (6, 4, 8), (6, 4, 8)), "needs q"),
        (((2, 6, 4, 8), (2, 6, 4, 8), (2, 6, 2, 8)), "needs q"),
        (((2, 6, 4, 8), (2, 6, 3, 8), (2, 6, 3, 8)), "must match q"),
        (((2, 6, 4, 8), (2, 5, 4, 8), (2, 5, 4, 8)), "must match q"),
    ],
)
def test_wrong_shapes_say_how_to_fix_them(shapes, message):
    with pytest.raises(ValueError, match=message):
        attention(*map(jnp.zeros, shapes))


def test_wrong_dtypes_and_names_are_refused():
    q, k, v = inputs(4)
    with pytest.raises(ValueError, match="must share a dtype"):
        attention(q, k.astype(jnp.bfloat16), v)
    with pytest.raises(ValueError, match="must be 'cudnn', 'xla' or None"):
        attention(q, k, v, implementation="flash")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.decoding import generate

VOCAB = 11


def apply_fn(table, tokens):
    """A causal model of order three: logits depend on the last three tokens that it sees."""
    position = jnp.arange(tokens.shape[1])
    previous = jnp.where(position >= 1, jnp.roll(tokens, 1, axis=1), 0)
    before = jnp.where(position >= 2, jnp.roll(tokens, 2, axis=1), 0)
    return table[tokens, previous, before]


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal((VOCAB,) * 4, np.float32))


@jax.jit
def gumbel_noise(key, i):
    return jax.random.gumbel(jax.random.fold_in(key, i), (2, VOCAB))


def slow_generate(table, prompt, steps, temperature, key, window):
    """The same model and decoder as loops over Python lists."""
    table, rows = np.asarray(table), np.asarray(prompt).tolist()
    for i in range(steps):
        noise = np.asarray(gumbel_noise(key, i))
        for row, row_noise in zip(rows, noise, strict=True):
            before, previous, last = ([0, 0, *row[-window:]])[-3:]
            logits = table[last, previous, before]
            if temperature:
                # The largest of logits plus Gumbel noise is a draw from their softmax.
                logits = logits / np.float32(temperature) + row_noise
            row.append(int(np.argmax(logits)))
    return rows


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("window", [1, 4, 6, 20], ids="window{}".format)
def test_equals_a_loop_that_grows_and_crops_its_input(table, window, temperature):
    # Prompt of 4 tokens: windows shorter, equal, reached while generating, never.
    prompt = jnp.array([[1, 2, 3, 4], [9, 0, 10, 3]])
    key = jax.random.key(3)
    actual = generate(
        apply_fn, table, prompt, steps=7, temperature=temperature, key=key, window=window
    )
    # Exact: the same logits and the same noise.
    np.testing.assert_array_equal(actual, slow_generate(table, prompt, 7, temperature, key, window))


def test_without_a_window_the_model_sees_everything(table):
    prompt = jnp.array([[5, 6]])
    kwargs = {"steps": 5, "temperature": 0.9, "key": jax.random.key(1)}
    np.testing.assert_array_equal(
        generate(apply_fn, table, prompt, **kwargs),
        generate(apply_fn, table, prompt, **kwargs, window=40),
    )


def test_the_key_decides_and_more_steps_extend(table):
    prompt = jnp.array([[5, 6]], jnp.int16)
    kwargs = {"temperature": 1.0, "window": 4}
    long = generate(apply_fn, table, prompt, steps=12, key=jax.random.key(1), **kwargs)
    again = generate(apply_fn, table, prompt, steps=12, key=jax.random.key(1), **kwargs)
    short = generate(apply_fn, table, prompt, steps=5, key=jax.random.key(1), **kwargs)
    other = generate(apply_fn, table, prompt, steps=12, key=jax.random.key(2), **kwargs)
    assert long.shape == (1, 14)
    assert long.dtype == prompt.dtype
    np.testing.assert_array_equal(long, again)
    np.testing.assert_array_equal(long[:, :7], short)
    assert not np.array_equal(long, other)  # Equal by chance: about 11**-12.


def test_samples_follow_the_softmax():
    logits = jnp.array([0.0, 1.0, -1.0])
    prompt = jnp.zeros((20_000, 1), jnp.int32)
    out = generate(
        lambda params, tokens: jnp.broadcast_to(params, (*tokens.shape, 3)),
        logits,
        prompt,
        steps=1,
        temperature=2.0,
        key=jax.random.key(0),
    )
    frequency = np.bincount(np.asarray(out[:, 1]), minlength=3) / len(out)
    p = np.asarray(jax.nn.softmax(logits / 2))
    # Statistical: 3 frequencies at 5 standard errors, a false alarm in 600,000 seeds.
    assert np.all(np.abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / len(out)))


def test_zero_steps_give_the_prompt(table):
    prompt = jnp.array([[1, 2, 3]])
    np.testing.assert_array_equal(
        generate(apply_fn, table, prompt, steps=0, temperature=0.0), prompt
    )


@pytest.mark.parametrize(
    ("prompt", "kwargs", "message"),
    [
        (jnp.zeros((3,), jnp.int32), {"steps": 1}, "prompt must be integers"),
        (jnp.zeros((1, 0), jnp.int32), {"steps": 1}, "prompt must be integers"),
        (jnp.zeros((1, 3)), {"steps": 1}, "prompt must be integers"),
        (jnp.zeros((1, 3), jnp.int32), {"steps": -1}, "steps >= 0"),
        (jnp.zeros((1, 3), jnp.int32), {"steps": 1, "temperature": -0.5}, "temperature >= 0"),
        (jnp.zeros((1, 3), jnp.int32), {"steps": 1, "window": 0}, "window >= 1"),
        (jnp.zeros((1, 3), jnp.int32), {"steps": 1}, "got no key"),
    ],
)
def test_a_wrong_call_says_how_to_fix_it(table, prompt, kwargs, message):
    with pytest.raises(ValueError, match=message):
        generate(apply_fn, table, prompt, **kwargs)

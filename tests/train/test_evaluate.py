import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.train.evaluate import make_evaluate


def loss_fn(params, batch, key):
    noise = 0.0 if key is None else jax.random.normal(key, ())
    return params["scale"] * jnp.mean(batch[0].astype(jnp.float32)) + noise


PARAMS = {"scale": jnp.float32(0.5)}


def batches(values):
    return [(np.full((2, 4), v, np.int32), np.full((2, 4), v, np.int32)) for v in values]


def test_is_the_mean_in_float64_with_units_of_bytes():
    values = [2**24, 1, 1, 1]  # in float32 the ones would be lost
    result = make_evaluate(loss_fn)(PARAMS, batches(values), tokens_per_byte=0.25)
    assert result.loss == 0.5 * (2**24 + 3) / 4  # Exact: all of these are binary fractions.
    assert result.tokens == 32
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) * 0.25, rel=1e-15)


def test_random_bits_are_the_same_every_time():
    evaluate = make_evaluate(loss_fn)
    first, second = (evaluate(PARAMS, batches([1, 2]), needs_key=True) for _ in range(2))
    assert first == second != evaluate(PARAMS, batches([1, 2]))
    assert first.bits_per_byte is None


def test_no_more_than_a_micro_batch_is_evaluated_at_a_time():
    shapes = []

    def recorded(params, batch, key):
        shapes.append(batch[0].shape)
        return loss_fn(params, batch, key)

    batch = np.arange(8, dtype=np.int32).reshape(2, 4)
    whole, parts = (
        make_evaluate(recorded, n)(PARAMS, [(batch, batch)], needs_key=True) for n in (1, 2)
    )
    assert set(shapes) == {(2, 4), (1, 4)}
    assert whole.tokens == parts.tokens == 8
    # Exact: binary fractions, but for noise, which each part draws for itself.
    without = [make_evaluate(loss_fn, n)(PARAMS, [(batch, batch)]).loss for n in (1, 2)]
    assert without == [0.5 * 3.5] * 2
    assert whole.loss != parts.loss


def test_stops_when_asked():
    answers = iter([False, True])
    result = make_evaluate(loss_fn)(PARAMS, batches([1] * 9), should_stop=lambda: next(answers))
    assert result is None


def test_no_batch_is_an_error():
    with pytest.raises(ValueError, match="validation split is shorter than one batch"):
        make_evaluate(loss_fn)(PARAMS, [])

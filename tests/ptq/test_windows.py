"""Windows of a text: every one once, the same ones for a run that goes on."""

import itertools

import numpy as np
import pytest

from lowbit_jax.models import Llama, LlamaConfig
from lowbit_jax.ptq.windows import TrainingWindows, held_out, mean_loss

MODEL = Llama(LlamaConfig(16, 8, 1, 1, d_ff=8))
TEXT = np.arange(100)
WINDOWS = TrainingWindows(TEXT, 9, 4, seed=1)  # eleven windows of 9 + 1


def test_each_epoch_has_every_window_once_in_an_order_of_its_own():
    rows = np.concatenate([WINDOWS[step] for step in range(11)])  # four epochs
    assert rows.shape == (44, 10)
    assert rows.dtype == np.int32
    epochs = (rows[:, 0] // 9).reshape(4, 11)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(11), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    np.testing.assert_array_equal(rows, rows[:, :1] + np.arange(10))  # neighbours in the text
    assert not np.array_equal(TrainingWindows(TEXT, 9, 4, seed=2)[0], WINDOWS[0])


def test_a_batch_depends_on_its_step_alone():
    for step, batch in enumerate(itertools.islice(WINDOWS, 8)):
        np.testing.assert_array_equal(batch, WINDOWS[step])
    for batch, again in zip(itertools.islice(WINDOWS, 3), WINDOWS, strict=False):
        np.testing.assert_array_equal(batch, again)


def test_what_is_held_out_is_in_no_other_batch():
    rest, batches = held_out(TEXT, 5, 9, 2)  # two batches of two
    assert [batch.shape for batch in batches] == [(2, 10), (2, 10)]
    # Its first token is context alone: no prediction is in both.
    np.testing.assert_array_equal(np.unique(np.concatenate(batches)), np.arange(63, 100))
    np.testing.assert_array_equal(rest, np.arange(63))


def test_what_is_too_short_is_refused():
    with pytest.raises(ValueError, match="got length=9, batch_size=1 and 9 tokens"):
        TrainingWindows(TEXT[:9], 9, 1)
    with pytest.raises(ValueError, match="held out of at least twice as many, got 100 tokens"):
        held_out(TEXT, 6, 9, 6)
    with pytest.raises(ValueError, match="mean_loss: needs at least one batch"):
        mean_loss(MODEL, {}, [])

"""Perplexity counts every token once, after as many others as it says."""

import math

import jax
import numpy as np
import pytest
from flax import linen as nn

from lowbit_jax.models import Llama, LlamaConfig
from lowbit_jax.ptq.perplexity import perplexity

MODEL = Llama(LlamaConfig(32, 16, 1, 2, d_ff=32, dtype="float32"))
TOKENS = np.random.default_rng(0).integers(0, 32, 43)


@pytest.fixture(scope="module")
def params():
    init = jax.jit(MODEL.init)(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
    return jax.tree.map(lambda x: 20 * x, nn.meta.unbox(init))


def by_hand(params, window, stride):
    """Token by token, from the logits of the window that counts it."""
    losses, counted, start = [], 0, 0
    while start + window < len(TOKENS):
        logits = np.asarray(MODEL.apply({"params": params}, TOKENS[None, start : start + window]))
        logits = logits[0].astype(np.float64)
        for place in range(window):
            target = start + place + 1
            if target > counted:
                row = logits[place] - logits[place].max()
                losses.append(np.log(np.exp(row).sum()) - row[TOKENS[target]])
        counted = start + window
        start += stride
    return np.mean(losses), len(losses)


@pytest.mark.parametrize(("window", "stride", "batch_size"), [(8, None, 2), (8, 3, 4), (42, 1, 1)])
def test_the_mean_is_that_of_single_tokens(params, window, stride, batch_size):
    seen = []
    found = perplexity(
        MODEL, params, TOKENS, window=window, stride=stride, batch_size=batch_size,
        on_batch=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    loss, count = by_hand(params, window, stride or window)
    assert found.tokens == count
    # Bound: float32 sums of at most 32 terms, of losses below 16.
    assert abs(found.loss - loss) < 1e-5
    assert found.perplexity == math.exp(found.loss)
    assert str(found.stride) in str(found)
    assert all(done <= total for done, total in seen)
    assert seen[-1][0] == seen[-1][1]


def test_other_weights_compile_nothing(params):
    traced = []

    class Watched(Llama):
        def loss(self, *args):
            traced.append(args)
            return super().loss(*args)

    def evaluate(scale):
        scaled = jax.tree.map(lambda leaf: scale * np.asarray(leaf), params)
        return perplexity(Watched(MODEL.config), scaled, TOKENS, window=8, batch_size=4).loss

    first = evaluate(1.0)
    compiled = len(traced)
    assert evaluate(0.5) != first
    assert evaluate(1.0) == first
    assert len(traced) == compiled == 2  # of the first window, and of the others


def test_tokens_of_another_vocabulary_are_refused(params):
    with pytest.raises(ValueError, match="must be 0 to 31, got"):
        perplexity(MODEL, params, TOKENS + 1, window=8)


@pytest.mark.parametrize(
    "options", [{"window": 43}, {"window": 0}, {"window": 8, "stride": 9}, {"batch_size": 0}]
)
def test_impossible_windows_are_refused(params, options):
    with pytest.raises(ValueError, match="perplexity: "):
        perplexity(MODEL, params, TOKENS, **{"window": 8, **options})


def test_no_more_targets_than_there_are_can_be_counted(params):
    batch = TOKENS[None, :9]
    with pytest.raises(ValueError, match="counted must be 1 to 8"):
        MODEL.apply({"params": params}, batch[:, :-1], batch[:, 1:], 9, method="loss")

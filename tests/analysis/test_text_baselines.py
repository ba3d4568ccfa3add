import collections
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_jax.analysis.text_baselines import fit_trigram, text_baselines

RNG = np.random.default_rng(0)
SMALL = b"the cat sat on the mat; the dog sat on the log.\n" * 400


def as_array(text):
    return np.frombuffer(text, np.uint8)


@pytest.fixture(scope="module")
def small():
    return fit_trigram(as_array(SMALL))


@pytest.mark.parametrize("context", [b"th", b"zz", b"\xff\x00", b"e ", b"z "])
def test_probabilities_of_the_next_byte_sum_to_one(small, context):
    texts = [as_array(context + bytes([byte])) for byte in range(256)]
    p = np.array([2 ** small.log2_probabilities(text)[-1] for text in texts])
    # Bound: 256 terms of relative rounding 2**-53, times a few operations each.
    assert abs(p.sum() - 1) < 256 * 8 * 2**-53
    assert p.min() > 0


def test_counts_and_probabilities_equal_a_slow_loop(small):
    text = b"\n\n" + SMALL
    ones = collections.Counter(text[2:])
    pairs = collections.Counter(itertools.pairwise(text[1:]))
    triples = collections.Counter(zip(text, text[1:], text[2:], strict=False))
    new = b"the cow sat on a zebra"
    actual = small.log2_probabilities(as_array(new))
    padded = b"\n\n" + new
    for i, (x, y, z) in enumerate(zip(padded, padded[1:], padded[2:], strict=False)):
        after_y = sum(n for (a, _), n in pairs.items() if a == y)
        after_xy = sum(n for (a, b, _), n in triples.items() if (a, b) == (x, y))
        p1 = (ones[z] + 1) / (len(SMALL) + 256)
        p2 = pairs[y, z] / after_y if after_y else p1
        p3 = triples[x, y, z] / after_xy if after_xy else p2
        w = small.weights[math.ceil(after_xy * small.fitted_share).bit_length()]
        expected = math.log2(w[0] / 256 + w[1] * p1 + w[2] * p2 + w[3] * p3)
        assert actual[i] == pytest.approx(expected, rel=1e-12)  # bound: a few float64 roundings


def test_the_trigram_reaches_the_entropy_of_a_second_order_source():
    # The next of 4 letters depends on the two before it, by a table of probabilities.
    table = RNG.dirichlet(np.full(4, 0.5), size=(4, 4))
    draws, letters = RNG.random(400_000), [0, 0]
    edges = table.cumsum(-1)
    for draw in draws:
        x, y = letters[-2:]
        letters.append(min(int((draw > edges[x, y]).sum()), 3))
    text = np.array(letters, np.uint8) + 97
    train, new = text[:300_000], text[300_000:]
    states = np.array(letters)
    x, y, z = states[300_000 - 2 : -2], states[300_000 - 1 : -1], states[300_000:]
    truth = -np.log2(table[x, y, z])
    excess = (-fit_trigram(train).log2_probabilities(new) - truth)[2:]
    # Bound: k frequencies fitted on n draws cost k / (2 n ln 2) bits a draw on average. 48 of them
    # are fitted on all 300,000; then 3 weights for each of 5 numbers of bits (4,526 to 50,050
    # contexts, 13 to 16 bits, and one for luck) on the tenth held out.
    # Statistical: 5 standard errors of the mean.
    bound = (48 / 300_000 + 15 / 29_000) / (2 * math.log(2))
    margin = 5 * excess.std() / len(excess) ** 0.5
    assert margin < 0.005  # 5 standard errors are a small part of the 1.5 bits that a letter costs
    assert -margin < excess.mean() < bound + margin


def test_random_bytes_cost_eight_bits():
    train, new = RNG.bytes(200_000), RNG.bytes(50_000)
    values = text_baselines(train, new)
    assert values["uniform"] == 8
    # Bound: no model of independent uniform bytes does better than 8 but by luck, and 200,000
    # draws cost at most 255 / (2 * 200,000 ln 2) < 0.001 bits for the frequencies of a unigram;
    # statistical: log p varies by about 0.05 bits a byte there, 5 standard errors are 0.001.
    assert abs(values["unigram"] - 8) < 0.002
    assert 8 - 0.002 < values["trigram"] < 8.1
    # LZMA2 stores what it cannot pack, with 3 bytes a chunk of 64 KiB and an end.
    for name in ("xz", "xz_alone"):
        assert 8 <= values[name] < 8 * (1 + 1e-3)


def test_models_order_as_they_should_on_text(moby_dick):
    train, new = moby_dick
    values = text_baselines(train, new)
    assert 8 > values["unigram"] > values["xz_alone"] > values["trigram"] > 2
    assert values["xz"] < values["xz_alone"]  # the train text helps


def test_text_seen_before_costs_xz_almost_nothing():
    text = RNG.bytes(100_000)
    # Bound: a match codes up to 273 bytes in under 8 bytes.
    assert text_baselines(text, text[20_000:60_000])["xz"] < 8 * 8 / 273 + 0.01


def test_only_the_end_of_a_long_train_text_is_used():
    a, b = RNG.bytes(5000), b"b" * 5000
    assert text_baselines(a + b, b"bb", max_train_bytes=5000) == text_baselines(b, b"bb")


@given(st.binary(min_size=1, max_size=40), st.binary(min_size=1, max_size=40))
def test_any_bytes_have_a_finite_cost_under_any_train_text(train, new):
    log2_p = fit_trigram(as_array(train)).log2_probabilities(as_array(new))
    assert np.isfinite(log2_p).all()
    assert (log2_p <= 0).all()


@pytest.mark.parametrize("args", [(b"", b"a"), (b"a", b"")])
def test_an_empty_text_is_refused(args):
    with pytest.raises(ValueError, match="needs bytes of both splits"):
        text_baselines(*args)


@pytest.fixture(scope="module")
def moby_dick():
    import importlib.resources

    folder = importlib.resources.files("lowbit_jax.data")
    text = (folder / "texts" / "moby-dick.txt").read_bytes()
    return text[100_000:600_000], text[600_000:650_000]

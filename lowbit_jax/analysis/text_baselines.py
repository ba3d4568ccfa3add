"""Bits per byte that need no neural network: what a language model of text has to beat."""

import lzma
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, UInt8

MAX_TRAIN_BYTES = 2**26
_BLOCK_BYTES = 2**10
_HELD_OUT_BLOCKS = 2**8  # at most, and at most a tenth of the train bytes
_EM_STEPS = 200
_CHUNK = 2**22


class Counts(NamedTuple):
    """How often each byte, pair and triple of bytes ends at a place of the text."""

    ones: Int[np.ndarray, "256"]
    pairs: Int[np.ndarray, "256 256"]
    triples: Int[np.ndarray, "256 256 256"]
    after_one: Int[np.ndarray, "256"]  # n(y.): pairs that begin with y
    after_two: Int[np.ndarray, "256 256"]  # n(xy.)


class Trigram(NamedTuple):
    """Counts of bytes, pairs and triples, and the weights that interpolate them.

    p(z | x y) = w3 n(xyz)/n(xy.) + w2 n(yz)/n(y.) + w1 (n(z) + 1)/(n + 256) + w0/256,

    where the four weights, which add up to 1, depend on how often the context x y was seen: on the
    number of bits of n(xy.) * fitted_share rounded up, 0 for a context never seen. Where a
    denominator is 0 the term falls back on the next one.
    """

    counts: Counts
    fitted_share: float  # of the text, counted when the weights were fitted: keeps their buckets
    weights: Float64[np.ndarray, "bucket 4"]  # w0 to w3 for each number of bits

    def log2_probabilities(self, text: UInt8[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """log2 p of each byte after the two before it; before the text lie two newlines."""
        parts = []
        padded = _pad(text)
        for start in range(0, len(text), _CHUNK):
            components, buckets = _components(
                self.counts, padded[start : start + _CHUNK + 2], self.fitted_share
            )
            parts.append(np.log2((components * self.weights[buckets]).sum(-1)))
        return np.concatenate(parts) if parts else np.empty(0)


def text_baselines(
    train: bytes, validation: bytes, *, max_train_bytes: int = MAX_TRAIN_BYTES
) -> dict[str, float]:
    """Bits per byte of `validation` under simple models that saw `train`.

    uniform: 8. unigram: bytes alone, add-one smoothing. trigram: `Trigram`. xz: what `validation`
    adds to the packed size of `train`, with a window as large as both. xz_alone: `validation`
    packed by itself. Both xz are LZMA2 without a file header.

    Args:
      train: Only its last `max_train_bytes` are used: 64 MiB take 3 to 4 minutes, nearly all of
        them for xz, and 1.4 GB of memory.
      validation: At least one byte.
      max_train_bytes: See `train`.

    Raises:
      ValueError: If either text is empty.
    """
    if not train or not validation or max_train_bytes < 1:
        raise ValueError(
            f"text_baselines: needs bytes of both splits, got {len(train)} of train,"
            f" {len(validation)} of validation and max_train_bytes={max_train_bytes}."
        )
    train = train[-max_train_bytes:]
    seen, new = (np.frombuffer(text, np.uint8) for text in (train, validation))
    counts = np.bincount(seen, minlength=256)
    unigram = -np.log2((counts + 1) / (len(seen) + 256))[new].mean()
    packed_train = _packed_size(train, len(train) + len(validation))
    packed_both = _packed_size(train + validation, len(train) + len(validation))
    return {
        "uniform": 8.0,
        "unigram": float(unigram),
        "trigram": float(-fit_trigram(seen).log2_probabilities(new).mean()),
        "xz": 8 * (packed_both - packed_train) / len(validation),
        "xz_alone": 8 * _packed_size(validation, len(validation)) / len(validation),
    }


def fit_trigram(text: UInt8[np.ndarray, " n"]) -> Trigram:
    """Counts all of `text`; the weights are the likeliest for blocks held out from a first count.

    The blocks of 1 KiB, together a tenth of the text and at most 256 KiB, lie evenly over it.
    From rare contexts to frequent ones, a bucket's prior is the bucket below, worth one byte, so
    that a bucket without held-out bytes does as its neighbour does; equal weights worth a hundredth
    of a byte keep each above 0, and with it the probability of every byte. A text below 10 KiB has
    no such block, and keeps equal weights.

    References:
      Jelinek, Mercer, Interpolated estimation of Markov source parameters from sparse data (1980).
    """
    weights = np.full((65, 4), 0.25)
    starts = _held_out_starts(len(text))
    fitted_share = 1 - len(starts) * _BLOCK_BYTES / max(len(text), 1)
    if len(starts):
        is_held = np.zeros(len(text), bool)
        for start in starts:
            is_held[start : start + _BLOCK_BYTES] = True
        rest = _count(text[~is_held])
        held = [_components(rest, _pad(text[start : start + _BLOCK_BYTES])) for start in starts]
        components = np.concatenate([components for components, _ in held])
        buckets = np.concatenate([buckets for _, buckets in held])
        for bucket in range(len(weights)):
            below = weights[max(bucket - 1, 0)]
            weights[bucket] = _fit_weights(components[buckets == bucket], below)
    return Trigram(_count(text), fitted_share, weights)


def _fit_weights(
    components: Float64[np.ndarray, "n 4"], below: Float64[np.ndarray, "4"]
) -> Float64[np.ndarray, "4"]:
    """The likeliest weights of a mixture, by expectation maximisation."""
    prior = below + 0.01 / 4
    weights = prior / prior.sum()
    if len(components):
        weights = np.full(4, 0.25)
        for _ in range(_EM_STEPS):
            share = components * weights
            weights = (share / share.sum(-1, keepdims=True)).sum(0) + prior
            weights /= weights.sum()
    return weights


def _held_out_starts(length: int) -> Int[np.ndarray, " blocks"]:
    count = min(length // (10 * _BLOCK_BYTES), _HELD_OUT_BLOCKS)
    return np.arange(count) * (length // max(count, 1))


def _pad(text: np.ndarray) -> np.ndarray:
    return np.concatenate([np.frombuffer(b"\n\n", np.uint8), text])


def _count(text: np.ndarray) -> Counts:
    padded = _pad(text)
    counts = None
    for start in range(0, max(len(text), 1), _CHUNK):
        x, y, z = _triples(padded[start : start + _CHUNK + 2])
        found = [
            np.bincount(z, minlength=2**8),
            np.bincount((y << 8) | z, minlength=2**16),
            np.bincount((x << 16) | (y << 8) | z, minlength=2**24),
            np.bincount(y, minlength=2**8),
            np.bincount((x << 8) | y, minlength=2**16),
        ]
        counts = found if counts is None else [a + b for a, b in zip(counts, found, strict=True)]
    assert counts is not None
    ones, pairs, triples, after_one, after_two = counts
    square = (256, 256)
    return Counts(
        ones,
        pairs.reshape(square),
        triples.reshape(256, *square),
        after_one,
        after_two.reshape(square),
    )


def _triples(padded: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    wide = padded.astype(np.int64)
    return wide[:-2], wide[1:-1], wide[2:]


def _components(
    counts: Counts, padded: UInt8[np.ndarray, " n_plus_2"], fitted_share: float = 1.0
) -> tuple[Float64[np.ndarray, "n 4"], Int[np.ndarray, " n"]]:
    """The four distributions' probability of each byte, and its context's bucket."""
    x, y, z = _triples(padded)
    uniform = np.full(len(z), 1 / 256)
    unigram = (counts.ones[z] + 1) / (counts.ones.sum() + 256)
    context = counts.after_one[y]
    bigram = np.where(context > 0, counts.pairs[y, z] / np.maximum(context, 1), unigram)
    context = counts.after_two[x, y]
    trigram = np.where(context > 0, counts.triples[x, y, z] / np.maximum(context, 1), bigram)
    buckets = np.frexp(np.ceil(context * fitted_share))[1]  # number of bits
    return np.stack([uniform, unigram, bigram, trigram], -1), buckets


def _packed_size(text: bytes, window_bytes: int) -> int:
    window = min(max(window_bytes, 2**12), 2**30)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": window}]
    return len(lzma.compress(text, format=lzma.FORMAT_RAW, filters=filters))

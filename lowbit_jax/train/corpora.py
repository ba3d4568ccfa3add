"""Training text by name."""

import pathlib

import numpy as np

from lowbit_jax.data.split import SPLITS, split_pieces
from lowbit_jax.data.text import as_pieces, bundled_text
from lowbit_jax.data.tokenizers import ByteTokenizer, token_dtype
from lowbit_jax.data.tokens import TokenArray, TokenDataset, open_dataset


def open_corpus(
    name: str, *, vocab_size: int | None = None, validation_fraction: float = 0.05
) -> TokenDataset:
    """The dataset that a config's `data` names.

    Args:
      name: `"moby-dick"`: the bundled book, byte by byte; `"synthetic"`: random tokens, which
        measure speed and whose loss means nothing; else a folder made by `prepare_data.py`.
      vocab_size: Of the synthetic tokens.
      validation_fraction: Of the book; a prepared folder has its own.

    Raises:
      ValueError: If there is no such folder or it is damaged.
    """
    if name == "synthetic":
        return _synthetic(vocab_size or 32000)
    if name != "moby-dick":
        return open_dataset(name)
    tokenizer, parts = ByteTokenizer(), {split: [] for split in SPLITS}
    for split, piece in split_pieces(as_pieces([bundled_text(name)]), validation_fraction):
        parts[split].append(piece.text)
    train, validation = (
        TokenArray(tokenizer.encode_batch(parts[split]), sum(map(len, parts[split])))
        for split in SPLITS
    )
    fingerprint = f"{name} {tokenizer.fingerprint} {validation_fraction}"
    return TokenDataset(pathlib.Path(name), train, validation, tokenizer, fingerprint)


def _synthetic(vocab_size: int) -> TokenDataset:
    rng, dtype = np.random.default_rng(0), token_dtype(vocab_size)
    train, validation = (
        TokenArray([rng.integers(0, vocab_size, count, dtype=dtype)], text_bytes=0)
        for count in (2**23, 2**20)
    )
    # The tokenizer plays no part: no text belongs to these tokens.
    return TokenDataset(pathlib.Path("synthetic"), train, validation, ByteTokenizer(), "synthetic")

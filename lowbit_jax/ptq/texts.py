"""Tokens to calibrate with and to evaluate on."""

import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

from lowbit_jax.data.text import read_documents
from lowbit_jax.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    load_tokenizer,
    tokenizer_from_json,
)
from lowbit_jax.models.pretrained import Pretrained, gguf_tokenizer, read_sentencepiece


def tokenizer_of(
    path: pathlib.Path, pretrained: Pretrained, given: str | None = None
) -> ByteTokenizer | BPETokenizer:
    """The tokenizer of a model.

    Args:
      path: Of the model, a directory or a GGUF file.
      pretrained: What was loaded from there.
      given: Another one, as `load_tokenizer` takes it, or a tokenizer.model of SentencePiece.

    Raises:
      ValueError: If there is none, it is of a kind that `tokenizer_from_json` refuses, or has more
        tokens than the model.
    """
    source = pretrained.tokenizer_path if given is None else given
    if given is None and path.is_file():
        tokenizer = tokenizer_from_json(gguf_tokenizer(path).to_str(), name=path.stem)
    elif source is None:
        raise ValueError(
            f"tokenizer_of: {path} has no tokenizer.json or tokenizer.model; pass --tokenizer FILE."
        )
    elif pathlib.Path(source).suffix == ".model" and pathlib.Path(source).is_file():
        found = read_sentencepiece(pathlib.Path(source))
        tokenizer = tokenizer_from_json(found.to_str(), name=pathlib.Path(source).parent.name)
    else:
        tokenizer = load_tokenizer(source)
    if tokenizer.vocab_size > pretrained.model.config.vocab_size:
        raise ValueError(
            f"tokenizer_of: a model of {pretrained.model.config.vocab_size:,} tokens cannot read"
            f" those of {tokenizer.name}, {tokenizer.vocab_size:,}; pass the tokenizer that it was"
            " trained with."
        )
    return tokenizer


def read_tokens(
    paths: Sequence[str | pathlib.Path],
    tokenizer: ByteTokenizer | BPETokenizer,
    limit: int | None = None,
) -> Integer[np.ndarray, " n"]:
    """The documents of files, one after another, as one vector of tokens.

    Args:
      paths: Files and directories, see `data.text.read_documents`.
      tokenizer: Of the model.
      limit: Reads no more than that many tokens; None: all.

    Raises:
      ValueError: As `read_documents`, if there is no text, or the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"read_tokens: limit must be at least 1 or None, got {limit}.")
    found, count = [], 0
    continued = tokenizer.continued() if isinstance(tokenizer, BPETokenizer) else tokenizer
    begins_document = True
    for piece in read_documents(paths):
        encoder = tokenizer if begins_document else continued
        begins_document = piece.ends_document
        (tokens,) = encoder.encode_batch([piece.text])
        found.append(tokens)
        count += len(tokens)
        if limit is not None and count >= limit:
            break
    if not count:
        raise ValueError(f"read_tokens: needs a text, got none in {', '.join(map(str, paths))}.")
    return np.concatenate(found)[:limit].astype(np.int32)


def calibration_batches(
    tokens: Integer[np.ndarray, " n"], samples: int, length: int, batch_size: int, seed: int
) -> list[Integer[np.ndarray, "b t"]]:
    """Windows at random places of a text, which may overlap.

    Args:
      tokens: The text.
      samples: Windows; a multiple of `batch_size`.
      length: Tokens of each.
      batch_size: Windows of a batch.
      seed: Of the places.

    Raises:
      ValueError: If a number is out of range or the text is shorter than a window.
    """
    if seed < 0:
        raise ValueError(f"calibration_batches: seed must be 0 or more, got {seed}.")
    if min(samples, length, batch_size) < 1 or samples % batch_size or len(tokens) < length:
        raise ValueError(
            "calibration_batches: samples must be a multiple of batch_size, both at least 1, and"
            f" the text no shorter than length, got samples={samples}, batch_size={batch_size},"
            f" length={length} and {len(tokens)} tokens."
        )
    starts = np.random.default_rng(seed).integers(0, len(tokens) - length + 1, samples)
    windows = tokens[starts[:, None] + np.arange(length)]
    return list(windows.reshape(-1, batch_size, length))


def text_warnings(
    pretrained: Pretrained, length: int, tokens: int | None = None, samples: int = 1
) -> list[str]:
    """What a user should know of a text and of windows, in words; no error.

    Args:
      pretrained: Whose config.json may say how many positions the model was trained with.
      length: Tokens of a window.
      tokens: Of the text that windows are drawn from; None: it is read as a whole.
      samples: Windows that are drawn.
    """
    found = []
    positions = pretrained.metadata.get("max_position_embeddings")
    if positions is not None and length > positions:
        found.append(f"windows of {length} tokens are longer than the {positions} of the model")
    if tokens is not None and 4 * tokens < samples * length:
        found.append(
            f"{samples} windows of {length} tokens overlap in a text of {tokens:,} tokens: give"
            " more text"
        )
    return found

"""A dataset of tokens on disk: a folder of shards and, written last, `dataset.json`.

    train-00000.tokens ...   validation-00000.tokens ...   tokenizer.json   dataset.json

A folder without `dataset.json` is an unfinished dataset, whatever else lies in it.
"""

import dataclasses
import hashlib
import json
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt

from lowbit_jax.data import shards
from lowbit_jax.data.split import SPLITS, Split, is_validation, split_pieces
from lowbit_jax.data.text import Piece, as_pieces
from lowbit_jax.data.tokenizers import (
    Tokenizer,
    load_tokenizer,
    token_dtype,
    tokenizer_from_json,
)
from lowbit_jax.files import sync, write_atomically

MANIFEST = "dataset.json"
_TOKENIZER = "tokenizer.json"
# Text that is tokenized in one call: some 250 pieces, enough to feed 16 threads evenly. The
# package's encodings take about 100 bytes a token, so that this also bounds the memory.
_GROUP_BYTES = 2**23


class TokenArray:
    """Tokens of several shards as one sequence; those of files are read when sliced.

    `len(a)`, `a[i]` and `a[start:stop]` do what they do for an array; a slice is a view where it
    lies in one array, and a copy where it comes from a file or crosses shards.
    """

    def __init__(
        self, parts: Sequence[UInt[np.ndarray, " t"] | shards.ShardTokens], text_bytes: int
    ):
        self.parts = [part for part in parts if len(part)]
        self.text_bytes = text_bytes  # of the text that the tokens stand for
        self._stops = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    def __getitem__(self, index: int | slice):
        if not isinstance(index, slice):
            i = range(len(self))[index]
            part = bisect_right(self._stops, i)
            return self.parts[part][i - self._stops[part]]
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"TokenArray: a slice must have step 1, got {step}; slice it twice.")
        pieces = []
        part = bisect_right(self._stops, start)
        while start < stop:
            first = self._stops[part] - len(self.parts[part])
            end = min(stop, self._stops[part])
            pieces.append(self.parts[part][start - first : end - first])
            start, part = end, part + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, np.uint8)

    @property
    def bytes_per_token(self) -> float:
        """Mean over all tokens, exact: bits per byte = loss in nats / (this * ln 2)."""
        return self.text_bytes / max(len(self), 1)

    def __repr__(self) -> str:
        return f"TokenArray({len(self):,} tokens, {self.text_bytes:,} bytes of text)"


@dataclasses.dataclass(frozen=True)
class TokenDataset:
    """An open dataset. `fingerprint` is equal for equal tokens: note it with each result."""

    path: Path | None  # None: in memory
    train: TokenArray
    validation: TokenArray
    tokenizer: Tokenizer
    fingerprint: str

    def check(
        self, *, vocab_size: int, seq_len: int, batch_size: int, needs_validation: bool = True
    ) -> None:
        """Says before the first step whether a model and a batch fit this dataset.

        Raises:
          ValueError: If the model's vocabulary is smaller than the tokenizer's, or a split has not
            enough tokens for one batch of windows.
        """
        if vocab_size < self.tokenizer.vocab_size:
            raise ValueError(
                f"TokenDataset.check: the model's vocab_size must be at least that of the tokenizer"
                f" {self.tokenizer.name!r} in {self.path}, {self.tokenizer.vocab_size}, got"
                f" {vocab_size}; enlarge the model's, or prepare the data with a smaller one."
            )
        splits = {"train": self.train, "validation": self.validation if needs_validation else None}
        needed = batch_size * seq_len + 1
        for name, tokens in splits.items():
            if tokens is not None and len(tokens) < needed:
                raise ValueError(
                    f"TokenDataset.check: {name} must have batch_size * seq_len + 1 = {needed}"
                    f" tokens for one batch of {batch_size} x {seq_len}, got {len(tokens)} in"
                    f" {self.path}; use a smaller batch or more text"
                    f"{' or a larger validation_fraction' if name == 'validation' else ''}."
                )


def check_destination(directory: str | Path, *, overwrite: bool) -> None:
    """Says before a long preparation whether `write_dataset` would write here.

    Raises:
      ValueError: If the directory holds a finished dataset that may not be replaced.
    """
    if (Path(directory) / MANIFEST).exists() and not overwrite:
        raise ValueError(
            f"write_dataset: {directory} holds a finished dataset; allow to overwrite it"
            " (overwrite=True, --overwrite), or choose another directory."
        )


def write_dataset(
    documents: Iterable[str | bytes | Piece],
    tokenizer: Tokenizer,
    directory: str | Path,
    *,
    validation_fraction: float = 0.01,
    shard_tokens: int = 2**27,
    overwrite: bool = False,
    on_write: Callable[[int, int], None] | None = None,
) -> TokenDataset:
    """Tokenizes a stream of documents into a dataset, in memory bounded by a few groups of pieces.

    Args:
      documents: Whole documents, or pieces from `read_documents`; both are streamed.
      tokenizer: Its `end_of_text` follows each document.
      directory: Made if needed. Leftovers of an unfinished dataset in it are removed.
      validation_fraction: Share of the pieces that become validation, see `split.py`.
      shard_tokens: A shard is closed by the first piece that brings it to this size.
      overwrite: Whether a finished dataset in `directory` may be replaced.
      on_write: Called with (tokens, bytes of text) just written.

    Returns:
      The dataset, opened.

    Raises:
      ValueError: If the directory holds a finished dataset, the stream has no text, or `documents`
        is a single one.
      OSError: If the disk does not take it; the directory is an unfinished dataset then.
    """
    if isinstance(documents, str | bytes):  # whose items are characters, or numbers
        raise ValueError(
            f"write_dataset: documents must be an iterable of texts, got one {type(documents)};"
            " pass [text], or read_documents([path]) for a file."
        )
    directory = Path(directory)
    is_validation(0, validation_fraction)  # complains before anything is removed
    _clear(directory, overwrite)
    dtype = token_dtype(tokenizer.vocab_size)
    said = {
        "tokenizer": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
    }
    writers: dict[Split, shards.ShardWriter] = {}
    headers: list[shards.ShardHeader] = []

    def append(split: Split, piece: Piece, tokens: np.ndarray) -> None:
        if split not in writers:
            index = sum(header.split == split for header in headers)
            path = directory / _shard_name(split, index)
            writers[split] = shards.ShardWriter(path, split=split, index=index, **said)
        writers[split].append(tokens, len(piece.text))
        if writers[split].count >= shard_tokens:
            headers.append(writers.pop(split).close())
        if on_write is not None:
            on_write(len(tokens), len(piece.text))

    try:
        assigned = split_pieces(as_pieces(documents), validation_fraction)
        for split, piece, tokens in _encode(assigned, tokenizer):
            append(split, piece, tokens)
        headers += [writers.pop(split).close() for split in list(writers)]
    finally:
        for writer in writers.values():
            writer.abandon()
    if not headers:
        raise ValueError("write_dataset: needs at least one document with text, got none.")
    headers.sort(key=lambda header: (SPLITS.index(header.split), header.index))
    _write_manifest(directory, tokenizer, headers, validation_fraction)
    return open_dataset(directory)


def dataset_from_text(
    text: str | bytes, tokenizer: Tokenizer, *, validation_fraction: float = 0.01
) -> TokenDataset:
    """A dataset of one text, in memory: what `write_dataset` makes of it, without the files.

    Raises:
      ValueError: If the text is empty.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    parts: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
    text_bytes: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    assigned = split_pieces(as_pieces([text]), validation_fraction)
    for split, piece, tokens in _encode(assigned, tokenizer):
        parts[split].append(tokens)
        text_bytes[split] += len(piece.text)
    if not parts["train"]:
        raise ValueError("dataset_from_text: needs a text, got an empty one.")
    arrays = {split: np.concatenate([*parts[split], np.empty(0, dtype)]) for split in SPLITS}
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for split in SPLITS:
        digest.update(arrays[split].tobytes())
    train, validation = (TokenArray([arrays[split]], text_bytes[split]) for split in SPLITS)
    return TokenDataset(None, train, validation, tokenizer, digest.hexdigest()[:16])


def open_dataset(directory: str | Path, *, verify: bool = False) -> TokenDataset:
    """Opens a dataset after checking its manifest, its tokenizer, and each shard's header and size.

    Args:
      directory: What `write_dataset` wrote.
      verify: Also read all tokens and compare their checksums: seconds a gigabyte.

    Raises:
      FileNotFoundError: If there is no such directory.
      ValueError: If the dataset is unfinished, damaged, or mixed from several.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"open_dataset: no such directory: {directory}")
    if not (directory / MANIFEST).is_file():
        left = len([*directory.glob("*.tokens"), *directory.glob("*.tokens" + shards.PARTIAL)])
        state = f"its preparation was interrupted after {left} shards" if left else "no dataset"
        raise ValueError(
            f"open_dataset: {directory} has no {MANIFEST}: {state}; run scripts/prepare_data.py."
        )
    manifest = _read_manifest(directory)
    tokenizer = _open_tokenizer(directory, manifest["tokenizer"])
    parts: dict[str, list[shards.ShardTokens]] = {split: [] for split in SPLITS}
    text_bytes: dict[str, int] = dict.fromkeys(SPLITS, 0)
    for said in manifest["shards"]:
        path = directory / _shard_name(said["split"], said["index"])
        if not path.is_file():
            raise ValueError(
                f"open_dataset: {path} is missing, {MANIFEST} names it; copy or prepare the data"
                " again."
            )
        header = shards.read_header(path)
        found = dataclasses.asdict(header)
        wrong = [
            f"{key} {value!r} instead of {said[key]!r}"
            for key, value in found.items()
            if value != said[key]
        ]
        if wrong:
            raise ValueError(
                f"open_dataset: {path} is not the shard that {MANIFEST} names: it has"
                f" {', '.join(wrong)}. Shards of several datasets were mixed; copy or prepare the"
                " data again."
            )
        if verify:
            shards.verify_shard(path, header)
        parts[header.split].append(shards.ShardTokens(path, header))
        text_bytes[header.split] += header.text_bytes
    train, validation = (TokenArray(parts[split], text_bytes[split]) for split in SPLITS)
    return TokenDataset(directory, train, validation, tokenizer, manifest["fingerprint"])


def _encode(
    assigned: Iterable[tuple[Split, Piece]], tokenizer: Tokenizer
) -> Iterator[tuple[Split, Piece, np.ndarray]]:
    """Tokens of each piece, with `end_of_text` where a document ends.

    One group is tokenized in another thread while this one reads the next and writes the last.
    """
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    separator = np.array(end, token_dtype(tokenizer.vocab_size))
    waiting: deque[tuple[list[tuple[Split, Piece]], Future[list[np.ndarray]]]] = deque()
    with ThreadPoolExecutor(1, "tokenize") as pool:
        for group in _groups(assigned):
            texts = [piece.text for _, piece in group]
            waiting.append((group, pool.submit(tokenizer.encode_batch, texts)))
            if len(waiting) > 1:
                yield from _join(*waiting.popleft(), separator)
        while waiting:
            yield from _join(*waiting.popleft(), separator)


def _join(
    group: list[tuple[Split, Piece]], encoded: Future[list[np.ndarray]], separator: np.ndarray
) -> Iterator[tuple[Split, Piece, np.ndarray]]:
    for (split, piece), tokens in zip(group, encoded.result(), strict=True):
        yield split, piece, np.concatenate([tokens, separator]) if piece.ends_document else tokens


def _groups(assigned: Iterable[tuple[Split, Piece]]) -> Iterator[list[tuple[Split, Piece]]]:
    group: list[tuple[Split, Piece]] = []
    size = 0
    for split, piece in assigned:
        group.append((split, piece))
        size += len(piece.text)
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.tokens"


def _clear(directory: Path, overwrite: bool) -> None:
    """Makes the directory and removes what an earlier `write_dataset` left there, nothing else."""
    check_destination(directory, overwrite=overwrite)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)  # first: now the old dataset is unfinished
    for split in SPLITS:
        for pattern in (f"{split}-*.tokens", f"{split}-*.tokens{shards.PARTIAL}"):
            for path in directory.glob(pattern):
                path.unlink()
    (directory / _TOKENIZER).unlink(missing_ok=True)


def _write_manifest(
    directory: Path,
    tokenizer: Tokenizer,
    headers: list[shards.ShardHeader],
    validation_fraction: float,
) -> None:
    model = tokenizer.to_json()
    if model is not None:
        write_atomically(directory / _TOKENIZER, model)
    said = [dataclasses.asdict(header) for header in headers]
    manifest = {
        "format": "lowbit_jax tokens",
        "version": shards.VERSION,
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "file": None if model is None else _TOKENIZER,
        },
        "validation_fraction": validation_fraction,
        "shards": said,
        "fingerprint": hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16],
    }
    write_atomically(directory / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    sync(directory)  # the new names, too


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
        version = manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"open_dataset: {path} is no manifest of a dataset ({error!r}); prepare the data again."
        ) from error
    if version != shards.VERSION:
        raise ValueError(
            f"open_dataset: {path} has format version {version}, this program reads"
            f" {shards.VERSION}; prepare the data again with it."
        )
    return manifest


def _open_tokenizer(directory: Path, said: dict[str, Any]) -> Tokenizer:
    if said["file"] is None:
        tokenizer: Tokenizer = load_tokenizer("bytes")
    else:
        path = directory / said["file"]
        if not path.is_file():
            raise ValueError(f"open_dataset: {path} is missing; copy or prepare the data again.")
        tokenizer = tokenizer_from_json(path.read_text("utf-8"), name=said["name"])
    if tokenizer.fingerprint != said["fingerprint"]:
        raise ValueError(
            f"open_dataset: the tokenizer in {directory} has fingerprint {tokenizer.fingerprint},"
            f" the tokens were made with {said['fingerprint']}; restore {_TOKENIZER}, or prepare"
            " the data again."
        )
    return tokenizer

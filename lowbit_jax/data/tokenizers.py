"""Text to token numbers and back: bytes, or BPE through the `tokenizers` package.

The BPE is byte-level (GPT-2, Llama 3, Qwen) or SentencePiece's (Llama 2, Mistral).

All of them put `end_of_text` after a document (not `encode` does, the writer of datasets does), and
decode it to nothing, so that the bytes of the decoded tokens are the bytes of the text.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tokenizers
from jaxtyping import Int, Integer, UInt

from lowbit_jax.data import sentencepiece

END_OF_TEXT = "<|endoftext|>"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


@runtime_checkable
class Tokenizer(Protocol):
    """What datasets, evaluation and generation need of a tokenizer."""

    @property
    def name(self) -> str:
        """For people: "bytes", "bpe-16384", the name of the file."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token numbers are below it."""
        ...

    @property
    def end_of_text(self) -> int | None:
        """The token after each document."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that give equal tokens; 16 hexadecimal digits."""
        ...

    @property
    def byte_lengths(self) -> Int[np.ndarray, " v"]:
        """Bytes of text that each token stands for; 0 for `end_of_text`."""
        ...

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """Tokens of each text, in the smallest unsigned dtype that holds the vocabulary."""
        ...

    def decode_bytes(self, tokens: Any) -> bytes:
        """The bytes that tokens stand for; a number outside the vocabulary gives U+FFFD."""
        ...

    def decode(self, tokens: Any) -> str:
        """The same as text; what is not UTF-8 becomes U+FFFD."""
        ...

    def to_json(self) -> str | None:
        """A `tokenizers` JSON that gives this tokenizer again; None for bytes."""
        ...


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint8, uint16 and uint32 that holds the vocabulary."""
    return np.dtype(np.min_scalar_type(vocab_size - 1))


def count_bytes(tokens: Integer[np.ndarray, "..."], tokenizer: Tokenizer) -> int:
    """Bytes of text that the tokens stand for: what turns nats into bits per byte.

    bits per byte = sum of the losses in nats / (count_bytes(targets) * ln 2).
    """
    return int(tokenizer.byte_lengths[tokens].sum())


@dataclass(frozen=True)
class ByteTokenizer:
    """A byte is a token. `end_of_text` is the NUL byte, which no text contains."""

    name: str = "bytes"
    vocab_size: int = 256
    end_of_text: int = 0
    fingerprint: str = "bytes-0000000001"

    @property
    def byte_lengths(self) -> Int[np.ndarray, "256"]:
        """One, but 0 for `end_of_text`."""
        return (np.arange(256) != self.end_of_text).astype(np.int64)

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[UInt[np.ndarray, " t"]]:
        """The UTF-8 bytes of each text."""
        return [np.frombuffer(_to_bytes(text), np.uint8) for text in texts]

    def decode_bytes(self, tokens: Any) -> bytes:
        """The bytes without `end_of_text`."""
        tokens = np.asarray(tokens, np.int64).reshape(-1)
        tokens = tokens[tokens != self.end_of_text]
        if tokens.size and (tokens.min() < 0 or tokens.max() > 255):
            return b"".join(bytes([t]) if 0 <= t < 256 else _REPLACEMENT for t in tokens.tolist())
        return tokens.astype(np.uint8).tobytes()

    def decode(self, tokens: Any) -> str:
        """The bytes as UTF-8."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def to_json(self) -> None:
        """Nothing to save."""
        return None


@dataclass(frozen=True)
class BPETokenizer:
    """A BPE of bytes: every byte string has tokens, and every token is a string of bytes.

    Made by `load_tokenizer` or `train_bpe`. Input that is not UTF-8 is a ValueError: the package
    takes text only, and replacing bytes would spoil their count.

    SentencePiece's puts a space before every text, which `decode` takes away again: the bytes of
    the tokens, as `byte_lengths` has them, are one more than those of the text.
    """

    name: str
    vocab_size: int  # one more than the largest number of a token or special token
    end_of_text: int | None  # "<|endoftext|>", or "</s>" of SentencePiece; None if there is none
    fingerprint: str
    model: tokenizers.Tokenizer = field(repr=False, compare=False)  # not to be changed
    pieces: tuple[bytes, ...] = field(repr=False, compare=False)  # what each token stands for
    byte_lengths: Int[np.ndarray, " v"] = field(repr=False, compare=False)
    # Of the same tokens, without the space before a text; None if there is none.
    continuation: tokenizers.Tokenizer | None = field(default=None, repr=False, compare=False)

    def continued(self) -> "BPETokenizer":
        """The tokenizer for what follows the cut of a long text: puts no space before it."""
        if self.continuation is None:
            return self
        return replace(self, model=self.continuation, continuation=None)

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[UInt[np.ndarray, " t"]]:
        """Tokens of each text; the package spreads the texts over all cores."""
        dtype = token_dtype(self.vocab_size)
        strings = [_to_str(text) for text in texts]
        encoded = self.model.encode_batch_fast(strings, add_special_tokens=False)
        return [np.array(encoding.ids, dtype) for encoding in encoded]

    def decode_bytes(self, tokens: Any) -> bytes:
        """The tokens' byte strings, joined."""
        pieces, size = self.pieces, self.vocab_size
        numbers = np.asarray(tokens, np.int64).reshape(-1).tolist()
        joined = b"".join(pieces[t] if 0 <= t < size else _REPLACEMENT for t in numbers)
        return joined if self.continuation is None else joined.removeprefix(b" ")

    def decode(self, tokens: Any) -> str:
        """The byte strings as UTF-8."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """The whole tokenizer as the package's JSON."""
        return self.model.to_str()


def load_tokenizer(source: str | Path) -> ByteTokenizer | BPETokenizer:
    """A tokenizer by name or from files.

    Args:
      source: "bytes"; a JSON file of the `tokenizers` package; or a directory with `tokenizer.json`
        or with GPT-2's pair `encoder.json` and `vocab.bpe`.

    Raises:
      ValueError: If there is no such thing, or as `tokenizer_from_json`.
    """
    if str(source) == "bytes":
        return ByteTokenizer()
    path = Path(source)
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return load_tokenizer(path / "tokenizer.json")
        if (path / "encoder.json").is_file() and (path / "vocab.bpe").is_file():
            return _load_gpt2(path)
    if not path.is_file():
        raise ValueError(
            'load_tokenizer: takes "bytes", a tokenizer.json, or a directory with tokenizer.json'
            f" or with encoder.json and vocab.bpe; got {str(source)!r}."
        )
    name = path.parent.name if path.name == "tokenizer.json" else path.stem
    return tokenizer_from_json(path.read_text("utf-8"), name=name)


def tokenizer_from_json(text: str, *, name: str) -> BPETokenizer:
    """Reads the JSON of the `tokenizers` package.

    Raises:
      ValueError: If it is not such a JSON, or neither a byte-level BPE nor one with byte fallback
        that leaves the text as it is.
    """
    try:
        model = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the package raises bare Exception
        raise ValueError(
            f"tokenizer_from_json: {name}: not a JSON of the tokenizers package: {error}."
        ) from error
    data = json.loads(text)
    alphabet = set(_byte_alphabet().values())
    added = {token["content"] for token in data["added_tokens"]}
    vocab = data["model"].get("vocab", {})
    vocab = vocab if isinstance(vocab, dict) else [token for token, _ in vocab]  # of Unigram
    foreign = [token for token in vocab if token not in added and not alphabet.issuperset(token)]
    if data["model"].get("type") == "BPE" and not foreign:
        return _wrap(model, name)
    if what := sentencepiece.why_not(data):
        raise ValueError(
            f"tokenizer_from_json: {name}: must be a byte-level BPE (GPT-2, Llama 3, SmolLM and"
            " their like), or one with byte fallback that leaves the text as it is (Llama 2,"
            f" Mistral), got a {data['model'].get('type')} with tokens such as {foreign[:3]}, and"
            f" {what}. Bits per byte and exact decoding rest on tokens that are strings of bytes."
        )
    other = sentencepiece.without_space(data)
    continuation = None if other is None else tokenizers.Tokenizer.from_str(json.dumps(other))
    return _wrap(model, name, is_byte_level=False, continuation=continuation)


def train_bpe(texts: Iterable[str | bytes], vocab_size: int) -> BPETokenizer:
    """Trains a byte-level BPE with GPT-2's rule for words.

    The vocabulary has "<|endoftext|>" (token 0), the 256 bytes and up to `vocab_size - 257`
    merges; a short sample gives fewer. Input that is not UTF-8 is replaced here, and only here.

    References:
      Sennrich, Haddow, Birch, Neural Machine Translation of Rare Words with Subword Units,
      arXiv:1508.07909.
    """
    if vocab_size < 257:
        raise ValueError(
            f"train_bpe: vocab_size must be at least 257 (bytes, end of text), got {vocab_size}."
        )
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(_byte_alphabet().values()),
        show_progress=False,
    )
    _set_byte_level(model)
    strings = (t if isinstance(t, str) else t.decode("utf-8", errors="replace") for t in texts)
    model.train_from_iterator(strings, trainer)
    return _wrap(model, f"bpe-{model.get_vocab_size()}")


def _load_gpt2(path: Path) -> BPETokenizer:
    vocab = json.loads((path / "encoder.json").read_text("utf-8"))
    lines = (path / "vocab.bpe").read_text("utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    broken = [merge for merge in merges if len(merge) != 2]
    if broken:
        raise ValueError(
            f"load_tokenizer: {path / 'vocab.bpe'}: a line must be two tokens, got {broken[0]}."
        )
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    _set_byte_level(model)
    if END_OF_TEXT in vocab:
        model.add_special_tokens([END_OF_TEXT])
    return _wrap(model, "gpt2-bpe")


def _set_byte_level(model: tokenizers.Tokenizer) -> None:
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()


def _wrap(
    model: tokenizers.Tokenizer,
    name: str,
    *,
    is_byte_level: bool = True,
    continuation: tokenizers.Tokenizer | None = None,
) -> BPETokenizer:
    # A text that spells "<|endoftext|>" shall not get the separator's token.
    for one in (model, continuation):
        if one is not None:
            one.encode_special_tokens = True
    vocab = model.get_vocab(with_added_tokens=True)
    added = model.get_added_tokens_decoder()
    byte_of = {character: byte for byte, character in _byte_alphabet().items()}
    end = END_OF_TEXT if is_byte_level else "</s>"
    silent = {end} if is_byte_level else {end, "<s>", "<unk>"}
    pieces = [b""] * (max(vocab.values()) + 1)
    for token, index in vocab.items():
        if token in silent:
            continue
        if index in added:  # is spelled as it reads
            pieces[index] = token.encode()
        elif is_byte_level:
            pieces[index] = bytes(byte_of[character] for character in token)
        else:
            pieces[index] = sentencepiece.piece_bytes(token)
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    return BPETokenizer(
        name=name,
        vocab_size=len(pieces),
        end_of_text=model.token_to_id(end),
        fingerprint=_fingerprint(model),
        model=model,
        pieces=tuple(pieces),
        byte_lengths=lengths,
        continuation=continuation,
    )


def _fingerprint(model: tokenizers.Tokenizer) -> str:
    """Hash of what decides about tokens: vocabulary, merges, how words are cut."""
    data = json.loads(model.to_str())
    # Releases of the package differ in how they spell a merge.
    merges = [m.split(" ") if isinstance(m, str) else m for m in data["model"]["merges"]]
    said = [data["model"]["vocab"], merges]
    said += [data[key] for key in ("normalizer", "pre_tokenizer", "added_tokens")]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte: itself, else the next one from U+0100 on.

    References:
      Radford et al., Language Models are Unsupervised Multitask Learners (2019), `bytes_to_unicode`
      of the released encoder.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}


def _to_bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def _to_str(text: str | bytes) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"encode_batch: text must be UTF-8, got {text[error.start : error.end]!r} after"
            f" {text[max(0, error.start - 30) : error.start]!r}; convert the file (iconv -t UTF-8),"
            " or use the bytes tokenizer."
        ) from error

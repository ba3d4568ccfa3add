"""SentencePiece's BPE, from tokenizer.model or a GGUF file, as a tokenizer of `tokenizers`.

Llama 1 and 2, Mistral and TinyLlama: a space is written as U+2581 and one is put before the text;
neighbours are merged whose union is the piece of the best score; a character without a piece
becomes its bytes. The package knows merges of pairs: those of a piece are all its cuts in two
pieces, in the order of the scores of the unions. Pairs of one union come in the order of their
pieces, where SentencePiece takes the leftmost in the text.

References:
  Kudo, Richardson, SentencePiece, arXiv:1808.06226; sentencepiece_model.proto of its repository.
"""

import pathlib
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces
_BPE = 2  # of the types of models
# Numbers of fields.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE, _SPACE_BEHIND, _BYTE_FALLBACK = 3, 24, 35  # of the trainer
_MAP, _ADDS_SPACE, _TRIMS, _ESCAPES, _RULES = 2, 3, 4, 5, 6  # of the normalizer


def read_sentencepiece(path: pathlib.Path) -> tokenizers.Tokenizer:
    """The tokenizer in a tokenizer.model; it adds no tokens of its own to a text.

    Raises:
      ValueError: If it is no such file, its model is not BPE with byte fallback, or it changes the
        text before it cuts it.
    """
    try:
        message = _fields(path.read_bytes())
        pieces, scores, types = [], [], []
        for raw in message.get(_PIECES, []):
            piece = _fields(raw)
            pieces.append(piece[1][0].decode())
            scores.append(struct.unpack("<f", piece[2][0])[0] if 2 in piece else 0.0)
            types.append(piece.get(3, [NORMAL])[0])
        trainer, normalizer = (_fields(message[key][0]) for key in (_TRAINER, _NORMALIZER))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(
            f"read_sentencepiece: {path} is damaged or no model of SentencePiece ({error!r}); fetch"
            " it again, or the tokenizer.json."
        ) from error

    def flag(message: dict[int, list[Any]], key: int, default: int) -> int:
        return message.get(key, [default])[0]

    refused = {
        "another model than BPE": flag(trainer, _MODEL_TYPE, 1) != _BPE,
        "no byte fallback": not flag(trainer, _BYTE_FALLBACK, 0),
        "spaces behind words": flag(trainer, _SPACE_BEHIND, 0),
        "a normalization of characters": normalizer.get(_MAP, [b""])[0],
        "rules of normalization": normalizer.get(_RULES, [b""])[0],
        "spaces that are removed": flag(normalizer, _TRIMS, 1),
        "spaces that are not escaped": not flag(normalizer, _ESCAPES, 1),
    }
    if found := [what for what, is_there in refused.items() if is_there]:
        raise ValueError(
            f"read_sentencepiece: {path} must be a BPE with byte fallback that leaves the text as"
            f" it is, got {', '.join(found)}; use the tokenizer.json of the model."
        )
    return sentencepiece_bpe(
        pieces, scores, types, adds_space=bool(flag(normalizer, _ADDS_SPACE, 1))
    )


def sentencepiece_bpe(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], *, adds_space: bool = True
) -> tokenizers.Tokenizer:
    """A tokenizer from pieces, the scores of their unions and their types.

    Args:
      pieces: By number.
      scores: A union of a higher score comes first.
      types: See the head of this file; bytes are spelled `<0x00>` to `<0xFF>`.
      adds_space: Whether a space comes before every text.
    """
    vocab = {piece: number for number, piece in enumerate(pieces)}
    ranked: list[tuple[float, int, int, int]] = []
    for number, (piece, kind) in enumerate(zip(pieces, types, strict=True)):
        if kind == NORMAL:
            for cut in range(1, len(piece)):
                left, right = vocab.get(piece[:cut]), vocab.get(piece[cut:])
                if left is not None and right is not None:
                    ranked.append((-scores[number], number, left, right))
    merges: Any = [(pieces[left], pieces[right]) for _, _, left, right in sorted(ranked)]
    unknown = [piece for piece, kind in zip(pieces, types, strict=True) if kind == UNKNOWN]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab,
            merges,
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [normalizers.Prepend(SPACE)] if adds_space else []
    normalizer: Any = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    tokenizer.normalizer = normalizer
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    decoder: Any = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if adds_space else steps)
    tokenizer.decoder = decoder
    special = [p for p, kind in zip(pieces, types, strict=True) if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens(special)
    plain = [p for p, kind in zip(pieces, types, strict=True) if kind == USER_DEFINED]
    # In the words of the text that was normalized, where a space is no space any more.
    tokenizer.add_tokens([tokenizers.AddedToken(p, normalized=False) for p in plain])
    return tokenizer


def _fields(raw: bytes) -> dict[int, list[Any]]:
    """A message of Protocol Buffers: numbers of fields to their values, in the order they came."""
    found: dict[int, list[Any]] = {}
    for number, value in _pairs(raw):
        found.setdefault(number, []).append(value)
    return found


def _pairs(raw: bytes) -> Iterator[tuple[int, Any]]:
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = raw[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    while place < len(raw):
        key = varint()
        kind = key & 7
        if kind == 0:
            value: Any = varint()
        elif kind in (1, 2, 5):
            size = varint() if kind == 2 else 8 if kind == 1 else 4
            value = raw[place : place + size]
            if len(value) < size:
                raise ValueError("it is cut off")
            place += size
        else:
            raise ValueError(f"a field of kind {kind}")
        yield key >> 3, value

"""Which pieces of a text stream are validation, and a sample of the others.

The rule. Pieces (whole documents up to 32 KiB, parts of longer ones) are numbered in the order of
the stream. Of each run of `k = round(1 / validation_fraction)` pieces, one, drawn by a hash of the
run's number, is validation; of the first run it is the second piece, so that the smallest text has
a validation split too. Both splits keep the order of the stream.

Why. The choice depends on nothing but the piece's number: the same files give the same split on
any machine, in one pass, with no second look at the stream. One piece of each run makes validation
representative of a corpus that is sorted by subject, which the last part of it is not. No byte lies
in both splits, and no window of tokens crosses from one to the other, for each has shards of its
own. Parts of one long document may fall on both sides, as the two halves of a book would; texts
that occur twice in the input are the input's affair.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Literal

from lowbit_jax.data.text import Piece

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


def is_validation(index: int, validation_fraction: float) -> bool:
    """Whether piece number `index` of a stream is validation; the module's docstring has the rule.

    Raises:
      ValueError: If the fraction lies outside [0, 0.5].
    """
    if not 0 <= validation_fraction <= 0.5:
        raise ValueError(
            f"is_validation: validation_fraction must lie in [0, 0.5], got {validation_fraction}."
        )
    if validation_fraction == 0:
        return False
    run_length = round(1 / validation_fraction)
    run, place = divmod(index, run_length)
    if run == 0:
        return place == 1
    digest = hashlib.blake2b(run.to_bytes(8, "little"), digest_size=8).digest()
    return place == int.from_bytes(digest, "little") % run_length


def split_pieces(
    pieces: Iterable[Piece], validation_fraction: float
) -> Iterator[tuple[Split, Piece]]:
    """Says for each piece in which split it lies.

    A piece after which its document goes on in the other split ends a document there: what follows
    it in its own split is another text.
    """
    held: tuple[Split, Piece] | None = None
    for index, piece in enumerate(pieces):
        split: Split = "validation" if is_validation(index, validation_fraction) else "train"
        if held is not None:
            ends = held[1].ends_document or held[0] != split
            yield held[0], held[1]._replace(ends_document=ends)
        held = (split, piece)
    if held is not None:
        yield held[0], held[1]._replace(ends_document=True)


def sample_train(
    pieces: Iterable[Piece], sample_bytes: int, validation_fraction: float = 0.01
) -> list[bytes]:
    """An even sample of the train pieces, between a half and all of `sample_bytes` where there
    are as many.

    Every `stride`-th piece is kept; when they grow beyond `sample_bytes`, every second of those is
    dropped and the stride doubles. One pass; the validation split stays unseen, so that a
    tokenizer trained on the sample knows nothing of it: pass the fraction that `write_dataset`
    gets.

    Raises:
      ValueError: If the fraction lies outside [0, 0.5].
    """
    kept: list[bytes] = []
    kept_bytes, stride, number = 0, 1, 0
    for index, piece in enumerate(pieces):
        if is_validation(index, validation_fraction):
            continue
        if number % stride == 0:
            kept.append(piece.text)
            kept_bytes += len(piece.text)
        number += 1
        while kept_bytes > sample_bytes and len(kept) > 1:
            kept = kept[::2]
            kept_bytes, stride = sum(map(len, kept)), 2 * stride
    return kept

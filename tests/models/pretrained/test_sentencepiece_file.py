"""tokenizer.model against a slow loop that merges by scores, as the paper's implementation does."""

import itertools
import struct
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lowbit_jax.models.pretrained import Pretrained, read_sentencepiece
from lowbit_jax.ptq.texts import tokenizer_of

SPACE = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["ab", "aba", f"{SPACE}a", "bab", "abab", f"{SPACE}{SPACE}", f"{SPACE}ab", "aa", "aaa"]
CHARACTERS = [SPACE, "a", "b", "c", "é"]
PIECES = ["<unk>", "<s>", "</s>", *BYTES, *WORDS, *CHARACTERS]
TYPES = [2, 3, 3, *[6] * 256, *[1] * (len(WORDS) + len(CHARACTERS))]
SCORES = [0.0] * 259 + [-float(number) for number in range(len(WORDS) + len(CHARACTERS))]


def varint(value):
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number, value):
    """A field of Protocol Buffers."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def write(path, *, trainer=None, normalizer=None):
    """As the trainer writes it: pieces, then what it and the normalizer were told."""
    trainer = {3: 2, 35: 1, **(trainer or {})}
    normalizer = {1: b"identity", 3: 1, 4: 0, 5: 1, **(normalizer or {})}
    message = b""
    for piece, score, kind in zip(PIECES, SCORES, TYPES, strict=True):
        said = field(1, piece.encode()) + field(2, score)
        message += field(1, said + (b"" if kind == 1 else field(3, kind)))
    for number, fields in ((2, trainer), (3, normalizer)):
        message += field(number, b"".join(field(key, value) for key, value in fields.items()))
    path.write_bytes(message)
    return path


def merged(text):
    """The pair of neighbours whose union has the best score, the leftmost of equals, and again."""
    symbols = list(SPACE + text.replace(" ", SPACE))
    rank = {piece: score for piece, score in zip(PIECES, SCORES, strict=True) if piece in WORDS}
    while True:
        unions = [a + b for a, b in itertools.pairwise(symbols)]
        found = [(-rank[union], place) for place, union in enumerate(unions) if union in rank]
        if not found:
            break
        place = min(found)[1]
        symbols[place : place + 2] = [unions[place]]
    tokens = [[s] if s in PIECES else [BYTES[b] for b in s.encode()] for s in symbols]
    return [PIECES.index(token) for part in tokens for token in part]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return read_sentencepiece(write(tmp_path_factory.mktemp("spm") / "tokenizer.model"))


def test_tokens_are_those_of_the_slow_loop(tokenizer):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("aaabbb  cé漢\n"), 30)) for _ in range(300)]
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert ids == merged(text), text
        assert tokenizer.decode(ids) == text


def test_a_directory_without_tokenizer_json_has_the_same_tokens(tokenizer, tmp_path):
    path = write(tmp_path / "tokenizer.model")
    model: Any = SimpleNamespace(config=SimpleNamespace(vocab_size=len(PIECES)))
    found = tokenizer_of(tmp_path, Pretrained(model, {}, path, {}))
    text = "ab abab </s> é\n"
    assert found.encode_batch([text])[0].tolist() == merged(text)
    assert found.decode(found.encode_batch([text])[0]) == text
    given = tokenizer_of(tmp_path, Pretrained(model, {}, None, {}), str(path))
    assert given == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainer": {3: 1}}, "another model than BPE"),
        ({"trainer": {35: 0}}, "no byte fallback"),
        ({"trainer": {24: 1}}, "spaces behind words"),
        ({"normalizer": {2: b"nfkc"}}, "a normalization of characters"),
        ({"normalizer": {4: 1}}, "spaces that are removed"),
    ],
)
def test_what_changes_the_text_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"leaves the text as it is, got {message};"):
        read_sentencepiece(write(tmp_path / "tokenizer.model", **change))


def test_damaged_files_are_refused(tmp_path):
    path = write(tmp_path / "tokenizer.model")
    whole = path.read_bytes()
    for content in (b"", b"no model at all", whole[:-3], whole[:2000], b"\xff" * 40):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged or no model of SentencePiece"):
            read_sentencepiece(path)

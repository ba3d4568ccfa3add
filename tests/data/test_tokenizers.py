import json

import numpy as np
import pytest
import tokenizers as tokenizers_package
from hypothesis import given
from hypothesis import strategies as st

from lowbit_jax.data.text import bundled_text, cut_document
from lowbit_jax.data.tokenizers import (
    ByteTokenizer,
    Tokenizer,
    count_bytes,
    load_tokenizer,
    token_dtype,
    tokenizer_from_json,
    train_bpe,
)

SAMPLES = [
    "",
    " ",
    "\n\n\t  \r\n",
    "Call me Ishmael.",
    "naïve café, 漢字かな, 😀👩‍👩‍👧, עברית, \u0301 combining",
    "def f(x):\n    return {'a': [x ** 2, ~x]}  # code\n",
    "x" * 300,
    "0123456789 3.14e-10",
    "\x00\x01\x7f\u2028",
    "<|endoftext|> spelled in the text",
]


def write_gpt2_files(model, folder):
    """The two files of GPT-2's release, from a trained model: same layout, small vocabulary."""
    data = json.loads(model.to_json())["model"]
    (folder / "encoder.json").write_text(json.dumps(data["vocab"]), "utf-8")
    lines = [m if isinstance(m, str) else " ".join(m) for m in data["merges"]]
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *lines, ""]), "utf-8")


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([bundled_text()[:200_000]], 600)


@pytest.fixture(scope="module")
def loaded(bpe, tmp_path_factory):
    """Every way to get a tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "gpt2").mkdir()
    write_gpt2_files(bpe, folder / "gpt2")
    (folder / "tokenizer.json").write_text(bpe.to_json(), "utf-8")
    return {
        "bytes": load_tokenizer("bytes"),
        "trained": bpe,
        "json": load_tokenizer(folder / "tokenizer.json"),
        "folder": load_tokenizer(folder),
        "gpt2": load_tokenizer(folder / "gpt2"),
    }


KINDS = ["bytes", "trained", "json", "folder", "gpt2"]


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_inverts_encoding(loaded, kind):
    tokenizer = loaded[kind]
    assert isinstance(tokenizer, Tokenizer)
    for text, tokens in zip(SAMPLES, tokenizer.encode_batch(SAMPLES), strict=True):
        expected = text.replace("\x00", "") if kind == "bytes" else text
        assert tokenizer.decode(tokens) == expected
        assert tokenizer.decode_bytes(tokens) == expected.encode()
        assert count_bytes(tokens, tokenizer) == len(expected.encode())
        assert tokens.dtype == token_dtype(tokenizer.vocab_size)


@given(st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"])))
def test_any_text_survives(bpe, text):
    for tokenizer in (bpe, ByteTokenizer()):
        (tokens,) = tokenizer.encode_batch([text])
        assert tokenizer.decode(tokens) == text
        assert count_bytes(tokens, tokenizer) == len(text.encode())


@given(st.lists(st.integers(-5, 700)))
def test_any_tokens_decode(bpe, tokens):
    for tokenizer in (bpe, ByteTokenizer()):
        text = tokenizer.decode(np.array(tokens, np.int32))
        outside = sum(not 0 <= t < tokenizer.vocab_size for t in tokens)
        assert text.count("\N{REPLACEMENT CHARACTER}") >= outside


def test_strings_and_bytes_have_the_same_tokens(bpe):
    for tokenizer in (bpe, ByteTokenizer()):
        strings = tokenizer.encode_batch(SAMPLES)
        for a, b in zip(
            strings, tokenizer.encode_batch([s.encode() for s in SAMPLES]), strict=True
        ):
            np.testing.assert_array_equal(a, b)  # exact


def test_the_packages_own_decoder_agrees(bpe):
    reference = tokenizers_package.Tokenizer.from_str(bpe.to_json())
    (tokens,) = bpe.encode_batch([bundled_text()[:50_000]])
    assert reference.decode(tokens.tolist()) == bpe.decode(tokens)


def test_pieces_of_a_document_have_the_tokens_of_the_document(bpe):
    text = bundled_text()[:100_000]
    pieces = [piece.text for piece in cut_document([text], 1000)]
    (whole,) = bpe.encode_batch([text])
    np.testing.assert_array_equal(np.concatenate(bpe.encode_batch(pieces)), whole)  # exact


def test_only_the_writer_makes_the_separator(bpe):
    (tokens,) = bpe.encode_batch(["a <|endoftext|> b"])
    assert bpe.end_of_text == 0
    assert 0 not in tokens
    assert bpe.decode([0, *tokens, 0]) == "a <|endoftext|> b"
    assert ByteTokenizer().decode([0, 104, 105, 0]) == "hi"


def test_equal_tokenizers_have_equal_fingerprints_and_others_do_not(loaded):
    assert loaded["trained"].fingerprint == loaded["json"].fingerprint
    assert loaded["trained"].fingerprint == loaded["folder"].fingerprint
    other = train_bpe([bundled_text()[:200_000]], 601)
    assert len({other.fingerprint, loaded["trained"].fingerprint, "bytes-0000000001"}) == 3
    # Golden: datasets on disk carry it.
    assert ByteTokenizer().fingerprint == "bytes-0000000001"


def test_training_is_deterministic_and_compresses(bpe):
    again = train_bpe([bundled_text()[:200_000]], 600)
    assert again.fingerprint == bpe.fingerprint
    assert bpe.vocab_size == 600
    (tokens,) = bpe.encode_batch([bundled_text()[:10_000]])
    assert len(tokens) < 10_000  # bound: byte-level BPE never has more tokens than bytes


@pytest.mark.parametrize(
    ("size", "dtype"), [(256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4")]
)
def test_the_dtype_holds_the_vocabulary(size, dtype):
    assert token_dtype(size) == np.dtype(dtype)


def test_input_that_is_not_utf8_is_named(bpe):
    with pytest.raises(ValueError, match=r"must be UTF-8, got b'\\xff' after b'good '"):
        bpe.encode_batch([b"good \xff bad"])
    (tokens,) = ByteTokenizer().encode_batch([b"good \xff"])
    assert ByteTokenizer().decode(tokens) == "good \N{REPLACEMENT CHARACTER}"


def test_what_is_no_tokenizer_is_refused(tmp_path, bpe):
    with pytest.raises(ValueError, match="load_tokenizer: takes"):
        load_tokenizer(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="load_tokenizer: takes"):
        load_tokenizer(tmp_path)  # a folder without either kind of file
    with pytest.raises(ValueError, match="not a JSON of the tokenizers package"):
        tokenizer_from_json('{"no": "tokenizer"}', name="a")
    words = tokenizers_package.Tokenizer(tokenizers_package.models.WordLevel({"a": 0}, "a"))
    with pytest.raises(ValueError, match="must be a byte-level BPE"):
        tokenizer_from_json(words.to_str(), name="words")
    pieces = tokenizers_package.models.BPE({"▁a": 0, "b": 1}, [])
    with pytest.raises(ValueError, match="tokens such as"):
        tokenizer_from_json(tokenizers_package.Tokenizer(pieces).to_str(), name="sentencepiece")
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe(["a"], 256)
    write_gpt2_files(bpe, tmp_path)
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na b c\n")
    with pytest.raises(ValueError, match="a line must be two tokens"):
        load_tokenizer(tmp_path)

"""Tokenizers of Llama 2's kind: BPE whose characters without a token become their bytes."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, trainers

from lowbit_jax.data.text import bundled_text
from lowbit_jax.data.tokenizers import load_tokenizer, tokenizer_from_json

SPACE = "\u2581"
TEXTS = ["", " ", "Call me Ishmael.", "   two  \n\n\tnaïve 漢字 😀", "</s> <s> <0x41> x", "\n"]
METASPACE = {
    "type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    """The JSON as of Llama 2, from a vocabulary trained on words: as large as the tests need."""
    trained = tokenizers.Tokenizer(models.BPE())
    words = bundled_text().decode()[:60_000].replace("\n", " ").split(" ")
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    trained.train_from_iterator((SPACE + word for word in words), trainer)
    found = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *found["vocab"]]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in found["merges"]]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return json.loads(tokenizer.to_str())


@pytest.fixture(scope="module")
def newer(data):
    """The same as it is written now."""
    return {**data, "normalizer": None, "pre_tokenizer": METASPACE}


def load(data):
    return tokenizer_from_json(json.dumps(data), name="llama")


@pytest.mark.parametrize("form", ["data", "newer"])
def test_texts_come_back(form, request):
    tokenizer = load(request.getfixturevalue(form))
    assert tokenizer.end_of_text == 2
    for text, tokens in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        # The newer form takes a space at the beginning for the one that it would put there.
        lost = form == "newer" and text.startswith(" ")
        assert tokenizer.decode(tokens) == (text[1:] if lost else text)
        if text:
            size = len(text.encode()) + (not lost)
            assert tokenizer.byte_lengths[tokens].sum() == size
        assert not np.isin(tokens, [0, 1, 2]).any()  # no special token, though one is spelled
    assert load_tokenizer("bytes") != tokenizer


@pytest.mark.parametrize("form", ["data", "newer"])
def test_the_parts_of_a_text_have_the_tokens_of_the_whole(form, request):
    tokenizer = load(request.getfixturevalue(form))
    text = bundled_text().decode()[:5000]
    (whole,) = tokenizer.encode_batch([text])
    cut = text.index(" ", 2500)
    (first,) = tokenizer.encode_batch([text[:cut]])
    (second,) = tokenizer.continued().encode_batch([text[cut:]])
    np.testing.assert_array_equal(np.concatenate([first, second]), whole)
    assert tokenizer.continued().decode(second) == text[cut:]
    assert tokenizer.continued().continued() == tokenizer.continued()


def test_tokens_are_those_of_transformers(data, newer, tmp_path):
    transformers = pytest.importorskip("transformers")
    for form in (data, newer):
        (tmp_path / "tokenizer.json").write_text(json.dumps(form), "utf-8")
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
        ours = load_tokenizer(tmp_path)
        for text in (bundled_text().decode()[:5000], *TEXTS[:4]):
            expected = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.encode_batch([text])[0].tolist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "NFKC"}}, "a normalizer NFKC"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "a pre-tokenizer Whitespace"),
        ({"pre_tokenizer": METASPACE}, "two spaces before a text"),
        ({"model": {"byte_fallback": False}}, "a BPE without byte fallback"),
        ({"model": {"dropout": 0.1}}, "dropout"),
    ],
)
def test_what_changes_the_text_is_refused_by_name(data, change, message):
    changed = {**data, **change}
    if "model" in change:
        changed["model"] = {**data["model"], **change["model"]}
    with pytest.raises(ValueError, match=f"must be a byte-level BPE.*and {message}"):
        load(changed)


def test_a_vocabulary_without_a_byte_is_refused(data):
    vocab = {token: n for token, n in data["model"]["vocab"].items() if token != "<0x7F>"}
    with pytest.raises(ValueError, match="byte fallback without <0x7F>"):
        load({**data, "model": {**data["model"], "vocab": vocab}})

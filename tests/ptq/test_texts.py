import json
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from lowbit_jax.data.text import PIECE_BYTES, bundled_text
from lowbit_jax.data.tokenizers import tokenizer_from_json, train_bpe
from lowbit_jax.models.pretrained import Pretrained
from lowbit_jax.models.pretrained.sentencepiece_file import sentencepiece_bpe
from lowbit_jax.ptq.texts import calibration_batches, read_tokens, tokenizer_of

LETTERS = ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "th", "\u2581th", "\u2581the"]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *LETTERS]
TYPES = [2, 3, 3, *[6] * 256, *[1] * len(LETTERS)]


@pytest.fixture(scope="module")
def llama():
    """A tokenizer of Llama 2's kind."""
    built = sentencepiece_bpe(PIECES, [-float(n) for n in range(len(PIECES))], TYPES)
    return tokenizer_from_json(built.to_str(), name="llama")


def pretrained(path, vocab_size):
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=vocab_size))
    return Pretrained(cast(Any, model), {}, path, {})


def test_a_long_document_has_the_tokens_of_the_whole(llama, tmp_path):
    text = bundled_text().decode()[: 2 * PIECE_BYTES + 1000]  # is read in three pieces
    (tmp_path / "a.txt").write_text(text, "utf-8")
    (tmp_path / "b.txt").write_text("the end", "utf-8")
    for tokenizer in (llama, train_bpe([text[:20_000]], 300)):
        found = read_tokens([tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer)
        whole = np.concatenate(tokenizer.encode_batch([text, "the end"]))
        np.testing.assert_array_equal(found, whole)
        np.testing.assert_array_equal(
            read_tokens([tmp_path / "a.txt"], tokenizer, 100), whole[:100]
        )


def test_the_tokenizer_of_a_directory(llama, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(llama.to_json(), "utf-8")
    found = tokenizer_of(tmp_path, pretrained(path, len(PIECES)))
    assert found == tokenizer_from_json(llama.to_json(), name=tmp_path.name)
    with pytest.raises(ValueError, match="cannot read"):
        tokenizer_of(tmp_path, pretrained(path, len(PIECES) - 1))
    with pytest.raises(ValueError, match=r"no tokenizer.json or tokenizer.model"):
        tokenizer_of(tmp_path, pretrained(None, len(PIECES)))
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]], "byte_fallback": False}
    path.write_text(json.dumps({**json.loads(llama.to_json()), "model": unigram}), "utf-8")
    with pytest.raises(ValueError, match=r"must be a byte-level BPE .* a Unigram without byte"):
        tokenizer_of(tmp_path, pretrained(path, len(PIECES)))


def test_windows_lie_in_the_text():
    batches = calibration_batches(np.arange(20, dtype=np.int32), 6, 5, 2, seed=0)
    assert [batch.shape for batch in batches] == [(2, 5)] * 3
    for batch in batches:
        assert (np.diff(batch) == 1).all()
    for wrong in ((5, 5, 2), (6, 21, 2), (0, 5, 2)):
        with pytest.raises(ValueError, match="samples must be a multiple of batch_size"):
            calibration_batches(np.arange(20), *wrong, seed=0)

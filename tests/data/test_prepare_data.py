import json
import pathlib
import runpy
import subprocess
import sys

import pytest

from lowbit_jax.data import open_dataset

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "prepare_data.py"


def run(*args):
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_script_trains_a_tokenizer_and_writes_a_dataset_once(tmp_path):
    texts = [f"Document {i} tells of whale number {i * i}." for i in range(300)]
    lines = "\n".join(json.dumps({"body": text}) for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    args = (tmp_path / "a.jsonl", "--out", tmp_path / "d", "--text-key", "body")
    args += ("--tokenizer", "bpe:300", "--validation-fraction", "0.1", "--baselines")
    first = run(*args)
    assert first.returncode == 0, first.stderr
    assert "bits/byte   uniform 8.000" in first.stdout
    dataset = open_dataset(tmp_path / "d", verify=True)
    assert dataset.tokenizer.vocab_size == 300
    assert dataset.train.text_bytes + dataset.validation.text_bytes == sum(map(len, texts))
    second = run(*args)
    assert second.returncode == 1
    assert "prepare_data: write_dataset:" in second.stderr
    assert "Traceback" not in second.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokenizer", "bpe:16k"), "needs a vocabulary of at least 257"),
        (("--tokenizer", "bpe:256"), "needs a vocabulary of at least 257"),
        (("--tokenizer", "gpt2"), "load_tokenizer: takes"),
        (("--out", "a.txt"), "File exists"),
    ],
    ids=str,
)
def test_a_wrong_call_is_told_without_a_traceback(tmp_path, monkeypatch, arguments, message):
    (tmp_path / "a.txt").write_text("Call me Ishmael.")
    words = [SCRIPT, tmp_path / "a.txt", "--out", tmp_path / "d", *arguments]
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    monkeypatch.chdir(tmp_path)
    # As above in a process of its own, where Python prints a text that it exits with, and no more.
    with pytest.raises(SystemExit, match=r"^prepare_data: ") as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert message in str(stopped.value)
    assert not (tmp_path / "d").exists()

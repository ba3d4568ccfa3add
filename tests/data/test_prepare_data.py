import json
import pathlib
import subprocess
import sys

from lowbit_jax.data import open_dataset

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "prepare_data.py"


def run(*args):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True, timeout=300
    )


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

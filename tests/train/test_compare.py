import dataclasses
import json

import pytest

from lowbit_jax.train.compare import compare_runs
from lowbit_jax.train.summary import Summary

SUMMARY = Summary(
    run_dir="x",
    steps=20,
    train_tokens=1000,
    validation_loss=3.0,
    validation_bits_per_byte=1.2,
    validation_tokens=500,
    baselines={},
    baseline_train_bytes=0,
    quantization_error=None,
    tokens_per_s=2.5e6,
    mfu=0.5,
    device="GPU",
    sample_prompt="",
    sample=None,
    files={},
)


def write_run(run_dir, summary):
    run_dir.mkdir()
    (run_dir / "summary.json").write_text(json.dumps(dataclasses.asdict(summary)))
    (run_dir / "run.json").write_text(json.dumps({"arguments": {"recipe": run_dir.name}}))
    (run_dir / "versions.json").write_text(json.dumps({"packages": {"jax": "0"}}))
    rows = [{"step": step, "split": "validation", "loss": 4.0 - step / 20} for step in (10, 20)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def test_gaps_are_to_the_first_run(tmp_path):
    first = write_run(tmp_path / "bf16", SUMMARY)
    better = dataclasses.replace(SUMMARY, validation_loss=2.75, quantization_error=0.1)
    second = write_run(tmp_path / "quest", better)
    table = compare_runs([first, second], tmp_path / "out")
    assert "| bf16 | 3.0000 | +0.0000 | 1.200 | 2,500 | - |" in table
    assert "| quest | 2.7500 | -0.2500 | 1.200 | 2,500 | 0.100 |" in table
    results = [json.loads(x) for x in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["run"] for row in results] == ["bf16", "quest"]
    assert results[1]["arguments"] == {"recipe": "quest"}
    assert (tmp_path / "out" / "validation_loss.png").read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_run_is_an_error(tmp_path):
    (tmp_path / "half").mkdir()
    with pytest.raises(ValueError, match="must hold a finished, validated run, got none"):
        compare_runs([tmp_path / "half"], tmp_path / "out")

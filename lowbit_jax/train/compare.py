"""Finished runs side by side: a table, a plot, and their results as JSON lines."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from lowbit_jax.files import write_atomically
from lowbit_jax.train.summary import Summary, load_summary
from lowbit_jax.train.tracking import read_metrics


def compare_runs(run_dirs: Sequence[pathlib.Path], out_dir: pathlib.Path) -> str:
    """Compares finished runs; the gaps are to the first of them.

    Args:
      run_dirs: Folders of finished runs, named after what tells them apart.
      out_dir: Where `results.jsonl` and `validation_loss.png` go; made if missing.

    Returns:
      A Markdown table: loss in nats per token, gap, bits per byte, speed, quantization error.

    Raises:
      ValueError: If a folder holds no finished run that was validated.
    """
    summaries: dict[str, Summary] = {}
    for run_dir in run_dirs:
        summary = load_summary(run_dir)
        if summary is None or summary.validation_loss is None:
            raise ValueError(
                f"compare_runs: {run_dir} must hold a finished, validated run, got"
                f" {'none' if summary is None else 'one without validation'}; finish it first."
            )
        summaries[run_dir.name] = summary
    out_dir.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"run": name, **run_record(run_dir, summary)}) + "\n"
        for run_dir, (name, summary) in zip(run_dirs, summaries.items(), strict=True)
    ]
    write_atomically(out_dir / "results.jsonl", "".join(lines))
    _plot(run_dirs, out_dir / "validation_loss.png")
    return _table(summaries)


def run_record(run_dir: pathlib.Path, summary: Summary) -> dict[str, Any]:
    """One line of a results file: what was run, what came of it, and on what, as JSON values."""
    run = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    made_with = json.loads((run_dir / "versions.json").read_text(encoding="utf-8"))
    return {
        "config": run.get("name"),
        "arguments": run["arguments"],
        "steps": summary.steps,
        "train_tokens": summary.train_tokens,
        "validation_loss": summary.validation_loss,
        "validation_bits_per_byte": summary.validation_bits_per_byte,
        "validation_tokens": summary.validation_tokens,
        "quantization_error": summary.quantization_error,
        "tokens_per_s": summary.tokens_per_s,
        "mfu": summary.mfu,
        "device": summary.device,
        "corpus": summary.corpus,
        "packages": made_with["packages"],
        "git_commit": made_with.get("git_commit"),
    }


def _table(summaries: dict[str, Summary]) -> str:
    baseline = next(iter(summaries.values())).validation_loss or 0.0
    lines = [
        "| run | validation loss | gap | bits per byte | ktok/s | rms(w - Q(w)) / rms(w) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, s in summaries.items():
        loss = s.validation_loss or 0.0
        bits = "" if s.validation_bits_per_byte is None else f"{s.validation_bits_per_byte:.3f}"
        speed = "" if s.tokens_per_s is None else f"{s.tokens_per_s / 1e3:,.0f}"
        error = "-" if s.quantization_error is None else f"{s.quantization_error:.3f}"
        gap = loss - baseline
        lines.append(f"| {name} | {loss:.4f} | {gap:+.4f} | {bits} | {speed} | {error} |")
    return "\n".join(lines)


def _plot(run_dirs: Sequence[pathlib.Path], path: pathlib.Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, needed once
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)  # no global state, no display
    axes = figure.subplots()
    for run_dir in run_dirs:
        rows = read_metrics(run_dir / "metrics.jsonl")
        points = [(row["step"], row["loss"]) for row in rows if row["split"] == "validation"]
        axes.plot(*zip(*points, strict=True), marker="o", label=run_dir.name)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)

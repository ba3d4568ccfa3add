"""What quantization did to each matrix: a table, JSON and a plot."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from lowbit_jax.ptq.calibrate import MatrixReport

REPORTS = ("report.json", "report.png", "report.txt")


def report_table(reports: Sequence[MatrixReport]) -> str:
    """Errors of the outputs by layer (rows) and matrix (columns), in percent, and seconds."""
    names = list(dict.fromkeys(report.path.split("/")[1] for report in reports))
    lines = ["layer  " + "".join(f"{name:>10}" for name in names) + "         s"]
    for layer in sorted({report.layer for report in reports}):
        of_layer = {r.path.split("/")[1]: r for r in reports if r.layer == layer}
        cells = "".join(f"{100 * of_layer[name].error:>10.3f}" for name in names)
        lines.append(f"{layer:>5}  {cells}{sum(r.time_s for r in of_layer.values()):>10.1f}")
    failures = sum(report.failures for report in reports)
    lines.append("errors of outputs on the calibration tokens, % of their squares")
    if failures:
        lines.append(f"{failures} factorisations failed and were repeated with more damping")
    return "\n".join(lines)


def save_report(
    folder: pathlib.Path, reports: Sequence[MatrixReport], settings: dict[str, Any]
) -> None:
    """Writes report.json, report.txt and report.png into a folder that is there."""
    record = {"settings": settings, "matrices": [dataclasses.asdict(r) for r in reports]}
    (folder / "report.json").write_text(json.dumps(record, indent=1) + "\n")
    _plot(folder / "report.png", reports)
    bits = settings.get("bits_per_weight")
    last = "" if bits is None else f"{bits:.3f} bits a weight\n"
    (folder / "report.txt").write_text(f"{report_table(reports)}\n{last}")


def _plot(path: pathlib.Path, reports: Sequence[MatrixReport]) -> None:
    from matplotlib.figure import Figure  # slow to import

    axes: Any
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(report.path.split("/")[1] for report in reports):
        rows = [r for r in reports if r.path.endswith(name)]
        axes.plot([r.layer for r in rows], [r.error for r in rows], marker=".", label=name)
    axes.set(xlabel="layer", ylabel="squared error of outputs, relative", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)

"""What quantization did to each matrix, and why: tables, JSON and a plot."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from lowbit_jax.ptq.calibrate import MatrixReport

# What is to be told beside the bits of codes that are not what was written.
AS_FLOATS = " as codes; written are float32 numbers of their values, 32 bits a weight"
REPORTS = ("report.json", "report.png", "report.txt")

# Columns of the table of reasons: heading, field, format, factor.
_COLUMNS = (
    ("w kurtosis", "weight_kurtosis", ".1f", 1),
    ("w max/rms", "weight_max_to_rms", ".1f", 1),
    ("x max/rms", "input_max_to_rms", ".1f", 1),
    ("x max/median", "input_max_to_median", ".3g", 1),
    ("scale min", "scale_min", ".2e", 1),
    ("scale median", "scale_median", ".2e", 1),
    ("scale max", "scale_max", ".2e", 1),
    ("zeros %", "zero_codes", ".2f", 100),
    ("limit %", "limit_codes", ".2f", 100),
)


def report_table(reports: Sequence[MatrixReport]) -> str:
    """Errors of the outputs by layer (rows) and matrix (columns), in percent, and seconds."""
    names = _names(reports)
    lines = ["layer  " + "".join(f"{name:>10}" for name in names) + "         s"]
    for layer in sorted({report.layer for report in reports}):
        of_layer = {_name(r): r for r in reports if r.layer == layer}
        cells = "".join(f"{100 * of_layer[name].error:>10.3f}" for name in names)
        lines.append(f"{layer:>5}  {cells}{sum(r.time_s for r in of_layer.values()):>10.1f}")
    failures = sum(report.failures for report in reports)
    lines.append("errors of outputs on the calibration tokens, % of their squares")
    if failures:
        lines.append(f"{failures} factorisations failed and were repeated with more damping")
    return "\n".join(lines)


def reasons_table(reports: Sequence[MatrixReport]) -> str:
    """Outliers, scales and codes of each matrix of the model, over all layers.

    The smallest of the smallest scales, the median of the median ones and of the shares of codes,
    the largest of the others; after the error the layer that has the largest. Columns that no
    report has are left out.
    """
    columns = [c for c in _COLUMNS if any(getattr(r, c[1]) is not None for r in reports)]
    rows = [["matrix", "error %", "layer", *(column[0] for column in columns)]]
    for name in _names(reports):
        of_name = [report for report in reports if _name(report) == name]
        worst = max(of_name, key=lambda report: report.error)
        cells = [name, f"{100 * worst.error:.3f}", f"{worst.layer}"]
        for _, field, form, factor in columns:
            found = [v for r in of_name if (v := getattr(r, field)) is not None]
            cells.append(f"{factor * _over_layers(field)(found):{form}}" if found else "-")
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    said = "largest error, and its layer"
    if columns:
        said += (
            "; outliers: the largest over the layers, scales: smallest, median, largest, shares of"
            " codes: medians\nw: weights; x: inputs; max/median: of the mean squares of channels;"
            " limit: codes at the outermost levels"
        )
    return "\n".join([*lines, said])


def save_report(
    folder: pathlib.Path, reports: Sequence[MatrixReport], settings: dict[str, Any]
) -> None:
    """Writes report.json, report.txt and report.png into a folder that is there."""
    record = {"settings": settings, "matrices": [dataclasses.asdict(r) for r in reports]}
    (folder / "report.json").write_text(json.dumps(record, indent=1) + "\n")
    plot_report(folder / "report.png", reports)
    bits = settings.get("bits_per_weight")
    note = AS_FLOATS if settings.get("store") == "floats" else ""
    last = "" if bits is None else f"{bits:.3f} bits a weight{note}\n"
    (folder / "report.txt").write_text(
        f"{report_table(reports)}\n\n{reasons_table(reports)}\n{last}"
    )


def plot_report(path: pathlib.Path, reports: Sequence[MatrixReport]) -> None:
    """Draws errors, outliers of weights and inputs, and shares of codes over the layers."""
    from matplotlib.figure import Figure  # slow to import

    panels = [
        ("error", "error of outputs, % of their squares", 100.0, "log"),
        ("weight_kurtosis", "kurtosis of weights (3: normal)", 1.0, "log"),
        ("input_max_to_rms", "largest input / root mean square", 1.0, "log"),
        ("zero_codes", "codes that are 0, %", 100.0, "linear"),
    ]
    panels = [p for p in panels if any(getattr(r, p[0]) is not None for r in reports)]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3 * lines + 0.6), layout="constrained")
    axes: Any = figure.subplots(lines, columns, squeeze=False).reshape(-1)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, reports, *panel)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize="small")
    figure.savefig(path, dpi=120)


def _draw(
    axis: Any, reports: Sequence[MatrixReport], field: str, title: str, factor: float, scale: str
) -> None:
    """A line for each matrix of a block."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    drawn: list[Any] = []
    for number, name in enumerate(_names(reports)):
        rows = sorted((r for r in reports if _name(r) == name), key=lambda r: r.layer)
        points = [(r.layer, factor * v) for r in rows if (v := getattr(r, field)) is not None]
        # Matrices that take one input have one line: the colours alternate along it.
        before = drawn.count(points)
        drawn.append(points)
        style = (4 * before, (4, 8)) if before else "-"
        axis.plot(*zip(*points, strict=True), ".", ls=style, color=f"C{number}", label=name)
    values = [value for points in drawn for _, value in points]
    axis.set_title(title, fontsize="medium")
    axis.set(xlabel="layer")
    if scale == "log" and min(values) > 0:
        axis.set(yscale="log")
        is_narrow = max(values) < 100 * min(values)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_narrow else (1,)))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)


def _name(report: MatrixReport) -> str:
    return report.path.split("/")[1]


def _names(reports: Sequence[MatrixReport]) -> list[str]:
    """Of the matrices of a block, in their order."""
    return list(dict.fromkeys(map(_name, reports)))


def _over_layers(field: str) -> Callable[[Sequence[float]], float]:
    if field == "scale_min":
        return min
    is_median = field in ("scale_median", "zero_codes", "limit_codes")
    return (lambda values: sorted(values)[(len(values) - 1) // 2]) if is_median else max

"""Measurements as a file, a table and a roofline plot."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import rich.box
from rich.table import Table

from lowbit_jax.files import write_atomically
from pallas_kernels.measurement import Measurement, data_sheet, show_rate, show_time

FILE = "bench.json"
_HEADER = ("work", "time", "min to max", "TFLOP/s", "of floor", "speed", "notes")


def save_rows(folder: pathlib.Path, rows: Sequence[Measurement]) -> None:
    """Writes the rows to `bench.json` of a folder, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"rows": [dataclasses.asdict(row) for row in rows]}
    write_atomically(folder / FILE, json.dumps(record, indent=1) + "\n")


def load_rows(*folders: pathlib.Path) -> list[Measurement]:
    """The rows of folders that `save_rows` wrote; of a case measured twice, the later folder's.

    Raises:
      FileNotFoundError: If a folder has none.
    """
    found: dict[tuple[str, str], Measurement] = {}
    for folder in folders:
        for fields in json.loads((folder / FILE).read_text())["rows"]:
            row = Measurement(**fields)
            found[row.work, row.name] = row
    return list(found.values())


def cells(row: Measurement) -> tuple[str, ...]:
    """The entries of a line of the table, as text."""
    if row.median_s is None or row.min_s is None or row.max_s is None:
        return (row.name, row.status, "", "", "", "", row.note)
    notes = [row.note] if row.note else []
    if row.tokens:
        notes.insert(0, f"{row.tokens / row.median_s / 1e3:.1f} ktok/s")
        if row.mfu:
            notes.insert(1, f"MFU {row.mfu:.1%}")
    if row.memory_bytes:
        notes.insert(-1, f"{row.memory_bytes / 2**30:.1f} GiB")
    if row.device_note:
        notes.append(row.device_note)
    if row.is_host_bound:
        notes.append(f"launches take {row.host_share:.0%} of the time")
    return (
        row.name,
        show_time(row.median_s),
        f"{show_time(row.min_s)} to {show_time(row.max_s)}",
        show_rate(row.flops_per_s) if row.flops_per_s else "",
        f"{row.share_of_floor:.0%}" if row.share_of_floor else "",
        ", ".join(f"{ratio:.2f} x {name}" for name, ratio in row.ratios.items()),
        "; ".join(notes),
    )


def table(rows: Sequence[Measurement]) -> Table:
    """All rows, under the name of their work, for a terminal."""
    made = Table(*_HEADER, box=rich.box.SIMPLE, caption=caption(rows))
    made.columns[0].no_wrap = True
    for work, members in _by_work(rows).items():
        made.add_section()
        made.add_row(f"[bold]{work}[/bold]")
        for row in members:
            made.add_row(*cells(row))
    return made


def markdown(rows: Sequence[Measurement]) -> str:
    """The same as Markdown."""
    lines = [f"| {' | '.join(_HEADER)} |", f"|{' --- |' * len(_HEADER)}"]
    for work, members in _by_work(rows).items():
        lines.append(f"| **{work}** |{' |' * (len(_HEADER) - 1)}")
        lines += [f"| {' | '.join(c.replace('|', '/') for c in cells(row))} |" for row in members]
    return "\n".join((*lines, "", caption(rows), ""))


def caption(rows: Sequence[Measurement]) -> str:
    """Where and how the rows were measured, and on what they are based."""
    origins = sorted({f"{row.device}, jax {row.jax_version}" for row in rows if row.device})
    measured = [row for row in rows if row.repeats]
    repeats = sorted({row.repeats for row in measured})
    settle_s = sorted({row.settle_s for row in measured})
    return (
        f"{'; '.join(origins)}. Medians of {' or '.join(map(str, repeats)) or 'no'} measurements,"
        " each the mean of queued calls; the rows of a work in turn, each after"
        f" {' or '.join(f'{s:g}' for s in settle_s) or 'no'} s by itself; speeds from neighbours."
        " Floor: the larger of FLOPs over peak and bytes over bandwidth by the data sheet; MFU"
        " over the bf16 peak."
    )


def plot_roofline(path: pathlib.Path, rows: Sequence[Measurement]) -> bool:
    """Draws FLOP/s over FLOP/byte with the roofs of the first known device.

    Rows without FLOPs, those of quantizers, have no place there. Baselines are hollow.

    Returns:
      Whether there was anything to draw, and so a file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, needed once
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.flops_per_s and row.bytes]
    if not shown:
        return False
    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)  # no global state, no display
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="TFLOP/s")
    intensities = [sum(row.flops.values()) / row.bytes for row in shown]
    device, sheet = next(
        ((row.device, s) for row in shown if (s := data_sheet(row.device)) is not None), ("", None)
    )
    if sheet is not None:
        ends = min(intensities) / 2, max(intensities) * 2
        for style, (unit, peak) in zip(("--", "-"), sheet.peak.items(), strict=False):
            ridge = peak / sheet.bandwidth
            x = sorted({*ends, min(max(ridge, ends[0]), ends[1])})
            y = [min(peak, at * sheet.bandwidth) / 1e12 for at in x]
            axes.plot(x, y, f"k{style}", linewidth=1, label=f"roof of {device}, {unit}")
    marks = dict(zip(_by_work(shown), "osD^vP*X<>hp" * 3, strict=False))
    for number, (work, members) in enumerate(_by_work(shown).items()):
        baselines = {name for row in members for name in row.ratios}
        for row in members:
            at = sum(row.flops.values()) / row.bytes, (row.flops_per_s or 0) / 1e12
            fill = "none" if row.name in baselines else f"C{number % 10}"
            axes.plot(
                *at, marks[work], color=f"C{number % 10}", markerfacecolor=fill, linestyle="none",
                label=work if row is members[0] else None,
            )  # fmt: skip
    figure.legend(loc="outside right upper", fontsize=7)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
    return True


def _by_work(rows: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    works: dict[str, list[Measurement]] = {}
    for row in rows:
        works.setdefault(row.work, []).append(row)
    return works

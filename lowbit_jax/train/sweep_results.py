"""Results of a sweep: JSON lines that outlive the runs' folders, a Markdown table, a plot."""

import json
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lowbit_jax.files import write_atomically
from lowbit_jax.train.sweep_rows import Row

# A finished run as JSON values, see `compare.run_record`, with "row" and "seed"; of a run that
# diverged there is an "error" in place of the results.
Record = dict[str, Any]
# Those of a sweep, by row and seed.
Records = dict[tuple[str, int], Record]


def read_records(path: pathlib.Path) -> Records:
    """The lines of a results file, the last of each run; {} if there is none.

    Raises:
      ValueError: If a line is not one of a sweep.
    """
    if not path.exists():
        return {}
    records = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            records[record["row"], record["seed"]] = record
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(
                f"read_records: {path}, line {number}, must be a JSON object with a row and a seed,"
                f" got {line[:80]!r}; mend it, or choose another --out."
            ) from error
    return records


def write_records(path: pathlib.Path, rows: Sequence[Row], records: Records) -> None:
    """Writes one line a run, in the order of the rows; runs of other rows come last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    order = {row.name: number for number, row in enumerate(rows)}
    keys = sorted(records, key=lambda key: (order.get(key[0], len(order)), *key))
    write_atomically(path, "".join(json.dumps(records[key]) + "\n" for key in keys))


def results_markdown(
    title: str, rows: Sequence[Row], records: Records, speeds: Mapping[str, float]
) -> str:
    """The table as text: a part for each group, a line for each row, those not run yet too.

    Losses are means over the seeds; a gap is the mean over the seeds that row and baseline share,
    with the standard error of that mean. If all baselines lead to one row, such as BF16, there is
    the gap to that one, too.

    Args:
      title: The heading.
      rows: In the order of the table.
      records: Of these rows.
      speeds: Tokens per second, by the rows' `speed_key`; only what was measured alone.
    """
    lines = [f"# {title}", "", *_provenance(records.values())]
    rows = [row for row in rows if row.has_result]
    reference = _reference(rows)
    columns = ["row", "validation loss", "gap", "to"]
    columns += [f"gap to {reference}"] if reference else []
    columns += ["bits per byte", "rms(w - Q(w)) / rms(w)", "ktok/s", "published"]
    groups = list(dict.fromkeys(row.group for row in rows))
    for group in groups:
        lines += ["", f"## {group}", ""] if group else [""]
        cells = [_cells(row, records, speeds, reference) for row in rows if row.group == group]
        lines += [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]
    return "\n".join(lines) + "\n"


def _reference(rows: Sequence[Row]) -> str | None:
    """The one row to which all baselines lead, if some lead there by way of another row."""
    baselines = {row.name: row.baseline for row in rows}
    ends = {end for end in baselines.values() if end and baselines.get(end) is None}
    is_direct = all(end is None or end in ends for end in baselines.values())
    return ends.pop() if len(ends) == 1 and not is_direct else None


def paired_gaps(row: Row, records: Records, baseline: str | None = None) -> list[float]:
    """Loss minus the baseline's, nats per token, for each seed that both have finished.

    Args:
      row: Whose loss.
      records: Of the runs.
      baseline: Another row than the row's own baseline.
    """
    baseline = baseline or row.baseline or ""
    gaps = []
    for seed in row.seeds:
        loss = _loss(records.get((row.name, seed)))
        reference = _loss(records.get((baseline, seed)))
        if loss is not None and reference is not None:
            gaps.append(loss - reference)
    return gaps


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None for fewer than two values."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def plot_gaps(path: pathlib.Path, rows: Sequence[Row], records: Records) -> None:
    """Draws the gaps with their standard errors, a panel for each group; no file without gaps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, needed once
    from matplotlib.figure import Figure

    groups: dict[str, list[tuple[str, list[float]]]] = {}
    for row in rows:
        if row.has_result and (gaps := paired_gaps(row, records)):
            label = f"{row.name} - {row.baseline}"
            groups.setdefault(row.group, []).append((label, gaps))
    if not groups:
        return
    heights = [len(bars) + 1.5 for bars in groups.values()]
    figure = Figure(figsize=(8, 0.26 * sum(heights) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)  # no global state, no display
    panels = figure.subplots(len(groups), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (group, bars) in zip(panels, groups.items(), strict=True):
        labels = [label for label, _ in bars]
        means = [statistics.mean(gaps) for _, gaps in bars]
        errors = [standard_error(gaps) or 0.0 for _, gaps in bars]
        drawn = axes.barh(labels, means, xerr=errors, height=0.7, capsize=2)
        axes.bar_label(drawn, fmt="%+.4f", fontsize=7, padding=2)
        axes.margins(x=0.15)  # for these numbers
        axes.axvline(0, color="black", lw=0.8)
        axes.invert_yaxis()
        axes.set_title(group, fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    panels[-1].set_xlabel("gap in validation loss (nats per token)")
    figure.savefig(path, dpi=120)


def _loss(record: Record | None) -> float | None:
    return None if record is None else record.get("validation_loss")


def _shown_gap(gaps: Sequence[float], runs: int) -> str:
    if not gaps:
        return ""
    error = standard_error(gaps)
    shown = f"{statistics.mean(gaps):+.4f}" + ("" if error is None else f" ± {error:.4f}")
    return shown + (f" ({len(gaps)} pairs)" if len(gaps) < runs else "")


def _cells(
    row: Row, records: Records, speeds: Mapping[str, float], reference: str | None
) -> Sequence[str]:
    found = [records[row.name, seed] for seed in row.seeds if (row.name, seed) in records]
    done = [record for record in found if _loss(record) is not None]
    all_seeds = f"{len(row.seeds)} seeds" if len(row.seeds) > 1 else ""
    seeds = all_seeds if len(done) == len(row.seeds) else f"{len(done)} of {all_seeds}"
    if done:
        loss = f"{_mean(done, 'validation_loss'):.4f}" + (f" ({seeds})" if seeds else "")
    elif found:
        loss = "diverged"
    else:
        loss = "to be run"
    if done and len(found) > len(done):
        loss += f", {len(found) - len(done)} diverged"
    gap = _shown_gap(paired_gaps(row, records), len(done))
    to_reference = (
        _shown_gap(paired_gaps(row, records, reference), len(done))
        if reference and row.name != reference
        else ""
    )
    bits, residual = _mean(done, "validation_bits_per_byte"), _mean(done, "quantization_error")
    speed = speeds.get(row.speed_key)
    return (
        row.name,
        loss,
        gap,
        row.baseline or "",
        *([to_reference] if reference else []),
        "" if bits is None else f"{bits:.3f}",
        "" if residual is None else f"{residual:.3f}",
        "" if speed is None else f"{speed / 1e3:,.0f}",
        row.anchor,
    )


def _mean(records: Sequence[Record], name: str) -> float | None:
    values = [record[name] for record in records if record[name] is not None]
    return statistics.mean(values) if values else None


def _provenance(records: Iterable[Record]) -> list[str]:
    """What the runs have in common, and a warning where that is not enough."""
    finished = [record for record in records if _loss(record) is not None]
    if not finished:
        return ["No run has finished yet."]

    def values(name: str) -> list[str]:
        return sorted({str(record[name]) for record in finished if record.get(name)})

    jax_versions = sorted({record["packages"]["jax"] for record in finished})
    lines = [
        f"{len(finished)} runs on {', '.join(values('device'))}, JAX {', '.join(jax_versions)};"
        " losses in nats per token, means over seeds; gaps seed by seed, with the standard error"
        " of their mean; speeds are of runs that had the device for themselves."
    ]
    for name in ("corpus", "validation_tokens"):
        if len(different := values(name)) > 1:
            lines += ["", f"**Not comparable: the runs differ in {name}: {', '.join(different)}.**"]
    return lines

"""Results of compression as a table and plots."""

import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from lowbit_jax.bench.compression_claims import Verdict, losses, verdicts_of
from lowbit_jax.bench.compression_rows import Table
from lowbit_jax.train.sweep_results import Record, Records, standard_error
from lowbit_jax.train.sweep_rows import Row

# Of Okabe and Ito, which those see who do not see red and green apart; marks differ as well.
_STYLES = {
    "rtn": ("#000000", "o"),
    "rtn_hadamard": ("#999999", "s"),
    "wush_rtn": ("#56B4E9", "^"),
    "gptq": ("#E69F00", "v"),
    "mr_gptq": ("#D55E00", "D"),
    "wush": ("#0072B2", "P"),
    "magnitude": ("#000000", "o"),
    "wanda": ("#56B4E9", "^"),
    "sparsegpt": ("#E69F00", "v"),
    "retrain": ("#009E73", "s"),
    "elsa": ("#CC79A7", "D"),
}
LABELS = {
    "rtn": "RTN",
    "rtn_hadamard": "RTN + Hadamard",
    "wush_rtn": "WUSH + RTN",
    "gptq": "GPTQ",
    "mr_gptq": "MR-GPTQ",
    "wush": "WUSH + GPTQ",
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "retrain": "retrained mask",
    "elsa": "Elsa",
}
_LEAST_GAP = 1e-2  # nats; below it the axis is linear


def results_markdown(title: str, table: Table, records: Records) -> str:
    """The table as text: what was measured of each row, and orderings of rows.

    Args:
      title: The heading.
      table: With all rows, those not run yet too.
      records: Of its rows.
    """
    values = losses(table.rows, records)
    lines = [f"# {title}", "", *_provenance(table, records)]
    header = ("row", "of RTN's", "layer error, %", "bits a weight", "s")
    if table.kind == "llama":
        header = ("row", "perplexity", "loss", "gap", *header[1:])
    for group in dict.fromkeys(row.group for row in table.rows):
        members = [row for row in table.rows if row.group == group]
        lines += ["", f"## {group}", "", f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
        nearest = next((r.name for r in members if r.arguments.get("method") == "rtn"), "")
        for row in members:
            cells = _cells(row, table, records, values, values.get(nearest, []))
            lines.append(f"| {' | '.join(cells)} |")
    lines += _orderings(table, values)
    return "\n".join(lines) + "\n"


def _provenance(table: Table, records: Records) -> list[str]:
    done = [record for record in records.values() if "error" not in record]
    if not done:
        return ["Nothing has been measured yet."]
    devices = sorted({record["device"] for record in done})
    versions = sorted({record["jax"] for record in done})
    common = (
        f"{len(done)} results on {', '.join(devices)}, JAX {', '.join(versions)}. Model"
        f" {table.name}, text {', '.join(table.settings['text'])}; calibrated on"
        f" {table.samples} windows of {table.length} tokens; means over the seeds of their places,"
        " ± the standard error of the mean. Layer error: squared error of the outputs of a matrix"
        " relative to their squares, mean over all matrices, on validation text, with inputs as the"
        " uncompressed model gives them"
    )
    if table.kind == "bert":
        return [
            common
            + "; W4A4: rounded, with the weights of W4A16, whose solving is not in its seconds."
        ]
    tokens = sorted({f"{record['validation_tokens']:,}" for record in done})
    return [
        f"{common}, not rounded. Perplexity on {', '.join(tokens)} tokens in windows of"
        f" {table.window} moved by {table.stride}; loss in nats a token, gap to the uncompressed"
        " model. Seconds with compilation and evaluation."
    ]


def _cells(
    row: Row,
    table: Table,
    records: Records,
    values: dict[str, list[float]],
    nearest: Sequence[float],
) -> list[str]:
    found = [records[row.name, seed] for seed in row.seeds if (row.name, seed) in records]
    done = [record for record in found if "error" not in record]
    blank = [""] * (4 if table.kind == "bert" else 7)
    label = LABELS.get(row.arguments.get("method", ""), row.name)
    if not done:
        state = "to be run"
        if found:  # of what a device says the first of many lines
            state = "failed: " + found[0]["error"].partition("\n")[0].replace("|", "/")
        return [f"{label} ({state})", *blank]
    if len(row.seeds) > 1:
        label += f" ({_count(done, found, row)})"
    own = values[row.name]
    of_nearest = ""
    if own and nearest and statistics.mean(nearest) > 0 and row.arguments.get("method") != "rtn":
        of_nearest = f"{statistics.mean(own) / statistics.mean(nearest):.2f}"
    errors = _column(done, "layer_error")
    cells = [
        of_nearest,
        _with_error([100 * e for e in errors], "{:.3f}"),
        _with_error(_column(done, "bits_per_weight")[:1], "{:.3f}"),
        f"{statistics.mean(_column(done, 'time_s')):.1f}",
    ]
    if table.kind == "bert":
        return [label, *cells]
    perplexities, own_losses = _column(done, "perplexity"), _column(done, "validation_loss")
    return [
        label,
        f"{statistics.mean(perplexities):.3f}",
        f"{statistics.mean(own_losses):.4f}",
        _with_error(own, "{:+.4f}"),
        *cells,
    ]


def _count(done: Sequence[Record], found: Sequence[Record], row: Row) -> str:
    seeds = f"{len(row.seeds)} seeds"
    text = seeds if len(done) == len(row.seeds) else f"{len(done)} of {seeds}"
    return text + (f", {len(found) - len(done)} failed" if len(found) > len(done) else "")


def _column(records: Sequence[Record], name: str) -> list[float]:
    return [record[name] for record in records if record.get(name) is not None]


def _with_error(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    error = standard_error(values)
    text = form.format(statistics.mean(values))
    return text if error is None else f"{text} ± {form.replace('+', '').format(error)}"


def _orderings(table: Table, values: dict[str, list[float]]) -> list[str]:
    judged = verdicts_of(table.rows, values)
    published = [verdict for verdict in judged if verdict.claim.source is not None]
    ours = [verdict for verdict in judged if verdict.claim.source is None]
    about = "Formats, inputs and sparsities are those of the papers."
    if table.kind == "bert":
        about += (
            " They compare accuracy or perplexity of language models, WUSH layer errors, too; here"
            " layer errors of an encoder are compared."
        )
    lines = _verdicts("Published orderings", about, published)
    about = "The same where no paper has them: other formats, scales or inputs, injected outliers."
    return lines + _verdicts("Orderings of ours", about, ours)


def _verdicts(heading: str, about: str, verdicts: Sequence[Verdict]) -> list[str]:
    if not verdicts:
        return []
    words = [verdict.word.split()[0] for verdict in verdicts]
    header = ["loses less", "than", "", "by"]
    header += ["published in"] if verdicts[0].claim.source else []
    return [
        "", f"## {heading}", "",
        f"{about} {words.count('holds')} of {len(words)} hold, {words.count('open')} are open"
        f" (difference below two standard errors, or one seed), {words.count('reversed')} are"
        " reversed.", "",
        f"| {' | '.join(header)} |", "| --- " * len(header) + "|",
        *map(_ordering, verdicts),
    ]  # fmt: skip


def _ordering(verdict: Verdict) -> str:
    claim, difference = verdict.claim, verdict.worse - verdict.better
    error = "" if verdict.standard_error is None else f" ± {verdict.standard_error:.2g}"
    return (
        f"| {claim.better} ({verdict.better:.4g}) | {claim.worse} ({verdict.worse:.4g})"
        f" | {verdict.word} | {difference:.3g}{error} |"
        + (f" {claim.source} |" if claim.source else "")
    )


def save_plots(folder: pathlib.Path, table: Table, records: Records) -> list[str]:
    """Draws formats.png and sparsity.png, where there is something to draw; their names."""
    values = {name: found for name, found in losses(table.rows, records).items() if found}
    rows = [row for row in table.rows if row.name in values]
    is_llama = table.kind == "llama"
    label = "gap in loss, nats a token" if is_llama else "error of outputs, relative"
    panels: dict[str, list[Row]] = {}
    for row in rows:
        if "format" in row.arguments:
            inputs = "weights and inputs" if "activations" in row.arguments else "weights alone"
            suffix = ", injected outliers" if row.arguments.get("outliers") else ""
            panels.setdefault(inputs + suffix, []).append(row)
    names = []
    if panels:
        _draw(folder / "formats.png", panels, "format", values, label, is_llama)
        names.append("formats.png")
    pruned = [
        row for row in rows if "pattern" in row.arguments and row.arguments["pattern"] != "0%"
    ]
    if pruned:
        _draw(folder / "sparsity.png", {"zeros": pruned}, "pattern", values, label, is_llama)
        names.append("sparsity.png")
    return names


def _draw(
    path: pathlib.Path,
    panels: dict[str, list[Row]],
    argument: str,
    values: dict[str, list[float]],
    label: str,
    is_gap: bool,
) -> None:
    """Marks for methods over formats or patterns, a panel for each list of rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, needed once
    from matplotlib.figure import Figure

    columns = 2 if len(panels) > 1 else 1
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns + 1.4, 3.6 * height), layout="constrained")
    FigureCanvasAgg(figure)  # no global state, no display
    grid = figure.subplots(height, columns, squeeze=False, sharey=True).ravel()
    seen: dict[str, Any] = {}
    for axes, (title, rows) in zip(grid, panels.items(), strict=False):
        places = {
            name: i for i, name in enumerate(dict.fromkeys(r.arguments[argument] for r in rows))
        }
        methods = list(dict.fromkeys(row.arguments["method"] for row in rows))
        for row in rows:
            method = row.arguments["method"]
            color, mark = _STYLES[method]
            shift = (methods.index(method) - (len(methods) - 1) / 2) * 0.8 / len(methods)
            mean = statistics.mean(values[row.name])
            drawn = axes.errorbar(
                places[row.arguments[argument]] + shift, mean,
                yerr=standard_error(values[row.name]) or 0.0,
                fmt=mark, color=color, markersize=6, capsize=2, linestyle="none",
            )  # fmt: skip
            seen.setdefault(method, drawn)
        for place in list(places.values())[1:]:
            axes.axvline(place - 0.5, color="black", alpha=0.12, linewidth=0.8)
        if is_gap:
            axes.set_yscale("symlog", linthresh=_LEAST_GAP)
            axes.axhline(0, color="black", linewidth=0.6)
        else:
            axes.set_yscale("log")
        axes.set_xticks(list(places.values()), [str(n) for n in places], fontsize=8)
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.set_title(title, fontsize=9, loc="left")
        axes.grid(axis="y", alpha=0.3, which="both")
        axes.tick_params(labelsize=8)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.supylabel(label, fontsize=9)
    order = [method for method in _STYLES if method in seen]
    figure.legend(
        [seen[m] for m in order], [LABELS[m] for m in order], loc="outside right upper", fontsize=8
    )
    figure.savefig(path, dpi=120)

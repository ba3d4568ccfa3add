"""How sparse a model really is, and a report of how it was pruned."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util
from jaxtyping import PyTree

from lowbit_jax.models.llama import QUANTIZABLE_PATHS
from lowbit_jax.ptq.report import AS_FLOATS, REPORTS, report_table
from lowbit_jax.ptq.sparse_methods import Pruned
from lowbit_jax.sparsity import NM, Pattern


def sparsity_of(params: PyTree) -> dict[str, np.ndarray]:
    """Fraction of exact zeros of each of the seven matrices, by path: `(layers,)` float64."""
    return {
        path: np.asarray(np.mean(np.asarray(w) == 0, axis=(1, 2), dtype=np.float64))
        for path, w in _matrices(params).items()
    }


def breaks_pattern(params: PyTree, pattern: Pattern) -> int:
    """Runs of m inputs that keep more than n; 0 for unstructured patterns, which have no runs."""
    if not isinstance(pattern, NM):
        return 0
    count = 0
    for matrix in _matrices(params).values():
        w = np.asarray(matrix)
        kept = np.count_nonzero(w.reshape(*w.shape[:-1], -1, pattern.m), axis=-1)
        count += int(np.sum(kept > pattern.n))
    return count


def sparsity_table(params: PyTree) -> str:
    """Percent of zeros by layer (rows) and matrix (columns), and over all of them."""
    found = sparsity_of(params)
    names = [path.split("/")[1] for path in found]
    lines = ["layer  " + "".join(f"{name:>10}" for name in names)]
    for layer, row in enumerate(np.stack(list(found.values()), axis=1)):
        lines.append(f"{layer:>5}  " + "".join(f"{100 * share:>10.3f}" for share in row))
    sizes = [w.size for w in _matrices(params).values()]
    total = np.average([share.mean() for share in found.values()], weights=sizes)
    lines.append(f"zeros of each matrix, %; of all of them {100 * total:.4f}")
    return "\n".join(lines)


def save_sparse_report(
    folder: pathlib.Path, pruned: Pruned, pattern: Pattern, settings: Mapping[str, Any]
) -> None:
    """Writes report.json, report.txt and report.png into a folder that is there.

    Args:
      folder: That is there.
      pruned: What to report.
      pattern: That it is to have.
      settings: Plain data for JSON; report.txt has of them "losses_held_out", by what was
        tried, None where not finite, and "loss_held_out_before".

    Raises:
      ValueError: If an N:M pattern is broken anywhere; nothing is written then.
    """
    if broken := breaks_pattern(pruned.params, pattern):
        raise ValueError(
            f"save_sparse_report: {broken} runs of inputs keep more than {pattern} allows; prune"
            " the model once more."
        )
    record = {
        "settings": dict(settings),
        "sparsity": {path: list(share) for path, share in sparsity_of(pruned.params).items()},
        "matrices": [dataclasses.asdict(report) for report in pruned.reports],
        "training": [row._asdict() for row in pruned.records],
    }
    parts = []
    if pruned.reports:
        parts.append(report_table(pruned.reports))
    if pruned.records:
        last = pruned.records[-1]
        gap = f", |x - z| / |x| {last.gap:.4f} before the last projection" if last.gap else ""
        parts.append(f"{last.step:,} steps, loss {last.loss:.4f} in the last of them{gap}")
    if "losses_held_out" in settings:
        found = (
            f"{'not finite' if loss is None else f'{loss:.4f}'} ({tried})"
            for tried, loss in settings["losses_held_out"].items()
        )
        before = settings["loss_held_out_before"]
        parts.append(f"held-out loss {before:.4f} before pruning, after it {', '.join(found)}")
    parts.append(sparsity_table(pruned.params))
    if pruned.bits_per_weight is not None:
        note = AS_FLOATS if settings.get("store") == "floats" else ""
        parts.append(f"{pruned.bits_per_weight:.3f} bits a weight, zeros among the codes{note}")
    _plot(folder / REPORTS[1], pruned)
    (folder / REPORTS[0]).write_text(json.dumps(record, indent=1) + "\n")
    (folder / REPORTS[2]).write_text("\n\n".join(parts) + "\n")


def _matrices(params: PyTree) -> dict[str, Any]:
    """The seven weights, stacked over layers, by "part/name"."""
    flat: dict[str, Any] = traverse_util.flatten_dict(dict(params), sep="/")
    return {
        path.removeprefix("layers/").removesuffix("/weight"): flat[path]
        for path in QUANTIZABLE_PATHS
    }


def _plot(path: pathlib.Path, pruned: Pruned) -> None:
    from matplotlib.figure import Figure  # slow to import

    axes: Any
    panels = 1 + bool(pruned.reports) + bool(pruned.records)
    figure = Figure(figsize=(5.5 * panels, 4), layout="constrained")
    axes = iter(figure.subplots(1, panels, squeeze=False)[0])
    zeros = next(axes)
    for name, shares in sparsity_of(pruned.params).items():
        zeros.plot(100 * shares, marker=".", label=name.split("/")[1])
    zeros.set(xlabel="layer", ylabel="zeros, %")
    zeros.legend(ncols=2, fontsize="small")
    if pruned.reports:
        errors = next(axes)
        for name in dict.fromkeys(report.path for report in pruned.reports):
            rows = [r for r in pruned.reports if r.path == name]
            errors.plot([r.layer for r in rows], [r.error for r in rows], marker=".")
        errors.set(xlabel="layer", ylabel="squared error of outputs, relative")
        if any(report.error > 0 for report in pruned.reports):  # with no zeros there is none
            errors.set_yscale("log")
    if pruned.records:
        training = next(axes)
        steps = [row.step for row in pruned.records]
        training.plot(steps, [row.loss for row in pruned.records], label="loss, nats a token")
        training.plot(steps, [row.gap for row in pruned.records], label="|x - z| / |x|")
        training.set(xlabel="step")
        training.legend(fontsize="small")
    for panel in figure.axes:
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)

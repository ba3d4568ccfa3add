"""`python scripts/bench_scaling.py`: training on one GPU and on several of one host."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np

from lowbit_jax.bench.scaling_row import TINY, Measured, Row

FILE = "scaling.jsonl"
_MODULE = "lowbit_jax.bench.scaling_row"
RECIPES = ("bf16", "fp8_tensorwise", "quartet")


def main(
    devices: int = 2,
    model: str = "800m",
    recipes: tuple[str, ...] = RECIPES,
    zero: tuple[int, ...] = (1, 3),
    gradient_exchange: tuple[str, ...] = (),
    device_batch: int = 8,
    seq_len: int = 2048,
    tiny: bool = False,
    out: pathlib.Path | None = None,
) -> int:
    """Tokens a second on one device and on several, and whether their losses are the same.

    Each recipe trains on random tokens: on one device with the batch of one, and with that of all,
    whose losses are the reference; then on all devices under each stage of ZeRO. A row is measured
    in a process of its own and saved when it is done; rows that the file has are not measured
    again. The exit status is 1 if a row failed, its losses differ by more than they should, or they
    are not finite.

    Args:
      devices: Of the mesh.
      model: A size of `models.llama_config`.
      recipes: Names in `ops.RECIPES`.
      zero: Stages. The third gathers codes where the recipe quantizes weights, else bfloat16.
      gradient_exchange: Further rows of stage 1, see `RunOptions`; int8 for example.
      device_batch: Sequences a device.
      seq_len: Tokens of each.
      tiny: A small model on simulated devices, to see whether everything works.
      out: Folder of scaling.jsonl and scaling.md.
    """
    if devices < 2:
        print(f"error: --devices must be at least 2, got {devices}.", file=sys.stderr)
        return 2
    if tiny:
        model, device_batch, seq_len = TINY, 2, 128
    rows = plan_rows(
        devices, model, recipes, zero, gradient_exchange, device_batch=device_batch, seq_len=seq_len
    )
    file = None if out is None else out / FILE
    known = load(file) if file is not None and file.exists() else []
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    measured, is_good = [m for m in known if m.row in rows], True
    for row in rows:
        if any(m.row == row for m in measured):
            continue
        found = _measure_apart(row, tiny)
        if found is None:
            is_good = False
            continue
        measured.append(found)
        if file is not None:
            with open(file, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(dataclasses.asdict(found)) + "\n")
        print(f"{row}: {found.tokens_per_s:,.0f} tokens/s", flush=True)
    text = markdown(measured)
    print(text)
    if out is not None:
        (out / "scaling.md").write_text(text)
    return int(not (is_good and all(_is_equal(m, measured) for m in measured)))


def plan_rows(
    devices: int,
    model: str,
    recipes: tuple[str, ...],
    zero: tuple[int, ...],
    gradient_exchange: tuple[str, ...],
    *,
    device_batch: int,
    seq_len: int,
) -> list[Row]:
    """The rows in an order in which the first are worth the most."""
    rows = []
    for recipe in recipes:
        one = Row(model, recipe, 1, device_batch=device_batch, seq_len=seq_len)
        many = dataclasses.replace(one, devices=devices)
        rows += [one, *(dataclasses.replace(many, zero=stage) for stage in zero)]
        rows += [dataclasses.replace(many, gradient_exchange=name) for name in gradient_exchange]
    rows += [
        dataclasses.replace(r, device_batch=devices * device_batch) for r in rows if r.devices == 1
    ]
    return rows


def load(file: pathlib.Path) -> list[Measured]:
    """The rows of a file."""
    return [Measured.from_json(line) for line in file.read_text(encoding="utf-8").splitlines()]


def reference(measured: Measured, others: list[Measured]) -> Measured | None:
    """The row of one device with the same tokens; None if there is none, or it is that row."""
    row = measured.row
    wanted = dataclasses.replace(
        row,
        devices=1,
        zero=1,
        gradient_exchange="exact",
        device_batch=row.devices * row.device_batch,
    )
    return next((m for m in others if m.row == wanted and row.devices > 1), None)


def difference(measured: Measured, others: list[Measured]) -> float:
    """The largest difference of a loss from the one of one device; 0 without a reference."""
    one = reference(measured, others)
    if one is None:
        return 0.0
    return float(np.abs(np.subtract(measured.losses, one.losses)).max())


def bound(measured: Measured, others: list[Measured]) -> float:
    """By how much losses may differ: what sums in another order do to them.

    Statistical: on one device weights that were off by a unit in their last place moved the losses
    by so much, and what several devices do is about as much; ten times that, and float32's rounding
    of a mean over a million terms, pass only where something else is different. Gradients that are
    rounded at random are another method: infinite.
    """
    one = reference(measured, others)
    if one is None or measured.row.gradient_exchange != "exact":
        return float("inf")
    moved = np.abs(np.subtract(one.perturbed, one.losses)).max()
    return float(10 * moved + 2.0**-20 * max(one.losses))


def _is_equal(measured: Measured, others: list[Measured]) -> bool:
    """Whether all losses are finite and those of one device; NaN is within no bound."""
    is_finite = bool(np.all(np.isfinite(measured.losses)))
    return is_finite and difference(measured, others) <= bound(measured, others)


def markdown(measured: list[Measured]) -> str:
    """The table, a line for each row."""
    lines = [
        "| model | recipe | devices | ZeRO | sequences x tokens a device | tokens/s | of linear |"
        " gathered | loss differs by (bound) | GiB | products |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for m in measured:
        row = m.row
        alone = dataclasses.replace(row, devices=1, zero=1, gradient_exchange="exact")
        base = next((o.tokens_per_s for o in measured if o.row == alone), None)
        linear = "" if base is None else f"{m.tokens_per_s / base / row.devices:.1%}"
        losses = ""
        if reference(m, measured) is not None:
            losses = f"{difference(m, measured):.1e} ({bound(m, measured):.1e})"
        gathered = ", ".join(
            f"{size / 2**20:.3g} MiB {dtype}"
            for dtype, size in m.sent.get("all-gather", {}).items()
        )
        stage = "" if row.devices == 1 else str(row.zero)
        stage += "" if row.gradient_exchange == "exact" else f", {row.gradient_exchange}"
        gib = "" if m.peak_bytes is None else f"{m.peak_bytes / 2**30:.1f}"
        cells = (
            row.model, row.recipe, row.devices, stage, f"{row.device_batch} x {row.seq_len}",
            f"{m.tokens_per_s:,.0f}", linear, gathered, losses, gib, m.paths,
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    devices = ", ".join(dict.fromkeys(m.device for m in measured))
    return "\n".join(
        [*lines, "", f"Measured on {devices}. What is gathered in a loop counts once."]
    )


def _measure_apart(row: Row, tiny: bool) -> Measured | None:
    """In a process that has the devices to itself; None if it failed, which it has printed."""
    environment = {**os.environ}
    if tiny:
        environment["JAX_PLATFORMS"] = "cpu"
    elif row.devices == 1:  # else it would take memory of all
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    command = [sys.executable, "-m", _MODULE, json.dumps(dataclasses.asdict(row))]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        print(f"{row}: its process ended with exit status {done.returncode}", file=sys.stderr)
        return None
    return Measured.from_json(done.stdout.splitlines()[-1])

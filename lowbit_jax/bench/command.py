"""`python scripts/bench.py`: measures groups, each in a process of its own, and reports."""

import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console

from lowbit_jax.analysis.kernel_times import kernel_times
from lowbit_jax.bench.groups import GROUPS, select
from lowbit_jax.bench.report import FILE, load_rows, markdown, plot_roofline, save_rows, table
from pallas_kernels.measure import measure_all
from pallas_kernels.measurement import Measurement

_MODULE = "lowbit_jax.bench.command"  # this file, also where it is the main program
# Within which an H100 has the clock that a program's power allows, after one of another power.
_SETTLE_S = 0.25
_WIDTH = 180  # of the table where the output is no terminal


def main(
    only: tuple[str, ...] = (),
    tiny: bool = False,
    out: pathlib.Path | None = None,
    sources: Annotated[tuple[pathlib.Path, ...], tyro.conf.arg(name="from")] = (),
    repeats: int = 20,
) -> int:
    """Times kernels, layers, decoding and whole training steps beside XLA in BF16 and FP8.

    Several groups run in a process each: what one leaves in memory, or breaks, does not reach the
    next. Rows are saved as soon as a comparison is done. The exit status is 1 if a row failed; rows
    that cannot run on this machine are skipped and say why.

    Args:
      only: Groups: product, quantizer, producer, layer, decode, step (step_7b, step_800m); none:
        all.
      tiny: Small shapes, to see whether everything works.
      out: Folder of bench.json, bench.md and bench.png. Rows of groups that are not measured now
        stay.
      sources: Folders of earlier runs: shows, and writes to out, their rows; measures nothing.
      repeats: Measurements of each row.
    """
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    try:
        groups = select(only)
        rows = load_rows(*sources)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if repeats < 1:
        print(f"error: --repeats must be at least 1, got {repeats}.", file=sys.stderr)
        return 2
    if sources:
        if only:
            rows = [row for row in rows if row.group in groups]
        if out is not None:
            save_rows(out, rows)
    elif len(groups) == 1:
        rows = _measure_group(groups[0], tiny, out, repeats)
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows = _measure_apart(groups, tiny, out or pathlib.Path(folder), repeats)
    if len(groups) == 1 or sources:  # otherwise the groups have shown theirs
        console.print(table(rows))
    if out is not None:
        _draw(out)
    return int(any(row.status == "failed" for row in rows))


def _measure_group(
    group: str, tiny: bool, out: pathlib.Path | None, repeats: int
) -> list[Measurement]:
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:5.0f} s] {text}", flush=True)

    say(f"{group} on {jax.devices()[0].device_kind}, jax {jax.__version__}")
    rows = []
    comparisons = GROUPS[group](tiny)
    options: dict[str, Any] = {
        "repeats": repeats,
        "settle_s": _SETTLE_S if jax.default_backend() == "gpu" else 0.0,
        "say": say,
        "device_seconds": device_seconds,
    }
    for measured in measure_all(comparisons, **options):
        rows += measured
        for row in measured:
            say(str(row))
        if out is not None:
            _merge(out, group, rows)
    return rows


def device_seconds(call: Callable[[], Any], calls: int = 10) -> float | None:
    """Seconds that a call's kernels run on the GPU, by the profiler; None where there is no GPU."""
    if jax.default_backend() != "gpu":
        return None
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                out = call()
            jax.block_until_ready(out)
        rows = kernel_times(folder)
    return sum(row.total_us for row in rows) * 1e-6 / calls


def _measure_apart(
    groups: tuple[str, ...], tiny: bool, out: pathlib.Path, repeats: int
) -> list[Measurement]:
    """This process leaves the device alone, so that each group has all of its memory."""
    found = []
    for group in groups:
        _merge(out, group, [])
        command = [
            *(sys.executable, "-m", _MODULE, "--only", group, "--out", str(out)),
            *("--repeats", str(repeats), *(("--tiny",) if tiny else ())),
        ]
        code = subprocess.run(command, check=False).returncode
        rows = [row for row in load_rows(out) if row.group == group]
        if code != int(any(row.status == "failed" for row in rows)):  # died, rows may be missing
            note = f"its process ended with exit status {code}"
            rows.append(Measurement(group, group, "all", "", jax.__version__, "failed", note))
            _merge(out, group, rows)
            print(rows[-1], file=sys.stderr)
        found += rows
    return found


def _merge(out: pathlib.Path, group: str, rows: list[Measurement]) -> None:
    """Replaces the rows of `group` in the file, which is in the order of `GROUPS`."""
    others = load_rows(out) if (out / FILE).exists() else []
    kept = [row for row in others if row.group != group]
    order = list(GROUPS)
    save_rows(out, sorted((*kept, *rows), key=lambda row: order.index(row.group)))


def _draw(out: pathlib.Path) -> None:
    rows = load_rows(out)
    (out / "bench.md").write_text(markdown(rows))
    has_plot = plot_roofline(out / "bench.png", rows)
    print(f"wrote {out}: {FILE}, bench.md{', bench.png' if has_plot else ''}")


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))

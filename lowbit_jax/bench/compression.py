"""`python scripts/compress_sweep.py`: a table of compression results, row after row."""

import dataclasses
import json
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lowbit_jax.bench.compression_report import results_markdown, save_plots
from lowbit_jax.bench.compression_rows import TRAINED, Table, expected_s, method_of, run_order
from lowbit_jax.bench.compression_subject import Subject, load_subject
from lowbit_jax.files import write_atomically
from lowbit_jax.train.config import UsageError, load_config_file, parse_knobs
from lowbit_jax.train.sweep_results import Record, Records, read_records, write_records
from lowbit_jax.train.sweep_rows import Row, check_rows


@dataclasses.dataclass(frozen=True)
class CompressionOptions:
    """Options of a table of compression results.

    Attributes:
      out: Folder for results.jsonl, results.md, formats.png and sparsity.png.
      only: Runs no other rows than those whose name matches this regular expression wholly; the
        table still has all.
      list: Say which rows would be run, in their order, with the seconds expected of each, and run
        none.
      time_limit_s: Start no row that is not expected to end within that many seconds from the
        start of the command. None: no limit.
      measure: Run rows; otherwise only table and plots are written anew.
    """

    out: pathlib.Path
    only: str | None = None
    list: bool = False
    time_limit_s: float | None = None
    measure: bool = True


@dataclasses.dataclass(frozen=True)
class CompressionReport:
    """What became of the rows.

    Attributes:
      done: Measured now.
      failed: By name, why.
      left: Not run, for lack of time or because of an interrupt.
    """

    done: tuple[str, ...]
    failed: dict[str, str]
    left: tuple[str, ...]


def parse_compression_command(
    arguments: Sequence[str],
) -> tuple[Table, str, CompressionOptions]:
    """Reads `TABLE.py --knob value ...`; the knobs are the arguments of its `get_table`.

    Returns:
      The table, the first line of the file's docstring as its title, and the options.

    Raises:
      UsageError: If there is no such file, or its rows contradict each other.
    """
    if not arguments or arguments[0].startswith("-"):
        tables = sorted(map(str, pathlib.Path("configs/compress").glob("*.py")))
        print(
            f"usage: {pathlib.Path(sys.argv[0]).name} TABLE.py --out DIR [...]\n\n"
            f"Tables here: {', '.join(tables) or 'none'}.\nTABLE.py --help explains the rest."
        )
        raise SystemExit(0 if arguments and arguments[0] in ("-h", "--help") else 2)
    path = pathlib.Path(arguments[0])
    module = load_config_file(path, "get_table")
    knobs, options = parse_knobs(path, module, "get_table", CompressionOptions, arguments[1:])
    try:
        table = module.get_table(**knobs)
        check_rows(table.rows)
        for row in table.rows:
            method_of(row.arguments)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    return table, (module.__doc__ or path.stem).split("\n")[0].rstrip("."), options


def compress_sweep(
    table: Table,
    title: str,
    options: CompressionOptions,
    *,
    console: Console | None = None,
    subject: Subject | None = None,
) -> CompressionReport:
    """Runs what is missing of a table in this process, and writes the table of what there is.

    The model, its tokens and the inputs of its layers are read once, and what is compiled serves
    all rows. A line is written as a row ends; a row that trains and is killed goes on from what it
    kept in the folder `work` of `options.out` (its `time_s` counts from there). A row that cannot
    be solved, or for which memory is short, has a line with its error, which counts as a result:
    remove it to try again.

    Args:
      table: What to measure.
      title: Of the page.
      options: Where and how.
      console: Where to print.
      subject: A loaded one; None: that of the table, loaded if there is a row to run.

    Raises:
      UsageError: If `options.out` holds a result of such a row under other settings or arguments.
      ValueError: If the results are damaged, or model or text cannot be read.
    """
    start = time.perf_counter()
    console = Console() if console is None else console
    path = options.out / "results.jsonl"
    records = read_records(path)
    for row in table.rows:
        for seed in row.seeds:
            if (said := _difference(row, table, records.get((row.name, seed)))) is not None:
                raise UsageError(
                    f"compress_sweep: {path} has a result of {row.name} under other settings"
                    f" ({said}); choose another --out, or remove that line."
                )
    device = jax.devices()[0].device_kind
    todo = [
        (row, seed)
        for row, seed in run_order(table.rows)
        if (row.name, seed) not in records
        and (options.only is None or re.fullmatch(options.only, row.name))
    ]
    if options.list:
        _print_list(console, todo, table, records, device)
        return CompressionReport((), {}, tuple(f"{row.name}, seed {seed}" for row, seed in todo))
    done, failed, left = [], {}, []
    if todo and options.measure:
        subject = load_subject(table) if subject is None else subject
        console.print(f"loaded in {time.perf_counter() - start:.0f} s; {device}", highlight=False)
        done, failed, left = _run(subject, todo, table, records, options, console, device, start)
    if records:
        _write_page(table, title, options.out, records)
    return CompressionReport(tuple(done), failed, tuple(left))


def _run(
    subject: Subject,
    todo: Sequence[tuple[Row, int]],
    table: Table,
    records: Records,
    options: CompressionOptions,
    console: Console,
    device: str,
    start: float,
) -> tuple[list[str], dict[str, str], list[str]]:
    """Measures rows, into `records` and the file; names of those done, failed and left."""
    done: list[str] = []
    failed: dict[str, str] = {}
    left: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(todo), left="")
        for number, (row, seed) in enumerate(todo):
            name = f"{row.name}, seed {seed}"
            expected = expected_s(row, table, records, device)
            passed = time.perf_counter() - start
            if options.time_limit_s is not None and passed + expected > options.time_limit_s:
                left.append(name)
                continue
            rest = sum(expected_s(other, table, records, device) for other, _ in todo[number:])
            shown = f"{number}/{len(todo)} rows, {_minutes(rest)} left"
            progress.update(bar, description=name, completed=number, left=shown)
            row_start = time.perf_counter()
            work = options.out / "work" / f"{row.name}-{seed}"
            try:
                found = subject.measure(
                    row,
                    seed,
                    lambda step, total, number=number: progress.update(
                        bar, completed=number + step / total
                    ),
                    work,
                )
            except KeyboardInterrupt:
                left += [f"{other.name}, seed {s}" for other, s in todo[number:]]
                break
            # A RuntimeError is what the device says, such as out of memory, or what is not covered.
            except (ValueError, RuntimeError) as error:
                failed[name] = str(error) or type(error).__name__
                found = {"error": failed[name]}
            else:
                done.append(name)
            record: Record = {
                **_identity(row, seed, table),
                **found,
                "time_s": time.perf_counter() - row_start,
                "device": device,
                "jax": jax.__version__,
            }
            records[row.name, seed] = record
            write_records(options.out / "results.jsonl", table.rows, records)
            shutil.rmtree(work, ignore_errors=True)
            progress.console.print(
                f"{name}: {_headline(record)}", highlight=False, markup=False, soft_wrap=True
            )
    return done, failed, left


def _identity(row: Row, seed: int, table: Table) -> dict[str, Any]:
    """What tells a line from others."""
    return {
        "row": row.name,
        "seed": seed,
        "config": pathlib.Path(row.config).stem,
        "arguments": dict(row.arguments),
        "settings": table.settings,
    }


def _difference(row: Row, table: Table, record: Record | None) -> str | None:
    """In what a line is not what the table asks for; None if in nothing.

    Settings that tables have gained or lost since do not count, nor do those of training for rows
    that do not train.
    """
    if record is None:
        return None
    wanted = json.loads(json.dumps(_identity(row, 0, table)))
    settings = set(wanted["settings"]) & set(record["settings"])
    if row.arguments.get("method") not in TRAINED:
        settings = {name for name in settings if not name.startswith("train_")}
    names = {"arguments": {*wanted["arguments"], *record["arguments"]}, "settings": settings}
    for part in names:
        for name in sorted(names[part]):
            there, here = record[part].get(name), wanted[part].get(name)
            if there != here:
                return f"{name} is {there!r} there, {here!r} here"
    return None


def _print_list(
    console: Console,
    todo: Sequence[tuple[Row, int]],
    table: Table,
    records: Records,
    device: str,
) -> None:
    seconds = [expected_s(row, table, records, device) for row, _ in todo]
    for (row, seed), expected in zip(todo, seconds, strict=True):
        console.print(f"{expected:7.1f} s  {row.name}, seed {seed}", highlight=False)
    runs = sum(len(row.seeds) for row in table.rows)
    console.print(
        f"{len(todo)} of {runs} results are missing, {_minutes(sum(seconds))} expected on {device}",
        highlight=False,
    )


def _write_page(table: Table, title: str, out: pathlib.Path, records: Records) -> None:
    write_atomically(out / "results.md", results_markdown(title, table, records))
    save_plots(out, table, records)


def _headline(record: Record) -> str:
    if "error" in record:
        return f"failed: {record['error']}"
    words = []
    if record.get("validation_loss") is not None:
        words.append(f"loss {record['validation_loss']:.4f}")
        words.append(f"perplexity {record['perplexity']:.3f}")
    if record.get("layer_error") is not None:
        words.append(f"layer error {100 * record['layer_error']:.3f} %")
    if record.get("bits_per_weight") is not None:
        words.append(f"{record['bits_per_weight']:.3f} bits")
    return ", ".join((*words, f"{record['time_s']:.1f} s"))


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"

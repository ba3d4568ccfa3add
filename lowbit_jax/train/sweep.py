"""A table of runs from one file: what to run, in which folders, and going on where it stopped."""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence

from rich.console import Console

from lowbit_jax.files import write_atomically
from lowbit_jax.train.config import UsageError, load_config_file, parse_knobs
from lowbit_jax.train.job_queue import Job, QueueReport, Slot, run_jobs
from lowbit_jax.train.loop import Diverged
from lowbit_jax.train.sweep_plan import Plan
from lowbit_jax.train.sweep_results import (
    Records,
    plot_gaps,
    read_records,
    results_markdown,
    write_records,
)
from lowbit_jax.train.sweep_rows import Row, check_rows

# A step's time shows in this many; what it takes to compile them is many times more.
_SPEED_STEPS = 60


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """Options of a sweep.

    Attributes:
      runs: Folder of the runs: ROW-sSEED with a log beside it, and a compilation cache that they
        share.
      out: Folder for results.jsonl, results.md, gaps.png and speed.jsonl.
      data: What each run gets as --data. None: as its config says.
      only: Runs no other rows than those whose name matches this regular expression wholly, and
        what they branch off from; the table still has all.
      gpus: Numbers of the GPUs to use. None given: one run after the other, on what JAX finds.
      jobs_per_gpu: Runs that share a GPU at a time.
      time_limit_s: Seconds until the running processes are asked to save and leave; a later call
        goes on. None: no limit.
      merge: Keep the results that --out has from elsewhere, and do not repeat those runs.
        Otherwise only what lies in --runs counts.
      train: Start runs; otherwise only the table is written.
      measure_speed: Instead of training, take 60 steps of each distinct row, alone on the first
        GPU, and write speed.jsonl.
    """

    runs: pathlib.Path
    out: pathlib.Path
    data: str | None = None
    only: str | None = None
    gpus: tuple[str, ...] = ()
    jobs_per_gpu: int = 1
    time_limit_s: float | None = None
    merge: bool = True
    train: bool = True
    measure_speed: bool = False


def parse_sweep_command(arguments: Sequence[str]) -> tuple[list[Row], str, SweepOptions]:
    """Reads `SWEEP.py --knob value ...`; the knobs are the arguments of its `get_rows`.

    Returns:
      The rows, the first line of the file's docstring as their title, and the options.

    Raises:
      UsageError: If there is no such file, or if its rows contradict each other.
    """
    if not arguments or arguments[0].startswith("-"):
        sweeps = sorted(map(str, pathlib.Path("configs/sweeps").glob("*.py")))
        print(
            f"usage: {pathlib.Path(sys.argv[0]).name} SWEEP.py --runs DIR --out DIR [...]\n\n"
            f"Sweeps here: {', '.join(sweeps) or 'none'}.\nSWEEP.py --help explains the rest."
        )
        raise SystemExit(0 if arguments and arguments[0] in ("-h", "--help") else 2)
    path = pathlib.Path(arguments[0])
    module = load_config_file(path, "get_rows")
    knobs, options = parse_knobs(path, module, "get_rows", SweepOptions, arguments[1:])
    try:
        rows = module.get_rows(**knobs)
        check_rows(rows)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    if options.jobs_per_gpu < 1:
        raise UsageError(f"sweep: --jobs-per-gpu must be at least 1, got {options.jobs_per_gpu}.")
    return rows, (module.__doc__ or path.stem).split("\n")[0].rstrip("."), options


def sweep(
    rows: Sequence[Row],
    title: str,
    options: SweepOptions,
    *,
    script: pathlib.Path,
    console: Console | None = None,
) -> QueueReport:
    """Runs what is missing of a sweep and writes the table of what there is.

    A run is finished when its folder, or a line of an earlier `results.jsonl`, holds one with the
    arguments of its row; those that the row does not state must have their defaults, and the
    place of the data does not count. To diverge is a result too: remove its line to try again.
    What was interrupted goes on from its checkpoint, or starts over if it has none.

    Args:
      rows: Of the sweep; `check_rows` must like them.
      title: Of the table.
      options: Where and how.
      script: scripts/pretrain.py.
      console: Where to print.

    Returns:
      What became of the runs that were started; folders of other runs are among the errors.

    Raises:
      UsageError: If `out` holds a result of such a row under other arguments, or if a config has
        no argument `data` for `options.data`.
      ValueError: If `results.jsonl` or `speed.jsonl` is damaged.
    """
    console = Console() if console is None else console
    results, speeds = options.out / "results.jsonl", options.out / "speed.jsonl"
    result_plan = Plan(rows, options.runs)
    speed_plan = Plan(_distinct(rows), options.runs / "speed")
    plan, path = (speed_plan, speeds) if options.measure_speed else (result_plan, results)
    for config in {row.config for row in rows} if options.data is not None else ():
        if "data" not in plan.defaults(config):
            raise UsageError(f"sweep: {config} has no argument `data`; leave out --data.")
    earlier = read_records(path) if options.merge else {}
    for run in plan.runs:
        said = plan.difference(run, earlier[run.key]) if run.key in earlier else None
        if said is not None:
            raise UsageError(
                f"sweep: {path} has a result of {run.name} under other arguments ({said}); choose"
                " another --out, or remove that line."
            )
    valid = plan.collect(earlier)
    todo = plan.missing(valid, options.only) if options.train else []

    def write() -> Records:
        write_records(path, rows, {**earlier, **valid})
        shown = result_plan.matching(read_records(results))
        measured = speed_plan.matching(read_records(speeds))
        row_speeds = {
            row.speed_key: measured[row.name, 0]["tokens_per_s"]
            for row in rows
            if "tokens_per_s" in measured.get((row.name, 0), {})  # it may have diverged
        }
        text = results_markdown(title, rows, shown, row_speeds)
        write_atomically(options.out / "results.md", text)
        return shown

    def on_success(job: Job) -> str:
        run = plan.by_name[job.name]
        if not run.row.has_result:
            return f"saved after step {run.row.stop_after} for others to branch off"
        valid[run.key] = record = plan.record(run)
        write()
        loss, speed = record["validation_loss"], record["tokens_per_s"]
        return f"{speed or 0:,.0f} tokens/s" if loss is None else f"loss {loss:.4f}"

    def on_error(job: Job, error: str, code: int | None) -> None:
        run = plan.by_name[job.name]
        # It would diverge again, so that is a result too.
        if code == Diverged.exit_code and run.row.has_result:
            valid[run.key] = {**plan.identity(run), "error": error}
            write()

    for text in plan.strangers.values():
        console.print(f"warning: {text}", highlight=False, markup=False, soft_wrap=True)
    report = run_jobs(
        [plan.job(run, script, options.data, validate=plan is result_plan) for run in todo],
        _slots(options),
        console=console,
        time_limit_s=options.time_limit_s,
        on_success=on_success,
        on_error=on_error,
    )
    plot_gaps(options.out / "gaps.png", rows, write())
    return dataclasses.replace(report, errors={**plan.strangers, **report.errors})


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """For each kind of step the first row that takes it, as a short run of its own."""
    first = {row.speed_key: row for row in reversed(rows) if row.has_result}
    return [
        dataclasses.replace(
            row,
            arguments={**row.arguments, "steps": _SPEED_STEPS},
            seeds=(0,),
            branch_of=None,
            save=False,
        )
        for row in rows
        if first.get(row.speed_key) is row
    ]


def _slots(options: SweepOptions) -> list[Slot]:
    # Runs with other seeds are the same program: compiled once.
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(options.runs.absolute() / ".jax_cache"))
    environment = {"JAX_COMPILATION_CACHE_DIR": cache}
    if not options.gpus:
        return [Slot(environment)]
    if options.measure_speed:
        return [Slot({**environment, "CUDA_VISIBLE_DEVICES": options.gpus[0]})]
    if options.jobs_per_gpu > 1:  # by default the first process takes most of the memory
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    return [
        Slot({**environment, "CUDA_VISIBLE_DEVICES": gpu})
        for _ in range(options.jobs_per_gpu)
        for gpu in options.gpus
    ]

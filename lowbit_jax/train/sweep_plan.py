"""Which runs a sweep has, which of them are finished, and how the others are started."""

import dataclasses
import inspect
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from lowbit_jax.train.checkpoint import list_checkpoints
from lowbit_jax.train.compare import run_record
from lowbit_jax.train.config import load_config_file
from lowbit_jax.train.job_queue import Job
from lowbit_jax.train.summary import load_summary
from lowbit_jax.train.sweep_results import Record, Records
from lowbit_jax.train.sweep_rows import Row


@dataclasses.dataclass(frozen=True)
class Run:
    """A row at one of its seeds, and the folder that holds it."""

    row: Row
    seed: int
    path: pathlib.Path

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.path.name

    @property
    def key(self) -> tuple[str, int]:
        """Of its record."""
        return self.row.name, self.seed


class Plan:
    """Which runs there are, which are finished, and how the others are started."""

    def __init__(self, rows: Sequence[Row], runs_dir: pathlib.Path):
        """Plans the `rows`, each run in a folder of its own in `runs_dir`."""
        self.runs = [
            Run(row, seed, runs_dir / f"{row.name}-s{seed}") for row in rows for seed in row.seeds
        ]
        self.by_name = {run.name: run for run in self.runs}
        self.strangers: dict[str, str] = {}  # by run, why its folder is another's
        self._defaults: dict[str, dict[str, Any]] = {}  # by config

    def difference(self, run: Run, record: Record) -> str | None:
        """In which argument a record is not what `run` asks for; None if in none.

        What the row states must be there and equal, and what it does not state must have its
        default. Only arguments that the config has gained or lost since do not count, nor does
        the place of the data, unless the row states it.
        """
        stated = {"config": pathlib.Path(run.row.config).stem, **run.row.arguments}
        stated["seed"] = run.seed
        recorded = {"config": record["config"], **record["arguments"]}
        defaults = {
            name: value
            for name, value in self.defaults(run.row.config).items()
            if name in recorded and name != "data"
        }
        wanted = json.loads(json.dumps({**defaults, **stated}, default=str))  # tuples are lists
        for name, value in wanted.items():
            if name not in recorded or recorded[name] != value:
                return f"{name} is {recorded.get(name)!r} there, {value!r} here"
        return None

    def defaults(self, config: str) -> dict[str, Any]:
        """Arguments of a config that have a default."""
        if config not in self._defaults:
            parameters = inspect.signature(load_config_file(config).get_config).parameters
            self._defaults[config] = {
                name: parameter.default
                for name, parameter in parameters.items()
                if parameter.default is not parameter.empty
            }
        return self._defaults[config]

    def collect(self, records: Records) -> Records:
        """The results of these rows, from the folders and, for the rest, from earlier lines."""
        valid = self.matching(records)
        for run in self.runs:
            try:
                self.check_folder(run)
            except ValueError as error:
                self.strangers[run.name] = str(error)
                continue
            if run.row.has_result and load_summary(run.path) is not None:
                valid[run.key] = self.record(run)
        return valid

    def matching(self, records: Records) -> Records:
        """Those of the records that hold what the rows ask for."""
        return {
            run.key: record
            for run in self.runs
            if (record := records.get(run.key)) is not None and self.difference(run, record) is None
        }

    def check_folder(self, run: Run) -> None:
        """Raises a ValueError if the folder of `run` holds a run with other arguments."""
        if not (run.path / "run.json").exists():
            return
        if (said := self.difference(run, self.identity(run))) is not None:
            raise ValueError(
                f"sweep: {run.path} holds a run with other arguments ({said}); remove that folder,"
                " or choose another --runs."
            )

    def identity(self, run: Run) -> Record:
        """What tells a run's line from others."""
        saved = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
        return {
            "run": run.name,
            "row": run.row.name,
            "seed": run.seed,
            "config": saved["name"],
            "arguments": saved["arguments"],
        }

    def record(self, run: Run) -> Record:
        """The result of a finished run."""
        summary = load_summary(run.path)
        if summary is None:
            raise ValueError(f"sweep: {run.path} must hold a finished run, got no summary.json.")
        return {**self.identity(run), **run_record(run.path, summary)}

    def base(self, run: Run) -> Run | None:
        """The run from which this one branches off."""
        name = run.row.branch_of
        return None if name is None else self.by_name[f"{name}-s{run.seed}"]

    def missing(self, valid: Records, only: str | None = None) -> list[Run]:
        """Runs without a result, in order, a base before the first run that branches off.

        `only`: a regular expression for the names of the rows.
        """
        todo: dict[str, Run] = {}
        for run in self.runs:
            if not run.row.has_result or run.key in valid:
                continue
            if only is not None and not re.fullmatch(only, run.row.name):
                continue
            base = self.base(run)
            chain = [run] if base is None or _is_ready(base) else [base, run]
            if any(link.name in self.strangers for link in chain):
                continue
            todo.update((link.name, link) for link in chain)
        return list(todo.values())

    def job(
        self, run: Run, script: pathlib.Path, data: str | None = None, *, validate: bool = True
    ) -> Job:
        """How `script` is started for `run`, on other `data` than its config names if given."""
        row, base = run.row, self.base(run)
        arguments = {**row.arguments, "seed": run.seed}
        if data is not None:
            arguments["data"] = data
        words = [sys.executable, str(script), row.config]
        for name, value in arguments.items():
            words += command_words(name, value)
        words += ["--run-dir", str(run.path), "--no-sample"]
        if base is not None:
            words += ["--branch-from", str(base.path)]
        if row.stop_after is not None:
            words += ["--stop-after", str(row.stop_after)]
        is_resumable = row.save or row.stop_after is not None
        if not is_resumable:
            # Nothing in the folder is worth keeping, and its config may have been edited since.
            words += ["--no-save", "--fresh"]
        if not validate:
            words += ["--no-validate"]
        waits_for = None if base is None or _is_ready(base) else base.name
        log = run.path.with_name(f"{run.name}.log")
        return Job(run.name, tuple(words), log, waits_for, is_resumable)


def _is_ready(base: Run) -> bool:
    """Whether others can branch off from it."""
    checkpoints = list_checkpoints(base.path / "checkpoints")
    return bool(checkpoints) and checkpoints[-1].name == f"step_{base.row.stop_after:08d}"


def command_words(name: str, value: Any) -> list[str]:
    """The words of a command line that set an argument of `get_config`."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    values = value if isinstance(value, tuple | list) else (value,)
    return [f"--{flag}", *map(str, values)]

"""Where a run lives: its folder, what identifies it, and the lock that keeps others out."""

import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax

from lowbit_jax.files import write_atomically
from lowbit_jax.train.checkpoint import list_checkpoints
from lowbit_jax.train.config import RunIdentity, UsageError
from lowbit_jax.train.run_lock import RunLock

# What a run leaves beside run.json and config.py, the mark of a finished run first.
_OUTPUTS = ("summary.json", "checkpoints", "metrics.jsonl", "tensorboard", "loss.png", "sample.txt",
            "versions.json")  # fmt: skip


class RunDirectory:
    """An opened, locked run folder; `close` releases it, as does the end of the process."""

    def __init__(self, path: pathlib.Path, lock: RunLock | None):
        """Use `open_run_directory`; of several processes one has the lock, the others None."""
        self.path, self._lock = path, lock

    @property
    def checkpoints(self) -> pathlib.Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def record(self, **values: Any) -> None:
        """Adds JSON values to run.json."""
        known = _read_record(self.path)
        text = json.dumps({**known, **values}, indent=1) + "\n"
        write_atomically(self.path / "run.json", text)

    def check_data(self, fingerprint: str) -> None:
        """Notes on which tokens this run is trained; it goes on with no others.

        Raises:
          UsageError: If its checkpoints come from tokens with another fingerprint.
        """
        before = _read_record(self.path).get("data_fingerprint")
        if before == fingerprint:
            return
        if before is not None and list_checkpoints(self.checkpoints):
            raise UsageError(
                f"run directory: {self.path} was trained on data with the fingerprint {before!r},"
                f" and now they have {fingerprint!r}: they were prepared anew or replaced. Restore"
                " them, choose another --run-dir, or pass --fresh to start anew."
            )
        self.record(data_fingerprint=fingerprint)

    def check_writable(self) -> None:
        """Whether a checkpoint could be written: before the first step, not a thousand later.

        Raises:
          UsageError: If not.
        """
        probe = self.checkpoints / ".writing-probe"
        try:
            probe.mkdir(parents=True, exist_ok=True)
            probe.rmdir()
        except OSError as error:
            raise UsageError(
                f"run directory: cannot write checkpoints to {self.checkpoints} ({error}); make it"
                " writable, choose another --run-dir, or pass --no-save."
            ) from error

    def check_lock(self) -> None:
        """Raises a UsageError if another process has taken the folder over; see `RunLock`."""
        if self._lock is not None:
            self._lock.check()

    @property
    def mark(self) -> str | None:
        """What the process with the lock has written into it, without the count of its beats."""
        try:
            text = (self.path / ".lock").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        return text.rpartition(" ")[0]

    def close(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_run_directory(
    identity: RunIdentity,
    run_dir: str | None = None,
    *,
    fresh: bool = False,
    branch_from: str | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> RunDirectory:
    """Opens the folder in which this run starts or goes on.

    With `run_dir` it is that folder. Otherwise it is `runs/NAME`, NAME holding the arguments that
    differ from the defaults, and `runs/NAME-2`, `-3`, ... once the earlier ones are finished: the
    same command trains again when it had finished, and goes on when it had not.

    Args:
      identity: Of the run.
      run_dir: Folder asked for by the user.
      fresh: Start anew: empties `run_dir`, or takes the next number.
      branch_from: Folder of the run from which this one branches off. It belongs to what
        identifies the run, and its last part to `NAME`.
      warn: Receives a message if this takes long, see `RunLock`.

    Raises:
      UsageError: If another process holds the folder, if it belongs to a run with other
        arguments, if its run.json is damaged, or if it holds other files.
    """
    origin = None if branch_from is None else os.path.normpath(branch_from)
    if run_dir is not None:
        return _open(pathlib.Path(run_dir), identity, origin, warn, empty=fresh)
    name = identity.run_name
    if origin is not None:
        name += f"-from-{os.path.basename(origin)}"
    base, number = pathlib.Path("runs") / name, 1
    while True:
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        if not (path / "run.json").exists():
            return _open(path, identity, origin, warn, empty=False)
        if not fresh and not (path / "summary.json").exists():
            return _open(path, identity, origin, warn, empty=False)
        number += 1


def _open(
    path: pathlib.Path,
    identity: RunIdentity,
    origin: str | None,
    warn: Callable[[str], None],
    *,
    empty: bool,
) -> RunDirectory:
    if path.exists() and not path.is_dir():
        raise UsageError(f"run directory: {path} is a file; choose another --run-dir.")
    if any(character in str(path.absolute()) for character in "*?["):
        raise UsageError(  # Orbax takes them for patterns and loses the arrays
            f"run directory: the path must be free of *, ? and [, got {path.absolute()}; choose"
            " another --run-dir."
        )
    known = path / "run.json"
    if path.is_dir():
        # A kill before run.json was in place leaves these. Looked at before run.json is: another
        # process may be making it a run's folder in this moment, run.json first.
        early = ("config.py", ".config.py.writing", ".run.json.writing", ".lock")
        others = sorted(p.name for p in path.iterdir() if p.name not in early)
        if others and not known.exists():
            raise UsageError(
                f"run directory: {path} is not empty and no run's folder (it holds {others[0]});"
                " choose another --run-dir."
            )
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(path, warn)
    except OSError as error:
        raise UsageError(
            f"run directory: cannot write in {path} ({error}); choose another --run-dir."
        ) from error
    try:
        if empty:  # run.json last, and replaced: no kill leaves checkpoints without their settings
            for name in _OUTPUTS:
                target = path / name
                shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        # As it will come back from the file, where a tuple is a list and a path a string.
        record = {
            "name": identity.name, "arguments": identity.arguments, "branch_from": origin,
        }  # fmt: skip
        record = json.loads(json.dumps(record, default=str))
        if known.exists() and not empty:
            _check_same_run(path, _read_record(path), record, identity.source)
        else:
            write_atomically(path / "config.py", identity.source)
            write_atomically(known, json.dumps(record, indent=1) + "\n")  # last: marks it ours
        # Rewritten when a run goes on: what counts is what wrote the newest rows.
        write_atomically(path / "versions.json", json.dumps(versions(), indent=1) + "\n")
    except BaseException:
        lock.release()
        raise
    return RunDirectory(path, lock)


def _check_same_run(path: pathlib.Path, saved: dict, record: dict, source: str) -> None:
    before, now = (
        {"config": run["name"], "branch_from": run.get("branch_from"), **run["arguments"]}
        for run in (saved, record)
    )
    differences = [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if not differences and (path / "config.py").read_text() != source:
        differences = [f"the config file has been edited since (it was {path / 'config.py'})"]
    if differences and not list_checkpoints(path / "checkpoints"):
        hint = "nothing was saved there yet"
    else:
        hint = "its checkpoints belong to other settings"
    if differences:
        raise UsageError(
            f"run directory: {path} holds a run with other arguments ({hint}):"
            f" {'; '.join(differences)}. Repeat that run's arguments to go on with it, choose"
            " another --run-dir, or pass --fresh to delete it and start anew."
        )


def _read_record(path: pathlib.Path) -> dict[str, Any]:
    try:
        record = json.loads((path / "run.json").read_text(encoding="utf-8"))
        _ = record["name"], record["arguments"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"run directory: {path / 'run.json'} is damaged ({error!r}), so that nothing tells"
            " whose checkpoints these are; restore it from a copy, choose another --run-dir, or"
            " pass --fresh to delete them and start anew."
        ) from error
    return record


def versions() -> dict[str, Any]:
    """Versions of Python and the packages, devices, and the git commit of the source, if any."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy",
                "ml_dtypes", "tokenizers", "lowbit-jax")  # fmt: skip
    return {
        "python": platform.python_version(),
        "command": sys.argv,
        "packages": {name: _version(name) for name in packages},
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_uncommitted_changes": bool(_git("status", "--porcelain")),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=pathlib.Path(__file__).parent, capture_output=True,
            text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

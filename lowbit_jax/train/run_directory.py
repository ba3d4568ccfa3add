"""Where a run lives: its folder, what identifies it, and the lock that keeps others out."""

import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
from typing import IO, Any

import jax

from lowbit_jax.train.checkpoint import list_checkpoints, write_atomically
from lowbit_jax.train.config import RunIdentity, UsageError

# What a run leaves beside run.json and config.py, the mark of a finished run first.
_OUTPUTS = ("summary.json", "checkpoints", "metrics.jsonl", "tensorboard", "loss.png", "sample.txt",
            "versions.json")  # fmt: skip


class RunDirectory:
    """An opened, locked run folder; `close` releases it, as does the end of the process."""

    def __init__(self, path: pathlib.Path, lock: IO[str]):
        """Use `open_run_directory`."""
        self.path, self._lock = path, lock

    @property
    def checkpoints(self) -> pathlib.Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def record(self, **values: Any) -> None:
        """Adds JSON values to run.json."""
        path = self.path / "run.json"
        known = json.loads(path.read_text(encoding="utf-8"))
        write_atomically(path, json.dumps({**known, **values}, indent=1) + "\n")

    def close(self) -> None:
        """Releases the lock."""
        self._lock.close()

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

    Raises:
      UsageError: If another process holds the folder, if it belongs to a run with other
        arguments, or if it holds other files.
    """
    origin = None if branch_from is None else os.path.normpath(branch_from)
    if run_dir is not None:
        return _open(pathlib.Path(run_dir), identity, origin, empty=fresh)
    name = identity.run_name
    if origin is not None:
        name += f"-from-{os.path.basename(origin)}"
    base, number = pathlib.Path("runs") / name, 1
    while True:
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        if not (path / "run.json").exists():
            return _open(path, identity, origin, empty=False)
        if not fresh and not (path / "summary.json").exists():
            return _open(path, identity, origin, empty=False)
        number += 1


def _open(
    path: pathlib.Path, identity: RunIdentity, origin: str | None, *, empty: bool
) -> RunDirectory:
    if path.exists() and not path.is_dir():
        raise UsageError(f"run directory: {path} is a file; choose another --run-dir.")
    if any(character in str(path.absolute()) for character in "*?["):
        raise UsageError(  # Orbax takes them for patterns and loses the arrays
            f"run directory: the path must be free of *, ? and [, got {path.absolute()}; choose"
            " another --run-dir."
        )
    known = path / "run.json"
    if path.is_dir() and not known.exists():
        # A kill before run.json was in place leaves these.
        early = ("config.py", ".config.py.writing", ".run.json.writing", ".lock")
        others = sorted(p.name for p in path.iterdir() if p.name not in early)
        if others:
            raise UsageError(
                f"run directory: {path} is not empty and no run's folder (it holds {others[0]});"
                " choose another --run-dir."
            )
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
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
            _check_same_run(path, json.loads(known.read_text()), record, identity.source)
        else:
            write_atomically(path / "config.py", identity.source)
            write_atomically(known, json.dumps(record, indent=1) + "\n")  # last: marks it ours
        # Rewritten when a run goes on: what counts is what wrote the newest rows.
        write_atomically(path / "versions.json", json.dumps(versions(), indent=1) + "\n")
    except BaseException:
        lock.close()
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


def _lock(path: pathlib.Path) -> IO[str]:
    lock = open(path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held while the run lasts
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise UsageError(
            f"run directory: another process ({holder}) is training in {path}; wait for it or"
            " choose another --run-dir."
        ) from None
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on {platform.node()}")
    lock.flush()
    return lock


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

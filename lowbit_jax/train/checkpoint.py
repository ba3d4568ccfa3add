"""Checkpoints that survive a kill at any moment and tell when their files were damaged.

A checkpoint is a folder `step_00001000/` with the arrays as Orbax wrote them (`arrays/`) and a
`manifest.json` with the sha256 of every file and of itself. It is written under another name, the
manifest last, and then renamed, so that a folder with the final name is complete; the checksums
find what was damaged afterwards. Of several processes each writes and reads the arrays that its
devices hold, in one folder that all of them see; the first one does the rest.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from lowbit_jax.files import sync, write_atomically
from lowbit_jax.parallel import is_first, on_first
from lowbit_jax.train.state import TrainState, abstract_state, leaf_paths, nonfinite_leaves

MANIFEST = "manifest.json"
# Threads that compute checksums, which release Python's lock: one makes 1 to 2 GB/s.
_READERS = 8
_NAME = re.compile(r"step_(\d{8,})")


def save_checkpoint(
    directory: str | os.PathLike, state: TrainState, metadata: dict[str, Any], *, keep: int = 2
) -> pathlib.Path:
    """Writes `state` to `directory/step_*`; older ones go only once the new one is complete.

    A step that is there undamaged stays as it is: a run comes to the same bits again. A folder
    `step_*` that was made read-only (`chmod a-w`) is kept beside the newest.

    Args:
      directory: Folder of all checkpoints of a run.
      state: Arrays of any dtype that Orbax stores.
      metadata: JSON values that go into the manifest, such as versions of packages.
      keep: How many of the newest complete checkpoints stay.

    Raises:
      ValueError: If the state holds a NaN or an infinity; nothing is written then.
      OSError: If it cannot be written, the disk being full for example; older ones stay.
    """
    if keep < 1:
        raise ValueError(f"save_checkpoint: keep must be at least 1, got {keep}.")
    if bad := nonfinite_leaves(state):
        raise ValueError(
            f"save_checkpoint: the state at step {int(state.step)} is not finite in {bad[:3]}"
            f" ({len(bad)} leaves); nothing was saved, resume from the checkpoint before."
        )
    directory = pathlib.Path(directory).absolute()
    step = int(state.step)
    temporary, final = directory / f".writing-{step}", directory / f"step_{step:08d}"
    try:
        if not on_first(lambda: _begin(temporary, final), OSError):
            return final
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(temporary / "arrays", state)
            checkpointer.wait_until_finished()
        on_first(lambda: _finish(temporary, final, state, metadata), OSError)
    except (ValueError, OSError) as error:  # TensorStore reports a full disk as a ValueError
        if is_first():  # which alone knows whether it is still being finished
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"save_checkpoint: cannot write step {step} to {directory}; the checkpoints before it"
            " are untouched. Make room or mend the folder; the same command then goes on from the"
            f" newest. The cause: {error}"
        ) from error
    on_first(lambda: _remove_old(directory, keep), OSError)
    return final


def _begin(temporary: pathlib.Path, final: pathlib.Path) -> bool:
    """Makes an empty folder to write to, unless the checkpoint is there, undamaged."""
    if final.exists() and find_damage(final) is None:
        return False
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=leftover != temporary)
    temporary.mkdir()  # where that fails, threads of Orbax would wait for it
    return True


def _finish(
    temporary: pathlib.Path, final: pathlib.Path, state: TrainState, metadata: dict[str, Any]
) -> None:
    """Writes the manifest, has the disk confirm all, and gives the folder its name."""
    _write_manifest(temporary, state, metadata)
    if final.exists():  # damaged, or it would have stayed
        # Renamed, for it may be read-only; the next save clears what is left of it.
        damaged = final.rename(final.with_name(f".writing-damaged-{time.time_ns()}"))
        temporary.rename(final)
        shutil.rmtree(damaged, ignore_errors=True)
    else:
        temporary.rename(final)
    sync(final.parent)


def _remove_old(directory: pathlib.Path, keep: int) -> None:
    # A damaged checkpoint must not push out an undamaged one: only complete ones count.
    complete = [path for path in list_checkpoints(directory) if (path / MANIFEST).exists()]
    for old in complete[:-keep]:
        if old.stat().st_mode & 0o222:  # one that was made read-only is to stay, also for root
            # Under a name that the next save clears, should this not come to an end.
            shutil.rmtree(old.rename(directory / f".writing-{old.name}"), ignore_errors=True)


def _write_manifest(folder: pathlib.Path, state: TrainState, metadata: dict[str, Any]) -> None:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        hashes = list(readers.map(_hash, files))
    manifest = {
        "step": int(state.step),
        "arrays": _describe(state),
        "files": {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256}
            for path, sha256 in zip(files, hashes, strict=True)
        },
        **metadata,
    }
    manifest = {"sha256": _hash_json(manifest), **manifest}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    for path in (*folder.rglob("*"), folder):
        sync(path)  # a power failure must not take the content of what the rename names


def restore_latest(
    directory: str | os.PathLike,
    target: TrainState,
    *,
    warn: Callable[[str], None],
) -> tuple[TrainState, dict[str, Any]] | None:
    """Restores the newest undamaged checkpoint onto the shardings of `target`.

    Args:
      directory: Folder of all checkpoints of a run; may be missing.
      target: Arrays or `jax.ShapeDtypeStruct`s with the shapes, dtypes and shardings wanted; what
        has no sharding goes to the first device of this process.
      warn: Receives a message for each damaged checkpoint that is passed over.

    Returns:
      State and manifest, or None if there is no checkpoint at all.

    Raises:
      ValueError: If an undamaged checkpoint holds other arrays than `target`, or if there are
        checkpoints and all are damaged.
    """
    found = on_first(lambda: _choose(directory, _describe(target), warn), ValueError)
    if found is None:
        return None
    path, manifest = found
    # Else Orbax would want the devices of the run that saved.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(
        lambda x: x if x.sharding is not None else x.update(sharding=here), abstract_state(target)
    )
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(pathlib.Path(path) / "arrays", wanted)
    return arrays, manifest


def _choose(
    directory: str | os.PathLike, wanted: dict[str, str], warn: Callable[[str], None]
) -> tuple[str, dict[str, Any]] | None:
    """Path and manifest of the newest undamaged checkpoint; None if there is no checkpoint."""
    candidates = list_checkpoints(directory)
    for path in reversed(candidates):
        if (damage := find_damage(path)) is not None:
            warn(f"checkpoint {path} is damaged ({damage}); using the one before it")
            continue
        manifest = json.loads((path / MANIFEST).read_text())
        _check_arrays(path, manifest["arrays"], wanted)
        return str(path), manifest
    if candidates:
        raise ValueError(
            f"restore_latest: every checkpoint in {directory} is damaged ({len(candidates)} of"
            " them); restore the files from a copy, or start anew with --fresh."
        )
    return None


def list_checkpoints(directory: str | os.PathLike) -> list[pathlib.Path]:
    """Checkpoint folders of a run, oldest first, damaged ones included."""
    directory = pathlib.Path(directory).absolute()
    found = [p for p in directory.glob("step_*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def find_damage(checkpoint: pathlib.Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None: every byte is as it was written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        checksum = manifest.pop("sha256")
    except FileNotFoundError:
        return f"no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    if checksum != _hash_json(manifest):
        return f"{MANIFEST} has changed since it was written"

    def damage(name: str) -> str | None:
        path, expected = checkpoint / name, manifest["files"][name]
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if _hash(path) != expected["sha256"]:
                return f"{name} has changed since it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:  # no permission, or a disk that fails
            return f"{name} cannot be read: {error}"
        return None

    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        return next(filter(None, readers.map(damage, manifest["files"])), None)


def _describe(state: Any) -> dict[str, str]:
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaf_paths(state)}


def _check_arrays(path: pathlib.Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise ValueError(
                f"restore_latest: checkpoint {path} and the model or optimizer of this run differ"
                f" in {name}: saved {saved.get(name, 'nothing')}, wanted"
                f" {wanted.get(name, 'nothing')}; use the configuration that wrote it, another"
                " --run-dir, or --fresh."
            )


def _hash(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

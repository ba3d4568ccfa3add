"""Beginning and end of a command that writes a model and then its reports, killed or not."""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from lowbit_jax.files import write_atomically
from lowbit_jax.ptq.report import REPORTS


def check_places(out: pathlib.Path, kept: pathlib.Path) -> None:
    """That a model can be written to `out`, and what is unfinished kept in `kept`.

    Raises:
      ValueError: If `out` is there and no empty directory, or `kept` is a file.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: must not exist yet, or be an empty directory.")
    if kept.exists() and not kept.is_dir():
        raise ValueError(f"--work {kept}: must be a folder, or not exist yet, got a file.")


def what_is_kept(kept: pathlib.Path, *, removes: bool) -> str:
    """What a user may do after an error; may remove a folder in which nothing has been done."""
    begun = list(kept.rglob("settings.json")) if kept.is_dir() else []
    if any(path.is_file() and path not in begun for path in kept.rglob("*")):
        return f"what is done is kept in {kept}: the same command goes on there" if begun else ""
    if removes and begun:
        shutil.rmtree(kept)
    return ""


def is_written(out: pathlib.Path, kept: pathlib.Path, arguments: Mapping[str, Any]) -> bool:
    """Whether this very command was stopped after it wrote the model, which takes one move.

    What is left to do is `finish_reports`: some reports are not copied yet, or `kept` is still
    there, or a part of it.

    Args:
      out: Directory of the model.
      kept: Folder in which the command keeps its reports before it writes the model.
      arguments: All that the model depends on and the absolute path of `out`, plain data for JSON:
        compared with the settings in report.json, which may say more.
    """
    if not (out / "config.json").exists() or not kept.exists():
        return False
    if not all((kept / name).exists() or (out / name).exists() for name in REPORTS):
        return False
    path = kept / REPORTS[0]
    try:
        record = json.loads((path if path.exists() else out / REPORTS[0]).read_text())
    except ValueError:  # a file of somebody else
        return False
    settings = record.get("settings", {}) if isinstance(record, dict) else {}
    return json.loads(json.dumps(dict(arguments))).items() <= settings.items()


def finish_reports(kept: pathlib.Path, out: pathlib.Path, *, removes: bool) -> None:
    """Copies the reports that are missing, each whole or not at all, and then may remove `kept`."""
    for name in REPORTS:
        if not (out / name).exists():
            write_atomically(out / name, (kept / name).read_bytes())
    if removes:
        shutil.rmtree(kept)

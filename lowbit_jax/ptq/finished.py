"""The end of a command that writes a model and then its reports, killed in between or not."""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from lowbit_jax.files import write_atomically
from lowbit_jax.ptq.report import REPORTS


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

"""The end of a command that writes a model and then its reports, killed in between or not."""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from lowbit_jax.files import write_atomically
from lowbit_jax.ptq.report import REPORTS


def is_finished_but_for_reports(
    out: pathlib.Path, kept: pathlib.Path, arguments: Mapping[str, Any]
) -> bool:
    """Whether this very command was stopped after it wrote the model, which takes one move.

    Args:
      out: Directory of the model.
      kept: Folder in which the command keeps its reports before it writes the model.
      arguments: All that the model depends on and the absolute path of `out`, plain data for JSON:
        compared with the settings in report.json, which may say more.
    """
    is_written = (out / "config.json").exists() and not (out / REPORTS[-1]).exists()
    if not is_written or not all((kept / name).exists() for name in REPORTS):
        return False
    settings = json.loads((kept / REPORTS[0]).read_text())["settings"]
    return json.loads(json.dumps(dict(arguments))).items() <= settings.items()


def copy_reports(kept: pathlib.Path, out: pathlib.Path, *, removes: bool) -> None:
    """Copies the reports, each whole or not at all, and then may remove the folder `kept`."""
    for name in REPORTS:
        write_atomically(out / name, (kept / name).read_bytes())
    if removes:
        shutil.rmtree(kept)

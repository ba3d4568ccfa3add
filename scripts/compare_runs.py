"""Prints a table of finished runs, and writes their results and a plot.

Example:
    python scripts/compare_runs.py runs/bf16 runs/quest_w4a4 --out docs/results/mine
"""

import pathlib
import sys

import tyro

from lowbit_jax.train.compare import compare_runs


def main(runs: tyro.conf.Positional[tuple[pathlib.Path, ...]], *, out: pathlib.Path) -> int:
    """Prints a Markdown table of finished runs; gaps are to the first of them.

    Args:
      runs: Folders of runs, named after what tells them apart.
      out: Folder for results.jsonl and validation_loss.png.
    """
    try:
        print(compare_runs(runs, out))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))

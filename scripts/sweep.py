r"""Runs the rows of a sweep file, each as a process of its own, and writes their table.

python scripts/sweep.py configs/sweeps/toy_cpu.py --runs runs/toy --out docs/results/toy_cpu
python scripts/sweep.py configs/sweeps/llama_30m.py --data prepared --runs runs/llama_30m \
        --out docs/results/llama_30m --gpus 0 1 --jobs-per-gpu 3 --only 'quartet.*'

Ctrl-C, or --time-limit-s, ends it cleanly; the same command goes on.
"""

import pathlib
import sys

from lowbit_jax.train import UsageError
from lowbit_jax.train.sweep import parse_sweep_command, sweep


def main(arguments: list[str]) -> int:
    try:
        rows, title, options = parse_sweep_command(arguments)
        pretrain = pathlib.Path(__file__).with_name("pretrain.py")
        report = sweep(rows, title, options, script=pretrain)
    except (UsageError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # the disk is full, for example
        print(f"error: {error}; the same command goes on", file=sys.stderr)
        return 1
    for name, error in report.errors.items():
        print(f"failed: {name}: {error}", file=sys.stderr)
    if report.left:
        print(f"{len(report.left)} runs are left; the same command goes on", file=sys.stderr)
    print(f"{len(report.succeeded)} runs finished; see {options.out / 'results.md'}")
    if report.signal_number:
        return 128 + report.signal_number
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

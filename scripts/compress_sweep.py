r"""Compresses a model in many ways, in one process, and writes the table of what each costs.

python scripts/compress_sweep.py configs/compress/smollm2.py --list --out runs/smollm2
python scripts/compress_sweep.py configs/compress/smollm2.py --model SmolLM2.gguf \
        --text corpus.txt.xz --out docs/results/compression_smollm2 --time-limit-s 1500

Ctrl-C, or --time-limit-s, ends it between rows; the same command goes on.
"""

import sys

from lowbit_jax.bench.compression import compress_sweep, parse_compression_command
from lowbit_jax.train import UsageError


def main(arguments: list[str]) -> int:
    try:
        table, title, options = parse_compression_command(arguments)
        report = compress_sweep(table, title, options)
    except (UsageError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # the disk is full, for example
        print(f"error: {error}; the same command goes on", file=sys.stderr)
        return 1
    if options.list:
        return 0
    for name, error in report.failed.items():
        print(f"failed: {name}: {error}", file=sys.stderr)
    if report.left:
        print(f"{len(report.left)} rows are left; the same command goes on", file=sys.stderr)
    print(f"{len(report.done)} rows measured; see {options.out / 'results.md'}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

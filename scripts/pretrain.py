"""Trains a language model as a config file says.

python scripts/pretrain.py configs/llama_tiny_quest_cage.py --peak-lr 1e-3
python scripts/pretrain.py configs/llama.py --data prepared/NAME --mesh 1x8x1 --zero 3
srun python scripts/pretrain.py configs/llama.py --data prepared/NAME --mesh 4x8x1 --run-dir SHARED
python scripts/pretrain.py configs/llama.py --help
"""

import sys

from lowbit_jax.decoding.generate import generate
from lowbit_jax.parallel import is_first, join_processes, run_together, telling_others
from lowbit_jax.train import Diverged, Interrupted, RunOptions, UsageError, parse_command, train


def join(options: RunOptions) -> None:
    try:
        join_processes(options.coordinator, options.processes, options.process)
    except ValueError as error:
        raise UsageError(str(error)) from error


def main(arguments: list[str]) -> int:
    try:
        with telling_others(Interrupted):
            config, identity, options = parse_command(arguments, join)
            summary = train(config, identity, options, generate=generate)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # the disk is full, for example
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as stopped:
        if is_first():
            print(stopped, file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:  # before the first step or after the last
        print("stopped; what was saved stays, the same command goes on from there", file=sys.stderr)
        return 130
    if is_first():
        print(summary)
    return 0


if __name__ == "__main__":
    run_together(lambda: main(sys.argv[1:]))

"""Trains a language model as a config file says.

python scripts/pretrain.py configs/llama_tiny_quest_cage.py --peak-lr 1e-3
python scripts/pretrain.py configs/llama.py --data prepared/NAME --mesh 1x8x1 --zero 3
python scripts/pretrain.py configs/llama.py --help
"""

import sys

from lowbit_jax.decoding.generate import generate
from lowbit_jax.train import Diverged, Interrupted, UsageError, parse_command, train


def main(arguments: list[str]) -> int:
    try:
        config, identity, options = parse_command(arguments)
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
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:  # before the first step or after the last
        print("stopped; what was saved stays, the same command goes on from there", file=sys.stderr)
        return 130
    print(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

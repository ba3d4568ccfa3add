"""Times the training step of a config and lists where the time goes, kernel by kernel.

python scripts/profile_step.py configs/llama.py --data synthetic --size 800m \
        --batch-size 8 --seq-len 2048 --scan-unroll 16 --recipe bf16
"""

import sys

from lowbit_jax.train import UsageError, parse_command
from lowbit_jax.train.profile import profile_step


def main(arguments: list[str]) -> int:
    try:
        config, _, _ = parse_command(arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(profile_step(config))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

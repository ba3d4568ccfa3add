"""Makes a published model the start of a run: its weights become a checkpoint of step 0.

Example:
    python scripts/import_hf.py models/Qwen2.5-0.5B runs/start configs/llama.py --size qwen2.5-0.5b
    python scripts/pretrain.py configs/llama.py --size qwen2.5-0.5b --branch-from runs/start
"""

import sys

from lowbit_jax.train import UsageError, parse_command
from lowbit_jax.train.pretrained_runs import import_pretrained


def main(arguments: list[str]) -> int:
    if len(arguments) < 3:
        print("usage: import_hf.py MODEL RUN_DIR CONFIG.py [--knob value ...]", file=sys.stderr)
        return 2
    model, run_dir, *command = arguments
    try:
        config, _, _ = parse_command(command)
        import_pretrained(model, config, run_dir)
    except (UsageError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{run_dir}: a checkpoint of step 0; train on with --branch-from {run_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

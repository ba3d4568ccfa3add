"""Times kernels, layers, decoding and training steps beside XLA: the table of the README.

Example:
    python scripts/bench.py --out runs/bench
    python scripts/bench.py --only product layer --out runs/bench
    python scripts/bench.py --from runs/bench --out runs/bench
"""

import sys

import tyro

from lowbit_jax.bench.command import main

if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))

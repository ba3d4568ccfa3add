"""Measures what recomputation and offloading free on one GPU, beside what the plan predicts.

Example:
    python scripts/bench_memory.py --out runs/memory
    python scripts/bench_memory.py --only 7b --memory-gib 16 --out runs/memory
    python scripts/bench_memory.py --only largest --recipes bf16 --out runs/memory
    python scripts/bench_memory.py --tiny
"""

import sys

import tyro

from lowbit_jax.bench.memory import main

if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))

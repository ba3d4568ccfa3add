"""Trains on one GPU and on several of one host: tokens/s, percent of linear, equal losses.

Example:
    python scripts/bench_scaling.py --devices 2 --out runs/scaling
    python scripts/bench_scaling.py --devices 4 --model 3b --recipes quartet --out runs/scaling
    python scripts/bench_scaling.py --gradient-exchange int8 --out runs/scaling
    python scripts/bench_scaling.py --tiny
"""

import sys

import tyro

from lowbit_jax.bench.scaling import main

if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))

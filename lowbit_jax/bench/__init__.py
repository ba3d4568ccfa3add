"""What the library's speed is, in one table: kernels, layers and training steps beside XLA's."""

from lowbit_jax.bench.groups import GROUPS
from lowbit_jax.bench.report import load_rows, save_rows, table

__all__ = ["GROUPS", "load_rows", "save_rows", "table"]

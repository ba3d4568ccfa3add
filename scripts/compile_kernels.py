"""Compiles every kernel for an H100 without a GPU and prints registers, spills and shared memory.

It needs, in an environment of its own, the wheels that `pallas_kernels/aot.py` names.

Example:
    python scripts/compile_kernels.py --op scaled_matmul
"""

import dataclasses
import os
import sys

import tyro
from rich.console import Console
from rich.table import Table

from pallas_kernels.aot import ahead_of_time_environment, compile_for_hopper, lowering_cases


def main(op: str | None = None, pattern: str = "") -> int:
    """Prints a table, a row for each kernel; the exit status is 1 if one fails or spills.

    Args:
      op: Package of kernels; None: all.
      pattern: Only cases whose name contains it.
    """
    os.environ.update(ahead_of_time_environment())
    table = Table("case", "kernel", "registers", "spilled", "stack", "serialized", "shared memory")
    is_good = True
    for case in lowering_cases(op):
        if pattern not in case[0]:
            continue
        try:
            kernels = compile_for_hopper(case)
        except Exception as error:  # whatever it is, the other cases are wanted
            is_good = False
            table.add_row(case[0], f"{type(error).__name__}: {str(error)[:300]}")
            continue
        for kernel in kernels:
            is_good &= not kernel.spill_bytes and not kernel.is_serialized
            table.add_row(*map(str, dataclasses.astuple(kernel)))
    Console(width=160).print(table)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))

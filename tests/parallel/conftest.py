import os
import socket
import subprocess
import sys
from typing import NamedTuple

import pytest


class Ended(NamedTuple):
    """How a process of a job ended, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_two():
    """`run_two(program, devices)`: two processes of a job, with so many devices each.

    The program finds the address where they meet in `sys.argv[1]`, and its own number after it.
    """
    started = []

    def run(program: str, devices: int) -> list[Ended]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        started[:] = [
            subprocess.Popen(
                [sys.executable, "-c", program, address, str(index)],
                env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(2)
        ]
        printed = [process.communicate(timeout=120) for process in started]
        return [
            Ended(process.returncode, *both) for process, both in zip(started, printed, strict=True)
        ]

    yield run
    for process in started:
        process.kill()
        process.wait()

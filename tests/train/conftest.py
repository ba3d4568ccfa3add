import os
import pathlib
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "llama_tiny_quest_cage.py"
# The tiny config made smaller still: one layer, a checkpoint every 6 steps.
SMALL = {"n_layers": 1, "steps": 24, "batch_size": 4, "seq_len": 32}


class PretrainScript:
    """Starts scripts/pretrain.py as a user does, in a folder of its own."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.processes: list[subprocess.Popen] = []

    def start(self, *arguments: object) -> subprocess.Popen:
        """The process; what it prints, errors too, is in `printed`."""
        cache = {
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        }
        with open(self.folder / "printed.txt", "w") as printed:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "scripts" / "pretrain.py"), *map(str, arguments)],
                cwd=self.folder, env={**os.environ, **cache},
                stdout=printed, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.processes.append(process)
        return process

    @property
    def printed(self) -> str:
        return (self.folder / "printed.txt").read_text()

    def run(self, *arguments: object) -> int:
        return self.start(*arguments).wait(timeout=300)


@pytest.fixture
def pretrain(tmp_path):
    script = PretrainScript(tmp_path)
    yield script
    for process in script.processes:
        process.kill()
        process.wait()

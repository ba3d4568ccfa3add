import dataclasses
import functools
import io
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
from rich.console import Console

from lowbit_jax.decoding.generate import generate
from lowbit_jax.models import count_params, llama
from lowbit_jax.train import loop, memory_plan, planning, start
from lowbit_jax.train.checkpoint import restore_latest
from lowbit_jax.train.config import RunIdentity, RunOptions, load_config_file
from lowbit_jax.train.loop import train
from lowbit_jax.train.start import draw_state
from lowbit_jax.train.state import create_state
from lowbit_jax.train.stored_bytes import Held, Stored

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "llama_tiny_quest_cage.py"
# The tiny config made smaller still: one layer, a checkpoint every 6 steps.
SMALL = {"n_layers": 1, "steps": 24, "batch_size": 4, "seq_len": 32}
IDENTITY = RunIdentity("tiny", CONFIG.read_text(), dict(SMALL), {})


Phase = loop.Phase


@pytest.fixture(autouse=True, scope="module")
def shared_phases():
    """Runs of one config share what is traced of it within a file: steps, shapes, what draws it.

    That another process comes to the same bits is for test_resume.py to show.
    """
    known = {}

    def phase(config, start, model, placement=None):
        key = (
            start, model, config.optimizer.update, config.learning_rate, config.micro_batches,
            config.seed, config.quantize_once,
            placement and (placement.layout, placement.offload, placement.exchange),
        )  # fmt: skip
        if key not in known:
            known[key] = Phase(config, start, model, placement)
        return known[key]

    def draw(config, key):
        of = config.model, config.optimizer, config.store, config.seq_len
        if of not in known:
            known[of] = jax.jit(functools.partial(draw_state, config))
        return known[of](key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Phase", phase)
        for module in (start, planning):
            patch.setattr(module, "draw_state", draw)
        patch.setattr(llama, "_boxed_shapes", functools.cache(llama._boxed_shapes))
        patch.setattr(memory_plan, "kept_bytes", functools.cache(memory_plan.kept_bytes))
        yield


def train_quietly(config, run_dir, *, identity=IDENTITY, **options):
    """Summary and what was printed."""
    console = Console(file=io.StringIO(), width=200)
    options = RunOptions(run_dir=str(run_dir), **options)
    summary = train(config, identity, options, generate=generate, console=console)
    return summary, console.file.getvalue()


def state_of(run_dir, config):
    """The state in the newest checkpoint of a run."""

    def create():
        params = config.model.init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
        return create_state(nn.meta.unbox(params), config.optimizer, config.store)

    state, _ = restore_latest(run_dir / "checkpoints", jax.eval_shape(create), warn=pytest.fail)
    return jax.device_get(state)


@functools.cache
def small_config(**knobs):
    """The tiny config, smaller still, with nothing to do but train."""
    config = load_config_file(CONFIG).get_config(**{**SMALL, "seq_len": 16, **knobs})
    return dataclasses.replace(config, eval_batches=1, final_eval_batches=1, sample_prompt="")


def stored_of(config, *, size=4, codes=None):
    """What a run holds whose parameters, gradients and moments take `size` bytes an entry.

    With `codes`, products read such of that many bytes instead of the stored matrices.
    """
    counts = count_params(config)
    whole = Held(*(size * counts[kind] for kind in ("matrices", "tables", "vectors")))
    held = dict.fromkeys(("weights", "gradients", "m", "v"), whole)
    if codes is not None:
        held["weights"] = whole._replace(matrices=codes * counts["matrices"])
        held["master"] = Held(whole.matrices)
    return Stored(held, logit=8, head=4, entry=size)


class PretrainScript:
    """Starts scripts/pretrain.py as a user does, in a folder of its own."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.processes: list[subprocess.Popen] = []

    def start(self, *arguments: object) -> subprocess.Popen:
        """The process; what it prints, errors too, is in `printed`."""
        cache = {
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as in all tests of training
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

"""Runs that stop where they are told to, and runs that start where another stands."""

import dataclasses
import functools
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from lowbit_jax.train.branch import branch_off
from lowbit_jax.train.checkpoint import list_checkpoints, save_checkpoint
from lowbit_jax.train.config import RunOptions, UsageError
from lowbit_jax.train.interrupts import Interrupted
from lowbit_jax.train.loop import train
from lowbit_jax.train.run_directory import open_run_directory
from lowbit_jax.train.state import create_state
from lowbit_jax.train.tracking import read_metrics

from .conftest import IDENTITY, small_config, state_of
from .conftest import train_quietly as train_and_validate

train_quietly = functools.partial(train_and_validate, validate=False)

# CAGE is silent for 0.8 * 24 = 19 steps.
STRONG = {"recipe": "int4_weights", "cage_total_strength": 2.7}
SILENT = {"recipe": "int4_weights", "cage_total_strength": 0.0}


def rows_of(run_dir):
    return read_metrics(run_dir / "metrics.jsonl", with_speeds=False)


def stop(config, run_dir, step, **options):
    with pytest.raises(Interrupted, match=f"after step {step} as --stop-after {step} says") as said:
        train_quietly(config, run_dir, stop_after=step, **options)
    assert said.value.exit_code == 0
    assert not (run_dir / "summary.json").exists()
    assert list_checkpoints(run_dir / "checkpoints")[-1].name == f"step_{step:08d}"


def assert_same_run(a, b, config):
    # Exact: the same program on the same bits.
    assert rows_of(a) == rows_of(b)
    jax.tree.map(np.testing.assert_array_equal, state_of(a, config), state_of(b, config))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    train_quietly(small_config(**STRONG), run_dir)
    return run_dir


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Strength 0, stopped while the other strength would be silent as well."""
    run_dir = tmp_path_factory.mktemp("runs") / "base"
    stop(small_config(**SILENT), run_dir, 18)
    return run_dir


def test_a_run_that_stopped_where_told_goes_on_to_the_bits_of_one_that_did_not(unbroken, tmp_path):
    run_dir = tmp_path / "run"
    stop(small_config(**STRONG), run_dir, 13)
    before = rows_of(run_dir)
    stop(small_config(**STRONG), run_dir, 13)  # it is there already
    assert rows_of(run_dir) == before
    train_quietly(small_config(**STRONG), run_dir)
    assert_same_run(run_dir, unbroken, small_config(**STRONG))


def test_a_branch_of_another_strength_is_the_unbranched_run_of_that_strength(
    base, unbroken, tmp_path
):
    origin, branch = tmp_path / "base", tmp_path / "branch"
    shutil.copytree(base, origin)
    config, options = small_config(**STRONG), {"branch_from": str(origin)}
    stop(config, branch, 21, **options)
    recorded = json.loads((branch / "run.json").read_text())
    assert (recorded["branch_from"], recorded["branch_step"]) == (str(origin), 18)
    shutil.rmtree(origin)  # the branch has its own copy
    _, said = train_quietly(config, branch, **options)
    assert "resuming" in said
    assert_same_run(branch, unbroken, config)
    # Both strengths act on the last five steps, and differ there.
    assert rows_of(branch)[-2]["loss"] != pytest.approx(rows_of(base)[-1]["loss"], abs=1e-6)


def test_a_branch_that_saves_nothing_copies_no_checkpoint(base, unbroken, tmp_path):
    train_quietly(small_config(**STRONG), tmp_path / "b", save=False, branch_from=str(base))
    assert not (tmp_path / "b" / "checkpoints").exists()
    assert rows_of(tmp_path / "b") == rows_of(unbroken)  # Exact: as above.


def test_a_run_goes_on_with_its_own_data_rows_and_lock_only(base, tmp_path):
    config, run_dir = small_config(**SILENT), tmp_path / "run"
    shutil.copytree(base, run_dir)
    other = dataclasses.replace(config.data, fingerprint="other")
    with pytest.raises(UsageError, match=r"trained on data .*'other'.*Restore them"):
        train_quietly(dataclasses.replace(config, data=other), run_dir)
    path = run_dir / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:16]))

    class Stranger(io.StringIO):
        """Takes the folder over once the first step has been told."""

        def write(self, text):
            if "step 19/" in text:
                (run_dir / ".lock").write_text("pid 12 on elsewhere 0123abcd 1\n")
            return super().write(text)

    console = Console(file=Stranger(), width=200)
    with pytest.raises(UsageError, match="pid 12 on elsewhere"):
        train(config, IDENTITY, RunOptions(str(run_dir), validate=False), console=console)
    assert "lacks 2 of the rows up to step 18" in console.file.getvalue()
    assert list_checkpoints(run_dir / "checkpoints")[-1].name == "step_00000018"


def tiny_state(step=0, width=4):
    params = {"weight": jnp.arange(width, dtype=jnp.float32)}
    return create_state(params, optax.adam(1e-3))._replace(step=jnp.int32(step))


def branch(tmp_path, origin, *, target=None, steps=9, save=True):
    with open_run_directory(IDENTITY, str(tmp_path / "branch")) as run:
        return branch_off(
            run, origin, target or tiny_state(), steps=steps, save=save, warn=pytest.fail
        )


def test_a_branch_without_a_checkpoint_of_its_own_starts_again_from_the_newest(tmp_path):
    origin = tmp_path / "origin"
    for step in (3, 5):
        save_checkpoint(origin / "checkpoints", tiny_state(step), {})
        assert int(branch(tmp_path, origin, save=False).step) == step
        assert json.loads((tmp_path / "branch" / "run.json").read_text())["branch_step"] == step


def test_what_cannot_be_branched_from_is_refused(tmp_path):
    with pytest.raises(UsageError, match="which has none; let that run save one first"):
        branch(tmp_path, tmp_path / "nowhere")
    origin = tmp_path / "origin"
    save_checkpoint(origin / "checkpoints", tiny_state(5), {})
    with pytest.raises(UsageError, match="stands after step 5, and this run has only 4 steps"):
        branch(tmp_path, origin, steps=4)
    with pytest.raises(ValueError, match=r"differ in .*: saved float32\[4\], wanted float32\[8\]"):
        branch(tmp_path, origin, target=tiny_state(width=8))
    assert not (tmp_path / "branch" / "checkpoints").exists()


def test_stopping_before_the_first_step_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--stop-after must be at least 1, got 0"):
        train_quietly(small_config(**SILENT), tmp_path / "run", stop_after=0)

import signal
import time

import jax
import numpy as np

from lowbit_jax.train.checkpoint import list_checkpoints
from lowbit_jax.train.config import load_config_file
from lowbit_jax.train.tracking import read_metrics

from .conftest import CONFIG, SMALL, state_of

STEPS = 120  # a checkpoint every 30
KNOBS = {
    **SMALL,
    "steps": STEPS,
    "recipe": "int4_weights",  # less to compile in every process
    "cage_total_strength": 0.0,
}


def rows_of(run_dir):
    return read_metrics(run_dir / "metrics.jsonl", with_speeds=False)


def steps_saved(run_dir):
    return [int(p.name.removeprefix("step_")) for p in list_checkpoints(run_dir / "checkpoints")]


def wait_for_step(pretrain, process, run_dir, step):
    """Until it has recorded `step`, a step of its own."""
    while process.poll() is None:
        # Rows of a killed predecessor are dropped before the first line about a step.
        if "\nstep " in pretrain.printed:
            rows = rows_of(run_dir)
            if rows and rows[-1]["step"] >= step:
                return
        time.sleep(0.01)
    raise AssertionError(f"ended before step {step}: {pretrain.printed}")


def final_state(run_dir):
    state = state_of(run_dir, load_config_file(CONFIG).get_config(**KNOBS))
    assert int(state.step) == STEPS
    return state


def test_killed_and_interrupted_runs_end_bit_for_bit_where_an_unbroken_one_does(pretrain, tmp_path):
    knobs = [word for key, value in KNOBS.items() for word in (f"--{key.replace('_', '-')}", value)]
    command = [CONFIG, *knobs, "--no-sample", "--run-dir"]
    assert pretrain.run(*command, "unbroken") == 0, pretrain.printed
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"

    # Killed after the first checkpoint (step 30), wherever it happens to be by then.
    process = pretrain.start(*command, "broken")
    wait_for_step(pretrain, process, broken, np.random.default_rng().integers(31, 75))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (broken / "summary.json").exists()
    saved = steps_saved(broken)[-1]

    # Interrupted: SIGTERM does what SIGINT does, as test_interrupts.py shows.
    process = pretrain.start(*command, "broken")
    wait_for_step(pretrain, process, broken, saved + 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 128 + signal.SIGTERM, pretrain.printed
    assert f"resuming broken after step {saved}\n" in pretrain.printed
    assert "saved in broken; the same command resumes" in pretrain.printed
    saved = steps_saved(broken)[-1]
    assert saved == rows_of(broken)[-1]["step"]

    assert pretrain.run(*command, "broken") == 0, pretrain.printed
    assert f"resuming broken after step {saved}\n" in pretrain.printed
    # Exact: the same program on the same bits. Each step is there once.
    assert rows_of(broken) == rows_of(unbroken)
    steps = [row["step"] for row in rows_of(broken) if row["split"] == "train"]
    assert steps == [*range(1, STEPS + 1)]
    jax.tree.map(np.testing.assert_array_equal, final_state(broken), final_state(unbroken))

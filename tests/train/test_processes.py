"""Training in two processes of two devices each, held to one process of four.

Two jobs serve all tests: in the first, process 1 is killed; the second is the same command again,
and process 1 is asked to stop on the way. Between the two, one process goes on with a copy.
"""

import dataclasses
import fcntl
import functools
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lowbit_jax.data.pipeline import batch_at
from lowbit_jax.parallel import batch_sharding, make_mesh
from lowbit_jax.train import loop, processes, train
from lowbit_jax.train.config import RunOptions, UsageError
from lowbit_jax.train.feed import part_of_process
from lowbit_jax.train.interrupts import Interrupted
from lowbit_jax.train.processes import check_mesh
from lowbit_jax.train.run_directory import RunDirectory, open_run_directory
from lowbit_jax.train.start import draw_state, place_run
from lowbit_jax.train.state import leaf_paths
from lowbit_jax.train.tracking import read_metrics

from .conftest import IDENTITY, ROOT, small_config, state_of, train_quietly

BATCH, SEQ_LEN, STEPS, SAVED, RATE = 8, 16, 12, 5, 4e-3
MESH = "4x1x1"
MESHES = (4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 1, 4)
# A process is killed, or gets a signal, when it reads the batch of the step after so many. Of the
# steps since the checkpoint, three may not have been recorded by the kill, and two have. The signal
# comes with the first batch after it, so that the steps that it takes to be heard are all left.
KILLED, STOPPED = 2 * SAVED, SAVED


@functools.cache
def toy():
    """Plain sums: no rounding makes much of a bit."""
    config = small_config(
        recipe="bf16", cage_total_strength=0.0, batch_size=BATCH, seq_len=SEQ_LEN, steps=STEPS,
        peak_lr=RATE,
    )  # fmt: skip
    return dataclasses.replace(config, checkpoint_interval=SAVED, eval_interval=STEPS)


# Of each process. Both jobs keep what their devices were given, and the state that they began with.
PROGRAM = """
import os, pathlib, signal, sys
import numpy as np
import jax
sys.path.insert(0, sys.argv[1])
from lowbit_jax.parallel import join_processes, processes, run_together, telling_others
address, me, folder = sys.argv[2], int(sys.argv[3]), pathlib.Path(sys.argv[4])
signals = {int(name): int(number) for name, number in (pair.split(":") for pair in sys.argv[5:])}
if signal.SIGKILL in signals.values():
    processes.HEARTBEAT_S = 6
join_processes(address, 2, me)
from tests.train.conftest import train_quietly
from tests.train.test_processes import BATCH, MESH, MESHES, toy
from lowbit_jax.parallel import batch_sharding, make_mesh
from lowbit_jax.train.feed import part_of_process
from lowbit_jax.train import loop, summary, Interrupted
from lowbit_jax.train.state import leaf_paths
real_batches, real_state, Phase = loop.train_batches, loop.initial_state, loop.Phase
phases = []  # of one config: traced once

def batches(config, start, place):
    for step, batch in enumerate(real_batches(config, start, place), start):
        parts = {shard.index[0].start or 0: shard.data for shard in batch[0].addressable_shards}
        rows = np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
        np.save(folder / f"rows_{me}_{step}.npy", rows)
        if me == 1 and step in signals:
            os.kill(os.getpid(), signals.pop(step))
        yield batch

def state(*arguments):
    found = real_state(*arguments)
    parts = {}
    for path, leaf in leaf_paths(found):
        for shard in leaf.addressable_shards:
            bounds = [cut.indices(size)[:2] for cut, size in zip(shard.index, leaf.shape)]
            name = ",".join(f"{start}:{stop}" for start, stop in bounds)
            parts[f"{path}[{name}]"] = np.asarray(shard.data)
    np.savez(folder / f"state_{me}_{int(found.step)}.npz", **parts)
    return found

def phase(*arguments):
    phases[:] = phases or [Phase(*arguments)]
    return phases[0]

def no_room(run_dir):
    raise OSError(28, "No space left on device")

loop.train_batches, loop.initial_state, loop.Phase = batches, state, phase
config = toy()

def main():
    with telling_others(Interrupted):
        try:
            print(train_quietly(config, folder / "run", sample=False, mesh=MESH)[1])
        except Interrupted as stopped:
            print(stopped, stopped.exit_code)
            places = (batch_sharding(make_mesh(*shape)) for shape in MESHES)
            print("parts", [part_of_process(place, BATCH) for place in places])
            if not (folder / "one").exists():
                return stopped.exit_code
            print(train_quietly(config, folder / "run", sample=False, mesh=MESH)[1])
            if me == 0:
                summary.plot_loss = no_room
            try:
                train_quietly(config, folder / "one", sample=False, mesh=MESH)
            except OSError as error:
                print("not written:", error)
    return 0

run_together(main)
"""


def start_job(folder, name, *signals):
    """Two processes; what they print is in `NAME_out_*.txt` and `NAME_err_*.txt`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    started = []
    for index in range(2):
        command = [sys.executable, "-c", PROGRAM, str(ROOT), address, str(index), str(folder)]
        with (
            open(folder / f"{name}_out_{index}.txt", "w") as out,
            open(folder / f"{name}_err_{index}.txt", "w") as err,
        ):
            started.append(
                subprocess.Popen(
                    [*command, *signals], cwd=folder, env=environment, stdout=out, stderr=err
                )
            )
    return started


def end_job(folder, name, started):
    """Waits for the processes, and notes how they ended for `Ended`."""
    start = time.monotonic()
    codes = [process.wait(timeout=240) for process in started]
    ended = {"codes": codes, "took_s": time.monotonic() - start}
    (folder / f"{name}.json").write_text(json.dumps(ended))


class Ended:
    """Folder, exit codes, output and errors of a job, and how long its last process took."""

    def __init__(self, folder: pathlib.Path, name: str):
        ended = json.loads((folder / f"{name}.json").read_text())
        self.folder, self.codes, self.took_s = folder, ended["codes"], ended["took_s"]
        self.out, self.err = (
            [(folder / f"{name}_{kind}_{index}.txt").read_text() for index in range(2)]
            for kind in ("out", "err")
        )


def made_once(tmp_path_factory, name, make):
    """A folder that is made by the first worker of the test run that wants it, and serves all."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / name
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Folder of one process of four devices that runs from start to end."""

    def make(folder):
        train_quietly(toy(), folder / "run", sample=False, mesh=MESH)

    return made_once(tmp_path_factory, "processes_reference", make) / "run"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The job of which one process is killed."""

    def make(folder):
        job = start_job(folder, "killed", f"{KILLED}:9")
        job[1].wait(timeout=240)
        end_job(folder, "killed", job)
        shutil.copytree(folder / "run", folder / "run_killed")
        shutil.copytree(folder / "run", folder / "one")
        with pytest.raises(Interrupted):  # one process goes on with what two have saved
            train_quietly(toy(), folder / "one", sample=False, mesh=MESH, stop_after=2 * SAVED)
        shutil.copytree(folder / "one", folder / "one_saved")
        end_job(folder, "restarted", start_job(folder, "restarted", f"{STOPPED}:15"))

    return Ended(made_once(tmp_path_factory, "processes_job", make), "killed")


@pytest.fixture(scope="module")
def restarted(killed):
    """The job that is started again, and asked to stop, and goes on."""
    return Ended(killed.folder, "restarted")


def rows_of(run_dir):
    return read_metrics(run_dir / "metrics.jsonl", with_speeds=False)


def whole(folder, step):
    """The state that the processes of a job had at first, put together from their parts."""
    found = {}
    for index in range(2):
        with np.load(folder / f"state_{index}_{step}.npz") as parts:
            for name, part in parts.items():
                path, _, bounds = name.rstrip("]").rpartition("[")
                slices = tuple(slice(*map(int, b.split(":"))) for b in bounds.split(",") if b)
                found.setdefault(path, []).append((slices, part))
    return found


def assert_state(folder, step, expected):
    """Exact: the same bits, each device its part of them."""
    found, leaves = whole(folder, step), leaf_paths(expected)
    assert found.keys() == {path for path, _ in leaves}
    for path, leaf in leaves:
        leaf, covered = np.asarray(leaf), np.zeros(np.shape(leaf), bool)
        for slices, part in found[path]:
            np.testing.assert_array_equal(part, leaf[slices], err_msg=path)
            covered[slices] = True
        assert covered.all(), path


def test_losses_are_those_of_one_process(reference, restarted):
    expected, got = rows_of(reference), rows_of(restarted.folder / "run")
    keys = [(row["step"], row["split"]) for row in expected]
    assert keys == [(row["step"], row["split"]) for row in got]  # the validation, too
    loss, norm = (np.array([row[k] for row in expected if k in row]) for k in ("loss", "grad_norm"))
    other = np.array([row["loss"] for row in got])
    # Bound, to first order: the same program, whose sums over 4 devices run in another order. Each
    # order is off by at most 3 * 2**-24 of the terms' sizes, which for the few sequences of a
    # device may be four times those of the mean; a dozen such sums in a row. Where a gradient is so
    # small that its sign turns, Adam's step differs by 2 * rate, and the loss by 2 * rate * |g|:
    # over P parameters at most 2 * rate * off * sqrt(P) * norm(g).
    off = 12 * 4 * 2 * 3 * 2.0**-24
    bound = off * loss + 2 * RATE * off * 278_912**0.5 * norm.sum()
    assert np.all(np.abs(other - loss) <= bound)
    assert 100 * bound.max() < loss[0] - loss[-1]  # training moves it by far more


def test_processes_read_disjoint_rows_that_make_up_the_batches_of_one(restarted):
    for step in range(STEPS):
        parts = [np.load(restarted.folder / f"rows_{index}_{step}.npy") for index in range(2)]
        assert [part.shape for part in parts] == [(BATCH // 2, SEQ_LEN)] * 2
        tokens = batch_at(
            toy().data.train, step, batch_size=BATCH, seq_len=SEQ_LEN, seed=toy().seed
        )
        np.testing.assert_array_equal(np.concatenate(parts), tokens.inputs)  # Exact: copied


def test_processes_read_the_same_rows_where_their_devices_share_sequences(restarted):
    for index, text in enumerate(restarted.out):
        assert f"parts {[(index, 2)] * 3 + [(0, 1)]}" in text


def test_devices_of_a_process_that_get_no_one_part_of_a_batch_are_refused(monkeypatch):
    place = batch_sharding(make_mesh(4, 1, 1))
    assert part_of_process(place, 8) == (0, 1)  # all devices are of this process
    monkeypatch.setattr(NamedSharding, "is_fully_addressable", False)
    pieces = {0: (slice(2, 4),), 1: (slice(4, 6),)}  # the middle two of four
    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", lambda *_: pieces)
    with pytest.raises(UsageError, match=r"must get one part of the batch, got rows .* of 8"):
        part_of_process(place, 8)


def test_a_mesh_without_some_devices_of_the_processes_is_refused(monkeypatch):
    check_mesh(None)  # of one process
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    check_mesh(make_mesh(8, 1, 1))
    for mesh in (None, make_mesh(4, 1, 1)):
        with pytest.raises(UsageError, match=r"all 8 devices of the 2 processes.* 8x1x1"):
            check_mesh(mesh)


def test_a_folder_that_is_not_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_SEEN_S", 0.0)
    with open_run_directory(IDENTITY, str(tmp_path / "here")) as run:
        processes._check_shared(run, run.mark)
        for name, found in (("missing", "does not;"), ("other", "sees another one")):
            elsewhere = RunDirectory(tmp_path / name, None)
            with pytest.raises(UsageError, match=f"all processes must see .*{found}"):
                processes._check_shared(elsewhere, run.mark)
            (tmp_path / "other").mkdir(exist_ok=True)
            (tmp_path / "other" / ".lock").write_text("pid 1 on another run 0\n")


def test_processes_that_were_not_started_alike_are_refused_before_anything_else(monkeypatch):
    def heard(function):
        mine = function()
        return [mine, mine, {**mine, "data": "others", "--mesh": "2x2x1"}]

    monkeypatch.setattr(processes, "on_each", heard)
    for other in ("on_each", "on_first", "open_mesh", "plan_run"):  # what they would do together
        monkeypatch.setattr(loop, other, lambda *_: pytest.fail("too early"))
    with pytest.raises(UsageError, match=r"alike, and process 2 differs .* in data, --mesh;"):
        train(toy(), IDENTITY, RunOptions(mesh=MESH, process=2))


def test_where_processes_may_differ_they_do(monkeypatch):
    said = []
    monkeypatch.setattr(processes, "on_each", lambda function: said.append(function()) or said)
    for index, address in enumerate(("localhost:1", "node:1")):
        processes.check_alike(IDENTITY, toy(), RunOptions(coordinator=address, process=index))
    assert said[0] == said[1]
    options = {field.name for field in dataclasses.fields(RunOptions)}
    named = {name[2:].replace("-", "_") for name in said[0] if name.startswith("--")}
    assert named == options - {"coordinator", "processes", "process"}


def test_weights_are_drawn_as_by_one_process(killed):
    key = jax.random.fold_in(jax.random.key(toy().seed), 2**32 - 1)
    places = place_run(toy(), make_mesh(4, 1, 1), zero=1).state
    drawn = jax.jit(lambda key: draw_state(toy(), key), out_shardings=places)(key)
    assert_state(killed.folder, 0, jax.device_get(drawn))


def test_what_two_processes_saved_is_restored_by_one_and_by_two(restarted):
    folder = restarted.folder
    saved = state_of(folder / "run_killed", toy())  # by one process
    assert int(saved.step) == SAVED
    assert_state(folder, SAVED, saved)


def test_what_one_process_saved_is_restored_by_two(restarted):
    folder = restarted.folder
    saved = state_of(folder / "one_saved", toy())
    assert int(saved.step) == 2 * SAVED
    assert_state(folder, 2 * SAVED, saved)
    assert rows_of(folder / "one")[-1]["step"] == STEPS  # and went on


def test_when_a_process_is_killed_the_other_ends_with_the_reason(killed):
    # Aborted by JAX; or its program meets the closed connection first, and raises.
    assert killed.codes[0] in (1, -6)
    assert killed.codes[1] == -9
    assert re.search("another task died|start all processes again", killed.err[0]), killed.err[0]
    assert killed.took_s < 60


def test_a_restarted_job_takes_the_same_steps_to_the_same_bits(restarted):
    before, after = (rows_of(restarted.folder / name) for name in ("run_killed", "run"))
    assert before[-1]["step"] > SAVED  # one that was not saved, taken again
    assert after[: len(before)] == before  # Exact: the same program and bits.


def test_a_signal_to_one_process_stops_both_at_the_same_step_saved(restarted):
    out = restarted.out
    assert restarted.codes == [0, 0], restarted.err
    stopped = [next(line for line in text.splitlines() if "stopped after" in line) for text in out]
    assert stopped[0] == stopped[1]
    assert stopped[0].endswith("143")
    step = int(stopped[0].split()[3].rstrip(","))
    assert STOPPED < step < STEPS
    assert f"run after step {step}\n" in out[0]  # resuming


def test_what_the_first_process_cannot_write_at_the_end_both_raise(restarted):
    for text in restarted.out:
        assert "not written: [Errno 28] No space left on device" in text
    assert not (restarted.folder / "one" / "summary.json").exists()


def test_one_process_prints_and_writes(restarted):
    folder, out = restarted.folder, restarted.out
    assert f"step {STEPS}: validation loss" in out[0]
    assert "step" not in out[1].replace("stopped after step", "").replace("same command", "")
    assert len([row for row in rows_of(folder / "run") if row["split"] == "train"]) == STEPS
    assert len(list((folder / "run" / "tensorboard").iterdir())) == 3  # one for each start

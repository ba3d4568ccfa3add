"""What kills, full disks, damage and a second process leave of a run.

Nothing that was reported as saved may be lost, and each message says what to do.
"""

import collections
import contextlib
import ctypes
import errno
import io
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time

import jax
import numpy as np
import pytest
from rich.console import Console

from lowbit_jax.train import checkpoint, interrupts, job_queue, run_lock, tracking
from lowbit_jax.train.checkpoint import list_checkpoints, restore_latest, save_checkpoint
from lowbit_jax.train.config import RunIdentity, UsageError
from lowbit_jax.train.job_queue import Job, Slot, run_jobs
from lowbit_jax.train.run_directory import open_run_directory
from lowbit_jax.train.state import TrainState
from lowbit_jax.train.tracking import MetricsLog, Progress, Throughput, read_metrics

IDENTITY = RunIdentity("tiny", "def get_config(): ...\n", {"lr": 0.1}, {})


def make_state(step):
    params = {"weight": np.full((2, 64), step, np.float32)}
    return TrainState(np.int32(step), params, {"momentum": np.ones(8, np.float32)})


def restore(directory):
    """Step that is restored, and the warnings."""
    messages = []
    target = jax.eval_shape(lambda: jax.tree.map(jax.numpy.asarray, make_state(0)))
    state, _ = restore_latest(directory, target, warn=messages.append)
    np.testing.assert_array_equal(state.params["weight"], int(state.step))  # Exact: stored.
    return int(state.step), messages


@contextlib.contextmanager
def full_disk(takes):
    """A disk that takes only the first bytes of each file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (takes, hard))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def bound_by_permissions():
    """Takes from this thread root's right to write and read everything, if it has that."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    effective = sets[0]
    sets[0] = effective & ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Checkpoints


@pytest.fixture
def snapshots(tmp_path, monkeypatch):
    """`snapshots(folder)` yields a copy of the folder for each change to it: what a kill leaves."""

    @contextlib.contextmanager
    def watch(folder):
        taken, busy = [], []

        def before(change):
            def changed(*args, **kwargs):
                if not busy:
                    busy.append(change)
                    taken.append(tmp_path / f"snapshot-{len(taken):03d}")
                    shutil.copytree(folder, taken[-1])
                    busy.clear()
                return change(*args, **kwargs)

            return changed

        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "mkdir", "unlink", "remove", "rmdir", "fsync"):
                patch.setattr(os, name, before(getattr(os, name)))
            yield taken

    return watch


@pytest.mark.parametrize("damaged", [False, True])
def test_a_kill_at_any_moment_of_a_save_leaves_what_was_saved(tmp_path, snapshots, damaged):
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        save_checkpoint(folder, make_state(step), {})
    if damaged:  # passed over when resuming, and replaced when step 3 comes again
        save_checkpoint(folder, make_state(3), {})
        (folder / "step_00000003" / "manifest.json").unlink()
    with snapshots(folder) as taken:
        save_checkpoint(folder, make_state(3), {})
    found = [restore(snapshot)[0] for snapshot in taken]
    assert found == sorted(found)  # the old one, then the new one
    assert {found[0], found[-1]} == {2, 3}
    for snapshot in taken[::6]:
        save_checkpoint(snapshot, make_state(4), {})
        left = {path.name: checkpoint.find_damage(path) for path in snapshot.iterdir()}
        assert left.pop("step_00000004") is None
        if damaged:  # it may still be there, as evidence, in nobody's way, or be replaced
            left.pop("step_00000003", None)
        assert set(left) <= {"step_00000002", "step_00000003"}
        assert set(left.values()) <= {None}


def test_a_damaged_checkpoint_made_read_only_stops_no_save(tmp_path):
    damaged = save_checkpoint(tmp_path, make_state(2), {})
    (damaged / "manifest.json").unlink()
    with bound_by_permissions():
        for folder in (damaged / "arrays", damaged):
            folder.chmod(0o555)
        save_checkpoint(tmp_path, make_state(2), {})
        save_checkpoint(tmp_path, make_state(3), {})
        assert restore(tmp_path) == (3, [])
        for folder in (*tmp_path.glob(".writing-damaged-*/arrays"), *tmp_path.glob(".writing-*")):
            folder.chmod(0o755)


def test_an_undamaged_checkpoint_is_not_replaced_by_its_repetition(tmp_path, snapshots):
    path = save_checkpoint(tmp_path / "c", make_state(2), {"note": "first"})
    with snapshots(tmp_path / "c") as taken:
        assert save_checkpoint(tmp_path / "c", make_state(2), {"note": "again"}) == path
    assert taken == []


@pytest.mark.parametrize("part", ["arrays", "manifest"])
def test_a_disk_that_takes_no_more_leaves_the_checkpoints_before(tmp_path, part):
    save_checkpoint(tmp_path, make_state(1), {})
    largest = max(p.stat().st_size for p in (tmp_path / "step_00000001").rglob("*") if p.is_file())
    takes = 100 if part == "arrays" else 4 * largest
    with (
        full_disk(takes),
        pytest.raises(OSError, match=r"cannot write step 2.*untouched. Make room"),
    ):
        save_checkpoint(tmp_path, make_state(2), {"note": "x" * 8 * largest})
    assert os.listdir(tmp_path) == ["step_00000001"]  # nothing that fills the disk
    assert restore(tmp_path) == (1, [])


def test_a_file_that_the_disk_cannot_read_is_damage(tmp_path, monkeypatch):
    for step in (1, 2):
        newest = save_checkpoint(tmp_path, make_state(step), {})
    real = checkpoint._hash

    def failing(path):
        if newest in path.parents:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path)

    monkeypatch.setattr(checkpoint, "_hash", failing)
    step, (message,) = restore(tmp_path)
    assert step == 1
    assert "cannot be read: [Errno 5] Input/output error" in message


def test_a_folder_made_read_only_is_told_before_the_first_step_and_at_a_save(tmp_path):
    with open_run_directory(IDENTITY, str(tmp_path / "run")) as run, bound_by_permissions():
        run.check_writable()
        save_checkpoint(run.checkpoints, make_state(1), {})
        run.checkpoints.chmod(0o555)
        with pytest.raises(UsageError, match=r"cannot write checkpoints .*make it writable"):
            run.check_writable()
        with pytest.raises(OSError, match=r"cannot write step 2 .*Permission denied"):
            save_checkpoint(run.checkpoints, make_state(2), {})
        assert restore(run.checkpoints) == (1, [])
        run.checkpoints.chmod(0o755)


def test_a_checkpoint_made_read_only_stays_and_the_others_go(tmp_path):
    for step in (1, 2, 3):
        path = save_checkpoint(tmp_path, make_state(step), {}, keep=1)
        if step == 1:
            path.chmod(0o555)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001", "step_00000003"]
    assert checkpoint.find_damage(tmp_path / "step_00000001") is None
    (tmp_path / "step_00000001").chmod(0o755)


# Records


def test_a_full_disk_ends_the_log_with_a_message_and_never_blocks_it(tmp_path):
    values = {f"v{i}": 0 for i in range(20)}  # makes events larger than rows
    steps = iter(range(1, 1000))
    with (
        full_disk(20_000),
        MetricsLog(tmp_path) as log,
        pytest.raises(OSError, match=r"cannot write the row .*make room, and the same command"),
    ):
        collections.deque((log.write(s, "train", **values) for s in steps), maxlen=0)
    step = next(steps) - 1
    rows = [{"step": s, "split": "train", **values} for s in range(1, step + 1)]
    assert read_metrics(tmp_path / "metrics.jsonl") in (rows, rows[:-1])
    with MetricsLog(tmp_path, step - 1, warn=pytest.fail) as log:
        log.write(step, "train", **values)
    assert read_metrics(tmp_path / "metrics.jsonl") == rows


@pytest.mark.parametrize("damage", [b"", b'{"step": 4\xff', b"7\nnull\n{}\n[1]\n"], ids=repr)
def test_rows_that_were_cut_or_damaged_are_counted_and_the_others_stay(tmp_path, damage):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 10):
            log.write(step, "train", loss=1.0 / step)
    path, messages = tmp_path / "metrics.jsonl", []
    lines = path.read_bytes().splitlines(keepends=True)
    # Line 4 is cut in its middle, so that line 5 goes on there.
    path.write_bytes(b"".join([*lines[:3], lines[3][:20], damage, *lines[4:]]))
    MetricsLog(tmp_path, 8, warn=messages.append).close()
    kept = [row["step"] for row in read_metrics(path)]
    assert kept in ([1, 2, 3, 6, 7, 8], [1, 2, 3, 5, 6, 7, 8])
    assert len(messages) == 1
    assert f"lacks {8 - len(kept)} of the rows up to step 8" in messages[0]


def events_of(path):
    """Steps and values of a TensorBoard file."""
    from tensorboardX.proto.event_pb2 import Event

    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        events.append((event.step, {v.tag: v.simple_value for v in event.summary.value}))
        data = data[12 + length + 4 :]
    return events


@pytest.mark.parametrize("jump_s", [-86400, 0, 86400])
def test_a_clock_that_jumps_by_a_day_changes_no_record(tmp_path, monkeypatch, jump_s):
    began = time.time()
    throughput, out = Throughput(tokens_per_step=1), io.StringIO()
    progress = Progress(Console(file=out, width=200), steps=3, every_s=0.0)
    with MetricsLog(tmp_path) as log:
        log.write(1, "train", loss=2.0)
    throughput.tick()
    progress.update(1, 2.0, None)
    monkeypatch.setattr(tracking.time, "time", lambda: began + jump_s)
    throughput.tick()
    progress.update(2, 2.0, None)
    with MetricsLog(tmp_path, 1) as log:
        log.write(2, "train", loss=0.5)
    # TensorBoard reads the files in the order of their names.
    first, second = sorted((tmp_path / "tensorboard").iterdir())
    assert events_of(first)[1:] == [(1, {"train/loss": 2.0})]
    assert events_of(second)[1:] == [(2, {}), (2, {"train/loss": 0.5})]
    # Bound: what lies between took less than a minute, and not less than no time.
    assert throughput.overall() > 1 / 60
    assert out.getvalue().splitlines()[-1].split()[-2] < "0:01:00"


# The folder and who trains in it


def test_a_damaged_record_is_told_and_fresh_starts_anew(tmp_path):
    open_run_directory(IDENTITY, str(tmp_path)).close()
    (tmp_path / "run.json").write_text('{"name": "ti')
    with pytest.raises(UsageError, match=r"run.json is damaged .*restore it .*--fresh"):
        open_run_directory(IDENTITY, str(tmp_path))
    open_run_directory(IDENTITY, str(tmp_path), fresh=True).close()


def test_of_many_that_start_at_once_one_trains(tmp_path):
    barrier, opened, refused = threading.Barrier(6), [], []

    def start():
        barrier.wait()
        try:
            opened.append(open_run_directory(IDENTITY, str(tmp_path / "run")))
        except UsageError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(opened), len(refused)) == (1, 5)
    assert all("is training in" in text for text in refused), refused
    opened[0].close()


@pytest.fixture
def on_host(monkeypatch):
    """`on_host(name)`: from here on the process is on another machine; locks are local to each."""
    monkeypatch.setattr(run_lock, "_BEAT_S", 0.02)
    monkeypatch.setattr(run_lock, "_WATCH_S", 0.4)

    def become(name):
        monkeypatch.setattr(run_lock.platform, "node", lambda: name)
        monkeypatch.setattr(run_lock, "_machine", lambda: f"boot-{name}")
        monkeypatch.setattr(run_lock.fcntl, "flock", lambda *_: None)

    return become


def test_a_lock_that_a_kill_left_on_another_host_is_watched_and_taken(tmp_path, on_host):
    (tmp_path / ".lock").write_text("pid 12 on elsewhere some-boot 0123abcd 7\n")
    messages = []
    lock = run_lock.RunLock(tmp_path, messages.append)
    (message,) = messages
    assert "left locked by pid 12 on elsewhere, killed or still alive; watching 0 s for" in message
    lock.check()
    lock.release()
    run_lock.RunLock(tmp_path, pytest.fail).release()  # released in order: nothing to watch


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells its start")
def test_a_lock_that_a_kill_left_on_this_machine_is_taken_at_once(tmp_path):
    boot = run_lock._BOOT_ID.read_text().strip()
    (tmp_path / ".lock").write_text(f"pid 12 on another-container {boot} 0123abcd 7\n")
    run_lock.RunLock(tmp_path, pytest.fail).release()


def test_a_machine_that_hides_the_number_of_its_start_is_known_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_BOOT_ID", tmp_path / "missing")
    name = run_lock.platform.node()
    (tmp_path / ".lock").write_text(f"pid 12 on {name} {name} 0123abcd 7\n")
    run_lock.RunLock(tmp_path, pytest.fail).release()


def test_a_run_that_lives_on_another_host_is_left_alone(tmp_path, on_host):
    on_host("one")
    lock = run_lock.RunLock(tmp_path, pytest.fail)
    on_host("two")
    with pytest.raises(UsageError, match=r"pid \d+ on one\) is training in .*machine is down"):
        run_lock.RunLock(tmp_path, lambda text: None)
    lock.check()
    lock.release()


def test_of_two_hosts_that_start_in_the_same_second_one_saves(tmp_path, on_host):
    on_host("one")
    first = run_lock.RunLock(tmp_path, pytest.fail)
    first._released.set()  # no sign of life, as in the second before the first
    (tmp_path / ".lock").write_text("")  # as the other host has seen it
    on_host("two")
    second = run_lock.RunLock(tmp_path, pytest.fail)
    with pytest.raises(UsageError, match=r"\(pid \d+ on two\) has taken .* over.*without saving"):
        first.check()
    first.release()
    second.check()
    second.release()
    with pytest.raises(UsageError, match="another process"):
        first.check()  # suspended for so long that the other one has come and gone


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    with pytest.raises(UsageError, match=r"keeps no locks .*choose a --run-dir on another"):
        open_run_directory(IDENTITY, str(tmp_path))


# Sweeps

CHILD = textwrap.dedent("""
    import pathlib, signal, sys, time
    def save(*_):
        pathlib.Path(sys.argv[1]).write_text("saved")
        sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    print("ready", flush=True)
    time.sleep(60)
""")
# Reads the modules by their paths: importing the package, and JAX with it, would take seconds.
SWEEP = textwrap.dedent("""
    import importlib.util, io, pathlib, sys
    from rich.console import Console
    for name in ("interrupts", "job_queue"):
        spec = importlib.util.spec_from_file_location(f"lowbit_jax.train.{name}", sys.argv.pop(1))
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    child, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    command = (sys.executable, "-c", child, str(folder / "saved"))
    job = module.Job("job", command, folder / "log")
    module.run_jobs([job], [module.Slot()], console=Console(file=io.StringIO()))
""")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells of the end of a parent")
def test_the_runs_of_a_killed_sweep_save_and_end(tmp_path):
    files = [interrupts.__file__, job_queue.__file__]
    sweep = subprocess.Popen([sys.executable, "-c", SWEEP, *files, CHILD, str(tmp_path)])
    log = tmp_path / "log"
    wait_for(lambda: sweep.poll() is None and log.exists() and "ready" in log.read_text())
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    wait_for((tmp_path / "saved").exists)


def test_a_full_disk_lets_the_other_runs_of_a_sweep_save(tmp_path):
    def command(*arguments):
        return (sys.executable, "-I", "-S", "-c", *arguments)

    slow_log = tmp_path / "slow.log"
    quick = """if True:
        import pathlib, sys, time
        while "ready" not in pathlib.Path(sys.argv[1]).read_text():
            time.sleep(0.01)
    """
    jobs = [
        Job("slow", command(CHILD, str(tmp_path / "saved")), slow_log),
        Job("quick", command(quick, str(slow_log)), tmp_path / "quick.log"),
    ]

    def full(job):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        run_jobs(jobs, [Slot(), Slot()], console=Console(file=io.StringIO()), on_success=full)
    assert (tmp_path / "saved").read_text() == "saved"

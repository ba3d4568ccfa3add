"""One process to a run folder: a lock of the file system, and signs of life where it has none."""

import contextlib
import fcntl
import os
import pathlib
import platform
import threading
import time
import uuid
from collections.abc import Callable

from lowbit_jax.train.config import UsageError

_BOOT_ID = pathlib.Path("/proc/sys/kernel/random/boot_id")
_BEAT_S = 5.0
# Four times as long: a network file system shows a change some seconds late.
_WATCH_S = 20.0


class RunLock:
    """Holds `.lock` of a folder until it is released or the process ends.

    On one machine, and where a network file system keeps locks for all of its hosts (NFS, CephFS,
    GPFS, Lustre with `flock`), `flock` decides alone, and a kill releases it. Others keep them for
    each host by itself (BeeGFS, Lustre with `localflock`, NFS with `local_lock`). So the holder
    also writes a sign of life into the file, and removes it when it leaves. A process that finds
    one of another machine, and the lock free, watches it: if it changes, somebody lives there; if
    it does not, a kill has left it. Nothing compares clocks, and a machine is known by what its
    kernel drew when it started: hosts and containers may share names.

    Two hosts that start in the same second see no sign of each other. The last one to write has
    the folder, and the other finds out in `check`, before it writes a checkpoint. That also stops
    a process that was taken for dead because it was suspended.
    """

    def __init__(self, folder: pathlib.Path, warn: Callable[[str], None]):
        """Takes the lock of `folder`; `warn` hears of a wait.

        Raises:
          UsageError: If another process has it, or if the file system has no locks.
          OSError: If the file cannot be written.
        """
        self.folder, self._path = folder, folder / ".lock"
        self.mark = f"pid {os.getpid()} on {platform.node()} {_machine()} {uuid.uuid4().hex[:8]}"
        self._released = threading.Event()
        self._file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", 0)
        try:
            self._acquire(warn)
            self._write(0)
        except BaseException:
            self._file.close()
            raise
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lock")
        self._thread.start()

    def check(self) -> None:
        """Raises a UsageError if another process has taken the folder over."""
        holder = self._read()
        if holder is not None and not holder.startswith(self.mark):
            raise UsageError(
                f"run directory: another process ({_name(holder)}) has taken {self.folder} over;"
                " this one ends without saving. Let one of them train, or give this one another"
                " --run-dir."
            )

    def release(self) -> None:
        """Lets the next process have the folder; the file stays, empty."""
        self._released.set()
        self._thread.join()
        if not self._file.closed:
            with contextlib.suppress(OSError):
                if (self._read() or "").startswith(self.mark):
                    self._file.truncate(0)
            self._file.close()

    def _acquire(self, warn: Callable[[str], None]) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._taken(self._read()) from None
        except OSError as error:  # ENOSYS, ENOLCK, EOPNOTSUPP
            raise UsageError(
                f"run directory: the file system of {self.folder} keeps no locks ({error}), so two"
                " runs could spoil each other there; choose a --run-dir on another one, or mount it"
                " with locks (Lustre: -o flock)."
            ) from error
        found = self._read()
        if not found or found.split()[4:5] == [_machine()]:
            return  # released, or left by a kill on this machine, where `flock` cannot err
        warn(
            f"{self.folder} was left locked by {_name(found)}, killed or still alive; watching"
            f" {_WATCH_S:.0f} s for a sign of life, then going on without it"
        )
        give_up = time.monotonic() + _WATCH_S
        while time.monotonic() < give_up:
            time.sleep(min(1.0, _WATCH_S / 10))
            if (now := self._read()) != found:
                raise self._taken(now)

    def _taken(self, holder: str | None) -> UsageError:
        return UsageError(
            f"run directory: another process ({_name(holder)}) is training in"
            f" {self.folder}; wait for it or choose another --run-dir. If its machine is down for"
            f" good, remove {self._path}."
        )

    def _read(self) -> str | None:
        try:  # opened anew: that is when a network file system looks at the server's copy
            return self._path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None  # removed by hand

    def _write(self, beat: int) -> None:
        said = f"{self.mark} {beat}\n".encode()
        os.pwrite(self._file.fileno(), said, 0)  # first: empty would mean released
        self._file.truncate(len(said))

    def _beat(self) -> None:
        beat = 0
        while not self._released.wait(_BEAT_S):
            beat += 1
            with contextlib.suppress(OSError):  # a full disk is for others to tell
                if not (self._read() or "").startswith(self.mark):
                    return  # taken over, or removed: `check` tells
                self._write(beat)


def _machine() -> str:
    """What no two machines share, nor one before and after a restart; the same in containers."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:  # not Linux, or hidden
        return platform.node()


def _name(content: str | None) -> str:
    """`pid 12 on host`, of the content of a lock file."""
    return " ".join((content or "unknown").split()[:4])

"""How several processes end: one that fails ends the others, with its reason and at once.

Without this a process would wait for the others of a collective that never come. Three cases:

- A process raises: `telling_others` hands the reason to the others, a thread of theirs prints it.
- A process is killed, or its machine is gone: JAX misses its heartbeats, and aborts the others.
- The first process, which keeps JAX's service, is gone: JAX aborts the others, too.

In the first case the exit code is that of the program, or 1. In the others it is 134, which a
shell makes of SIGABRT, and JAX's message names the task that died. Nothing may stand between: such
an abort comes out of a thread of JAX while another one may hold Python's lock for good.
"""

import atexit
import contextlib
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed

_FAILURE, _END = "lowbit_jax/failure", "lowbit_jax/end"
# Seconds from one look for a failure of another process to the next.
_LOOK_S = 1.0
# A process that another tells of an error has so long to end by itself: it may be the same one.
_GRACE_S = 5.0
# How long one that failed waits for the others to hear of it.
_FAREWELL_S = 15.0
_ADVICE = (
    "What was saved stays. Mend the cause and start all processes again with the same command: they"
    " go on from the newest checkpoint."
)
_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it
# Of this process: set once its program has ended, for the thread that looks for failures.
_leaving = threading.Event()
# Whoever gets it ends this process, and says why: the program, or the thread. Nobody gives it back.
_last_word = threading.Lock()


@contextlib.contextmanager
def telling_others(*silent: type[BaseException]) -> Iterator[None]:
    """Within it, an exception ends the other processes, too; nothing else happens where it is one.

    To be followed by the end of the process, as in `run_together`.

    Args:
      *silent: Exceptions that all processes raise alike, so that none is to be told.
    """
    try:
        yield
    except (SystemExit, *silent):
        raise
    except BaseException as error:
        if (client := _client()) is not None:
            # Not told if another was faster, or the service is gone.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                reason = f"{type(error).__name__}: {error}"
                client.key_value_set(
                    _FAILURE, f"process {jax.process_index()} on {platform.node()}: {reason}"
                )
        raise


def run_together(main: Callable[[], int]) -> NoReturn:
    """Runs a program, and ends the process with its exit code, after the others have heard of it.

    Args:
      main: May call `join_processes`. What it raises is printed, with exit code 1.
    """
    failure = None
    try:
        code = main()
    except SystemExit:
        raise
    except BaseException:
        code, failure = 1, traceback.format_exc()
    client = _client()
    if client is not None and code:
        _leaving.set()
        _last_word.acquire()  # or for good: this follows from what the thread has printed
    if failure is not None:
        sys.stderr.write(failure)
    if client is None or code == 0:
        sys.exit(code)  # JAX waits there for all
    if failure is not None:
        print(f"error: this process ends with the error above. {_ADVICE}", file=sys.stderr)
    _flush()
    _wait_for_all(client)
    os._exit(code)


def end_with_the_others() -> None:
    """Has this process end when another one fails; for `join_processes`."""
    thread = threading.Thread(target=_watch, args=(_client(),), daemon=True, name="others")
    thread.start()

    def stop_watching() -> None:
        _leaving.set()
        thread.join()  # for good if it ends this process

    atexit.register(stop_watching)  # runs before JAX's own, which disconnects


def _watch(client: Any) -> None:
    """Waits for a failure of another process, then ends this one."""
    reason = None
    while reason is None:
        if _leaving.wait(_LOOK_S):
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # none yet, or no service
            reason = client.key_value_try_get(_FAILURE)
    if _leaving.wait(_GRACE_S) or not _last_word.acquire(blocking=False):
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.write(_SHOW_CURSOR if stream.isatty() else "")
    print(f"error: this process ends with {reason}\n{_ADVICE}", file=sys.stderr)
    _flush()
    _wait_for_all(client)
    os._exit(1)


def _wait_for_all(client: Any) -> None:
    """Returns when all processes are about to end, or have had the time to."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.wait_at_barrier(_END, int(1000 * _FAREWELL_S))
    if jax.process_index() == 0:
        time.sleep(1)  # the service goes last: JAX aborts who misses it


def _client() -> Any:
    """JAX's connection to the service of process 0; None in a program of one process.

    Of its private module, as Orbax takes it; there is no public way to it.
    """
    return distributed.global_state.client


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()

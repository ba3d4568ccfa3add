"""Ctrl-C and SIGTERM: the first asks the loop to stop after its step, the second ends at once."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Launchers such as `timeout` signal the process and then its group: that is one request.
_SAME_REQUEST_S = 0.5


class Interrupted(Exception):
    """Training stopped before its last step, its state saved.

    Attributes:
      exit_code: 128 + signal number, as shells have it: 130 for Ctrl-C, 143 for SIGTERM. 0 where
        no signal came but `RunOptions.stop_after` asked for it.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number if signal_number else 0


class StopRequest:
    """Whether a signal has asked for a stop: `number` is the signal's, or 0."""

    def __init__(self) -> None:
        self.number = 0

    def __bool__(self) -> bool:
        return self.number != 0

    def poll(self) -> bool:
        """Looks whether a stop was asked for; all processes of a program do so equally often."""
        return bool(self)


@contextlib.contextmanager
def listen_for_signals(
    announce: Callable[[str], None], at_once: Callable[[], object] = lambda: None
) -> Iterator[StopRequest]:
    """Within the block, SIGINT and SIGTERM set the request; a second one exits the process.

    Python runs signal handlers between bytecodes, so during a long compilation neither would be
    seen. The interpreter writes the number to a socket right away, though; a thread reads it.
    A repetition within half a second is the same request, for launchers send their signal twice.
    Outside the main thread nothing is installed: signals are then the caller's affair.

    Args:
      announce: Receives a message for the user after the first signal.
      at_once: Runs before the exit on the second, to put the terminal in order.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        requested = 0.0
        while numbers := reader.recv(64):
            for number in numbers:
                if number not in _SIGNALS:  # 0 ends the thread; others are not ours
                    if number == 0:
                        return
                    continue
                if request:
                    if time.monotonic() - requested < _SAME_REQUEST_S:
                        continue
                    at_once()
                    os._exit(128 + number)
                requested = time.monotonic()
                try:
                    announce(
                        f"{signal.Signals(number).name}: finishing this step, then saving;"
                        " once more exits at once without saving"
                    )
                finally:
                    request.number = number

    thread = threading.Thread(target=watch, daemon=True, name="signals")
    thread.start()
    previous = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    previous_descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield request
    finally:
        signal.set_wakeup_fd(previous_descriptor)
        for number, handler in previous.items():
            signal.signal(number, handler)
        writer.send(b"\0")
        thread.join()
        reader.close()
        writer.close()

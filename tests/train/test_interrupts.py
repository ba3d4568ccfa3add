import signal
import subprocess
import sys
import textwrap
import time

import pytest

from lowbit_jax.train import interrupts

# Reads the module by its path: importing the package, and JAX with it, would take seconds.
CHILD = textwrap.dedent("""
    import ctypes, os, runpy, signal, sys, time
    listen_for_signals = runpy.run_path(sys.argv.pop(1))["listen_for_signals"]
    sleep_in_c = ctypes.CDLL(None).sleep  # as a compilation does: no bytecode runs meanwhile
    before = signal.getsignal(signal.SIGINT)  # a background job of a shell ignores it
    with listen_for_signals(lambda text: print(text, flush=True)) as stop:
        print("ready", flush=True)
        while not stop:
            sleep_in_c(int(sys.argv[1]))
        print("stopping", flush=True)
        time.sleep(float(sys.argv[2]))
    print("restored", signal.getsignal(signal.SIGINT) is before, flush=True)
    sys.exit(128 + stop.number)
""")


@pytest.fixture
def start():
    children = []

    def start(*arguments):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, interrupts.__file__, *arguments],
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        assert child.stdout.readline() == "ready\n"
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_handlers_are_put_back(start, number):
    child = start("1", "0")
    child.send_signal(number)
    said = child.stdout.read()
    assert child.wait() == 128 + number
    assert said.startswith(f"{number.name}: finishing this step")
    assert said.endswith("stopping\nrestored True\n")


def test_a_signal_that_a_launcher_sends_twice_is_one_request(start):
    child = start("1", "1")  # the handlers stay for a second
    child.send_signal(signal.SIGTERM)
    said = child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    assert said.startswith("SIGTERM: finishing this step")
    assert child.stdout.read().endswith("stopping\nrestored True\n")
    assert child.wait() == 128 + signal.SIGTERM


def test_the_second_signal_exits_at_once_even_in_the_middle_of_a_call(start):
    child = start("100", "100")
    child.send_signal(signal.SIGINT)
    assert "finishing" in child.stdout.readline()
    time.sleep(1)  # at once it would be the same request
    began = time.monotonic()
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=50) == 130
    assert time.monotonic() - began < 50  # of the 100 s that the call would take

"""Two processes that decide as one, the second of which fails in the end."""

import pytest

from lowbit_jax.parallel import on_each, on_first, run_together, telling_others

PROGRAM = """
import sys
import jax
from lowbit_jax.parallel import (
    is_first, join_processes, on_each, on_first, run_together, telling_others
)
join_processes(sys.argv[1], 2, int(sys.argv[2]))
me = jax.process_index()

def refuse(text):
    raise ValueError(text)

def told(function, *arguments):
    try:
        return function(*arguments, ValueError)
    except ValueError as error:
        return str(error)

def main():
    print(is_first())
    print(told(on_first, lambda: ["read", me]))
    print(told(on_first, lambda: refuse(f"first is {me}")))
    print(told(on_each, lambda: "x" * (2000 + me))[1][:3], len(told(on_each, lambda: me)))
    print(told(on_each, lambda: me if me == 0 else refuse("no such folder")))
    print(told(on_each, lambda: refuse("no such mesh")), flush=True)
    with telling_others():
        if me == 1:
            raise OSError(28, "No space left on device")
        on_first(lambda: 0)  # the other never comes
        on_first(lambda: 0)
    return 0

run_together(main)
"""


def test_two_processes_decide_and_end_as_one(run_two):
    found = run_two(PROGRAM, devices=1)
    for index, (code, out, err) in enumerate(found):
        lines = [line for line in out.splitlines() if "Gloo" not in line]
        # What the first finds all have.
        assert lines[:3] == [str(index == 0), "['read', 0]", "first is 0"], err
        # What each finds all have, and an error names its process.
        assert lines[3] == "xxx 2", err
        assert lines[4].startswith("process 1 on ")
        assert lines[4].endswith(": no such folder")
        assert lines[5] == "no such mesh"  # all agree: of no process in particular
        # The one that fails in the end takes the other with it: both know why, and what to do.
        assert code == 1
        assert "No space left on device" in err
        assert "start all processes again with the same command" in err.splitlines()[-1]
    told, failed = (ended.err for ended in found)
    assert "this process ends with process 1 on" in told
    # One of them has a traceback: the other's would be of the connection that is gone.
    assert "Traceback" in failed
    assert "Traceback" not in told


def test_one_process_alone_just_calls():
    given = object()
    assert on_first(lambda: given) is given
    assert on_each(lambda: given) == [given]
    with pytest.raises(ValueError, match="as it is"), telling_others():
        on_each(lambda: (_ for _ in ()).throw(ValueError("as it is")), ValueError)


@pytest.mark.parametrize("code", [0, 3])
def test_one_process_alone_ends_with_the_code_of_its_program(code):
    with pytest.raises(SystemExit) as ended:
        run_together(lambda: code)
    assert ended.value.code == code

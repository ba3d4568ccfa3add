import json
import subprocess
import types

import pytest

from lowbit_jax.bench import command
from lowbit_jax.bench.report import load_rows
from pallas_kernels.measure import Build, Case, Comparison, Program


def works(shapes):
    return Build(None, lambda compiled, inputs: Program(lambda: 0, {}, 1))


def comparison(group, build=works):
    return Comparison(group, f"{group} work", lambda key: (), (Case("a", build),))


def broken(shapes):
    raise RuntimeError("does not compile")


@pytest.fixture
def groups(monkeypatch):
    """Groups of one case each, of which the one named "layer" fails."""
    for group in command.GROUPS:
        made = comparison(group, *((broken,) if group == "layer" else ()))
        monkeypatch.setitem(command.GROUPS, group, lambda tiny, made=made: [made])


def test_a_tiny_group_is_measured_saved_and_drawn(tmp_path, capsys):
    assert command.main(("product",), tiny=True, out=tmp_path, repeats=2) == 0
    rows = load_rows(tmp_path)
    measured = [row.name for row in rows if row.status == "measured"]
    assert measured[:3] == ["XLA bf16", "XLA fp8", "XLA fp8, scales"]
    assert all(row.repeats == 2 for row in rows[:3])
    assert (tmp_path / "bench.png").exists()
    printed = capsys.readouterr().out
    for row in rows:
        if row.status == "skipped":  # never silently
            assert f"{row.name} skipped: {row.note}" in printed
            assert row.note


def test_a_failing_row_is_reported_and_the_exit_status_says_so(groups, tmp_path, capsys):
    assert command.main(("layer",), out=tmp_path) == 1
    assert "does not compile" in capsys.readouterr().out
    assert load_rows(tmp_path)[0].status == "failed"


def test_rows_of_other_groups_stay_in_the_order_of_the_table(groups, tmp_path):
    command.main(("decode",), out=tmp_path)
    command.main(("product",), out=tmp_path)
    command.main(("decode",), out=tmp_path)
    assert [row.group for row in load_rows(tmp_path)] == ["product", "decode"]


def test_groups_run_apart_and_one_that_dies_leaves_the_others_alone(
    groups, tmp_path, monkeypatch, capfd
):
    def run(arguments, check):
        options = dict(zip(arguments[3::2], arguments[4::2], strict=False))
        if options["--only"] == "step_7b":  # dies without a word
            return types.SimpleNamespace(returncode=-11)
        code = command.main((options["--only"],), out=tmp_path, repeats=int(options["--repeats"]))
        return types.SimpleNamespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", run)
    assert command.main(("product", "layer", "step"), out=tmp_path, repeats=3) == 1
    found = {row.group: (row.status, row.note) for row in load_rows(tmp_path)}
    assert found["product"][0] == found["step_800m"][0] == "measured"
    assert found["layer"] == ("failed", "RuntimeError: does not compile")
    assert found["step_7b"] == ("failed", "its process ended with exit status -11")


def test_a_process_that_dies_after_a_failed_row_is_still_reported(
    groups, tmp_path, monkeypatch, capsys
):
    def run(arguments, check):
        group = arguments[arguments.index("--only") + 1]
        code = command.main((group,), out=tmp_path)
        return types.SimpleNamespace(returncode=-6 if group == "layer" else code)

    monkeypatch.setattr(subprocess, "run", run)
    assert command.main(("product", "layer"), out=tmp_path) == 1
    notes = [row.note for row in load_rows(tmp_path) if row.group == "layer"]
    assert notes == ["RuntimeError: does not compile", "its process ended with exit status -6"]
    assert "its process ended with exit status -6" in capsys.readouterr().err


def test_a_table_is_drawn_again_without_measuring(groups, tmp_path, monkeypatch, capsys):
    command.main(("product",), out=tmp_path / "a")
    command.main(("decode",), out=tmp_path / "b")
    monkeypatch.setattr(command, "measure_all", None)
    sources = (tmp_path / "a", tmp_path / "b")
    assert command.main(sources=sources, out=tmp_path / "c") == 0
    assert [row.group for row in load_rows(tmp_path / "c")] == ["product", "decode"]
    assert "decode work" in capsys.readouterr().out
    assert json.loads((tmp_path / "c" / "bench.json").read_text())["rows"][0]["name"] == "a"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"only": ("nothing",)}, "groups must be among product"),
        ({"repeats": 0}, "--repeats"),
    ],
)
def test_a_wrong_call_is_told_so(arguments, said, capsys):
    assert command.main(**arguments) == 2
    assert said in capsys.readouterr().err


def test_a_folder_without_rows_is_told_so(tmp_path, capsys):
    assert command.main(sources=(tmp_path,)) == 2
    assert "bench.json" in capsys.readouterr().err

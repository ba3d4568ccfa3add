import dataclasses
import json

import pytest

from lowbit_jax.train.config import RunIdentity, UsageError
from lowbit_jax.train.run_directory import open_run_directory

IDENTITY = RunIdentity("tiny", "def get_config(): ...\n", {"lr": 0.1, "recipe": "a/b"}, {})
OTHER = dataclasses.replace(IDENTITY, arguments={"lr": 0.2, "recipe": "a/b"}, overrides={"lr": 0.2})


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def finish(run):
    (run.path / "summary.json").write_text("{}")
    run.close()


def test_records_config_arguments_and_versions():
    with open_run_directory(IDENTITY) as run:
        assert str(run.path) == "runs/tiny"
        assert (run.path / "config.py").read_text() == IDENTITY.source
        assert json.loads((run.path / "run.json").read_text())["arguments"] == IDENTITY.arguments
        versions = json.loads((run.path / "versions.json").read_text())
    assert {"python", "packages", "device", "git_commit"} <= versions.keys()
    assert "jax" in versions["packages"]


def test_the_same_command_goes_on_until_finished_then_starts_the_next():
    for expected in ("tiny", "tiny", "tiny-2", "tiny-2", "tiny-3"):
        run = open_run_directory(IDENTITY)
        assert run.path.name == expected
        if json.loads((run.path / "run.json").read_text()) and (run.path / "seen").exists():
            finish(run)
        else:
            (run.path / "seen").touch()
            run.close()


def test_other_arguments_have_a_folder_of_their_own():
    with open_run_directory(IDENTITY), open_run_directory(OTHER) as other:
        assert other.path.name == "tiny-lr=0.2"
    slashes = dataclasses.replace(IDENTITY, overrides={"data": "../x/y"})
    assert slashes.run_name == "tiny-data=.._x_y"


def test_a_folder_given_by_name_refuses_other_arguments_and_names_them():
    open_run_directory(IDENTITY, "here").close()
    with pytest.raises(UsageError, match=r"lr was 0.1, now 0.2.*--run-dir.*--fresh"):
        open_run_directory(OTHER, "here")
    edited = dataclasses.replace(IDENTITY, source="def get_config(): return 1\n")
    with pytest.raises(UsageError, match="config file has been edited"):
        open_run_directory(edited, "here")
    open_run_directory(IDENTITY, "here").close()  # refusing has changed nothing


def test_fresh_empties_what_a_run_wrote_and_nothing_else(tmp_path):
    run = open_run_directory(IDENTITY, "here")
    (run.checkpoints / "step_00000001").mkdir(parents=True)
    (run.path / "metrics.jsonl").write_text("{}\n")
    (run.path / "notes.txt").write_text("mine")
    finish(run)
    with open_run_directory(OTHER, "here", fresh=True) as run:
        assert sorted(p.name for p in run.path.iterdir() if p.name != ".lock") == [
            "config.py", "notes.txt", "run.json", "versions.json",
        ]  # fmt: skip


def test_fresh_without_a_folder_takes_the_next_number():
    open_run_directory(IDENTITY).close()
    with open_run_directory(IDENTITY, fresh=True) as run:
        assert run.path.name == "tiny-2"


def test_two_jobs_do_not_share_a_folder():
    with (
        open_run_directory(IDENTITY, "here"),
        pytest.raises(UsageError, match=r"another process \(pid \d+ on .*\) is training in here"),
    ):
        open_run_directory(IDENTITY, "here")
    open_run_directory(IDENTITY, "here").close()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_other_things_is_left_alone(tmp_path, fresh):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(UsageError, match=r"holds chapter.tex"):
        open_run_directory(IDENTITY, "thesis", fresh=fresh)
    with pytest.raises(UsageError, match="is a file"):
        open_run_directory(IDENTITY, "thesis/chapter.tex", fresh=fresh)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "x"

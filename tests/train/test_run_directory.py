import dataclasses
import json
import pathlib

import pytest

from lowbit_jax.train import run_directory
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
        if (run.path / "seen").exists():
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


def test_a_kill_while_emptying_a_folder_leaves_no_checkpoint_without_its_settings(monkeypatch):
    run = open_run_directory(IDENTITY, "here")
    (run.checkpoints / "step_00000001").mkdir(parents=True)
    run.close()
    removed = []
    remove_tree = run_directory.shutil.rmtree

    def killed(path):
        remove_tree(path)
        removed.append(path.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_directory.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        open_run_directory(OTHER, "here", fresh=True)
    assert removed == ["checkpoints"]
    with pytest.raises(UsageError, match=r"lr was 0.1, now 0.2"):
        open_run_directory(OTHER, "here")
    open_run_directory(IDENTITY, "here").close()


def test_a_kill_before_the_record_is_in_place_does_not_lock_the_folder(tmp_path):
    (tmp_path / "here").mkdir()
    for name in ("config.py", ".config.py.writing", ".run.json.writing", ".lock"):
        (tmp_path / "here" / name).touch()
    open_run_directory(IDENTITY, "here").close()


def test_checkpoints_whose_settings_are_unknown_are_left_alone(tmp_path):
    (tmp_path / "here" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UsageError, match="holds checkpoints"):
        open_run_directory(IDENTITY, "here")


def test_values_that_json_changes_or_lacks_are_still_the_same_arguments():
    arguments = {"betas": (0.9, 0.95), "folder": pathlib.Path("x")}
    identity = dataclasses.replace(IDENTITY, arguments=arguments)
    open_run_directory(identity, "here").close()
    open_run_directory(identity, "here").close()
    other = dataclasses.replace(IDENTITY, arguments={**arguments, "betas": (0.9, 0.99)})
    with pytest.raises(UsageError, match="betas was"):
        open_run_directory(other, "here")


def test_a_path_that_checkpoints_would_not_survive_is_refused():
    with pytest.raises(UsageError, match=r"must be free of \*, \? and \["):
        open_run_directory(IDENTITY, "runs[1]")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write in file/run"):
        open_run_directory(IDENTITY, "file/run")


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


def test_a_folder_belongs_to_its_branch_alone():
    open_run_directory(IDENTITY, "here", branch_from="runs/base/").close()
    open_run_directory(IDENTITY, "here", branch_from="runs/base").close()
    for other in (None, "runs/other"):
        with pytest.raises(UsageError, match=r"branch_from was 'runs/base', now "):
            open_run_directory(IDENTITY, "here", branch_from=other)
    with open_run_directory(IDENTITY), open_run_directory(IDENTITY, branch_from="a/base") as run:
        assert str(run.path) == "runs/tiny-from-base"
    run.record(branch_step=3)
    open_run_directory(IDENTITY, branch_from="a/base").close()
    assert json.loads((run.path / "run.json").read_text())["branch_step"] == 3


def test_lists_among_the_arguments_make_readable_names():
    several = dataclasses.replace(IDENTITY, overrides={"rules": ("a=x", "b=y"), "lr": 0.1})
    assert several.run_name == "tiny-rules=a=x+b=y-lr=0.1"

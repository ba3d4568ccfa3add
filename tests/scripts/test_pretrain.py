import importlib.util
import pathlib
import subprocess
import sys

import pytest

from lowbit_jax.train import Diverged

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    """The script as a module: its `main` gets the arguments and returns the exit code."""
    spec = importlib.util.spec_from_file_location("pretrain", ROOT / "scripts" / "pretrain.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.chdir(ROOT)
    return script


def test_the_script_exits_with_the_code_of_main_and_without_a_traceback():
    done = subprocess.run(
        [sys.executable, "scripts/pretrain.py", "configs/none.py"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: config: no file configs/none.py")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recipe", "x"], "no recipe 'x'"),
        (["--run-dir", "configs"], "--run-dir"),
    ],
)
def test_wrong_arguments_are_told_and_exit_with_2(script, capsys, arguments, said):
    assert script.main(["configs/llama_tiny_quest_cage.py", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert said in printed


def test_help_without_a_config_shows_one(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code in (0, None)
    assert "llama_tiny_quest_cage.py" in capsys.readouterr().out


def test_a_diverged_run_has_an_exit_code_of_its_own(script, monkeypatch, capsys):
    def train(*args, **kwargs):
        raise Diverged("train: step 3 is not finite in w.")

    monkeypatch.setattr(script, "train", train)
    assert script.main(["configs/llama_tiny_quest_cage.py"]) == Diverged.exit_code == 3
    assert capsys.readouterr().err == "error: train: step 3 is not finite in w.\n"

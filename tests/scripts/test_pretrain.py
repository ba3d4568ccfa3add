import importlib.util
import pathlib
import subprocess
import sys

import pytest

from lowbit_jax.train import Diverged

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "llama_tiny_quest_cage.py"),
        (["configs/none.py"], 2, "error: config: no file configs/none.py"),
        (["configs/llama_tiny_quest_cage.py", "--recipe", "x"], 2, "no recipe 'x'"),
        (["configs/llama_tiny_quest_cage.py", "--run-dir", "configs"], 2, "--run-dir"),
    ],
)
def test_exit_codes_and_messages_without_a_traceback(arguments, code, said):
    done = subprocess.run(
        [sys.executable, "scripts/pretrain.py", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    printed = done.stdout + done.stderr
    assert done.returncode == code, printed
    assert said in printed
    assert "Traceback" not in printed


def test_a_diverged_run_has_an_exit_code_of_its_own(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("pretrain", ROOT / "scripts" / "pretrain.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def train(*args, **kwargs):
        raise Diverged("train: step 3 is not finite in w.")

    monkeypatch.setattr(script, "train", train)
    monkeypatch.chdir(ROOT)
    assert script.main(["configs/llama_tiny_quest_cage.py"]) == Diverged.exit_code == 3
    assert capsys.readouterr().err == "error: train: step 3 is not finite in w.\n"

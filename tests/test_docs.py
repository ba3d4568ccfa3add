"""The README's code runs as printed, and the files and commands that it names exist."""

import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_snippets():
    assert SNIPPETS


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: s.strip().splitlines()[0][:40])
def test_snippet_runs_as_printed(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})


def test_every_path_that_the_readme_names_exists():
    named = re.findall(
        r"`((?:lowbit_jax|pallas_kernels|configs|scripts|tests|docs)/[\w./-]+)`", README
    )
    links = re.findall(r"\]\((?!http)([\w./-]+)\)", README)
    missing = [path for path in {*named, *links} if not (ROOT / path).exists()]
    assert named
    assert not missing


def test_every_config_that_the_readme_runs_can_be_built():
    configs = set(re.findall(r"scripts/pretrain\.py (configs/\w+\.py)", README))
    assert configs
    for path in configs:
        spec = importlib.util.spec_from_file_location("config", ROOT / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert callable(module.get_config)

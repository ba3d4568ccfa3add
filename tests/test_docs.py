"""The code in README and docs runs as printed, and the files and commands they name exist."""

import importlib.util
import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


WITH_CODE = [page for page in PAGES if blocks(page)]


@pytest.fixture
def optimized(page, compilation):
    """Guides train for hundreds of steps: level 0 of LLVM costs more time there than it saves."""
    was = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", was and "guides" not in page.parts)
    yield
    jax.config.update("jax_disable_most_optimizations", was)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), namespace)


def test_there_is_a_guide_for_each_way_of_building_a_loop():
    assert {"README.md", "plain_jax.md", "flax_nnx.md"} <= {page.name for page in WITH_CODE}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_that_a_page_names_exists(page):
    text = page.read_text()
    named = re.findall(
        r"`((?:lowbit_jax|pallas_kernels|configs|scripts|tests|docs)/[\w./-]+)`", text
    )
    links = re.findall(r"\]\((?!http|#)([\w./-]+)\)", text)
    missing = [path for path in named if not (ROOT / path).exists()]
    missing += [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_every_config_that_a_page_runs_can_be_built():
    text = "".join(page.read_text() for page in PAGES)
    configs = set(re.findall(r"scripts/pretrain\.py (configs/\w+\.py)", text))
    assert configs
    for path in configs:
        spec = importlib.util.spec_from_file_location("config", ROOT / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert callable(module.get_config)

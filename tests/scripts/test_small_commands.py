"""The thin commands: what is given to the library, what is printed, and how they end."""

import importlib.util
import pathlib
import types

import pytest

from lowbit_jax.bench.compression import CompressionReport
from lowbit_jax.models import LlamaConfig, llama_rules
from lowbit_jax.ops.recipes import get_recipe

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def load(monkeypatch):
    """`load(name, **places)`: the script with functions in place of names."""

    def load(name, **places):
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for place, value in places.items():
            monkeypatch.setattr(module, place, value)
        return module

    return load


def raises(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("codes", [False, True])
def test_export_writes_codes_or_says_that_the_recipe_is_left_out(load, tmp_path, capsys, codes):
    model = LlamaConfig(32, 32, 1, 2, recipe_rules=llama_rules(get_recipe("quartet")))
    config = types.SimpleNamespace(steps=9, model=types.SimpleNamespace(config=model))
    calls = []

    def export_run(*arguments, **options):
        calls.append((arguments, options))
        return config, 7

    module = load("export_hf", export_run=export_run, describe_directory=lambda out: "4.25 bits")
    out = tmp_path / "out"
    assert module.main(tmp_path, out=out, codes=codes, dtype="bfloat16") == 0
    saver = module.save_quantized if codes else None
    assert calls == [((tmp_path, out), {"dtype": "bfloat16", "save_codes": saver})]
    printed = capsys.readouterr().out
    assert "weights after step 7 of 9" in printed
    assert ("4.25 bits" if codes else "the recipe is not written") in printed
    module = load("export_hf", export_run=raises(ValueError("no checkpoint")))
    assert module.main(tmp_path, out=out) == 2
    assert capsys.readouterr().err == "error: no checkpoint\n"


def test_import_takes_the_config_with_its_knobs(load, capsys):
    calls = []
    module = load("import_hf", import_pretrained=lambda *given: calls.append(given))
    config = str(ROOT / "configs" / "llama_tiny_quest_cage.py")
    assert module.main(["models/x", "runs/start", config, "--steps", "17"]) == 0
    ((model, found, run_dir),) = calls
    assert (model, run_dir, found.steps) == ("models/x", "runs/start", 17)
    assert "--branch-from runs/start" in capsys.readouterr().out
    assert module.main(["models/x", "runs/start"]) == 2
    assert "usage" in capsys.readouterr().err
    assert module.main(["models/x", "runs/start", "missing.py"]) == 2
    assert "no file missing.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("report", "code", "said"),
    [
        (CompressionReport(("base, seed 0",), {}, ()), 0, ""),
        (CompressionReport((), {"x": "no memory"}, ()), 1, "failed: x: no memory"),
        (CompressionReport((), {}, ("x",)), 0, "1 rows are left; the same command goes on"),
        (OSError("disk full"), 1, "disk full; the same command goes on"),
        (ValueError("damaged"), 2, "error: damaged"),
    ],
)
def test_a_sweep_of_results_says_how_it_ended(load, tmp_path, capsys, report, code, said):
    fails = isinstance(report, Exception)
    module = load("compress_sweep", compress_sweep=raises(report) if fails else lambda *_: report)
    table = str(ROOT / "configs" / "compress" / "llama_30m_elsa.py")
    assert module.main([table, "--out", str(tmp_path)]) == code
    assert said in capsys.readouterr().err

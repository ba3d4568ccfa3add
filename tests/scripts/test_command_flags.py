"""What a flag says reaches the library: spies stand where scripts call it, and stop them there."""

import importlib.util
import pathlib
import types

import numpy as np
import pytest

from lowbit_jax.models import Llama, LlamaConfig, llama_rules
from lowbit_jax.numerics.presets import MXFP4
from lowbit_jax.ops.dot_recipe import DotRecipe
from lowbit_jax.ptq.methods import Method, calibration_model
from lowbit_jax.rotations import Hadamard

ROOT = pathlib.Path(__file__).parents[2]
LLAMA = Llama(LlamaConfig(257, 32, 2, 2, d_ff=64, dtype="float32"))
LOADED = types.SimpleNamespace(
    model=LLAMA, params={}, tokenizer_path="tokenizer.json", metadata="bos, eos and length"
)


class Calls(dict):
    """Arguments of the last call of each name."""

    def spy(self, name, returns=None, *, stops=False):
        def call(*arguments, **options):
            self[name] = arguments, options
            if stops:
                raise ValueError("stopped by the spy")
            return returns

        return call


@pytest.fixture
def load(monkeypatch):
    """`load(name, returns, last)`: the script with spies in place of names, and their calls."""

    def load(name, returns, last):
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        calls = Calls()
        returns = {"load_pretrained": LOADED, "read_tokens": np.arange(9000) % 257, **returns}
        for each, value in {**returns, "tokenizer_of": None}.items():
            monkeypatch.setattr(module, each, calls.spy(each, value))
        for each in last:
            monkeypatch.setattr(module, each, calls.spy(each, stops=True))
        return module.main, calls

    return load


@pytest.mark.parametrize(
    ("flags", "recipe", "stride"),
    [
        ({}, None, None),
        ({"stride": 16}, None, 16),
        ({"activations": "mxfp4"}, DotRecipe(y_x=MXFP4), None),
        (
            {"activations": "mxfp4", "rotation": 32},
            DotRecipe(y_x=MXFP4, rotation=Hadamard(32)),
            None,
        ),
    ],
    ids=str,
)
def test_flags_of_evaluate(load, tmp_path, capsys, flags, recipe, stride):
    main, calls = load("evaluate", {"is_quantized_directory": False}, ["perplexity"])
    assert main(tmp_path, ("text",), **flags) == 2
    assert "stopped by the spy" in capsys.readouterr().err
    (llama, *_), options = calls["perplexity"]
    rules = LLAMA.config.recipe_rules if recipe is None else llama_rules(recipe)
    assert llama.config.recipe_rules == rules
    assert options["stride"] == stride


def quantize(load, tmp_path, capsys, last, **flags):
    stubs = {} if last == "compress_blocks" else {"compress_blocks": []}
    stubs |= {"bits_per_weight": 4.0, "save_report": None, "quantized_model": (LLAMA, {})}
    main, calls = load("quantize", {**stubs, "quantized_params": {}}, [last])
    assert main(tmp_path / "m", tmp_path / "out", "mxfp4", ("text",), **flags) == 2
    assert "stopped by the spy" in capsys.readouterr().err
    return calls[last]


@pytest.mark.parametrize("rotation", [None, 16])
def test_quantize_calibrates_the_model_it_will_write(load, tmp_path, capsys, rotation):
    flags = {"method": "gptq", "activations": "mxfp4", "rotation": rotation, "samples": 8}
    how = Method("gptq", MXFP4, activations=MXFP4, rotation=rotation)
    (model, *_, compression), options = quantize(load, tmp_path, capsys, "compress_blocks", **flags)
    expected = calibration_model(LLAMA, how)
    assert expected.config != LLAMA.config
    assert model.config == expected.config
    assert options["settings"]["method"] == repr(how)
    assert options["folder"] == tmp_path / "out.work"
    # The transform that inputs go through is the rotation's, not only what is written of it.
    x = np.arange(32.0, dtype=np.float32)
    found = x if compression.transform_inputs is None else compression.transform_inputs(x)
    np.testing.assert_array_equal(found, x if rotation is None else Hadamard(rotation).apply(x))


@pytest.mark.parametrize("seed", [0, 7])
def test_quantize_draws_windows_by_its_seed(load, tmp_path, capsys, seed):
    arguments, _ = quantize(load, tmp_path, capsys, "calibration_batches", seed=seed)
    assert arguments[-1] == seed


@pytest.mark.parametrize("store", ["codes", "floats"])
def test_quantize_writes_the_rest(load, tmp_path, capsys, store):
    last = "save_quantized" if store == "codes" else "save_pretrained"
    flags = {"method": "rtn", "samples": 8, "store": store, "rest_dtype": "float16"}
    _, options = quantize(load, tmp_path, capsys, last, **flags)
    assert options["tokenizer"] == LOADED.tokenizer_path
    assert options["metadata"] == LOADED.metadata
    if store == "codes":
        assert options["dtype"] == "float16"


def prune(load, tmp_path, capsys, stubs, last, method, **flags):
    main, calls = load("prune", stubs, last)
    flags = {"text": ("text",), "sparsity": 0.5, "samples": 8, "length": 32, **flags}
    assert main(tmp_path / "m", tmp_path / "out", method, **flags) == 2
    assert "stopped by the spy" in capsys.readouterr().err
    return next(calls[each] for each in last if each in calls)


@pytest.mark.parametrize(
    ("method", "flag", "value", "field"),
    [
        ("sparsegpt", "damping", 0.3, "damping"),
        ("retrain", "mask", "wanda", "mask_solver"),
        ("elsa", "interval", 5, "interval"),
        ("elsa", "final_strength", 0.7, "final_strength"),
        ("elsa", "objective_aware", False, "is_objective_aware"),
        ("elsa", "recompute", "block", None),
    ],
)
def test_flags_of_prune(load, tmp_path, capsys, method, flag, value, field):
    last = ["prune_model", "search_training"]
    (llama, _, how), _ = prune(load, tmp_path, capsys, {}, last, method, **{flag: value})
    if field is None:
        assert llama.config.recompute == value
    else:
        how = how[0] if isinstance(how, (list, tuple)) else how
        assert getattr(how, field) == value


def test_prune_writes_the_tokenizer_and_metadata(load, tmp_path, capsys):
    pruned = types.SimpleNamespace(bits_per_weight=16.0, params={})
    stubs = {"prune_model": pruned, "save_sparse_report": None}
    _, options = prune(load, tmp_path, capsys, stubs, ["save_pretrained"], "sparsegpt")
    assert options["tokenizer"] == LOADED.tokenizer_path
    assert options["metadata"] == LOADED.metadata

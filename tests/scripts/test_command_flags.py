"""What a flag says reaches the library: spies stand where scripts call it, and stop them there."""

import importlib.util
import pathlib
import types

import numpy as np
import pytest

from lowbit_jax.models import Llama, LlamaConfig, llama_rules
from lowbit_jax.models.pretrained import Pretrained
from lowbit_jax.numerics.presets import MXFP4
from lowbit_jax.ops.dot_recipe import DotRecipe
from lowbit_jax.ptq.methods import Method, calibration_model
from lowbit_jax.rotations import Hadamard

ROOT = pathlib.Path(__file__).parents[2]
LLAMA = Llama(LlamaConfig(257, 32, 2, 2, d_ff=64, dtype="float32"))
LOADED = Pretrained(LLAMA, {}, pathlib.Path("tokenizer.json"), {"max_position_embeddings": 256})


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
    pruned = types.SimpleNamespace(bits_per_weight=16.0, params={}, coded=None)
    stubs = {"prune_model": pruned, "save_sparse_report": None}
    _, options = prune(load, tmp_path, capsys, stubs, ["save_pretrained"], "sparsegpt")
    assert options["tokenizer"] == LOADED.tokenizer_path
    assert options["metadata"] == LOADED.metadata


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"format": "int4"}, "blocks of 128 (weights"),
        ({"block_size": 64}, "powers of two up to 32 do: see --block-size"),
        ({"method": "gptq", "rotation": 64}, "blocks of 64 (rotation"),
        ({"method": "gptq", "activations": "int4"}, "blocks of 128 (inputs"),
        ({"format": "fp8_e4m3"}, "pass a rotation (--rotation 32), or take gptq"),
        ({"format": "mxfp5"}, "formats are"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"samples": 0}, "samples=0"),
    ],
    ids=str,
)
def test_quantize_refuses_before_it_calibrates(load, tmp_path, capsys, flags, said):
    main, calls = load("quantize", {}, ["compress_blocks"])
    flags = {"format": "mxfp4", "samples": 8, **flags}
    assert main(tmp_path / "m", tmp_path / "out", text=("text",), **flags) == 2
    assert said in capsys.readouterr().err
    assert "compress_blocks" not in calls
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"pattern": "2:5", "sparsity": None}, "blocks of 5 (pattern: 2:5)"),
        ({"strengths": (-1.0,)}, "strengths must be 0 or positive, got -1.0"),
        ({"damping": -1.0}, "damping must be 0 or positive, got -1.0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
    ids=str,
)
def test_prune_refuses_before_it_trains(load, tmp_path, capsys, flags, said):
    main, calls = load("prune", {}, ["search_training"])
    flags = {"text": ("text",), "sparsity": 0.5, "length": 32, **flags}
    assert main(tmp_path / "m", tmp_path / "out", "elsa", **flags) == 2
    assert said in capsys.readouterr().err
    assert "search_training" not in calls


@pytest.mark.parametrize("place", ["out", "work"])
def test_files_in_the_place_of_folders_are_named(load, tmp_path, capsys, place):
    (tmp_path / "file").write_text("")
    places = {"out": tmp_path / "out", place: tmp_path / "file"}
    for script, given in (("quantize", {"format": "mxfp4"}), ("prune", {"method": "wanda"})):
        main, calls = load(script, {}, [])
        extra = {} if script == "quantize" else {"sparsity": 0.5}
        assert main(tmp_path / "m", text=("text",), **places, **given, **extra) == 2
        assert f"--{place} {tmp_path / 'file'}: must" in capsys.readouterr().err
        assert not calls


def test_short_texts_and_long_windows_are_warned_of(load, tmp_path, capsys):
    main, _ = load("quantize", {}, ["compress_blocks"])
    main(tmp_path / "m", tmp_path / "out", "mxfp4", ("text",), samples=128, length=512)
    err = capsys.readouterr().err
    assert "warning: windows of 512 tokens are longer than the 256 of the model" in err
    assert "warning: 128 windows of 512 tokens overlap in a text of" in err


@pytest.mark.parametrize("is_begun", [False, True])
def test_an_error_says_what_is_kept_or_leaves_nothing(load, tmp_path, capsys, is_begun):
    main, _ = load("quantize", {}, [])
    kept = tmp_path / "out.work"
    kept.mkdir()
    (kept / "settings.json").write_text("{}")
    if is_begun:
        (kept / "block_000.npz").write_text("")
    flags = {"samples": 8, "length": 16, "seed": -1}
    assert main(tmp_path / "m", tmp_path / "out", "mxfp4", ("text",), **flags) == 2
    assert ("the same command goes on there" in capsys.readouterr().err) == is_begun
    assert kept.exists() == is_begun

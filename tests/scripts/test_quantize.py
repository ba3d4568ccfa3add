"""From a directory to a quantized directory, and its perplexity, as a user does."""

import importlib.util
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from flax import linen as nn

from lowbit_jax.models import Llama, LlamaConfig
from lowbit_jax.models.pretrained import load_pretrained, open_safetensors, save_pretrained
from lowbit_jax.numerics import quantize
from lowbit_jax.numerics.presets import MXFP4, NVFP4
from lowbit_jax.ptq.export import shares_global_scales
from lowbit_jax.ptq.quantized_directory import is_quantized_directory, load_quantized
from lowbit_jax.ptq.texts import calibration_batches, read_tokens, tokenizer_of
from lowbit_jax.rotations import Hadamard

ROOT = pathlib.Path(__file__).parents[2]
SHORT = {"tokenizer": "bytes", "dtype": "float32"}
CALIBRATION = {"samples": 4, "length": 32, "batch_size": 2}


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = Llama(LlamaConfig(257, 32, 2, 2, d_ff=64, dtype="float32"))
    init = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    save_pretrained(path / "model", model, jax.tree.map(lambda x: 5 * x, nn.meta.unbox(init)))
    (path / "text.txt").write_text("Call me Ishmael. " * 200)
    return path


def test_a_directory_is_quantized_and_evaluated(folder, tmp_path, capsys):
    text = (str(folder / "text.txt"),)
    out = tmp_path / "out"
    arguments = {"text": text, **SHORT, **CALIBRATION}
    assert script("quantize")(folder / "model", out, "mxfp4", method="rtn", **arguments) == 0
    printed = capsys.readouterr().out
    assert "4.250 bits a weight\n" in printed
    assert "4.250 bits a weight on disk, mxfp4-pack-quantized" in printed
    before, after = load_pretrained(folder / "model"), load_quantized(out)
    for part, name in (("attention", "q_proj"), ("mlp", "down_proj")):
        w, found = (p.params["layers"][part][name]["weight"] for p in (before, after))
        expected = quantize(w[1], MXFP4)
        np.testing.assert_array_equal(found.quantized.codes[1], expected.codes)
        np.testing.assert_array_equal(found.quantized.scales[1], expected.scales)
    record = json.loads((out / "report.json").read_text())
    assert len(record["matrices"]) == 14
    assert not (tmp_path / "out.work").exists()
    assert all(0 < row["error"] < 0.1 for row in record["matrices"])
    assert {"report.txt", "report.png", "config.json"} <= {path.name for path in out.iterdir()}

    options = {"window": 32, "max_tokens": 200, **SHORT}
    found = []
    for model, more in ((folder / "model", {}), (out, {}), (out, {"activations": "mxfp4"})):
        assert script("evaluate")(model, text, **options, **more) == 0
        printed = capsys.readouterr().out
        assert "on 192 tokens, windows of 32 moved by 32" in printed
        found.append(float(re.search(r"loss ([\d.]+)", printed)[1]))
    assert len(set(found)) == 3


def test_a_command_that_was_wrong_or_killed_is_given_once_more(folder, tmp_path, capsys):
    out, quantize = tmp_path / "out", script("quantize")
    arguments = {"text": (str(folder / "text.txt"),), **SHORT, **CALIBRATION, "method": "rtn"}
    # Blocks of 128 do not divide the model's width of 32: found when the first block is solved.
    assert quantize(folder / "model", out, "int4", **arguments) == 2
    assert "128" in capsys.readouterr().err
    assert not out.exists()
    assert quantize(folder / "model", out, "int4", block_size=32, **arguments) == 0
    whole = capsys.readouterr().out
    # As a kill between the weights and the reports would leave it.
    work = tmp_path / "out.work"
    work.mkdir()
    for name in ("report.json", "report.png", "report.txt"):
        (out / name).rename(work / name)
    assert quantize(folder / "model", out, "int4", block_size=32, **arguments) == 0
    assert capsys.readouterr().out == whole
    assert (out / "report.png").exists()
    assert script("evaluate")(out, arguments["text"], rotation=32, **SHORT) == 2
    assert "--rotation: a directory of codes has its own" in capsys.readouterr().err
    # And as a kill after the reports would.
    work.mkdir()
    shutil.copy(out / "report.json", work)
    assert quantize(folder / "model", out, "int4", block_size=32, **arguments) == 0
    assert capsys.readouterr().out == whole
    assert not work.exists()
    # With other arguments it is another model.
    work.mkdir()
    for name in ("report.json", "report.png", "report.txt"):
        (out / name).rename(work / name)
    assert quantize(folder / "model", out, "int4", block_size=16, **arguments) == 2
    assert "must not exist yet" in capsys.readouterr().err


def test_matrices_that_servers_fuse_are_solved_under_one_scale(folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = {"text": (str(folder / "text.txt"),), **SHORT, **CALIBRATION}
    how = {"method": "mr_gptq", "activations": "nvfp4"}
    assert script("quantize")(folder / "model", out, "nvfp4", **how, **arguments) == 0
    assert "inputs go through Hadamard 16" in capsys.readouterr().out
    params = load_quantized(out, on_host=True).params
    assert shares_global_scales(params)
    layers = params["layers"]
    scales = [layers["attention"][f"{n}_proj"]["weight"].quantized.global_scale for n in "qo"]
    assert not np.array_equal(*scales)
    assert {w["weight"].activations for w in layers["mlp"].values()} == {NVFP4}
    assert {w["weight"].rotation for w in layers["mlp"].values()} == {Hadamard(16)}
    # The scale of inputs: of what the first norm gives, rotated, on the calibration tokens.
    file = open_safetensors(out / "model.safetensors")
    divisor = file.read("model.layers.0.self_attn.k_proj.input_global_scale")
    loaded = load_pretrained(folder / "model", "float32")
    found = tokenizer_of(folder / "model", loaded, "bytes")
    tokens = read_tokens([folder / "text.txt"], found, 1_000_000)
    x = np.concatenate(calibration_batches(tokens, 4, 32, 2, 0))
    x = loaded.params["embedding"]["weight"][x]
    x = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + loaded.model.config.norm_eps)
    x = Hadamard(16).apply(x * loaded.params["layers"]["attention_norm"]["scale"][0])
    # The power of two below what maps the largest input to the largest number.
    assert divisor == 2.0 ** np.floor(np.log2(448 * 6 / np.abs(x).max()))


def test_floats_are_written_where_they_are_asked_for(folder, tmp_path):
    text, quantizer = (str(folder / "text.txt"),), script("quantize")
    for store in ("codes", "floats"):
        arguments = {"text": text, **SHORT, **CALIBRATION, "method": "rtn", "rotation": 32}
        out = tmp_path / store
        assert quantizer(folder / "model", out, "mxfp4", store=store, **arguments) == 0
        assert is_quantized_directory(out) == (store == "codes")
    floats = load_pretrained(tmp_path / "floats").params["layers"]
    codes = load_quantized(tmp_path / "codes", dequantizes=True).params["layers"]
    for part, name in (("attention", "q_proj"), ("mlp", "down_proj")):
        a, b = (layers[part][name]["weight"] for layers in (floats, codes))
        # Bound: sums of 32 terms by the inverse transform, in another order.
        np.testing.assert_allclose(a, b, rtol=0, atol=32 * 2.0**-24 * np.abs(a).max())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "mxfp5"}, "formats are int2, int3"),
        ({"method": "awq"}, "solver must be one of"),
        ({"samples": 3}, "samples must be a multiple of batch_size"),
        ({"tokenizer": None}, "pass --tokenizer"),
        ({"calibration_tokens": 0}, "limit must be at least 1"),
        ({"model": pathlib.Path("nowhere")}, "nowhere"),
    ],
)
def test_a_wrong_command_says_what_to_do_and_leaves_nothing(
    folder, tmp_path, capsys, changes, said
):
    arguments = {
        "model": folder / "model", "out": tmp_path / "out", "format": "mxfp4", "method": "rtn",
        "text": (str(folder / "text.txt"),), **SHORT, **CALIBRATION, **changes,
    }  # fmt: skip
    assert script("quantize")(**arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

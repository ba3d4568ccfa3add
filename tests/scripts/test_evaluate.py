"""Perplexity of a directory of codes, with inputs rounded as it says, and not at all."""

import importlib.util
import pathlib
import re

import jax
import numpy as np
import pytest
from flax import linen as nn

from lowbit_jax.models import Llama, LlamaConfig
from lowbit_jax.numerics import MXFP4, QTensor
from lowbit_jax.ops import CodedWeight
from lowbit_jax.ptq.export import save_quantized
from lowbit_jax.ptq.methods import with_activations
from lowbit_jax.ptq.perplexity import perplexity
from lowbit_jax.rotations import Hadamard

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "evaluate.py"
MODEL = Llama(LlamaConfig(256, 32, 2, 2, d_ff=64, dtype="float32"))
TEXT = "Call me Ishmael. " * 10
SHORT = {"tokenizer": "bytes", "dtype": "float32", "window": 32}


@pytest.fixture(scope="module")
def evaluate():
    spec = importlib.util.spec_from_file_location("evaluate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def params():
    """Random parameters; matrices are random codes, of rounded Hadamard transforms."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if "_proj" in jax.tree_util.keystr(path) and leaf.ndim == 3:
            *rows, k = leaf.shape
            codes = rng.integers(0, 256, (*rows, k // 2), np.uint8)
            scales = rng.integers(120, 124, (*rows, k // 32), np.uint8)
            q = QTensor(codes, scales, None, MXFP4)
            return CodedWeight(q, rotation=Hadamard(32), activations=MXFP4)
        is_norm = "scale" in jax.tree_util.keystr(path)
        return (1 if is_norm else 0) + 0.3 * rng.standard_normal(leaf.shape, np.float32)

    tokens = jax.ShapeDtypeStruct((1, 4), np.int32)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), tokens)["params"]
    return jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(shapes))


@pytest.fixture(scope="module")
def folder(params, tmp_path_factory):
    path = tmp_path_factory.mktemp("coded")
    save_quantized(path / "model", MODEL, params, dtype="float32")
    (path / "text.txt").write_text(TEXT)
    return path


def test_codes_are_multiplied_with_the_inputs_that_are_asked_for(evaluate, folder, params, capsys):
    tokens = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32)
    losses = []
    for name, spec in ((None, MXFP4), ("none", None)):
        text = (str(folder / "text.txt"),)
        assert evaluate(folder / "model", text, max_tokens=100, activations=name, **SHORT) == 0
        out = capsys.readouterr().out
        printed = re.search(r"loss ([\d.]+)", out)[1]
        assert re.search(r"^products: dequantize \(", out, re.MULTILINE)
        given = with_activations(params, spec)
        # Exact, to the digits that are printed: the same codes, the rest in float32.
        assert printed == f"{perplexity(MODEL, given, tokens[:100], window=32).loss:.4f}"
        losses.append(printed)
    assert len(set(losses)) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"activations": "mxfp4", "rotation": 32}, "a directory of codes has its own"),
        ({"activations": "mxfp5"}, "must be none or one of"),
        ({"implementation": "mixed_matmul"}, "rows must be a multiple of 64"),
        ({"activations": "none", "implementation": "hopper"}, "does not cover"),
        ({"implementation": "cutlass"}, "must be None or one of"),
    ],
)
def test_options_that_would_be_ignored_are_refused(evaluate, folder, capsys, options, said):
    assert evaluate(folder / "model", (str(folder / "text.txt"),), **options, **SHORT) == 2
    assert said in capsys.readouterr().err

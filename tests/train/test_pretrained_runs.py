import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from lowbit_jax import FP8_E4M3
from lowbit_jax.models import Llama, llama_rules
from lowbit_jax.models.pretrained import load_pretrained
from lowbit_jax.ops.recipes import get_recipe
from lowbit_jax.optim import dequantize_leaves, quantize_leaves
from lowbit_jax.ptq.export import save_quantized
from lowbit_jax.ptq.methods import with_activations
from lowbit_jax.ptq.quantized_directory import load_quantized
from lowbit_jax.train import pretrained_runs
from lowbit_jax.train.checkpoint import save_checkpoint
from lowbit_jax.train.config import UsageError
from lowbit_jax.train.evaluate import make_evaluate
from lowbit_jax.train.feed import held_out_batches
from lowbit_jax.train.pretrained_runs import (
    coded_params,
    export_run,
    import_pretrained,
    load_run,
)
from lowbit_jax.train.start import draw_state
from lowbit_jax.train.step import loss_function

from .conftest import CONFIG, SMALL, small_config, state_of

KNOBS = {**SMALL, "seq_len": 16}


@jax.jit
def in_fp8(params):
    return quantize_leaves(params, FP8_E4M3)


def drawn(config):
    return jax.jit(lambda key: draw_state(config, key))(jax.random.key(5))


@pytest.fixture(scope="module")
def config():
    return small_config()


@pytest.fixture(scope="module")
def run(tmp_path_factory, config):
    """The folder of a run that was saved at step 7, and its state."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    state = drawn(config)._replace(step=np.int32(7))
    save_checkpoint(folder / "checkpoints", state, {})
    shutil.copy(CONFIG, folder / "config.py")
    (folder / "run.json").write_text(json.dumps({"name": "tiny", "arguments": KNOBS}))
    return folder, state


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)  # exact: no arithmetic between


def test_a_run_is_exported_and_starts_another_one(run, config, tmp_path):
    folder, state = run
    found, step = export_run(folder, tmp_path / "hf")
    assert (step, found.model) == (7, config.model)
    loaded = load_pretrained(tmp_path / "hf", "float32")
    assert_equal(loaded.params, state.params)
    assert loaded.metadata["max_position_embeddings"] == 16
    assert loaded.metadata["eos_token_id"] == config.data.tokenizer.end_of_text
    # The recipe is not in the files; everything else of the model is.
    shape = config.model.config
    plain = dataclasses.replace(shape, n_kv_heads=shape.kv_heads, recipe_rules=())
    assert loaded.model == Llama(plain)

    import_pretrained(tmp_path / "hf", config, tmp_path / "start")
    restored = state_of(tmp_path / "start", config)
    assert int(restored.step) == 0
    assert_equal(restored.params, state.params)
    assert_equal(restored.opt_state, config.optimizer.init(state.params))


def test_a_model_of_another_shape_is_no_start(run, tmp_path):
    folder, _ = run
    export_run(folder, tmp_path / "hf")
    with pytest.raises(UsageError, match="got n_layers=2 where it has n_layers=1"):
        import_pretrained(tmp_path / "hf", small_config(n_layers=2), tmp_path / "start")
    assert not (tmp_path / "start").exists()


def test_codes_are_exported_as_the_weights_that_they_stand_for(config, tmp_path, monkeypatch):
    state = drawn(config)
    state = state._replace(params=in_fp8(state.params))
    monkeypatch.setattr(pretrained_runs, "load_run", lambda folder: (config, state))
    export_run("run", tmp_path / "hf")
    loaded = load_pretrained(tmp_path / "hf", "float32")
    assert_equal(loaded.params, jax.jit(dequantize_leaves)(state.params))


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [
        ("quest_w4a4", "lowbit_jax"),
        ("quartet", "mxfp4-pack-quantized"),
    ],
)
def test_a_trained_model_of_codes_predicts_as_the_run_does(
    config, tmp_path, monkeypatch, recipe, layout
):
    shape = dataclasses.replace(
        config.model.config, recipe_rules=llama_rules(get_recipe(recipe)), dtype="float32"
    )
    config = dataclasses.replace(config, model=Llama(shape))
    state = drawn(config)
    monkeypatch.setattr(pretrained_runs, "load_run", lambda folder: (config, state))

    export_run("run", tmp_path / "codes", save_codes=save_quantized)
    written = json.loads((tmp_path / "codes" / "config.json").read_text())["quantization_config"]
    assert written.get("format", written["quant_method"]) == layout
    loaded = load_quantized(tmp_path / "codes", "float32")
    assert loaded.model.config.recipe_rules == ()
    without_inputs = with_activations(loaded.params, None)
    batches = list(held_out_batches(config, 1, None))
    losses = []
    for model, params, key in (
        (config.model, state.params, True),
        (loaded.model, loaded.params, False),
    ):
        evaluate = make_evaluate(loss_function(model))
        losses.append(evaluate(params, batches, needs_key=key).loss)
    losses.append(make_evaluate(loss_function(loaded.model))(without_inputs, batches).loss)
    # Bound: the same operands in the same products. 16 units of float32 for sums of the loss that
    # another program takes in another order.
    np.testing.assert_allclose(losses[1], losses[0], rtol=2.0**-20)
    assert abs(losses[2] - losses[0]) > 1e-4 * losses[0]  # inputs not quantized


def test_weights_that_are_not_quantized_are_no_codes(config, monkeypatch, tmp_path):
    state = drawn(config)
    plain = dataclasses.replace(
        config, model=Llama(dataclasses.replace(config.model.config, recipe_rules=()))
    )
    with pytest.raises(UsageError, match="must quantize the weights of each"):
        coded_params(plain, state)
    # Codes that are stored are exported as they are.
    state = state._replace(params=in_fp8(state.params))
    coded = coded_params(plain, state)["layers"]["attention"]["q_proj"]["weight"]
    assert_equal(coded.quantized, state.params["layers"]["attention"]["q_proj"]["weight"])


def test_what_is_no_run_is_refused(run, tmp_path):
    folder, _ = run
    with pytest.raises(UsageError, match="must be the folder of a run"):
        load_run(tmp_path)
    copy = pathlib.Path(shutil.copytree(folder, tmp_path / "copy"))
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UsageError, match="has no checkpoint"):
        load_run(copy)
    record = {"name": "tiny", "arguments": {"no_such_knob": 1}}
    (copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="no_such_knob"):
        load_run(copy)

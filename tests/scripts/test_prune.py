"""From a directory to a pruned directory, as a user does."""

import errno
import importlib.util
import json
import os
import pathlib
import re
import shutil
import types

import jax
import numpy as np
import pytest
from flax import linen as nn

from lowbit_jax.models import Llama, LlamaConfig
from lowbit_jax.models.pretrained import load_pretrained, save_pretrained
from lowbit_jax.ops import CodedWeight
from lowbit_jax.ptq import finished
from lowbit_jax.ptq.quantized_directory import load_quantized

ROOT = pathlib.Path(__file__).parents[2]
WINDOWS = {"tokenizer": "bytes", "samples": 4, "length": 32, "batch_size": 2}
TRAINING = {"steps": 8, "interval": 4, "learning_rates": (1e-3,)}


def prune(*arguments, **options):
    spec = importlib.util.spec_from_file_location("prune", ROOT / "scripts" / "prune.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(*arguments, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = Llama(LlamaConfig(257, 32, 2, 2, d_ff=64, dtype="float32"))
    init = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    save_pretrained(path / "model", model, jax.tree.map(lambda x: 5 * x, nn.meta.unbox(init)))
    (path / "text.txt").write_text("Call me Ishmael. " * 400)
    return path


def kept(path):
    params = load_pretrained(path).params
    return np.asarray(params["layers"]["mlp"]["down_proj"]["weight"])


def test_without_a_text_magnitude_keeps_two_of_four(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert prune(folder / "model", out, "magnitude", pattern="2:4") == 0
    assert "zeros of each matrix, %; of all of them 50.0000" in capsys.readouterr().out
    before, after = kept(folder / "model"), kept(out)
    groups = np.abs(before).reshape(-1, 4)
    stays = groups >= np.sort(groups, axis=1)[:, 2:3]
    np.testing.assert_array_equal(after, np.where(stays.reshape(before.shape), before, 0))
    record = json.loads((out / "report.json").read_text())
    assert record["sparsity"] == {path: [0.5, 0.5] for path in record["sparsity"]}
    assert len(record["sparsity"]) == 7
    assert not (tmp_path / "out.work").exists()


def test_what_stays_is_written_as_codes_or_as_floats_of_their_values(folder, tmp_path, capsys):
    loaded = {}
    for store in ("codes", "floats"):
        out = tmp_path / store
        text = (str(folder / "text.txt"),)
        how = {"pattern": "2:4", "format": "mxfp4", "store": store, "text": text, **WINDOWS}
        assert prune(folder / "model", out, "sparsegpt", **how) == 0
        printed = capsys.readouterr().out
        assert "4.250 bits a weight, zeros among the codes" in printed
        assert ("4.250 bits a weight on disk" in printed) == (store == "codes")
        assert ("written are float32" in printed) == (store == "floats")
        load = load_pretrained if store == "floats" else load_quantized
        loaded[store] = load(out, "float32", on_host=True).params["layers"]
    for part, name in (("attention", "v_proj"), ("mlp", "down_proj")):
        floats, codes = (loaded[store][part][name]["weight"] for store in ("floats", "codes"))
        np.testing.assert_array_equal(jax.jit(CodedWeight.dequantized)(codes), floats)
        assert ((floats.reshape(-1, 4) == 0).sum(1) >= 2).all()


def test_elsa_says_what_it_did_and_a_killed_command_is_given_once_more(folder, tmp_path, capsys):
    out, text = tmp_path / "out", (str(folder / "text.txt"),)
    arguments = {"text": text, "sparsity": 0.7, **WINDOWS, **TRAINING}
    assert prune(folder / "model", out, "elsa", work=tmp_path / "work", **arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(r"8 steps, loss \d\.\d{4} .*, \|x - z\| / \|x\| \d\.\d{4} before", printed)
    assert re.search(
        r"held-out loss \d\.\d{4} before .* \(learning rate 0.001, strength \S+\)", printed
    )
    assert all(np.sum(w == 0) == int(0.7 * w.size) for w in kept(out))
    record = json.loads((out / "report.json").read_text())
    assert [row["step"] for row in record["training"]] == [4, 8]
    take_reports(out, tmp_path / "work")
    assert prune(folder / "model", out, "elsa", work=tmp_path / "work", **arguments) == 0
    assert capsys.readouterr().out == printed


def take_reports(out, work):
    """As a kill between the weights and the reports would leave it."""
    work.mkdir(exist_ok=True)
    for name in ("report.json", "report.png", "report.txt"):
        (out / name).rename(work / name)


def test_a_command_with_other_arguments_or_another_directory_is_not_the_one_that_was_killed(
    folder, tmp_path, capsys
):
    out, work = tmp_path / "out", tmp_path / "work"
    arguments = {"model": folder / "model", "method": "magnitude", "sparsity": 0.5, "work": work}
    assert prune(out=out, **arguments) == 0
    take_reports(out, work)
    foreign = tmp_path / "foreign"
    shutil.copytree(folder / "model", foreign)
    before = {path.name for path in foreign.iterdir()}
    for changes in ({"out": foreign}, {"sparsity": 0.6}, {"per": "row"}, {"seed": 1}):
        assert prune(**{"out": out, **arguments, **changes}) == 2, changes
        assert "must not exist yet" in capsys.readouterr().err
    assert {path.name for path in foreign.iterdir()} == before
    assert prune(out=out, **arguments) == 0
    assert "of all of them 50.0000" in capsys.readouterr().out


def test_reports_are_whole_or_not_there(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = {"sparsity": 0.5, "work": tmp_path / "work"}
    assert prune(folder / "model", out, "magnitude", **arguments) == 0
    printed = capsys.readouterr().out
    take_reports(out, tmp_path / "work")
    before = {path.name for path in out.iterdir()}

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert prune(folder / "model", out, "magnitude", **arguments) == 2
    assert {path.name for path in out.iterdir()} == before
    assert prune(folder / "model", out, "magnitude", **arguments) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("removed", ["", "report.json"])
def test_a_kill_while_the_work_is_removed_is_made_up_for(
    folder, tmp_path, capsys, monkeypatch, removed
):
    out = tmp_path / "out"
    arguments = {"model": folder / "model", "out": out, "method": "magnitude"}

    def be_killed(work):
        if removed:
            (work / removed).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finished, "shutil", types.SimpleNamespace(rmtree=be_killed))
        with pytest.raises(KeyboardInterrupt):
            prune(**arguments, sparsity=0.5)
    assert (tmp_path / "out.work").exists()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert prune(**arguments, sparsity=0.6) == 2
    assert "must not exist yet" in capsys.readouterr().err
    assert prune(**arguments, sparsity=0.5) == 0
    assert "of all of them 50.0000" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not (tmp_path / "out.work").exists()


def test_a_rate_that_diverges_is_reported_and_the_other_written(folder, tmp_path, capsys):
    out = tmp_path / "out"
    options = {"text": (str(folder / "text.txt"),), "sparsity": 0.5, **WINDOWS, **TRAINING}
    options["learning_rates"] = (1e38, 1e-3)
    assert prune(folder / "model", out, "retrain", **options) == 0
    assert re.search(
        r"after it not finite \(learning rate 1e\+38\), \d\.\d{4} \(learning rate 0.001\)",
        capsys.readouterr().out,
    )
    settings = json.loads((out / "report.json").read_text())["settings"]
    assert settings["learning_rate"] == 1e-3
    assert settings["losses_held_out"]["learning rate 1e+38"] is None
    assert np.all(np.isfinite(kept(out)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sparsity": None}, "needs either a sparsity, such as 0.5, or a pattern, such as 2:4"),
        ({"pattern": "2:4"}, "needs either a sparsity"),
        ({"sparsity": None, "pattern": "half"}, "a pattern is n:m"),
        ({"sparsity": 1.5}, r"sparsity must lie in [0, 1), got 1.5"),
        ({"method": "alps"}, "solver must be one of"),
        ({"budget": "tree"}, "wanda compares entries within a matrix"),
        ({"format": "mxfp5"}, "--format: must be one of"),
        ({"format": "mxfp4"}, "only sparsegpt quantizes"),
        ({"text": ()}, "--text: wanda needs a text"),
        ({"samples": 3}, "samples must be a multiple of batch_size"),
        ({"learning_rates": ()}, "--learning-rates and --strengths: need at least one"),
        ({"method": "elsa", "length": 4096}, "windows of 4096 tokens are to be held out"),
        ({"model": pathlib.Path("nowhere")}, "nowhere"),
    ],
)
def test_a_wrong_command_says_what_to_do_and_leaves_nothing(
    folder, tmp_path, capsys, changes, said
):
    arguments = {
        "model": folder / "model", "out": tmp_path / "out", "method": "wanda", "sparsity": 0.5,
        "text": (str(folder / "text.txt"),), **WINDOWS, **changes,
    }  # fmt: skip
    assert prune(**arguments) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

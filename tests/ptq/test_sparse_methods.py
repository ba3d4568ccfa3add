"""Pruning of a whole language model, by each method."""

import dataclasses
import itertools

import chex
import jax
import numpy as np
import pytest
from flax import linen as nn

from lowbit_jax.models import Llama, LlamaConfig, llama_rules
from lowbit_jax.models.llama import QUANTIZABLE_PATHS
from lowbit_jax.numerics import MXFP4
from lowbit_jax.ops.recipes import get_recipe
from lowbit_jax.ptq import sparse_methods
from lowbit_jax.ptq.sparse_methods import (
    Callbacks,
    SparseMethod,
    prune_model,
    search_training,
    sparse_compression_of,
    training_grid,
)
from lowbit_jax.ptq.sparse_report import breaks_pattern, sparsity_of, sparsity_table
from lowbit_jax.ptq.windows import TrainingWindows, held_out, mean_loss
from lowbit_jax.sparsity import NM, Unstructured

VOCABULARY, WIDTH, LENGTH = 24, 32, 16
# All matrices of one shape: each solver is compiled once.
MODEL = Llama(LlamaConfig(VOCABULARY, WIDTH, 2, 2, d_ff=WIDTH, dtype="float32"))
HALF, MOST = Unstructured(0.5), Unstructured(0.7)
TRAINING = {"steps": 160, "interval": 8, "learning_rate": 1e-2, "strength": 0.02}


@pytest.fixture(scope="module")
def text():
    """A cycle of all tokens, with a random one every fourth time."""
    rng = np.random.default_rng(0)
    steps = np.where(rng.random(30_000) < 0.25, rng.integers(0, VOCABULARY, 30_000), 1)
    tokens, validation = held_out(np.cumsum(steps) % VOCABULARY, 16, LENGTH, 8)
    return TrainingWindows(tokens, LENGTH, 8), validation


@pytest.fixture(scope="module")
def params(text):
    init = jax.jit(MODEL.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    dense = SparseMethod("retrain", Unstructured(0.0), **TRAINING)
    start = jax.tree.map(np.asarray, nn.meta.unbox(init))
    return prune_model(MODEL, start, dense, batches=text[0]).params


@pytest.fixture(scope="module")
def calibration(text):
    return [text[0][step][:, :-1] for step in range(2)]


def matrices(params):
    found = {}
    for path in QUANTIZABLE_PATHS:
        _, part, name, _ = path.split("/")
        found[f"{part}/{name}"] = np.asarray(params["layers"][part][name]["weight"])
    return found


def rest(params):
    """All but the seven matrices."""
    layers = {k: v for k, v in params["layers"].items() if k not in ("attention", "mlp")}
    return {**params, "layers": layers}


@pytest.mark.parametrize(
    "method",
    [
        SparseMethod("magnitude", MOST),
        SparseMethod("wanda", MOST),
        SparseMethod("sparsegpt", NM(2, 4), spec=MXFP4),
    ],
    ids=lambda m: m.solver,
)
def test_the_solved_have_the_zeros_that_were_asked_for(params, calibration, method):
    pruned = prune_model(MODEL, params, method, calibration=calibration)
    assert len(pruned.reports) == 14
    assert all(0 < report.error < 1 for report in pruned.reports)
    for path, w in matrices(pruned.params).items():
        zeros = np.sum(w == 0, axis=-1)
        if method.solver == "wanda":
            np.testing.assert_array_equal(zeros, int(0.7 * w.shape[-1]))
        elif method.pattern == MOST:
            np.testing.assert_array_equal(np.sum(zeros, axis=-1), int(0.7 * w[0].size))
            before = matrices(params)[path]
            np.testing.assert_array_equal(w[w != 0], before[w != 0])
    assert breaks_pattern(pruned.params, method.pattern) == 0
    chex.assert_trees_all_equal(rest(pruned.params), rest(params))
    assert (pruned.bits_per_weight is not None) == (method.spec is not None)


def test_wanda_of_the_first_block_by_hand(params, calibration):
    pruned = prune_model(MODEL, params, SparseMethod("wanda", HALF), calibration=calibration)
    x = np.asarray(params["embedding"]["weight"], np.float64)[np.concatenate(calibration)]
    scale = np.asarray(params["layers"]["attention_norm"]["scale"][0], np.float64)
    x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + MODEL.config.norm_eps) * scale
    w = matrices(params)["attention/k_proj"][0]
    scores = np.abs(w) * np.sqrt(np.mean(x**2, axis=(0, 1)))
    goes = np.argsort(scores, axis=1)[:, : WIDTH // 2]
    expected = w.copy()
    np.put_along_axis(expected, goes, 0, axis=1)
    np.testing.assert_array_equal(matrices(pruned.params)["attention/k_proj"][0], expected)


def test_magnitude_needs_no_inputs_and_may_have_one_budget(params, calibration):
    method = SparseMethod("magnitude", MOST)
    apart = prune_model(MODEL, params, method)
    solved = prune_model(MODEL, params, method, calibration=calibration)
    chex.assert_trees_all_equal(apart.params, solved.params)  # Exact: the same order.
    together = prune_model(MODEL, params, dataclasses.replace(method, budget="tree")).params
    before = np.concatenate([w.ravel() for w in matrices(params).values()])
    after = np.concatenate([w.ravel() for w in matrices(together).values()])
    smallest = np.sort(np.abs(before))[int(0.7 * before.size)]
    np.testing.assert_array_equal(after, np.where(np.abs(before) >= smallest, before, 0))
    shares = np.stack(list(sparsity_of(together).values()))
    assert np.ptp(shares) > 0.01
    total = 100 * int(0.7 * before.size) / before.size
    assert f"of all of them {total:.4f}" in sparsity_table(together)


def test_elsa_and_its_control_train_on_the_same_terms(params, text, calibration, tmp_path):
    batches, validation = text
    elsa = prune_model(MODEL, params, SparseMethod("elsa", MOST, **TRAINING), batches=batches)
    wanda = SparseMethod("retrain", MOST, mask_solver="wanda", **TRAINING)
    seen, blocks = [], []
    grid = training_grid(wanda, (1e-5, 1e-2))
    control, chosen, losses = search_training(
        MODEL, params, grid, validation=validation, batches=batches,
        calibration=calibration, folder=tmp_path,
        on=Callbacks(block=blocks.append, method=lambda m: seen.append(m.learning_rate)),
    )  # fmt: skip
    assert len(blocks) == 2  # one mask for both rates
    assert {f.name for f in tmp_path.iterdir()} == {
        "blocks", "learning_rate_1e-05", "learning_rate_0.01"
    }  # fmt: skip
    assert seen == [1e-5, 1e-2]
    assert grid == tuple(losses)
    assert chosen == grid[1] == min(losses, key=losses.__getitem__)
    one_shot = prune_model(MODEL, params, wanda.one_shot, calibration=calibration)
    loss = {
        name: mean_loss(MODEL, found.params, validation)
        for name, found in {"wanda": one_shot, "retrain": control, "elsa": elsa}.items()
    }
    assert loss["retrain"] == losses[chosen]
    assert max(loss["elsa"], loss["retrain"]) < loss["wanda"]
    for found in (elsa, control):
        assert found.records[-1].step == TRAINING["steps"]
        assert np.any(rest(found.params)["embedding"]["weight"] != params["embedding"]["weight"])
    for path, w in matrices(elsa.params).items():
        np.testing.assert_array_equal(np.sum(w == 0, axis=(1, 2)), int(0.7 * w[0].size))
        mask = matrices(one_shot.params)[path] == 0
        np.testing.assert_array_equal(matrices(control.params)[path] == 0, mask)


def test_a_search_passes_over_rates_that_diverge(params, text):
    search = {"batches": text[0], "validation": text[1]}
    method = SparseMethod("retrain", MOST, steps=4)
    high, low = grid = training_grid(method, (1e38, 1e-3))
    found, chosen, losses = search_training(MODEL, params, grid, **search)
    assert losses == {high: np.inf, low: mean_loss(MODEL, found.params, text[1])}
    assert np.isfinite(losses[low])
    assert chosen == low
    said = r"finite for one .* got inf at learning rate 1e\+38; inf at learning rate 2e\+38; "
    with pytest.raises(ValueError, match=said):
        search_training(MODEL, params, training_grid(method, (1e38, 2e38)), **search)


def test_a_search_does_not_choose_a_held_out_loss_that_is_not_a_number(params, text, monkeypatch):
    search = {"batches": text[0], "validation": text[1]}
    method = SparseMethod("retrain", MOST, steps=1)
    measured = iter([np.nan, 2.0, 1.0])
    monkeypatch.setattr(sparse_methods, "mean_loss", lambda *_: next(measured))
    grid = training_grid(method, (1e-2, 1e-3, 1e-4))
    _, chosen, losses = search_training(MODEL, params, grid, **search)
    assert losses == dict(zip(grid, (np.inf, 2.0, 1.0), strict=True))
    assert chosen == grid[-1]


def test_elsa_is_searched_over_strengths_too(params, text):
    search = {"batches": text[0], "validation": text[1]}
    elsa = SparseMethod("elsa", MOST, steps=2, interval=1)
    grid = training_grid(elsa, (1e-3, 1e-2), (1e-3, 1e-1))
    assert [(m.learning_rate, m.strength) for m in grid] == [
        (1e-3, 1e-3), (1e-2, 1e-3), (1e-3, 1e-1), (1e-2, 1e-1)
    ]  # fmt: skip
    found, chosen, losses = search_training(MODEL, params, grid, **search)
    assert losses[chosen] == min(losses.values()) == mean_loss(MODEL, found.params, text[1])
    assert len(set(losses.values())) == 4
    retrained = SparseMethod("retrain", MOST)
    assert training_grid(retrained, (1e-3,), (1e-3, 1e-1)) == training_grid(retrained, (1e-3,))
    assert training_grid(elsa, ()) == (elsa,)


def test_what_a_method_cannot_be_is_refused(params, text, calibration):
    with pytest.raises(ValueError, match="solver must be one of magnitude, wanda, sparsegpt, elsa"):
        SparseMethod("alps", HALF)
    with pytest.raises(ValueError, match="mask_solver must be one of"):
        SparseMethod("retrain", HALF, mask_solver="elsa")
    with pytest.raises(ValueError, match="wanda compares entries within a matrix"):
        SparseMethod("retrain", HALF, mask_solver="wanda", budget="tree")
    with pytest.raises(ValueError, match="a budget for the tree needs an Unstructured pattern"):
        SparseMethod("elsa", NM(2, 4), budget="tree")
    with pytest.raises(ValueError, match="only sparsegpt quantizes what stays"):
        SparseMethod("wanda", HALF, spec=MXFP4)
    with pytest.raises(ValueError, match=r"interval must lie in 1 .. steps"):
        SparseMethod("elsa_l", HALF, steps=8)
    with pytest.raises(ValueError, match="steps must be at least 1 and learning_rate positive"):
        SparseMethod("retrain", HALF, learning_rate=0.0)
    with pytest.raises(ValueError, match=r"solves one matrix at a time, got solver='elsa'"):
        sparse_compression_of(SparseMethod("elsa", HALF))
    wanda = SparseMethod("wanda", NM(2, 5))
    with pytest.raises(ValueError, match=r"2:5 needs widths .* got \(32, 32\) of attention/q_proj"):
        prune_model(MODEL, params, wanda, calibration=calibration)
    elsa = SparseMethod("elsa", HALF, **TRAINING)
    random = Llama(
        dataclasses.replace(MODEL.config, recipe_rules=llama_rules(get_recipe("quartet")))
    )
    with pytest.raises(ValueError, match="recipes must not need a key"):
        prune_model(random, params, elsa, batches=text[0])
    search = {"batches": text[0], "validation": text[1]}
    other = dataclasses.replace(elsa, interval=1)
    for grid in ((), (elsa, elsa), (elsa, other), (SparseMethod("wanda", HALF),)):
        with pytest.raises(ValueError, match="at different learning rates or strengths"):
            search_training(MODEL, params, grid, **search)
    stream = {**search, "batches": itertools.cycle(text[1])}
    with pytest.raises(ValueError, match="batches must start anew"):
        search_training(MODEL, params, (elsa,), **stream)
    with pytest.raises(ValueError, match="needs validation batches"):
        search_training(MODEL, params, (elsa,), **{**search, "validation": ()})

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import optax
import pytest

from lowbit_jax.train.checkpoint import list_checkpoints
from lowbit_jax.train.config import UsageError, load_config_file
from lowbit_jax.train.loop import Diverged
from lowbit_jax.train.tracking import read_metrics

from .conftest import CONFIG, IDENTITY, SMALL, Phase, train_quietly

LIGHT = {"recipe": "int4_weights", "cage_total_strength": 0.0}  # less to compile


@pytest.fixture(scope="module")
def config():
    return load_config_file(CONFIG).get_config(**SMALL)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    return run_dir, *train_quietly(config, run_dir)


def test_a_run_leaves_all_that_it_says_it_leaves(finished):
    run_dir, summary, _ = finished
    for path in summary.files.values():
        assert (run_dir / path).exists(), path
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [r["step"] for r in rows if r["split"] == "train"] == [*range(1, 25)]
    assert [r["step"] for r in rows if r["split"] == "validation"] == [6, 12, 18, 24]
    assert [p.name for p in list_checkpoints(run_dir / "checkpoints")] == [
        "step_00000018", "step_00000024",
    ]  # fmt: skip


def test_the_summary_is_consistent_and_comes_back_from_its_file(finished):
    run_dir, summary, _ = finished
    record = json.loads((run_dir / "summary.json").read_text())
    assert record["validation_loss"] == summary.validation_loss
    # A byte is a token here.
    assert summary.validation_bits_per_byte == pytest.approx(
        summary.validation_loss / math.log(2), rel=1e-12
    )
    assert {"uniform", "unigram", "trigram", "xz"} <= summary.baselines.keys()
    assert 0 < summary.quantization_error < 0.2
    assert len(summary.sample) > 50
    for shown in ("trigram", "nats per token", "rms(w - Q(w))", str(run_dir)):
        assert shown in str(summary)


def test_training_lowers_the_loss_far_below_chance(finished):
    run_dir, summary, _ = finished
    first = read_metrics(run_dir / "metrics.jsonl")[0]["loss"]
    assert abs(first - math.log(256)) < 0.1  # logits start near 0
    assert summary.validation_loss < first - 1


def test_a_finished_run_is_reported_and_not_trained_again(finished, config):
    run_dir, summary, _ = finished
    before = (run_dir / "metrics.jsonl").read_bytes()
    again, said = train_quietly(config, run_dir)
    assert again == summary
    assert "finished; pass --fresh" in said
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_other_arguments_are_refused(finished, config):
    other = dataclasses.replace(IDENTITY, arguments={**SMALL, "seed": 1})
    with pytest.raises(UsageError, match="seed was None, now 1"):
        train_quietly(config, finished[0], identity=other)


@pytest.fixture(scope="module")
def poisoned():
    """`poisoned(step)`: one weight of layer 0 is spoiled in that update, after all clipping.

    The step is part of the optimizer's first state, so that all share one compiled update.
    """

    def update(updates, left, params=None):
        weight = updates["layers"]["mlp"]["up_proj"]["weight"]
        bad = jnp.where(left == 1, jnp.nan, weight[0, 3, 4])
        updates["layers"]["mlp"]["up_proj"]["weight"] = weight.at[0, 3, 4].set(bad)
        return updates, left - 1

    config = load_config_file(CONFIG).get_config(**SMALL, **LIGHT)
    poison = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
    chain = optax.chain(config.optimizer, poison)

    def at(step, **changes):
        def init(params):
            return (*chain.init(params)[:-1], jnp.int32(step))

        return dataclasses.replace(config, optimizer=chain._replace(init=init), **changes)

    return at


def test_a_validation_loss_that_is_not_finite_names_the_parameter(poisoned, tmp_path):
    config = poisoned(24, eval_batches=1, final_eval_batches=1, eval_interval=100)
    with pytest.raises(
        Diverged, match=r"after step 24 is not finite \(nan\).*layers/mlp/up_proj/weight"
    ):
        train_quietly(config, tmp_path / "run")


def test_not_saving_still_goes_on_from_what_was_saved(poisoned, tmp_path):
    with pytest.raises(Diverged):
        train_quietly(poisoned(8), tmp_path / "run")
    with pytest.raises(Diverged):
        train_quietly(poisoned(8), tmp_path / "run", save=False)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["split"] == "train"] == [*range(1, 9)]


def test_shapes_that_a_recipe_refuses_are_a_usage_error_before_compiling(tmp_path):
    config = load_config_file(CONFIG).get_config(**SMALL, d_model=192)
    with pytest.raises(UsageError, match=r"multiple of 128 .* got 192"):
        train_quietly(config, tmp_path / "run")


def test_a_sample_cannot_steer_the_terminal(finished):
    _, summary, _ = finished
    steering = dataclasses.replace(summary, sample="a\x1b[2J\r\x07b\nc")
    assert "|a\ufffd[2J\ufffd\ufffdb\n  c\n" in str(steering)


@pytest.mark.parametrize(("step", "found"), [(8, "step 9"), (12, "step 12")])
def test_a_tensor_gone_bad_stops_the_run_is_named_and_never_saved(poisoned, tmp_path, step, found):
    # At step 12 a checkpoint is due: the state is found out before the next loss could tell.
    config = poisoned(step, eval_batches=1, eval_interval=100)
    with pytest.raises(Diverged, match=found) as stopped:
        train_quietly(config, tmp_path / "run")
    assert "layers/mlp/up_proj/weight" in str(stopped.value)
    if step == 8:
        assert "parameter layers/mlp/up_proj/weight, layer 0" in str(stopped.value)
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000006"]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_speed_can_be_measured_without_validation_and_checkpoints(config, tmp_path):
    summary, _ = train_quietly(config, tmp_path / "run", validate=False, save=False, sample=False)
    assert summary.validation_loss is None
    assert summary.tokens_per_s > 0
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert "ktok/s" in str(summary)


def test_the_training_step_is_compiled_once(tmp_path, monkeypatch):
    counts = []
    real = jax.jit

    def counting(fn, **kwargs):
        jitted = real(fn, **kwargs)
        if getattr(fn, "__name__", "") == "train_step":
            counts.append(jitted)
        return jitted

    monkeypatch.setattr("lowbit_jax.train.loop.Phase", Phase)  # none that another test shares
    monkeypatch.setattr("lowbit_jax.train.step.jax.jit", counting)
    config = load_config_file(CONFIG).get_config(**SMALL, **LIGHT)
    train_quietly(config, tmp_path / "run", validate=False, save=True, sample=False)
    assert [jitted._cache_size() for jitted in counts] == [1]

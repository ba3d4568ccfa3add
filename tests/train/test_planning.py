"""The memory plan of a run, and its speed of light, as the user meets them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
import pytest

from lowbit_jax.models import Llama, flops_by_part
from lowbit_jax.train import Interrupted, RunOptions, UsageError, planning
from lowbit_jax.train.planning import HEADROOM, compiled_memory, plan_run
from lowbit_jax.train.state import create_state
from lowbit_jax.train.step import make_train_step
from lowbit_jax.train.tracking import read_metrics
from pallas_kernels import measurement
from pallas_kernels.measurement import BF16, DataSheet

from .conftest import small_config, train_quietly

GIB = 2**30


@pytest.fixture(scope="module")
def config():
    # Weights on a grid, that there is something to recompute; and little to trace and compile.
    return small_config(recipe="int4_weights", steps=8)


@pytest.fixture(scope="module")
def as_configured(config):
    return plan_run(config, RunOptions(), None)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder of a finished run."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    train_quietly(config, run_dir, sample=False, validate=False, save=False)
    return run_dir


def test_without_a_wish_the_run_stays_as_it_is(config, as_configured):
    assert as_configured.config is config
    assert as_configured.plan.recompute == config.model.config.recompute
    # Exact: the state is float32 AdamW, whose counter is 4 bytes; CAGE keeps another.
    held = dict(as_configured.plan.stored)
    assert held["m"].matrices == held["v"].matrices == held["weights"].matrices
    assert held["weights"].total == held["gradients"].total


def test_the_fastest_plan_that_fits_is_put_into_the_config(config, as_configured):
    least = as_configured.plan.total / (1 - HEADROOM) / GIB
    options = RunOptions(memory_plan="auto", memory_gib=1.0001 * least)
    assert plan_run(config, options, None).plan.recompute == "none"
    options = dataclasses.replace(options, memory_gib=0.97 * least)
    chosen = plan_run(config, options, None)
    model = chosen.config.model.config
    assert model.recompute == chosen.plan.recompute != "none"
    assert model.loss_chunks == chosen.plan.loss_chunks
    assert chosen.options.offload == chosen.plan.offload
    assert chosen.plan.total <= (1 - HEADROOM) * 0.97 * least * GIB
    assert "the next faster one, recompute" in str(chosen)
    kept = ("recompute", "loss_chunks", "offload_residuals")
    same = {name: getattr(config.model.config, name) for name in kept}
    assert dataclasses.replace(model, **same) == config.model.config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_plan": "auto"}, "pass --memory-gib"),
        ({"memory_plan": "auto", "memory_gib": 1e-4}, "no plan fits into .* use "),
        ({"memory_gib": 1e-4}, "--memory-gib 0.0001: recompute none, .* No choice of .* fits"),
        ({"memory_gib": -1.0}, "must be a positive number"),
        ({"memory_gib": math.nan}, "must be a positive number"),
        ({"memory_gib": math.inf, "memory_plan": "auto"}, "must be a positive number"),
    ],
)
def test_what_cannot_fit_is_refused_before_anything_is_made(config, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        train_quietly(config, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_plan_that_does_not_fit_is_told_which_would(config, as_configured):
    memory_gib = 0.99 * as_configured.plan.total / GIB
    with pytest.raises(UsageError, match=r"--memory-plan auto would choose what fits: recompute "):
        plan_run(config, RunOptions(memory_gib=memory_gib), None)


def test_what_auto_replaces_is_said(config):
    model = dataclasses.replace(config.model.config, recompute="qkv", loss_chunks=2)
    changed = dataclasses.replace(config, model=Llama(model))
    options = RunOptions(memory_plan="auto", memory_gib=1.0)
    said = str(plan_run(changed, options, None))
    assert "takes the place of recompute qkv, loss_chunks 2, as configured" in said
    assert "takes the place" not in str(plan_run(config, options, None))


def test_more_of_the_host_than_it_has_is_warned_of(config, monkeypatch):
    monkeypatch.setattr(planning, "host_memory_bytes", lambda: 2**20)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "0")
    said = str(plan_run(config, RunOptions(offload="moments"), None))
    assert "of the host's memory, which has 1.00 MiB" in said
    assert "start it with XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=1 in its environment" in said
    assert "warning" not in str(plan_run(config, RunOptions(), None))


def test_a_finished_run_needs_no_plan(config, whole):
    summary, said = train_quietly(config, whole, memory_gib=1e-4, validate=False)
    assert "holds this run, finished" in said
    assert summary.steps == config.steps


def test_a_run_goes_on_under_another_plan(config, as_configured, whole, tmp_path):
    with pytest.raises(Interrupted):
        train_quietly(config, tmp_path, stop_after=2, validate=False)
    # A few bytes too little for the plan as it was: the next one keeps less.
    memory_gib = 0.9999 * as_configured.plan.total / (1 - HEADROOM) / GIB
    options = {"memory_plan": "auto", "memory_gib": memory_gib}
    options |= {"sample": False, "validate": False}
    _, printed = train_quietly(config, tmp_path, **options)
    lines = printed.splitlines()
    assert lines[0].startswith("memory of a device, predicted: ")
    assert any(line.startswith("  chosen as the fastest that fits into") for line in lines)
    assert any("after step 2" in line for line in lines)
    assert any(line.startswith("memory of a device, by the compiler: ") for line in lines)
    first, second = (
        [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]
        for folder in (whole, tmp_path)
    )
    assert len(first) == config.steps
    assert first == second  # Exact: in float32 recomputation gives the same bits.


def test_asking_the_compiler_compiles_nothing(as_configured):
    tx = optax.sgd(0.1)
    step = make_train_step(lambda params, batch, key: jnp.sum(params * batch), tx)
    compiled = []

    def listen(name, duration, **_):
        if name.endswith("backend_compile_duration"):
            compiled.append(duration)

    state, batch = jax.device_put((create_state(jnp.ones(8), tx), jnp.ones(8)))
    state, _ = step(state, batch)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        line = compiled_memory(step, state, batch, as_configured)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled
    assert "predicted" in line
    assert "warning" not in line
    small = dataclasses.replace(as_configured, memory_bytes=1)
    assert "warning: that is more than the 1 B of a device" in compiled_memory(
        step, state, batch, small
    )


def test_every_line_tells_how_near_to_the_speed_of_light_it_is(config, tmp_path, monkeypatch):
    flops = sum(flops_by_part(config.model.config, config.seq_len).values())
    sheet = DataSheet({BF16: 1e6 * flops}, 1e9)  # a million tokens a second
    monkeypatch.setitem(measurement._DATA_SHEETS, "cpu", sheet)
    summary, printed = train_quietly(config, tmp_path, sample=False, validate=False, save=False)
    assert "speed of light, a device: 1,000,000 tokens/s: blocks" in printed
    rows = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "share_of_light" in r]
    assert len(rows) >= config.steps / 2
    for row in rows:
        # Exact up to the rounding of a few divisions: all of it is in bfloat16.
        assert row["share_of_light"] == pytest.approx(row["tokens_per_s"] / 1e6)
        assert row["mfu"] == pytest.approx(row["share_of_light"])
    assert "% of light, MFU" in printed
    assert summary.share_of_light == pytest.approx(summary.tokens_per_s / 1e6)
    assert "% of light, MFU" in str(summary)

"""Predicted memory: published numbers, the compiler's, and the choice of a plan."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

from lowbit_jax.models import Llama, LlamaConfig, llama_config
from lowbit_jax.models.activations import kept_bytes
from lowbit_jax.optim.low_precision_adam import MOMENT_E4M3_128, scale_by_adam_low_precision
from lowbit_jax.train import memory_plan as memory_plan_module
from lowbit_jax.train.memory_plan import (
    LADDER,
    LLMQ_STORAGE,
    OFFLOADABLE,
    choose_plan,
    memory_plan,
    training_storage,
)
from lowbit_jax.train.state import create_state
from lowbit_jax.train.step import make_train_step

MIB = 2**20
KEPT = functools.cache(kept_bytes)  # the same shapes are traced once
SMALL = LlamaConfig(
    vocab_size=64, d_model=64, n_layers=4, n_heads=2, d_ff=256, dtype="float32", loss_chunks=1
)
SHAPE = {"batch_size": 4, "seq_len": 64}


@pytest.fixture(autouse=True)
def traced_once(monkeypatch):
    monkeypatch.setattr(memory_plan_module, "kept_bytes", KEPT)


def test_published_bytes_of_qwen():
    # Schultheis and Alistarh, LLMQ, arXiv:2512.15306: what a run of Qwen2.5-0.5B in float8 prints,
    # in whole MiB.
    plan = memory_plan(
        llama_config("qwen2.5-0.5b"), batch_size=1, seq_len=128, storage=LLMQ_STORAGE
    )
    printed = {"m": 942, "v": 942, "gradients": 942, "master": 682, "weights": 601}
    assert {name: getattr(plan, name) // MIB for name in printed} == printed


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_stages_of_zero_divide_what_they_should(zero):
    plan, whole = (
        memory_plan(SMALL, **SHAPE, storage=LLMQ_STORAGE, zero=zero, world_size=n) for n in (4, 1)
    )
    divided = ["m", "v", "master"] + ["gradients"] * (zero > 1) + ["weights"] * (zero > 2)
    for name, size in whole.categories.items():
        assert plan.categories[name] == math.ceil(size / (4 if name in divided else 1))
    assert plan.total == sum(plan.categories.values())


def test_the_compiler_needs_what_is_predicted():
    config = dataclasses.replace(SMALL, recompute="swiglu+norm")
    plan = memory_plan(config, **SHAPE, storage=training_storage(dtype="float32"))
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    tx = optax.adamw(1e-3)

    def init():
        variables = Llama(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        return create_state(nn.meta.unbox(variables["params"]), tx)

    state = jax.eval_shape(init)
    step = make_train_step(Llama(config), tx)
    # Without LLVM's passes, which take most of the time and no memory of the program's.
    quick = {"xla_backend_optimization_level": 0}
    memory = step.lower(state, (tokens, tokens)).compile(quick).memory_analysis()
    counters_and_batch = 2 * 4 + 2 * 4 * tokens.size
    # Exact: parameters and both moments.
    stored = plan.weights + plan.m + plan.v
    assert memory.argument_size_in_bytes == stored + counters_and_batch
    predicted = plan.total - stored
    # Bound: when the backward pass begins, all layers keep what they keep, which is most of it.
    assert memory.temp_size_in_bytes >= plan.activation_bytes > predicted / 2
    # Bound: beside it gradients may exist once more as updates, and the results between the
    # operations of a layer at most once as often as what the layer keeps where it keeps all.
    everything = sum(size for _, size in plan.activations) + plan.recomputed
    assert memory.temp_size_in_bytes <= predicted + plan.gradients + everything


def test_moments_are_stored_as_predicted():
    params = {"w": jnp.zeros((4, 256), jnp.bfloat16)}
    storage = training_storage("bfloat16", "e4m3", micro_batches=2)
    state = jax.eval_shape(scale_by_adam_low_precision(m=MOMENT_E4M3_128).init, params)
    for moment, size in ((state.m, storage.m), (state.v, storage.v)):
        found = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(moment))
        assert found == 4 * 256 * size
    assert (storage.gradients, storage.accumulators, storage.logits) == (2, 4, 6)


def test_offloading_leaves_two_layers_on_the_device():
    plan, plain = (
        memory_plan(SMALL, **SHAPE, storage=LLMQ_STORAGE, offload=o) for o in (OFFLOADABLE, ())
    )
    for name in ("m", "v", "master", "gradients"):
        assert plan.categories[name] == math.ceil(plain.categories[name] / 2)  # of four layers
    residual = 4 * 64 * 64 * 4  # b t d of float32
    assert dict(plan.host)["residual"] == 4 * residual
    assert plain.activation_bytes - plan.activation_bytes == 2 * residual
    assert "in the host's memory: m " in str(plan)


def test_the_first_plan_of_the_ladder_that_fits_is_chosen():
    choose = functools.partial(choose_plan, SMALL, **SHAPE, storage=training_storage())
    first = choose(2**40)
    assert (first.recompute, first.loss_chunks) == LADDER[0][:2]
    second = choose(first.total - 1)
    assert (second.recompute, second.loss_chunks) == LADDER[1][:2]
    last = choose(round(0.7 * second.total))
    assert last.total <= 0.7 * second.total
    lines = str(last).splitlines()
    assert "recompute block, loss in 4 chunks, ZeRO 1 over 1 device" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == [*last.categories, "total", "a"]
    with pytest.raises(ValueError, match=r"no plan fits into .* of which .* use"):
        choose(last.total - 1)


def test_offloading_is_a_last_resort_that_has_to_be_allowed():
    storage = LLMQ_STORAGE
    smallest = memory_plan(
        dataclasses.replace(SMALL, recompute="block", loss_chunks=4),
        **SHAPE, storage=storage, offload=("m", "v", "master", "residual"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="no plan fits"):
        choose_plan(SMALL, smallest.total, **SHAPE, storage=storage)
    chosen = choose_plan(SMALL, smallest.total, **SHAPE, storage=storage, may_offload=True)
    assert chosen == smallest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero": 4}, "zero must be"),
        ({"world_size": 0}, "at least 1"),
        ({"offload": ("weights",)}, "offload may name m, v"),
    ],
)
def test_impossible_plans_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        memory_plan(SMALL, **SHAPE, **changes)


def test_unknown_storage_is_refused():
    with pytest.raises(ValueError, match="moments must be one of"):
        training_storage(moments="int4")

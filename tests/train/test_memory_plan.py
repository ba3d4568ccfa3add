"""Predicted memory: published numbers and the compiler's."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

from lowbit_jax.models import Llama, LlamaConfig, logical_axes
from lowbit_jax.parallel import make_mesh
from lowbit_jax.train.memory_plan import OFFLOADS, planner
from lowbit_jax.train.placement import make_placement
from lowbit_jax.train.planning import program_memory
from lowbit_jax.train.state import create_state
from lowbit_jax.train.step import make_train_step
from lowbit_jax.train.stored_bytes import stored_by_run

from .conftest import stored_of

SMALL = LlamaConfig(
    vocab_size=64, d_model=64, n_layers=4, n_heads=2, d_ff=256, dtype="float32", loss_chunks=1
)
SHAPE = {"batch_size": 4, "seq_len": 64}


def plan_of(config, offload="none", *, codes=None):
    plan = planner(config, **SHAPE, stored=stored_of(config, codes=codes))
    return plan(config.recompute, config.loss_chunks, offload)


@pytest.fixture(scope="module")
def state_and_step():
    """Of float32 AdamW on a small model, and its tokens."""
    config = dataclasses.replace(SMALL, recompute="swiglu+norm")
    tx = optax.adamw(1e-3)

    def init():
        variables = Llama(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        return create_state(nn.meta.unbox(variables["params"]), tx)

    return config, jax.eval_shape(init), make_train_step(Llama(config), tx)


def test_the_compiler_needs_what_is_predicted(state_and_step):
    config, state, step = state_and_step
    held = stored_by_run(config, state)
    counter = 4  # of Adam's steps, among the vectors
    # Exact: parameters, gradients and both moments are float32.
    expected = stored_of(config).held
    moment = expected["m"]._replace(vectors=expected["m"].vectors + counter)
    assert held.held == {**expected, "m": moment}
    plan = planner(config, **SHAPE, stored=held)(config.recompute, 1, "none")
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    # Without LLVM's passes, which take most of the time and no memory of the program's.
    quick = {"xla_backend_optimization_level": 0}
    memory = step.lower(state, (tokens, tokens)).compile(quick).memory_analysis()
    counter_and_batch = 4 + 2 * 4 * tokens.size
    # Exact: parameters and both moments.
    stored = sum(held.held[name].total for name in ("weights", "m", "v"))
    assert memory.argument_size_in_bytes == stored + counter_and_batch
    sizes = plan.bytes_by_part["backward"]
    # Bound: when the backward pass begins, all layers keep what they keep, which is most of it.
    assert memory.temp_size_in_bytes >= sizes["activations"] > (plan.total - stored) / 2
    # Bound: beside what is predicted, gradients may exist once more as updates, and what a layer
    # works on once more between its operations.
    predicted = plan.total - stored
    assert memory.temp_size_in_bytes <= predicted + sizes["gradients"] + sizes["working"]


@pytest.mark.parametrize(
    ("mesh", "zero", "changes"),
    [((1, 8, 1), 3, {}), ((1, 8, 1), 3, {"tie_embeddings": True}), ((1, 1, 8), 1, {})],
    ids=["zero 3", "zero 3, tied", "tensor"],
)
def test_the_compiler_needs_what_is_predicted_of_a_device_among_eight(mesh, zero, changes):
    vocab = 4096 if changes else 512  # a tied table matters where it is large
    config = dataclasses.replace(
        SMALL, d_model=128, n_heads=8, d_ff=512, vocab_size=vocab, **changes
    )
    tx, cuts = optax.sgd(0.1), mesh[0] * mesh[1]

    def init():
        variables = Llama(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        return create_state(nn.meta.unbox(variables["params"]), tx)

    state = jax.eval_shape(init)
    pieces = {"heads": config.n_heads, "kv_heads": config.kv_heads}
    axes = logical_axes(Llama(config))
    placement = make_placement(state, axes, make_mesh(*mesh), zero, pieces=pieces)
    # As the trainer does where weights are gathered.
    model = dataclasses.replace(config, recompute="unnamed" if zero == 3 else "none")
    step = make_train_step(Llama(model), tx, placement=placement)
    shapes = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        state,
        placement.state,
    )
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=placement.batch)
    quick = {"xla_backend_optimization_level": 0}
    used = program_memory(step.lower(shapes, (tokens, tokens)).compile(quick))
    stored = stored_by_run(
        config, state, places=placement.state, gradient_places=placement.gradients
    )
    plan = planner(
        config, batch_size=8 // cuts, seq_len=16, stored=stored, zero=zero,
        world_size=8, tensor=mesh[2], loss_tokens=8 * 16,
    )("none", 1, "none")  # fmt: skip
    sizes = plan.bytes_by_part["backward"]
    # Bound: a layer and its gradient are there whole, or all layers keep what they keep.
    assert used.temporary_bytes >= max(sizes.get("passing", 0), sizes["activations"])
    # Bound: beside what is predicted, gradients may exist once more as updates, and what a layer
    # works on once more between its operations.
    predicted = plan.total - sizes["weights"]
    assert used.temporary_bytes <= predicted + sizes["gradients"] + sizes["working"]


def test_a_tied_table_has_two_gradients_before_they_are_added():
    tied = dataclasses.replace(SMALL, vocab_size=65536, tie_embeddings=True)
    sizes = plan_of(tied).bytes_by_part
    assert sizes["embedding"]["passing"] == 4 * 65536 * 64  # Exact: one more in float32.
    assert "passing" not in plan_of(SMALL).bytes_by_part["embedding"]


def test_the_loss_is_cut_as_the_program_counts_its_tokens():
    # Of 2**18 tokens a device and 64 words the logits are 64 MiB, of all 32 devices 2 GiB.
    stored = stored_of(SMALL)
    shape = {"batch_size": 2**12, "seq_len": 64}
    chunks = [
        planner(SMALL, **shape, stored=stored, loss_tokens=n)("block", None, "none").loss_chunks
        for n in (None, 32 * 2**18)
    ]
    assert chunks == [1, 2]


def test_offloading_leaves_two_layers_on_the_device():
    everything = "+".join(OFFLOADS)
    plan, plain = (plan_of(SMALL, offload, codes=1) for offload in (everything, "none"))
    held, sizes = dict(plain.stored), plan.bytes_by_part
    for name in ("m", "v", "master", "gradients"):
        # Of four layers; the tables are smaller, a piece of them at a time. Vectors stay.
        assert sizes["update"][name] == math.ceil(held[name].matrices / 2) + held[name].vectors
        assert plan.host_bytes[name] == held[name].total
    assert not {"m", "v", "master"} & {*sizes["loss"], *sizes["backward"]}
    # Backward makes the gradients of the tables whole, the loss reads the head, one of two tables.
    gradients = held["gradients"]
    assert sizes["backward"]["gradients"] == gradients.total - math.floor(gradients.matrices / 2)
    assert sizes["loss"]["weights"] == held["weights"].tables // 2 + held["weights"].vectors
    residual = 4 * 64 * 64 * 4  # b t d of float32
    assert plan.host_bytes["activations"] == 4 * residual
    assert "offload moments+gradients+weights+residuals" in str(plan)


def test_a_flag_that_frees_nothing_at_the_peak_frees_nothing():
    plan = planner(SMALL, **SHAPE, stored=stored_of(SMALL))
    one, two = plan("none", 1, "none"), plan("none", 2, "none")
    assert one.peak == two.peak == "backward"
    assert two.total == one.total
    assert two.logits < one.logits


def test_the_table_has_a_line_for_what_there_is():
    lines = str(plan_of(SMALL)).splitlines()
    assert "recompute none, loss in 1 chunk, offload none, ZeRO 1 over 1 device" in lines[0]
    assert lines[1].split() == ["loss", "backward", "embedding", "update"]
    names = ["weights", "m", "v", "gradients", "activations", "working", "logits", "total", "a"]
    assert [line.split()[0] for line in lines[2:]] == names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero": 4}, "zero must be"),
        ({"world_size": 0}, "at least 1"),
        ({"tensor": 0}, "at least 1"),
    ],
)
def test_impossible_plans_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        planner(SMALL, **SHAPE, stored=stored_of(SMALL), **changes)


def test_what_cannot_be_offloaded_is_refused():
    with pytest.raises(ValueError, match="whose 'm' is none of them"):
        plan_of(SMALL, "moments+m")

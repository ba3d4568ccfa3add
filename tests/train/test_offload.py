"""Arrays in the host's memory: where they lie changes nothing that is trained."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.extend.core import jaxprs_in_params

from lowbit_jax.models import Llama, LlamaConfig, logical_axes
from lowbit_jax.models.host_memory import HOST
from lowbit_jax.numerics import FP8_E4M3
from lowbit_jax.ops.recipes import get_recipe
from lowbit_jax.optim import (
    apply_updates_low_precision,
    cage,
    dequantize_leaves,
    eco,
    match_paths,
    quantize_leaves,
)
from lowbit_jax.optim.low_precision_adam import MOMENT_E4M3_128, adamw_low_precision
from lowbit_jax.parallel import make_mesh
from lowbit_jax.train import offload, streaming
from lowbit_jax.train.config import RunOptions, UsageError, parse_command
from lowbit_jax.train.interrupts import Interrupted
from lowbit_jax.train.offender import first_offender
from lowbit_jax.train.offload import (
    OFFLOADABLE,
    draw_slowly,
    offload_flags,
    offloaded_value_and_grad,
    offloading_model,
    offloading_placement,
)
from lowbit_jax.train.placement import make_placement, open_mesh
from lowbit_jax.train.planning import offloadable, plan_run
from lowbit_jax.train.sliceable import check_sliceable
from lowbit_jax.train.state import create_state, leaf_paths, nonfinite_leaves
from lowbit_jax.train.step import Metrics, StepPlan, loss_function, make_train_step
from lowbit_jax.train.summary import quantization_error
from lowbit_jax.train.tracking import read_metrics

from .conftest import CONFIG, small_config, state_of, train_quietly

pytestmark = [
    pytest.mark.usefixtures("small_slices"),
    pytest.mark.skipif(
        HOST not in [memory.kind for memory in jax.devices()[0].addressable_memories()],
        reason=f"this device has no memory of the kind {HOST}",
    ),
]

ALL = "+".join(OFFLOADABLE)
STEPS, VOCAB, WIDTH, SEQ_LEN = 3, 64, 32, 16
MODEL = Llama(
    LlamaConfig(
        VOCAB, WIDTH, 2, 4, n_kv_heads=2, d_ff=64, dtype="float32", qkv_bias=True,
        recompute="block",  # what is offloaded computes some of it anew in any case
    )
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (4, SEQ_LEN + 1), np.int32)
BATCH = TOKENS[:, :-1], TOKENS[:, 1:]
WHOLE = StepPlan()
MATRICES = match_paths(r"layers/.*_proj/weight")


@pytest.fixture(scope="module")
def small_slices():
    """Embedding and head in four slices each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "MAX_ENTRIES", VOCAB * WIDTH // 4)
        yield


@pytest.fixture(scope="module")
def params():
    return jax.device_get(nn.meta.unbox(jax.jit(MODEL.init)(jax.random.key(0), TOKENS)["params"]))


def place(state, flags, mesh=(1, 1, 1), zero=1, micro_batches=1):
    placement = make_placement(
        state, logical_axes(MODEL), make_mesh(*mesh), zero,
        pieces={"heads": 4, "kv_heads": 2}, micro_batches=micro_batches,
    )  # fmt: skip
    return offloading_placement(placement, state, flags)


def prepare(params, tx, flags, plan=WHOLE, mesh=(1, 1, 1), zero=1, model=MODEL):
    """The compiled step, and where its state lies."""
    state = jax.eval_shape(lambda: create_state(params, tx))
    placement = place(state, flags, mesh, zero, plan.micro_batches)
    model = offloading_model(model, flags)
    step = make_train_step(loss_function(model, placement.layout), tx, plan, placement=placement)
    return step, placement.state


def train(params, tx, flags, *args, steps=STEPS, **kwargs):
    """The state after some steps, and loss and norm of each."""
    step, places = prepare(params, tx, flags, *args, **kwargs)
    state = jax.device_put(create_state(jax.tree.map(jnp.asarray, params), tx), places)
    rows = []
    for _ in range(steps):
        state, metrics = step(state, BATCH)
        rows.append((float(metrics.loss), float(metrics.grad_norm)))
    return state, np.array(rows)


def kinds_of(tree):
    return {path: leaf.sharding.memory_kind for path, leaf in leaf_paths(tree)}


@pytest.fixture(scope="module")
def plain(params):
    """Steps of half the gradient, without offload; for each number of micro-batches."""
    tx = optax.sgd(0.5, momentum=0.5)
    return tx, {n: train(params, tx, "none", StepPlan(n)) for n in (1, 2)}


@pytest.mark.parametrize(
    ("flags", "micro_batches"), [*((flag, 1) for flag in OFFLOADABLE), (ALL, 1), (ALL, 2)]
)
def test_where_arrays_lie_changes_no_bit_of_what_is_trained(params, plain, flags, micro_batches):
    tx, expected = plain
    state, rows = train(params, tx, flags, StepPlan(micro_batches))
    old, old_rows = expected[micro_batches]
    # Exact: products with powers of two and sums of the same numbers, cut otherwise. But gradients
    # of words that occur several times are added to the sum of micro-batches one by one where they
    # need not leave the device first: a bound for 68 terms below one, in each step.
    off = STEPS * 68 * 2.0**-24 if micro_batches > 1 else 0.0
    np.testing.assert_allclose(rows[:, 0], old_rows[:, 0], rtol=off)
    chex.assert_trees_all_close(jax.device_get(state), jax.device_get(old), rtol=0, atol=off)
    # Bound: a sum of squares in another order.
    np.testing.assert_allclose(rows[:, 1], old_rows[:, 1], rtol=64 * 2**-23 + off)
    for tree, flag in ((state.params, "weights"), (state.opt_state, "moments")):
        for path, kind in kinds_of(tree).items():
            is_moved = flag in flags.split("+") and path.endswith("weight")
            assert kind == (HOST if is_moved else "device"), path


CLIP, RATE, EPS, B2 = 0.1, 1e-2, 1e-3, 0.999
# Bound, to first order, of gradients relative to their norm: two dozen sums of at most 64 terms in
# a row, each in another order.
OFF = 24 * 64 * 2.0**-24


@pytest.mark.parametrize(
    # Of Adam's update the derivative by the gradient is at most 1 / eps by way of the first moment,
    # and by way of the second |m| / sqrt(v) < 2 times as much.
    ("tx", "gain"),
    [(optax.sgd(1.0), 1.0), (optax.adamw(RATE, b2=B2, eps=EPS), 3 * RATE / EPS)],
    ids=["sgd", "adamw"],
)
def test_an_optimizer_slice_by_slice_takes_the_same_steps_of_clipped_gradients(params, tx, gain):
    plan = StepPlan(clip_norm=CLIP)
    (moved, places), (step, device) = (prepare(params, tx, flags, plan) for flags in (ALL, "none"))
    start = jax.device_get(create_state(jax.tree.map(jnp.asarray, params), tx))
    for done in (1, 2):  # each from one and the same state, so that nothing adds up
        (got, row), (old, old_row) = (
            jax.device_get(f(jax.device_put(start, to), BATCH))
            for f, to in ((moved, places), (step, device))
        )
        assert old_row.grad_norm > CLIP
        np.testing.assert_allclose(row.grad_norm, old_row.grad_norm, rtol=OFF)
        for (path, a), b in zip(leaf_paths(got), jax.tree.leaves(old), strict=True):
            if a.dtype == np.int32:
                assert a == b == done, path
                continue
            bound = OFF * CLIP
            if path.startswith("params"):
                bound = gain * bound + 2**-23 * np.linalg.norm(b)  # the sum itself rounds
            elif "/nu/" in path:
                bound *= 2 * (1 - B2) * CLIP
            assert np.linalg.norm(a - b) <= bound, path
        start = old


@pytest.mark.parametrize("clip_norm", [0.1, 100.0])
def test_the_step_clips_as_optax_does(clip_norm):
    def loss(params, batch, key):
        del key
        x = batch @ params["layers"]["weight"][0] @ params["head"]["weight"]
        return jnp.mean(jnp.square(x))

    rng = np.random.default_rng(0)
    params = {"layers": {"weight": rng.normal(size=(1, 8, 8))}, "head": {"weight": np.eye(8)}}
    params, x = jax.tree.map(np.float32, (params, rng.normal(size=(4, 8))))
    tx = optax.sgd(1.0)
    chain = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
    new, old = (
        make_train_step(loss, t, plan)(create_state(jax.tree.map(jnp.asarray, params), t), x)[0]
        for t, plan in ((tx, StepPlan(clip_norm=clip_norm)), (chain, StepPlan()))
    )
    # Bound: the two norms sum the same squares in another order, and so scale what is at most 0.1.
    off = 64 * 2**-23 if clip_norm < 1 else 0.0
    chex.assert_trees_all_close(new.params, old.params, rtol=off and 2**-23, atol=0.1 * off)


def test_offload_on_a_mesh_gives_the_gradients_of_one_device(params):
    tx = optax.sgd(1.0)  # an update is the gradient
    one, _ = train(params, tx, "none", steps=1)
    many, _ = train(params, tx, ALL, steps=1, mesh=(2, 2, 1), zero=3)
    for (path, p), a, b in zip(
        leaf_paths(params), *(jax.tree.leaves(s.params) for s in (one, many)), strict=True
    ):
        gradient, got = p - np.asarray(a), p - np.asarray(b)
        assert np.linalg.norm(got - gradient) <= OFF * np.linalg.norm(gradient), path
        assert np.linalg.norm(gradient) > 0, path
    assert kinds_of(many.params)["layers/mlp/up_proj/weight"] == HOST


def test_stochastic_rounding_draws_for_each_layer_and_keeps_the_mean():
    tx, shape = optax.sgd(1.0), (4, 64, 128)
    # From 1, bfloat16 steps down by 2**-8: a fourth of that is taken one time in four.
    params = {"layers": {"weight": jnp.ones(shape, jnp.bfloat16)}}
    grads = {"layers": {"weight": jnp.full(shape, 2.0**-10)}}
    streams = streaming.Streams(params, tx.init(params), grads)
    groups = streaming.make_groups(params, "layers")
    new, _ = jax.jit(
        lambda streams: streaming.streamed_update(
            tx, streams, groups, key=jax.random.key(0), ok=jnp.bool_(True), finish=lambda _, g: g
        )
    )(streams)
    moved = np.asarray(new["layers"]["weight"], np.float32) != 1
    # Statistical: five standard errors of a share of 1/4 among 32,768; one seed in a million fails.
    assert abs(moved.mean() - 0.25) < 5 * (0.25 * 0.75 / moved.size) ** 0.5
    assert not any(np.array_equal(moved[i], moved[j]) for i in range(4) for j in range(i))


def abstract(params, tx, store=lambda p: p):
    state = jax.eval_shape(lambda: create_state(jax.tree.map(jnp.asarray, params), tx, store))
    return streaming.Streams(
        state.params, state.opt_state, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params))
    )


def check(params, tx, store=lambda p: p):
    groups = streaming.make_groups(params, "layers")
    check_sliceable(tx, abstract(params, tx, store), groups, "moments")


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(1e-3),
        optax.inject_hyperparams(optax.adamw)(1e-3),
        optax.lion(1e-3),
        adamw_low_precision(1e-3, m=MOMENT_E4M3_128, decay_mask=MATRICES),
        cage(1e-3, jnp.round, total_steps=10),
    ],
    ids=["adamw", "injected", "lion", "low_precision", "cage"],
)
def test_optimizers_that_take_layers_one_by_one_are_sliceable(params, tx):
    check(params, tx)


def test_eco_is_sliceable_with_its_codes_and_their_scales(params):
    check(params, eco(1e-3, FP8_E4M3, mask=MATRICES, decay_mask=MATRICES),
          lambda p: quantize_leaves(p, FP8_E4M3, MATRICES))  # fmt: skip


def of_each(fn):
    """An optimizer that makes each update of a gradient by `fn`."""
    return optax.stateless(lambda grads, params: jax.tree.map(fn, grads))


def rows_of(g):
    return jnp.arange(g.shape[0], dtype=g.dtype).reshape(-1, *(1,) * (g.ndim - 1))


def with_embedding(grads, params):
    return {**grads, "head": jax.tree.map(jnp.add, grads["head"], grads["embedding"])}


@pytest.mark.parametrize(
    ("tx", "said"),
    [
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), "several slices at once, in"),
        (optax.lamb(1e-3), "several slices at once, in reduce_sum"),
        (
            of_each(lambda g: jax.lax.cond(g.ndim > 0, lambda g: g / jnp.sum(g), lambda g: g, g)),
            "several slices at once, in reduce_sum",
        ),
        (of_each(lambda g: g[::-1]), "several slices at once, in rev"),
        (of_each(lambda g: jnp.take(g, jnp.zeros(g.shape[0], int), axis=0)), "in gather"),
        (
            of_each(lambda g: jax.lax.scan(lambda c, x: (c + x, c), jnp.zeros(g.shape[1:]), g)[1]),
            "several slices at once, in scan",
        ),
        (of_each(lambda g: jnp.cumsum(g, axis=0)), "several slices at once, in cumsum"),
        (optax.stateless(with_embedding), "slices of several parameters together, in add"),
        (of_each(lambda g: g * rows_of(g)), "asks where in its array a slice lies"),
        (of_each(rows_of), "asks where in its array a slice lies"),
        (optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(1.0)), "draws random bits that do"),
    ],
    ids=["global_norm", "trust_ratio", "branch", "reversed", "gathered", "carried", "summed",
         "joined", "placed", "positions", "noise"],
)  # fmt: skip
def test_optimizers_whose_slices_need_one_another_are_refused(params, tx, said):
    with pytest.raises(ValueError, match=f"lets the optimizer work slice by slice, got .*{said}"):
        check(params, tx)


def onto_quarters(x):
    return jnp.round(4 * x) / 4


@pytest.mark.parametrize(
    ("tx", "store"),
    [
        (cage(RATE, onto_quarters, strength=2.0, total_steps=4, silence=0.25), lambda p: p),
        (
            eco(RATE, FP8_E4M3, mask=MATRICES, decay_mask=MATRICES),
            lambda p: quantize_leaves(p, FP8_E4M3, MATRICES),
        ),
    ],
    ids=["cage", "eco"],
)
def test_corrections_towards_a_grid_are_those_of_the_whole(params, tx, store):
    params = {"layers": {"mlp": params["layers"]["mlp"]}, "head": params["head"]}
    params = store(jax.tree.map(jnp.asarray, params))
    groups = streaming.make_groups(params, "layers")

    def whole(streams):
        updates, opt_state = tx.update(streams.gradients, streams.opt_state, streams.params)
        return apply_updates_low_precision(streams.params, updates), opt_state

    def streamed(streams):
        return streaming.streamed_update(
            tx, streams, groups, key=jax.random.key(0), ok=jnp.bool_(True), finish=lambda _, g: g
        )

    state, both = (params, tx.init(params)), [jax.jit(whole), jax.jit(streamed)]
    values = dequantize_leaves(params)
    for number in range(4):  # the correction is silent in the first one
        key = jax.random.key(number)
        grads = jax.tree.map(lambda p, key=key: jax.random.normal(key, p.shape), values)
        state, got = (step(streaming.Streams(*state, grads)) for step in both)
        # Bound: the same operations on the same entries, some of them fused. Of the update, the
        # rate times what is at most a few, 64 roundings of 2**-24; of moments, of terms up to 5
        # and 5**2, four each; the sum with the weight rounds once. Codes are equal.
        for tree, like, off in zip(got, state, (RATE * 2.0**-18, 100 * 2.0**-24), strict=True):
            chex.assert_trees_all_close(tree, like, rtol=2**-23, atol=off)


def test_a_state_of_another_first_axis_is_refused(params):
    with pytest.raises(ValueError, match=r"keeps for .* must have its first axis"):
        check(params, optax.adafactor(1e-3, min_dim_size_to_factor=8))


def test_what_cannot_be_offloaded_is_refused(params):
    with pytest.raises(ValueError, match="whose 'momenta' is none of them"):
        offload_flags("weights+momenta")
    tx = eco(1e-3, FP8_E4M3, mask=MATRICES, decay_mask=MATRICES)
    state = jax.eval_shape(
        lambda: create_state(
            jax.tree.map(jnp.asarray, params), tx, lambda p: quantize_leaves(p, FP8_E4M3, MATRICES)
        )
    )
    with pytest.raises(ValueError, match=r"stored as codes stay on the device, got 'weights'"):
        place(state, "weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "HOST", "tape")
        with pytest.raises(ValueError, match=r"needs devices .* kind 'tape', got .* with"):
            place(state, "moments")
    unrolled = Llama(dataclasses.replace(MODEL.config, scan_unroll=2))
    with pytest.raises(ValueError, match=r"a loop over layers of scan_unroll 1, got 2"):
        offloading_model(unrolled, "residuals")
    rows = {"head": {"weight": jax.ShapeDtypeStruct((67, WIDTH), jnp.float32)}}
    with pytest.raises(ValueError, match=r"its 67 rows divide into 67 instead of 5 .* pad the"):
        streaming.check_cuts(rows, streaming.make_groups(rows, "layers"), "layers")


ONCE = StepPlan(
    2, weights_once=(("layers/mlp/up_proj/weight", get_recipe("quest_w4a4_no_hadamard")),)
)


@pytest.mark.parametrize("flag", ["weights", "gradients"])
def test_weights_that_are_quantized_once_a_step_stay_and_so_do_their_gradients(params, flag):
    with pytest.raises(ValueError, match="weights that are quantized once a step are read as a"):
        prepare(params, optax.sgd(1.0), flag, ONCE)
    config = small_config(recipe="quest_w4a4", quantize_once=True)
    options = RunOptions(offload=f"moments+{flag}")
    with pytest.raises(UsageError, match=r"--offload moments.*quantized once a step are read"):
        plan_run(config, options, open_mesh(config, options))
    assert offloadable(config) == {"moments", "residuals"}


def test_moments_wait_in_host_memory_while_weights_are_quantized_once_a_step(params):
    rules = ONCE.weights_once
    model = Llama(dataclasses.replace(MODEL.config, recipe_rules=rules))
    tx = optax.sgd(0.5, momentum=0.5)
    (state, rows), (old, old_rows) = (
        train(params, tx, flags, ONCE, steps=2, model=model) for flags in ("moments", "none")
    )
    # Exact: products with powers of two and sums of the same numbers, cut otherwise.
    np.testing.assert_array_equal(rows[:, 0], old_rows[:, 0])
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(old))
    assert HOST in kinds_of(state.opt_state).values()


@pytest.mark.parametrize("norm", [0.0, -1.0, np.inf, np.nan])
def test_a_bound_for_gradients_that_is_none_is_refused(norm):
    with pytest.raises(ValueError, match="StepPlan: clip_norm must be finite and above 0"):
        StepPlan(clip_norm=norm)
    with pytest.raises(UsageError, match="Config: clip_norm must be finite and above 0"):
        dataclasses.replace(small_config(), clip_norm=norm)


def test_inputs_of_blocks_wait_in_host_memory_and_nothing_else_does(params):
    model = offloading_model(MODEL, "residuals")

    def loss(params):
        return model.apply({"params": params}, *BATCH, method="loss")

    kept = [str(v.aval) for eqn in jax.make_jaxpr(jax.grad(loss))(params).eqns for v in eqn.outvars]
    assert [k for k in kept if "<host>" in k] == [f"float32<host>[2,4,{SEQ_LEN},{WIDTH}]"]


@pytest.mark.parametrize("flags", ["moments", "gradients"])
def test_the_loop_over_layers_keeps_no_copy_of_weights_that_are_on_the_device(params, flags):
    model = Llama(dataclasses.replace(MODEL.config, recompute="none"))
    state = jax.eval_shape(lambda: create_state(params, optax.sgd(1.0)))
    loss_fn = loss_function(offloading_model(model, flags), place(state, flags).layout)
    differentiated = offloaded_value_and_grad(loss_fn, flags, "layers")
    stacked = params["layers"]["mlp"]["gate_proj"]["weight"].shape
    batch = tuple(part[:3] for part in BATCH)  # as many tokens as nothing else is long
    loops = scans_of(jax.make_jaxpr(differentiated)(params, batch, None).jaxpr)
    written = [v for eqn in loops for v in eqn.outvars if v.aval.shape == stacked]
    assert len(written) == 2  # the gradients of gate_proj and up_proj


def scans_of(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from scans_of(inner)


def test_a_bad_value_in_host_memory_is_found(params):
    tx = optax.sgd(1.0)
    bad = jax.tree.map(np.copy, params)
    bad["layers"]["mlp"]["up_proj"]["weight"][1, 2, 3] = np.nan
    bad["head"]["weight"][-1, 0] = np.inf
    state = create_state(jax.tree.map(jnp.asarray, bad), tx)
    state = jax.device_put(state, place(jax.eval_shape(lambda: state), "weights").state)
    assert nonfinite_leaves(state.params) == ["head/weight", "layers/mlp/up_proj/weight"]
    nan = jnp.float32(jnp.nan)
    metrics = Metrics(nan, nan, {"a": nan}, nan)
    said = first_offender(metrics, state.params)
    assert said.startswith("parameter layers/mlp/up_proj/weight, layer 1;")


def test_a_state_is_drawn_where_it_lies_with_the_bits_of_one_drawn_at_once(params):
    tx = optax.adamw(1e-3)

    def create(key):
        return create_state(nn.meta.unbox(MODEL.init(key, TOKENS)["params"]), tx)

    placement = place(jax.eval_shape(create, jax.random.key(0)), ALL)
    state = draw_slowly(create, jax.random.key(0), placement.state)
    assert kinds_of(state) == {
        path: place.memory_kind or "device" for path, place in leaf_paths(placement.state)
    }
    # Bound: the same bits of the key; the normal distribution's dozen operations, of numbers up to
    # six standard deviations of 0.02, compiled otherwise.
    chex.assert_trees_all_close(
        jax.device_get(state.params), params, rtol=0, atol=12 * 6 * 0.02 * 2**-24
    )


@pytest.fixture(scope="module")
def run_config():
    config = small_config(recipe="bf16", cage_total_strength=0.0, steps=4)
    return dataclasses.replace(config, optimizer=optax.sgd(RATE, momentum=0.5))


def test_a_run_goes_on_with_other_arrays_in_host_memory(run_config, tmp_path):
    train_quietly(run_config, tmp_path / "plain", sample=False)
    with pytest.raises(Interrupted):
        train_quietly(run_config, tmp_path / "moved", offload=ALL, stop_after=2)
    train_quietly(run_config, tmp_path / "moved", offload="moments", sample=False)

    def rows(name, key="loss"):
        return np.array([r[key] for r in read_metrics(tmp_path / name / "metrics.jsonl")
                         if key in r])  # fmt: skip

    expected, got = rows("plain"), rows("moved")
    assert len(expected) == 2 * 4  # a validation after each step
    # Bound, to first order: gradients are off by 24 sums of at most 384 terms, weights after four
    # steps, each felt twice through the momentum, by 8 times the rate as much, and the loss by the
    # gradient times that, and by its own sums.
    norm = max(rows("plain", "grad_norm"))
    off = 384 * 2.0**-24 * (24 * 8 * RATE * norm**2 + max(expected))
    np.testing.assert_allclose(got, expected, rtol=0, atol=off)
    assert np.ptp(expected) > 8 * off  # a step less would be seen


def test_a_quantizing_run_with_everything_in_host_memory_comes_to_its_end(tmp_path):
    config = small_config(recipe="int4_weights", cage_total_strength=0.0, steps=1)
    config = dataclasses.replace(config, sample_prompt="a", sample_tokens=2)
    summary, _ = train_quietly(config, tmp_path / "run", offload=ALL, validate=False)
    assert summary.sample is not None
    params = state_of(tmp_path / "run", config).params
    # Exact: the same sums of a layer, of the same numbers.
    expected = quantization_error(config.model, jax.tree.map(jnp.asarray, params))
    assert summary.quantization_error == expected
    assert 0.05 < expected < 0.2  # of normal weights in 4 bits


def test_offload_comes_from_the_command_line_and_does_not_identify_a_run(run_config, tmp_path):
    _, plain, options = parse_command([str(CONFIG)])
    assert options.offload == "none"
    _, identity, options = parse_command([str(CONFIG), "--offload", "moments+weights"])
    assert options.offload == "moments+weights"
    assert identity == plain
    with pytest.raises(UsageError, match=r"offload: must be 'none' or flags of .*'moment' is none"):
        train_quietly(run_config, tmp_path / "run", offload="moment")
    assert not (tmp_path / "run").exists()

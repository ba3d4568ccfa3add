"""Gradients sent as codes, against those of one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowbit_jax.numerics import dequantize, quantize
from lowbit_jax.parallel import make_mesh
from lowbit_jax.train import loop
from lowbit_jax.train.config import UsageError
from lowbit_jax.train.gradient_exchange import FORMATS, exchanged_loss, parse_exchange
from lowbit_jax.train.placement import make_placement
from lowbit_jax.train.start import draw_state, place_run
from lowbit_jax.train.state import create_state
from lowbit_jax.train.step import StepPlan, make_train_step
from lowbit_jax.train.tracking import read_metrics

from .conftest import small_config, train_quietly

DEVICES, K, N, BATCH = 4, 64, 32, 32
AXES = {
    "head": {"weight": ("vocab", "embed"), "bias": ("vocab",)},
    "layers": {"weight": ("layers", "mlp", "embed")},
    "norm": ("norm",),
}
# A device's part of the bias has 8 entries, no block of 32.
EXCHANGE = "layers/.*=mxfp4,head/bias=mxfp4,int8"


def loss_fn(params, batch, key):
    """A different loss for each device's key, were it used; it must come all the same."""
    assert key is not None
    x, y = batch
    x = x * params["norm"]
    for w in params["layers"]["weight"]:
        x = x + jnp.tanh(x @ w.T) @ w
    return jnp.mean(jnp.square(x @ params["head"]["weight"].T + params["head"]["bias"] - y))


loss_of, gradient_of = jax.jit(loss_fn), jax.jit(jax.grad(loss_fn))


@pytest.fixture(scope="module")
def start():
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "head": {"weight": 0.2 * jax.random.normal(keys[0], (N, K)), "bias": jnp.zeros((N,))},
        "layers": {"weight": 0.2 * jax.random.normal(keys[1], (2, 2 * K, K))},
        "norm": jnp.ones((K,)),
    }
    return jax.device_get(create_state(params, optax.sgd(1.0)))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    return rng.normal(size=(BATCH, K)).astype("f"), rng.normal(size=(BATCH, N)).astype("f")


def step_of(start, mesh, exchange, micro_batches=1, zero=1):
    placement = make_placement(
        start, AXES, make_mesh(*mesh), zero, micro_batches=micro_batches,
        exchange=parse_exchange(exchange),
    )  # fmt: skip
    loss = exchanged_loss(loss_fn, placement.exchange, placement)
    plan = StepPlan(micro_batches=micro_batches, needs_key=True)
    return make_train_step(loss, optax.sgd(1.0), plan, placement=placement), placement


def gradients_of(step, placement, start, batch):
    """By plain gradient descent an update is the gradient."""
    state, metrics = step(jax.device_put(start, placement.state), batch)
    grads = jax.tree.map(lambda p, new: p - np.asarray(new), start.params, state.params)
    return grads, float(metrics.loss)


def parts_of(start, batch, count=DEVICES):
    """The gradient of the rows that a device has at a time, over the number of such parts."""
    rows = np.split(np.arange(BATCH), count)
    parts = [jax.tree.map(lambda x, own=own: x[own], batch) for own in rows]
    grads = [gradient_of(start.params, part, jax.random.key(0)) for part in parts]
    return [jax.tree.map(lambda g: np.asarray(g) / count, g) for g in grads]


def steps_of(parts, name, fraction, block):
    """The sum over devices of the distance between the levels round an entry, at most."""
    steps = 0
    for part in parts:
        g = part[name]["weight"]
        largest = np.abs(g.reshape(*g.shape[:-1], -1, block)).max(-1)
        steps = steps + fraction * np.repeat(largest, block, -1)
    return steps


# Bound: float32 sums of at most 256 terms in another order, of numbers below 100.
OFF = 256 * 100 * 2.0**-24


@pytest.mark.parametrize("mesh", [(4, 1, 1), (2, 2, 1)])
def test_errors_are_within_a_step_of_each_device(start, batch, mesh):
    step, placement = step_of(start, mesh, EXCHANGE)
    got, loss = gradients_of(step, placement, start, batch)
    parts = parts_of(start, batch)
    exact = jax.tree.map(lambda *g: sum(g), *parts)
    assert abs(loss - float(loss_of(start.params, batch, jax.random.key(0)))) <= OFF
    # What no device has a part of, and what is no block, is summed in float32.
    np.testing.assert_allclose(got["norm"], exact["norm"], atol=OFF, rtol=0)
    np.testing.assert_allclose(got["head"]["bias"], exact["head"]["bias"], atol=OFF, rtol=0)
    # Bound: a device is off by less than a step. That of int8 is 1 / 127 of the largest entry of a
    # row, which is sent whole; that of the 4 bits at most a third of the largest of 32: from 4 to 6
    # of what is scaled to reach 3 at the least.
    for name, fraction, block in (("head", 1 / 127, K), ("layers", 2 / 3, 32)):
        error = np.abs(got[name]["weight"] - exact[name]["weight"])
        assert np.all(error <= steps_of(parts, name, fraction, block) + OFF), name
        assert error.max() > OFF  # which rounding is to blame for


def test_there_is_no_bias(start, batch):
    exact = jax.tree.map(lambda *g: sum(g), *parts_of(start, batch))
    step, placement = step_of(start, (4, 1, 1), EXCHANGE)
    state = jax.device_put(start._replace(step=np.int32(0)), placement.state)
    errors = []
    for seed in range(64):  # of step t the key is that of the seed and t
        placed = state._replace(step=jax.device_put(np.int32(seed), placement.state.step))
        placed = jax.tree.map(jnp.copy, placed)  # which the step takes
        new, _ = step(placed, batch)
        errors.append(
            jax.tree.map(lambda p, n, e: p - np.asarray(n) - e, start.params, new.params, exact)
        )
    for name in ("head", "layers"):
        found = np.stack([error[name]["weight"] for error in errors])
        deviation = found.std(0, ddof=1) / len(found) ** 0.5
        # Statistical: the mean of 18,432 squared t values of 63 degrees of freedom is 63 / 61 with
        # a standard error of 0.011; entries that share a scale are rounded apart.
        t = found.mean(0)[deviation > 1e-7] / deviation[deviation > 1e-7]
        assert abs(np.mean(t**2) - 63 / 61) < 6 * 1.5 / t.size**0.5
        assert abs(np.mean(t)) < 5 / t.size**0.5


def test_micro_batches_are_exchanged_one_by_one(start, batch):
    got, _ = gradients_of(*step_of(start, (4, 1, 1), "int8", 2), start, batch)
    parts = parts_of(start, batch, 2 * DEVICES)
    exact = jax.tree.map(lambda *g: sum(g), *parts)
    for name in ("head", "layers"):
        # Bound: less than a step, 1 / 127 of the largest of a row, of each part.
        bound = steps_of(parts, name, 1 / 127, K) + OFF
        assert np.all(np.abs(got[name]["weight"] - exact[name]["weight"]) <= bound)
        assert np.any(np.abs(exact[name]["weight"]) / 2 > bound)  # of half the gradient they differ


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_table_counts_whole_gradients_and_the_parts_of_their_sums(start, micro_batches):
    _, placement = step_of(start, (4, 1, 1), EXCHANGE, micro_batches)
    cut, whole = 4 * (N * K + N + 4 * K * K), 4 * K  # bytes of what devices cut, and of the norm
    gradients = cut + whole
    if micro_batches > 1:
        gradients += cut // DEVICES + whole
    assert placement.table.device_bytes == (cut + whole, gradients, 0)


def test_codes_travel(start, batch):
    step, placement = step_of(start, (4, 1, 1), "mxfp4")
    target = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        start, placement.state,
    )  # fmt: skip
    text = step.lower(target, batch).compile().as_text()
    sent = " ".join(re.findall(r"= (.*) all-to-all(?:-start)?\(", text))
    assert "u8[" in sent
    assert "f32[1,8" not in sent
    # What is summed in float32 is no larger than the norm's gradient.
    for sizes in re.findall(r"f32\[([\d,]*)\]\S* (?:all-reduce|reduce-scatter)\(", text):
        assert np.prod([int(n) for n in sizes.split(",") if n]) <= K


def test_specs_follow_the_first_rule_that_matches():
    exchange = parse_exchange("layers/mlp/.*=mxfp4,head/weight=exact,int8")
    assert exchange.spec("layers/mlp/up_proj/weight") == FORMATS["mxfp4"]
    assert exchange.spec("head/weight") is None
    assert exchange.spec("layers/attention/q_proj/weight") == FORMATS["int8"]
    assert exchange.spec("final_norm/scale") is None
    assert parse_exchange("exact") is None
    for text, said in (
        ("int7", "one of exact, int8, fp8, mxfp4"),
        ("=int8", "PATTERN=FORMAT"),
        ("(=int8", "no regular expression"),
    ):
        with pytest.raises(ValueError, match=said):
            parse_exchange(text)


@pytest.mark.parametrize("name", ["int8", "fp8", "mxfp4"])
def test_formats_never_clip(name):
    x = jnp.linspace(-3.0, 3.0, 64).at[0].set(-7).reshape(2, 32)
    spec = FORMATS[name]
    keys = jax.random.split(jax.random.key(0), 256)
    q = jax.jit(jax.vmap(lambda key: dequantize(quantize(x, spec, key=key))))(keys)
    # Statistical: 64 means of 256, each within 5 standard errors; a step is at most 2/3 of the
    # largest entry, which is met exactly or rounded to both sides.
    errors = np.asarray(q) - np.asarray(x)
    error = 5 * errors.std(0) / 16 + 1e-5
    assert np.all(np.abs(errors.mean(0)) <= error)


def test_a_run_takes_the_option_and_sends_codes(tmp_path, monkeypatch):
    phases, make_phase = [], loop.Phase

    def recorded(*args):
        phases.append(make_phase(*args))
        return phases[-1]

    monkeypatch.setattr(loop, "Phase", recorded)
    config = small_config(recipe="bf16", cage_total_strength=0.0, steps=2)
    options = {"mesh": "2x1x1", "gradient_exchange": EXCHANGE}
    _, said = train_quietly(config, tmp_path / "run", sample=False, validate=False, **options)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 2
    assert np.all(np.isfinite(losses))
    (phase,) = phases
    placement = place_run(config, make_mesh(2), 1, gradient_exchange=EXCHANGE)
    assert placement.exchange == parse_exchange(EXCHANGE)
    assert str(placement.table) in said
    target = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(lambda key: draw_state(config, key), jax.random.key(0)), placement.state,
    )  # fmt: skip
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), jnp.int32)
    sent = re.findall(
        r"all_to_all.*tensor<(?:\d+x)*(\w+)>$",
        phase.train_step.lower(target, (tokens, tokens)).as_text(), re.MULTILINE,
    )  # fmt: skip
    assert {"ui8", "i8"} & set(sent)  # the codes


@pytest.mark.parametrize(
    "options", [{"mesh": "1x1x1"}, {"mesh": "2x1x2"}, {"mesh": "4x1x1", "zero": 2}], ids=str
)
def test_where_it_does_not_apply_it_is_refused_before_anything_is_written(tmp_path, options):
    with pytest.raises(UsageError, match="is for devices of data and fsdp alone"):
        train_quietly(small_config(), tmp_path / "run", gradient_exchange="int8", **options)
    assert not (tmp_path / "run").exists()


def test_weights_and_gradients_that_are_cut_are_refused(start):
    with pytest.raises(ValueError, match=r"takes whole weights and gradients .* got 2 devices"):
        step_of(start, (2, 1, 2), "int8")
    with pytest.raises(ValueError, match=r"weights cut over \('data',\) .* use --zero 1"):
        step_of(start, (4, 1, 1), "int8", zero=3)
    with pytest.raises(ValueError, match=r"gradients over \('fsdp', 'data'\); use --zero 1"):
        step_of(start, (4, 1, 1), "int8", zero=2)

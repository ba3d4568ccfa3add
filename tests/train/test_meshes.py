"""Runs that go on on another mesh, and what the trainer says to meshes that cannot be."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

from lowbit_jax.models import Llama, LlamaConfig, logical_axes
from lowbit_jax.parallel import make_mesh
from lowbit_jax.train.config import UsageError, parse_command
from lowbit_jax.train.interrupts import Interrupted
from lowbit_jax.train.placement import make_placement
from lowbit_jax.train.state import create_state, leaf_paths
from lowbit_jax.train.step import StepPlan, make_train_step
from lowbit_jax.train.tracking import read_metrics

from .conftest import CONFIG, small_config, train_quietly

STEPS, BATCH, SEQ_LEN, RATE = 3, 8, 16, 4e-3


@pytest.fixture(scope="module")
def config():
    config = small_config(
        recipe="bf16", cage_total_strength=0.0, batch_size=BATCH, seq_len=SEQ_LEN, steps=STEPS,
        peak_lr=RATE,
    )  # fmt: skip
    eight_heads = dataclasses.replace(config.model.config, n_heads=8)
    return dataclasses.replace(config, model=Llama(eight_heads), eval_interval=STEPS)


def rows_of(run_dir, name):
    return np.array([row[name] for row in read_metrics(run_dir / "metrics.jsonl") if name in row])


def test_a_run_goes_on_on_other_meshes_with_the_losses_of_one_device(config, tmp_path):
    train_quietly(config, tmp_path / "one", sample=False)
    with pytest.raises(Interrupted):
        train_quietly(config, tmp_path / "many", sample=False, mesh="8x1x1", zero=2, stop_after=2)
    _, said = train_quietly(config, tmp_path / "many", sample=False, mesh="1x1x8")
    assert "layers/mlp/up_proj/weight       1 x 384 x 128  mlp:tensor" in said
    assert "each device of data 1 x fsdp 1 x tensor 8 holds" in said
    assert "resuming" in said
    expected, got = rows_of(tmp_path / "one", "loss"), rows_of(tmp_path / "many", "loss")
    assert len(expected) == STEPS + 1  # the validation, too
    # Bound, to first order: a dozen sums of at most 384 terms in a row, each in another order, are
    # off by 12 * 384 * 2**-24 of their terms' size, and with them loss and gradient g. Where g is
    # so small that its sign turns, Adam's step differs by 2 * rate, and the loss by 2 * rate * |g|;
    # over P parameters that is at most 2 * rate * off * sqrt(P) * norm(g).
    off = 12 * 384 * 2.0**-24
    steps = 2 * RATE * off * 278_912**0.5 * rows_of(tmp_path / "one", "grad_norm").sum()
    bound = off * expected + steps
    assert np.all(np.abs(got - expected) <= bound)
    assert 10 * bound.max() < expected[0] - expected[1]  # a step moves it by far more
    # Adam does not see a factor of the gradient, such as a sum in the place of a mean; its norm
    # does. Bound: the sums above, a hundred times, for what a step's difference does to the next.
    norms, norm = (rows_of(tmp_path / name, "grad_norm") for name in ("many", "one"))
    np.testing.assert_allclose(norms, norm, rtol=100 * off)


def test_every_gradient_on_a_mesh_is_that_of_one_device():
    # Fewer key heads than devices along tensor times two, a head that is the embedding, biases,
    # micro-batches, weights gathered again for the backward pass: all that places something.
    model = Llama(
        LlamaConfig(
            64, 128, 2, 8, n_kv_heads=2, d_ff=256, dtype="float32", tie_embeddings=True,
            qkv_bias=True, recompute="unnamed",
        )
    )  # fmt: skip
    tx = optax.sgd(1.0)  # an update is the gradient, whose scale Adam would not see
    plan = StepPlan(micro_batches=2)
    tokens = np.random.default_rng(0).integers(0, 64, (16, 17), np.int32)
    batch = tokens[:, :-1], tokens[:, 1:]
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), batch[0][:1])["params"])
    before = jax.device_get(create_state(params, tx))
    placement = make_placement(
        before, logical_axes(model), make_mesh(2, 2, 2), 3,
        pieces={"heads": 8, "kv_heads": 2}, micro_batches=2,
    )  # fmt: skip
    one, _ = make_train_step(model, tx, plan)(jax.device_put(before), batch)
    step = make_train_step(model, tx, plan, placement=placement)
    many, _ = step(jax.device_put(before, placement.state), batch)
    # Bound, to first order: two dozen sums of at most 256 terms in a row, each in another order.
    off = 24 * 256 * 2.0**-24
    for (path, p), a, b in zip(
        leaf_paths(before.params), *map(jax.tree.leaves, (one.params, many.params)), strict=True
    ):
        gradient, got = p - np.asarray(a), p - np.asarray(b)
        assert np.linalg.norm(got - gradient) <= off * np.linalg.norm(gradient), path
        assert np.linalg.norm(gradient) > 0, path


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("16x1x1", r"--mesh 16x1x1: .* needs 16 devices, got 8"),
        ("2x2", r"--mesh 2x2: .* must be DATAxFSDPxTENSOR, got '2x2'"),
        ("2x3x1", r"--mesh 2x3x1: batch_size must be a multiple of .* = 6, got 8"),
        ("1x1x8", r"--mesh 1x1x8: --zero 3 cuts over devices of data and fsdp, of which there is"),
    ],
)
def test_a_mesh_that_cannot_be_is_a_usage_error_before_anything_is_written(
    config, tmp_path, mesh, said
):
    with pytest.raises(UsageError, match=said):
        train_quietly(config, tmp_path / "run", mesh=mesh, zero=3)
    assert not (tmp_path / "run").exists()


def test_mesh_and_stage_come_from_the_command_line_and_do_not_identify_a_run(capsys):
    _, plain, options = parse_command([str(CONFIG)])
    assert (options.mesh, options.zero) == ("1x1x1", 1)
    _, identity, options = parse_command([str(CONFIG), "--mesh", "2x2x2", "--zero", "3"])
    assert (options.mesh, options.zero) == ("2x2x2", 3)
    assert identity == plain
    with pytest.raises(SystemExit):
        parse_command([str(CONFIG), "--zero", "4"])
    assert "'4' for argument '--zero'" in " ".join(capsys.readouterr().err.split())

"""Settings of the named methods do what the solvers say of them, and reports tell it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowbit_jax.models import Llama, LlamaConfig
from lowbit_jax.numerics.presets import INT4, MXFP4
from lowbit_jax.ptq import elsa
from lowbit_jax.ptq.calibrate import compress_blocks
from lowbit_jax.ptq.elsa import ElsaSettings
from lowbit_jax.ptq.gptq import gptq
from lowbit_jax.ptq.hessian import Hessian
from lowbit_jax.ptq.methods import Method, compression_of
from lowbit_jax.ptq.report import save_report
from lowbit_jax.ptq.sparse_methods import SparseMethod, prune_model, sparse_compression_of
from lowbit_jax.ptq.sparsegpt import sparsegpt
from lowbit_jax.ptq.windows import TrainingWindows
from lowbit_jax.ptq.wush import wush_quantize
from lowbit_jax.sparsity import Unstructured

HALF = Unstructured(0.5)
INT4_32 = dataclasses.replace(INT4, block_size=32)
K = 64


@pytest.fixture(scope="module")
def layer():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, K), np.float32)  # fewer tokens than inputs: damping matters
    w = rng.standard_normal((32, K), np.float32)
    return jnp.asarray(w), Hessian(jnp.asarray(x.T @ x / 40), jnp.float32(40))


def codes(kept):
    return np.asarray(kept[0].codes if isinstance(kept, tuple) else kept.codes)


@pytest.mark.parametrize("solver", ["gptq", "wush"])
def test_damping_of_a_method_is_that_of_its_solver(layer, solver):
    w, hessian = layer
    found = {}
    for damping in (0.01, 1.0):
        method = Method(solver, INT4_32, damping=damping)
        kept, info = compression_of(method).solve("attention/q_proj", w, hessian)
        assert float(info.damping) == np.float32(damping)
        solve = gptq if solver == "gptq" else wush_quantize
        expected, _ = solve(w, hessian.matrix, INT4_32, search="rule", damping=damping)
        np.testing.assert_array_equal(codes(kept), expected.codes)
        found[damping] = codes(kept)
    assert (found[0.01] != found[1.0]).any()


def test_damping_of_the_transform_bounds_its_condition(layer):
    w, hessian = layer

    def condition(damping):
        _, info = wush_quantize(w, hessian.matrix, MXFP4, solver="rtn", transform_damping=damping)
        return np.linalg.cond(np.asarray(info.transform.matrices[0], np.float64))

    assert condition(1.0) < condition(0.01) < condition(1e-4)


def test_transforms_are_kept_in_the_dtype_that_is_asked_for(layer):
    for dtype in ("float32", "bfloat16"):
        method = Method("wush_rtn", MXFP4, transform_dtype=dtype)
        (_, transform), _ = compression_of(method).solve("mlp/up_proj", *layer)
        assert transform.matrices.dtype == dtype
    with pytest.raises(ValueError, match="must be float32 or bfloat16"):
        Method("wush", MXFP4, transform_dtype="float16")


def test_damping_of_a_sparse_method_is_that_of_sparsegpt(layer):
    w, hessian = layer
    found = []
    for damping in (0.01, 1.0):
        method = SparseMethod("sparsegpt", HALF, damping=damping)
        kept, info = sparse_compression_of(method).solve("attention/q_proj", w, hessian)
        expected, _ = sparsegpt(w, hessian.matrix, HALF, per="matrix", damping=damping)
        np.testing.assert_array_equal(kept, expected)
        assert float(info.damping) == np.float32(damping)
        found.append(np.asarray(kept))
    assert (found[0] != found[1]).any()


def test_what_a_hessian_that_is_indefinite_took_is_in_the_report(tmp_path):
    model = Llama(LlamaConfig(32, 32, 1, 2, d_ff=32, dtype="float32"))
    batches = [np.random.default_rng(0).integers(0, 32, (2, 16), np.int32)]
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), batches[0])["params"])
    compression = compression_of(Method("gptq", dataclasses.replace(INT4, block_size=16)))

    def solve(path, w, hessian):
        if path == "attention/o_proj":
            shift = 0.05 * jnp.trace(hessian.matrix) / len(hessian.matrix)
            hessian = hessian._replace(matrix=hessian.matrix - shift * jnp.eye(len(hessian.matrix)))
        return compression.solve(path, w, hessian)

    (block,) = compress_blocks(model, params, batches, compression._replace(solve=solve))
    save_report(tmp_path, block.reports, {})
    rows = {
        row["path"]: row for row in json.loads((tmp_path / "report.json").read_text())["matrices"]
    }
    told = rows["attention/o_proj"]
    assert told["failures"] > 0
    assert told["damping"] == pytest.approx(0.01 + 0.01 * (2 ** told["failures"] - 1), rel=1e-6)
    assert (rows["mlp/up_proj"]["failures"], rows["mlp/up_proj"]["damping"]) == (
        0, pytest.approx(0.01),
    )  # fmt: skip


@pytest.mark.parametrize("field", ["is_objective_aware", "final_strength", "strength"])
def test_settings_of_elsa_reach_its_optimizer(field):
    changed = {"is_objective_aware": False, "final_strength": 0.7, "strength": 0.3}[field]
    method = SparseMethod("elsa", HALF, steps=8, interval=2)
    other = dataclasses.replace(method, **{field: changed})
    assert getattr(other.elsa_settings, field) == changed

    def trained(settings: ElsaSettings):
        optimizer, w = settings.optimizer(), {"w": jnp.linspace(-1.0, 1.0, 16).reshape(4, 4)}
        scale = {"w": jnp.geomspace(1.0, 1e-3, 16).reshape(4, 4)}

        @jax.jit
        def step(carry, _):
            w, state = carry
            gradient = jax.tree.map(lambda x, s: s * (x - 0.3), w, scale)
            updates, state = optimizer.update(gradient, state, w)
            return (jax.tree.map(jnp.add, w, updates), state), None

        return jax.lax.scan(step, (w, optimizer.init(w)), None, 8)[0][0]["w"]

    one, two = trained(method.elsa_settings), trained(other.elsa_settings)
    assert np.abs(np.asarray(one - two)).max() > 1e-7


@pytest.mark.parametrize("solver", ["elsa", "retrain"])
def test_learning_rates_fall_linearly_to_zero(monkeypatch, solver):
    seen = []
    made = elsa._linear_decay
    monkeypatch.setattr(elsa, "_linear_decay", lambda *a: seen.append((a, made(*a))) or made(*a))
    model = Llama(LlamaConfig(32, 32, 1, 2, d_ff=32, dtype="float32"))
    tokens = np.random.default_rng(0).integers(0, 32, 400, np.int32)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), tokens[None, :16])["params"])
    method = SparseMethod(solver, HALF, steps=4, interval=2, learning_rate=1e-3)
    prune_model(model, params, method, batches=TrainingWindows(tokens, 16, 2))
    for arguments, schedule in seen:
        assert arguments == (1e-3, 4)
        np.testing.assert_allclose([schedule(i) for i in range(5)], 1e-3 * np.linspace(1, 0, 5))
    assert seen

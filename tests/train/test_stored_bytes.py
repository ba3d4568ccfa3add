"""What a run holds on each device, read off the shapes of its state."""

import math

import jax
import pytest

from lowbit_jax.bench.memory_case import Case, case_config
from lowbit_jax.models.activations import kept_bytes
from lowbit_jax.numerics import QTensor
from lowbit_jax.train import RunOptions
from lowbit_jax.train.config import quantized_weights
from lowbit_jax.train.placement import open_mesh
from lowbit_jax.train.planning import run_planner
from lowbit_jax.train.start import draw_state
from lowbit_jax.train.stored_bytes import stored_by_run

from .conftest import small_config


def test_published_bytes_of_qwen():
    # Schultheis and Alistarh, LLMQ, arXiv:2512.15306: what a run of Qwen2.5-0.5B in float8 prints,
    # in whole MiB.
    config, _ = case_config(Case("", "qwen2.5-0.5b", recipe="fp8_tensorwise"))
    stored = stored_by_run(
        config.model.config,
        jax.eval_shape(lambda key: draw_state(config, key), jax.random.key(0)),
        quantized_once=dict(quantized_weights(config.model)),
    )
    printed = {"m": 942, "v": 942, "gradients": 942, "master": 682, "weights": 601}
    assert {name: held.total // 2**20 for name, held in stored.held.items()} == printed


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_stages_of_zero_divide_what_they_should(zero):
    config = small_config(recipe="bf16", cage_total_strength=0.0, batch_size=8)
    (_, whole), (_, cut) = held_by(config), held_by(config, mesh="1x8x1", zero=zero)
    divided = ["m", "v"] + ["gradients"] * (zero > 1) + ["weights"] * (zero > 2)
    for name, held in whole.items():
        parts = 8 if name in divided else 1
        for kind in ("matrices", "tables"):
            assert getattr(cut[name], kind) == getattr(held, kind) / parts


def test_moments_are_stored_as_the_optimizer_says():
    config = small_config(recipe="bf16", cage_total_strength=0.0, moments="e4m3", micro_batches=2)
    _, held = held_by(config)
    weights = held["weights"].matrices  # float32
    # Exact: a byte and a float32 scale for 128 of them; bfloat16; sums in float32.
    assert held["m"].matrices == weights / 4 * (1 + 4 / 128)
    assert held["v"].matrices == weights / 2
    assert held["sums"] == held["gradients"]


def held_by(config, **options):
    options = RunOptions(**options)
    plan = run_planner(config, options, open_mesh(config, options))("none", 1, "none")
    return plan, dict(plan.stored)


def test_weights_stored_as_codes_are_read_as_float32_values_of_all_layers():
    config = small_config(recipe="bf16", cage_total_strength=0.0, optimizer="eco", batch_size=8)
    params = jax.eval_shape(lambda key: draw_state(config, key), jax.random.key(0)).params
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QTensor))
    codes = [leaf for leaf in leaves if isinstance(leaf, QTensor)]
    assert len(codes) == 7
    _, held = held_by(config)
    # Exact: codes with their scales, and 4 bytes of each value.
    stored = sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(codes))
    assert held["master"].matrices == stored
    assert held["weights"].matrices == 4 * sum(math.prod(leaf.shape) for leaf in codes)
    _, cut = held_by(config, mesh="1x8x1", zero=3)
    assert cut["weights"].matrices == held["weights"].matrices / 8


def test_weights_quantized_once_are_codes_and_nothing_a_layer_keeps():
    config = small_config(recipe="quest_w4a4", quantize_once=True, batch_size=8)
    plan, held = held_by(config)
    _, cut = held_by(config, mesh="1x8x1", zero=3)
    # Bound: four bits, or a byte that holds them, of 4 bytes; scales take less than a byte more.
    assert held["master"].matrices / 8 <= held["weights"].matrices < held["master"].matrices / 2
    assert cut["weights"].matrices == held["weights"].matrices / 8
    kept, again = (kept_bytes(config.model.config, 8, 16, once) for once in (True, False))
    assert dict(plan.activations) == kept
    assert kept.get("weights", 0) < again["weights"]

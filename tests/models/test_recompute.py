"""Levels of recomputation: the same bits in float32, less memory, and what each keeps."""

import dataclasses
import itertools

import chex
import jax
import numpy as np
import pytest
from flax import linen as nn
from jax._src.cudnn import fused_attention_stablehlo

from lowbit_jax.models import Llama, LlamaConfig, llama_rules
from lowbit_jax.models.activations import kept_bytes
from lowbit_jax.models.recompute import FLAGS, NAMES, KeepNames, dropped_names
from lowbit_jax.ops import dispatch, get_recipe
from pallas_kernels.compat import hopper_obstacle

CONFIG = LlamaConfig(
    vocab_size=50, d_model=128, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=512, dtype="float32"
)
B, T = 2, 16
LEVELS = ("none", "swiglu", "ffn", "block")
QUICK = {"xla_backend_optimization_level": 0}  # of LLVM, whose passes take most of the time


def with_recipe(name, **changes):
    return dataclasses.replace(CONFIG, recipe_rules=llama_rules(get_recipe(name)), **changes)


@pytest.fixture(scope="module")
def runs():
    """Level to loss and gradients, and to bytes that the compiler needs beside the arguments."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, CONFIG.vocab_size, (B, T + 1), np.int32)
    shapes = jax.eval_shape(Llama(CONFIG).init, jax.random.key(0), tokens)
    params = jax.tree.map(
        lambda leaf: random.normal(0, 0.1, leaf.shape).astype(np.float32),
        nn.meta.unbox(shapes)["params"],
    )
    found = {}
    for level in LEVELS:
        model = Llama(dataclasses.replace(CONFIG, recompute=level))

        def loss_fn(params, model=model):
            inputs, targets = tokens[:, :-1], tokens[:, 1:]
            return model.apply({"params": params}, inputs, targets, method="loss")

        compiled = jax.jit(jax.value_and_grad(loss_fn)).lower(params).compile(QUICK)
        memory = compiled.memory_analysis().temp_size_in_bytes
        found[level] = jax.device_get(compiled(params)), memory
    return found


def test_every_level_gives_the_same_bits(runs):
    plain = jax.tree.leaves(runs["none"][0])
    for level in LEVELS[1:]:
        for actual, expected in zip(jax.tree.leaves(runs[level][0]), plain, strict=True):
            # Exact: the same operations on the same float32 operands, some of them twice.
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("recipe", ["fp8_tensorwise_e4m3", "quest_w4a4"])
def test_operands_that_are_kept_are_those_of_the_forward_pass(recipe):
    random = np.random.default_rng(0)
    tokens = random.integers(0, CONFIG.vocab_size, (B, T + 1), np.int32)
    init = jax.jit(Llama(dataclasses.replace(CONFIG, n_layers=1)).init)
    params, found = nn.meta.unbox(init(jax.random.key(0), tokens)["params"]), {}
    for level in ("none", "unnamed"):
        model = Llama(with_recipe(recipe, n_layers=1, recompute=level))

        def loss_fn(params, model=model):
            return model.apply({"params": params}, tokens[:, :-1], tokens[:, 1:], method="loss")

        found[level] = jax.jit(jax.value_and_grad(loss_fn)).lower(params).compile(QUICK)(params)
    # Exact, as above: what is kept passes a rounding to its own bits.
    chex.assert_trees_all_equal(found["unnamed"], found["none"])


def test_memory_falls_from_level_to_level(runs):
    bytes_needed = [runs[level][1] for level in LEVELS]
    assert all(a > b for a, b in itertools.pairwise(bytes_needed))
    for level in LEVELS[1:]:
        # Bound: when the backward pass begins, all layers keep what they keep.
        kept = kept_bytes(dataclasses.replace(CONFIG, recompute=level), B, T)
        assert runs[level][1] >= CONFIG.n_layers * sum(kept.values())


# Bytes a token and layer, Schultheis and Alistarh, LLMQ, arXiv:2512.15306: widths d of the stream,
# f of the MLP, and of query, key and value together. `size` is that of activations, `operand` that
# of what a product keeps. Attention by XLA keeps no statistics, and its result only for o_proj.
def published(size, operand):
    d, f, qkv = 128, 512, 256
    return {
        "resid": size * d,
        "ln1": operand * d,
        "qkv": size * qkv,
        "att": operand * d,
        "att_out": size * d,
        "ln2": operand * d,
        "mlp_up": size * 2 * f,
        "swiglu": operand * f,
        "rstd": 8,
    }


@pytest.mark.parametrize(
    ("recipe", "operand", "scales", "levels"),
    [
        ("bf16", 2, 0, ("swiglu", "ffn", "qkv", "att", "norm")),
        ("fp8_tensorwise_e4m3", 1, 4 / (B * T), ("swiglu",)),  # one float32 for all tokens
        ("quest_w4a4", 3, 4, ("ffn+norm",)),  # bfloat16 and a mask; a float32 for each
    ],
)
def test_flags_drop_the_published_bytes(recipe, operand, scales, levels):
    expected = published(2, operand)
    for name in ("ln1", "att", "ln2", "swiglu"):
        expected[name] += scales
    for level in levels:
        kept = kept_bytes(with_recipe(recipe, dtype="bfloat16", recompute=level), B, T)
        weights = kept.pop("weights", 0)
        assert (weights > 0) == (recipe != "bf16")
        left = {name: size for name, size in expected.items() if name not in dropped_names(level)}
        assert {name: size / (B * T) for name, size in kept.items()} == left  # Exact.
    block = kept_bytes(with_recipe(recipe, dtype="bfloat16", recompute="block"), B, T)
    assert block == {"resid": B * T * expected["resid"]}


def test_a_kernel_whose_operands_are_kept_does_not_run_its_products_again(monkeypatch):
    if obstacle := hopper_obstacle((9, 0)):
        pytest.skip(obstacle)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(dispatch, "cuda_capability", lambda: (9, 0))
    config = with_recipe("quartet", dtype="bfloat16", implementation="hopper")
    # Gate and up stay, so their products need no second run, though their operands do: ln2 in
    # bfloat16 has gone, and its kernel's results with it.
    kept = kept_bytes(dataclasses.replace(config, recompute="norm"), 8, 16)
    assert set(kept) == set(NAMES) - {"ln1", "ln2"}


def test_statistics_of_cudnn_are_kept_with_its_result():
    primitive = fused_attention_stablehlo._dot_product_attention_fwd_p_wrapper
    assert KeepNames(frozenset({"att"}))(primitive)
    assert not KeepNames(frozenset(NAMES) - dropped_names("att"))(primitive)


def test_flags_imply_what_the_published_ones_do():
    assert dropped_names("ffn") > dropped_names("swiglu")
    assert dropped_names("att") > dropped_names("qkv")
    assert dropped_names("block") == frozenset(NAMES) > dropped_names("att+ffn+norm")
    assert dropped_names("norm+swiglu") == {"ln1", "ln2", "swiglu"}
    assert dropped_names("none") == set()


@pytest.mark.parametrize("recompute", ["all", "", "swiglu,norm", "none+att"])
def test_an_unknown_flag_lists_the_known(recompute):
    with pytest.raises(ValueError, match=", ".join(FLAGS)):
        dataclasses.replace(CONFIG, recompute=recompute)

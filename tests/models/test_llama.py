import collections
import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from lowbit_jax.models import (
    Llama,
    LlamaConfig,
    count_params,
    linear,
    llama_rules,
    logical_axes,
    recipe_table,
)
from lowbit_jax.models.llama import QUANTIZABLE_PATHS
from lowbit_jax.numerics import QuantSpec, formats
from lowbit_jax.ops import DotRecipe, explain, get_recipe

# Contraction axes are multiples of 128, the Hadamard block of the QuEST recipes.
CONFIG = LlamaConfig(
    vocab_size=50,
    d_model=128,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    d_ff=128,
    dtype="float32",
)
ROUNDED_GRADIENTS = DotRecipe(
    dx_g=QuantSpec(formats.integer(8), None, "absmax", "stochastic"), name="stochastic"
)


def with_recipe(name, **changes):
    rules = llama_rules(get_recipe(name) if isinstance(name, str) else name)
    return dataclasses.replace(CONFIG, recipe_rules=rules, **changes)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 9), 0, CONFIG.vocab_size)


@pytest.fixture(scope="module")
def params(tokens):
    """Initial weights times 4: further from a uniform guess, so that errors show."""
    variables = jax.jit(Llama(CONFIG).init)(jax.random.key(0), tokens)
    flat = traverse_util.flatten_dict(nn.meta.unbox(variables)["params"], sep="/")
    scaled = {path: x * 4 if path.endswith("/weight") else x for path, x in flat.items()}
    return traverse_util.unflatten_dict(scaled, sep="/")


@functools.cache
def compiled(config):
    def loss_fn(params, tokens, kwargs):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        return Llama(config).apply({"params": params}, inputs, targets, method="loss", **kwargs)

    return jax.jit(jax.value_and_grad(loss_fn))


def loss_and_gradient(config, params, tokens, **kwargs):
    """Of the loss of each next token."""
    return compiled(config)(params, tokens, kwargs)


@pytest.fixture(scope="module")
def scanned(params, tokens):
    return loss_and_gradient(CONFIG, params, tokens)


@pytest.fixture(scope="module")
def float_logits(params, tokens):
    return jax.jit(Llama(CONFIG).apply)({"params": params}, tokens)


def test_parameters_are_plain_float32_arrays_at_the_documented_paths(params):
    shapes = {k: v.shape for k, v in traverse_util.flatten_dict(params, sep="/").items()}
    assert shapes == {
        "embedding/weight": (50, 128),
        "layers/attention/q_proj/weight": (2, 128, 128),
        "layers/attention/k_proj/weight": (2, 64, 128),
        "layers/attention/v_proj/weight": (2, 64, 128),
        "layers/attention/o_proj/weight": (2, 128, 128),
        "layers/attention_norm/scale": (2, 128),
        "layers/mlp/gate_proj/weight": (2, 128, 128),
        "layers/mlp/up_proj/weight": (2, 128, 128),
        "layers/mlp/down_proj/weight": (2, 128, 128),
        "layers/mlp_norm/scale": (2, 128),
        "final_norm/scale": (128,),
        "head/weight": (50, 128),
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert count_params(CONFIG)["total"] == sum(x.size for x in jax.tree.leaves(params))


def test_initial_weights_have_the_documented_spread(params):
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        if path.endswith("/scale"):
            assert jnp.all(leaf == 1)
            continue
        is_residual = path.endswith(("o_proj/weight", "down_proj/weight"))
        expected = 4 * 0.02 / (2 * CONFIG.n_layers) ** 0.5 if is_residual else 4 * 0.02
        # Statistical: the standard error of a standard deviation is 1 / sqrt(2 n) of it; 9 matrices
        # at 5 of them, a false alarm in about 200,000 seeds.
        assert abs(leaf.std() / expected - 1) <= 5 / (2 * leaf.size) ** 0.5
        # Layers differ: the scan draws a new key for each.
        assert leaf.ndim == 2 or not np.array_equal(leaf[0], leaf[1])


def assert_gradients_close(actual, expected):
    """Up to summation order."""
    # Bound, in norm and to first order: sums of at most 128 terms, through six products a layer
    # and the head, forward and then backward.
    for a, e in zip(*map(jax.tree.leaves, jax.device_get((actual, expected))), strict=True):
        assert np.linalg.norm(a - e) <= 26 * 128 * 2.0**-24 * np.linalg.norm(e)


def test_loss_and_gradient_are_those_of_the_logits(params, tokens, scanned):
    def naive(params):
        logits = Llama(CONFIG).apply({"params": params}, tokens[:, :-1])
        log_p = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()

    loss, gradient = jax.jit(jax.value_and_grad(naive))(params)
    # Bound: the same logits up to summation order, 128 terms; then a logsumexp over 50.
    np.testing.assert_allclose(scanned[0], loss, rtol=(128 + 50) * 2.0**-24)
    assert_gradients_close(scanned[1], gradient)


def test_schedules_change_nothing_but_rounding(params, tokens, scanned):
    config = dataclasses.replace(CONFIG, scan_unroll=5, loss_chunks=4)
    loss, gradient = loss_and_gradient(config, params, tokens)
    # Bound as above: the same operations, which the compiler may fuse and sum in another order.
    np.testing.assert_allclose(loss, scanned[0], rtol=(128 + 50) * 2.0**-24)
    assert_gradients_close(gradient, scanned[1])


def test_bfloat16_is_off_by_its_roundings(params, tokens, float_logits):
    config = dataclasses.replace(CONFIG, dtype="bfloat16", scan_unroll=2)
    exact, logits = float_logits, jax.jit(Llama(config).apply)({"params": params}, tokens)
    assert logits.dtype == jnp.float32
    hidden = jax.eval_shape(
        lambda p: Llama(config).apply({"params": p}, tokens, method="hidden_states"), params
    )
    assert hidden.dtype == jnp.bfloat16
    # Bound, in norm and to first order: a path from token to logit passes 8 roundings of 2^-9 in
    # attention (norm, weight, q or k or v, rotation, probability, sum, o, residual), 6 in the MLP
    # (norm, weight, gate or up, product, down, residual), 3 outside (embedding, norm, head).
    roundings = 14 * config.n_layers + 3
    assert jnp.linalg.norm(logits - exact) <= roundings * 2.0**-9 * jnp.linalg.norm(exact)


PER_TOKEN = ["bf16", "quest_w4a4", "quest_w2a16", "rtn_w2a2", "mxfp4_forward"]
PER_TENSOR = ["fp8_tensorwise", "nvfp4_forward"]


@pytest.mark.parametrize("name", PER_TOKEN + PER_TENSOR)
def test_causality_holds_where_scales_are_a_token_or_less(params, tokens, float_logits, name):
    model = Llama(with_recipe(name))
    logits_fn = jax.jit(model.apply)
    logits = logits_fn({"params": params}, tokens)
    changed = tokens.at[:, 6:].set((tokens[:, 6:] + 1) % CONFIG.vocab_size)
    changed = logits_fn({"params": params}, changed)
    assert jnp.all(jnp.isfinite(logits))
    assert np.array_equal(logits, float_logits) == (name == "bf16")  # something was quantized
    assert not np.array_equal(logits[:, 6:], changed[:, 6:])
    # Exact: no operation mixes positions but attention, whose masked weights are zero, and a scale
    # that a whole tensor shares: that one moves with every token, and with it all logits a little.
    assert np.array_equal(logits[:, :6], changed[:, :6]) == (name in PER_TOKEN)


def test_quantized_gradients_are_finite_and_reach_every_leaf(params, tokens):
    loss, gradient = loss_and_gradient(with_recipe("quest_w4a4"), params, tokens)
    assert jnp.isfinite(loss)
    for leaf in jax.tree.leaves(jax.device_get(gradient)):
        assert np.all(np.isfinite(leaf))
        assert np.any(leaf != 0)


@pytest.mark.parametrize("changes", [{}, {"scan_unroll": 2}], ids=str)
def test_exactly_the_seven_matrices_of_each_layer_are_quantized(params, tokens, changes):
    model = Llama(with_recipe("quest_w4a4", **changes))

    def loss_fn(params):
        return model.apply({"params": params}, tokens, tokens, method="loss")

    count = collections.Counter()
    matrices = collections.Counter()
    for row in explain(jax.grad(loss_fn), params).rows:
        count[row.product] += row.count
        if row.product == "y":
            assert "-" not in (row.a_format, row.b_format)
            (name,) = re.findall(r"(\w+_proj)", row.where)
            matrices[f"{name}/weight"] += row.count
    assert count == dict.fromkeys(("y", "dx", "dw"), 7 * CONFIG.n_layers)
    names = {path.split("/", 2)[2] for path in QUANTIZABLE_PATHS}
    assert matrices == dict.fromkeys(names, CONFIG.n_layers)


def test_random_recipes_draw_one_key_a_layer_however_layers_run(params, tokens):
    rngs = {"quantize": jax.random.key(5)}
    runs = [
        loss_and_gradient(with_recipe(ROUNDED_GRADIENTS, **changes), params, tokens, rngs=rngs)
        for changes in ({}, {"scan_unroll": 2, "recompute": "block"})
    ]
    other = loss_and_gradient(
        with_recipe(ROUNDED_GRADIENTS), params, tokens, rngs={"quantize": jax.random.key(6)}
    )
    # Bound: a difference of summation order may cross a rounding threshold, one step of 1 / 127 of
    # the largest entry; another key moves most entries by such a step.
    (_, a), (_, b), (_, c) = runs[0], runs[1], other
    q = "q_proj"
    a, b, c = (x["layers"]["attention"][q]["weight"] for x in (a, b, c))
    assert jnp.linalg.norm(a - b) < 0.01 * jnp.linalg.norm(a - c)


@jax.custom_vjp
def product_that_shows_its_key(x, w, key):
    """`x w^T`; the gradient of every entry of `w` is one number drawn from the key."""
    return x @ w.T


product_that_shows_its_key.defvjp(
    lambda x, w, key: (x @ w.T, (w, key)),
    lambda saved, g: (g @ saved[0], jnp.full_like(saved[0], jax.random.uniform(saved[1])), None),
)


def test_every_input_of_every_layer_draws_from_a_key_of_its_own(params, tokens, monkeypatch):
    # Matrices that share an input differ by `quantized_dots`.
    def products(x, weights, recipe, *, key, **_):
        return {name: product_that_shows_its_key(x, w, key) for name, w in weights.items()}

    monkeypatch.setattr(linear, "quantized_dots", products)
    model, rngs = Llama(with_recipe(ROUNDED_GRADIENTS)), {"quantize": jax.random.key(5)}
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, tokens, rngs=rngs))))
    layers = traverse_util.flatten_dict(gradient(params)["layers"], sep="/")
    drawn = [layers[path.removeprefix("layers/")][:, 0, 0] for path in QUANTIZABLE_PATHS]
    assert len(np.unique(drawn)) == 4 * CONFIG.n_layers


def test_a_random_recipe_without_a_key_says_so(params, tokens):
    model = Llama(with_recipe(ROUNDED_GRADIENTS))
    with pytest.raises(ValueError, match=r'rngs=\{"quantize": key\}'):
        model.apply({"params": params}, tokens)


def test_recipe_table_names_rule_and_recipe_of_every_matrix():
    w4, w8 = get_recipe("quest_w4a4"), get_recipe("quest_w8a8")
    rules = (("layers/mlp/down_proj/weight", w8), ("layers/.*_proj/weight", w4))
    table = recipe_table(Llama(dataclasses.replace(CONFIG, recipe_rules=rules)))
    by_path = {row.path: row for row in table.rows}
    assert set(by_path) == {*QUANTIZABLE_PATHS, "embedding/weight", "head/weight"}
    assert by_path["layers/mlp/down_proj/weight"].recipe == w8
    assert by_path["layers/mlp/up_proj/weight"][1:] == ((2, 128, 128), rules[1][0], w4)
    assert by_path["head/weight"].recipe is None
    lines = str(table).splitlines()
    assert len(lines) == 1 + 9
    assert lines[0].split() == ["path", "shape", "rule", "recipe"]
    (line,) = (line for line in lines if "k_proj" in line)
    assert "2 x 64 x 128" in line
    assert line.endswith("quest_w4a4")


def test_logical_axes_name_every_axis_of_every_parameter(params):
    axes = logical_axes(Llama(CONFIG))
    chex.assert_trees_all_equal_structs(
        jax.tree.map(lambda x: 0, axes, is_leaf=lambda x: isinstance(x, tuple)), params
    )
    named = traverse_util.flatten_dict(axes, sep="/")
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        assert len(named[path]) == leaf.ndim
        assert (named[path][0] == "layers") == path.startswith("layers/")
    assert named["layers/attention/k_proj/weight"] == ("layers", "kv_heads", "embed")
    assert named["layers/mlp/down_proj/weight"] == ("layers", "embed", "mlp")


def test_numpy_tokens_will_do(params, tokens):
    shape = jax.eval_shape(lambda p: Llama(CONFIG).apply({"params": p}, np.asarray(tokens)), params)
    assert (shape.shape, shape.dtype) == ((2, 9, CONFIG.vocab_size), jnp.float32)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (jnp.zeros((2, 3)), jnp.zeros((2, 3)), "tokens must be integers"),
        (jnp.zeros((3,), jnp.int32), jnp.zeros((3,), jnp.int32), "tokens must be integers"),
        (jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 4), jnp.int32), "one shape"),
    ],
)
def test_wrong_tokens_say_how_to_fix_them(params, inputs, targets, message):
    with pytest.raises(ValueError, match=message):
        Llama(CONFIG).apply({"params": params}, inputs, targets, method="loss")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 127}, "multiple of n_heads"),
        ({"n_heads": 128}, "must be even"),
        ({"n_heads": 4, "n_kv_heads": 3}, "must divide n_heads"),
        ({"n_layers": 0}, "n_layers must be at least 1"),
        ({"n_kv_heads": 0}, "kv_heads must be at least 1"),
        ({"dtype": "float16"}, "dtype must be"),
        ({"attention": "flash"}, "attention must be"),
        ({"scan_unroll": 0}, "scan_unroll must be at least 1"),
        ({"recipe_rules": (("head/weight", get_recipe("quest_w4a4")),)}, "every rule must match"),
    ],
    ids=str,
)
def test_an_impossible_config_is_refused_when_it_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_products_are_computed_as_the_config_names(params, tokens):
    model = Llama(with_recipe("fp8_tensorwise:y=bf16", implementation="dequantize"))

    def loss_fn(params):
        return model.apply({"params": params}, tokens, tokens, method="loss")

    rows = explain(jax.grad(loss_fn), params).rows
    assert {row.reason for row in rows} == {"asked for by name"}
    with pytest.raises(ValueError, match=r"implementation must be None or one of .* got 'cutlass'"):
        with_recipe("quest_w4a4", implementation="cutlass")
    # Matrices that are not quantized take the plain product whatever the name.
    Llama(with_recipe("bf16", implementation="fp8")).apply({"params": params}, tokens)

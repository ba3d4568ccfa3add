"""From the knobs of the configs to rules, optimizers and stored parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models.llama import QUANTIZABLE_PATHS
from lowbit_jax.numerics import FP8_E4M3, QTensor
from lowbit_jax.ops.recipes import get_recipe, weight_projection
from lowbit_jax.optim import cage, dequantize_leaves, match_paths, one_cycle_cosine
from lowbit_jax.sparsity import identity
from lowbit_jax.train.config import UsageError, load_config_file, parse_command
from lowbit_jax.train.setups import parse_rules, training_setup
from lowbit_jax.train.state import create_state, leaf_paths
from lowbit_jax.train.step import StepPlan, make_train_step

from .conftest import CONFIG, ROOT

STEPS = 10
RATE = one_cycle_cosine(1e-2, STEPS)
DOWN = "layers/mlp/down_proj/weight"


def setup_of(**knobs):
    return training_setup(
        **{"learning_rate": RATE, "steps": STEPS, "recipe": "bf16", **knobs}  # pyright: ignore
    )


def make_params(width=32):
    """The tree of a Llama of two layers, its matrices square."""
    keys = iter(jax.random.split(jax.random.key(0), 16))
    params = {}
    for path in ("embedding/weight", *QUANTIZABLE_PATHS, "final_norm/scale", "head/weight"):
        *folders, leaf = path.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        shape = {"scale": (width,), "weight": (width, width)}[leaf]
        stacked = (2, *shape) if folders[0] == "layers" else shape
        node[leaf] = jax.random.normal(next(keys), stacked)
    return params


def loss_fn(params, batch, key):
    """Half the squared distance to 0.5, times the batch, a number; 0 gives no gradient."""
    squares = (jnp.sum((p.astype(jnp.float32) - 0.5) ** 2) for p in jax.tree.leaves(params))
    return 0.5 * batch * sum(squares)


def initial_state(setup):
    # Drawn outside: a program of its own might round the draws elsewhere.
    return jax.jit(lambda p: create_state(p, setup.optimizer, setup.store))(make_params())


def train(setup, steps, batch=1.0):
    plan = StepPlan(clip_norm=setup.clip_norm)
    state, step = initial_state(setup), make_train_step(loss_fn, setup.optimizer, plan)
    for _ in range(steps):
        state, metrics = step(state, jnp.float32(batch))
    return state, metrics


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("strength", [0.0, 2.7])
def test_adamw_is_the_chain_of_cage_bit_for_bit(strength):
    matrices = match_paths("layers/.*_proj/weight")
    plain = cage(
        RATE,
        weight_projection(get_recipe("rtn_w4a4")) if strength else identity,
        total_steps=STEPS, total_strength=strength, mask=matrices, decay_mask=matrices,
        weight_decay=0.1,
    )  # fmt: skip
    setup = setup_of(recipe="rtn_w4a4", cage_total_strength=strength)
    state, _ = train(setup, STEPS)
    expected, _ = train(setup.__class__((), (), plain, None, 1.0), STEPS)
    assert_trees_equal(state, expected)  # Exact: the same chain.


def test_each_matrix_is_pulled_to_the_grid_of_its_own_last_recipe():
    setup = setup_of(
        recipe="int4_weights",
        rules=(f"{DOWN}=bf16", "layers/mlp/up_proj/weight=fp8_weights"),
        recipe_schedule=("5:rtn_w2a2",),
        cage_total_strength=1.0,
        weight_decay=0.0,
    )
    pulled, _ = train(setup, STEPS, batch=0.0)
    before, after = dict(leaf_paths(make_params())), dict(leaf_paths(pulled.params))
    for path in before:
        recipe = {DOWN: "bf16", "layers/mlp/up_proj/weight": "fp8_weights"}.get(path, "rtn_w2a2")
        if recipe == "bf16" or not path.endswith("_proj/weight"):
            np.testing.assert_array_equal(after[path], before[path])  # Exact: nothing is added.
            continue
        # The two last steps take away the fractions a and b of the residual, a + b = 1, and leave
        # (1 - a) (1 - b) = a b <= 1/4. Bound: on absolute scales of up to 4, 2**-20 is rounding.
        projection = weight_projection(get_recipe(recipe))
        left, whole = (jnp.abs(p - projection(p)) for p in (after[path], before[path]))
        assert jnp.all(left <= whole / 4 + 2**-20), path
        assert jnp.max(whole) > 2**-6, path


def test_branches_of_any_strength_fit_the_state_of_a_silent_base():
    rules = {"recipe": "rtn_w4a4", "rules": (f"{DOWN}=fp8_weights",)}
    shapes = [
        jax.eval_shape(setup_of(**rules, cage_total_strength=s).optimizer.init, make_params())
        for s in (0.0, 1.0)
    ]
    assert shapes[0] == shapes[1]


def test_the_first_rule_that_matches_wins():
    rules = parse_rules("quartet", (f"{DOWN}=fp8_tensorwise", "layers/mlp/.*=quartet:y=bf16"))
    assert [(pattern, str(recipe)) for pattern, recipe in rules] == [
        (DOWN, "fp8_tensorwise"),
        ("layers/mlp/.*", "quartet:y=bf16"),
        ("layers/.*_proj/weight", "quartet"),
    ]


def test_a_later_recipe_keeps_the_rules():
    setup = setup_of(rules=(f"{DOWN}=fp8_tensorwise",), recipe_schedule=("4:quest_w4a4", "8:bf16"))
    steps = [step for step, _ in setup.recipe_schedule]
    texts = [[str(recipe) for _, recipe in rules] for _, rules in setup.recipe_schedule]
    assert steps == [4, 8]
    assert texts == [["fp8_tensorwise", "quest_w4a4"], ["fp8_tensorwise", "bf16"]]


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"rules": ("fp8_tensorwise",)}, "each must be PATTERN=RECIPE, got 'fp8_tensorwise'"),
        ({"rules": ("layers/dwn=bf16",)}, "got 'layers/dwn', which matches none of"),
        ({"rules": ("layers/(=bf16",)}, r"must be a regular expression, got 'layers/\('"),
        ({"rules": (f"{DOWN}=fp9",)}, "no recipe 'fp9'"),
        ({"recipe_schedule": ("bf16",)}, "each entry must be STEP:RECIPE, got 'bf16'"),
        ({"recipe_schedule": ("-1:bf16",)}, "each entry must be STEP:RECIPE, got '-1:bf16'"),
        ({"optimizer": "sgd"}, "optimizer must be one of .*'eco'.*, got 'sgd'"),
        ({"moments": "e5m2"}, "moments must be one of"),
        ({"weights": "fp8"}, "weights and weight_rounding belong to optimizer 'eco'"),
        ({"optimizer": "eco", "recipe": "quest_w4a4"}, "quantize them again, got quest_w4a4"),
        ({"optimizer": "eco", "recipe_schedule": ("5:int4_weights",)}, "again, got int4_weights"),
        ({"optimizer": "naive", "cage_total_strength": 1.0}, "got cage_total_strength=1.0"),
        ({"optimizer": "eco", "moments": "e4m3"}, "needs more bits, got moments 'e4m3'"),
        ({"optimizer": "eco", "weights": "int5"}, "weights must be one of fp8, int4, int2"),
        ({"optimizer": "eco", "weights": "nvfp4_eden_128"}, "got 'nvfp4_eden_128'"),
        ({"weight_decay": float("nan")}, "weight_decay must be finite and at least 0, got nan"),
    ],
)
def test_knobs_that_cannot_be_are_refused(knobs, said):
    with pytest.raises(ValueError, match=said):
        setup_of(**knobs)


@pytest.mark.parametrize(
    ("knobs", "weights", "others", "moments"),
    [
        ({}, 4, 4, (4, 4)),
        ({"param_dtype": "bfloat16"}, 2, 2, (4, 4)),
        ({"moments": "bfloat16"}, 4, 4, (2, 2)),
        # Rows of 32 are no multiple of 128 and get a float32 scale each.
        ({"moments": "e4m3", "param_dtype": "bfloat16"}, 2, 2, (1 + 4 / 32, 2)),
        ({"optimizer": "eco"}, 1 + 4 / 32, 4, (4, 4)),
        ({"optimizer": "naive", "moments": "bfloat16"}, 1 + 4 / 32, 4, (2, 2)),
        ({"optimizer": "eco", "weights": "int4", "weight_rounding": "nearest",
          "param_dtype": "bfloat16"}, 0.5 + 4 / 32, 2, (4, 4)),
        ({"optimizer": "eco", "weights": "nvfp4"}, 0.5 + 1 / 16, 4, (4, 4)),
    ],
)  # fmt: skip
def test_what_is_stored_takes_these_bytes_before_and_after_a_step(knobs, weights, others, moments):
    setup = setup_of(**knobs)
    start = jax.eval_shape(lambda: create_state(make_params(), setup.optimizer, setup.store))
    state, _ = jax.eval_shape(make_train_step(loss_fn, setup.optimizer), start, 1.0)
    assert jax.tree.structure(state) == jax.tree.structure(start)
    matrices, tables, norm = 7 * 2 * 32 * 32, 2 * 32 * 32, 32
    for each in (start, state):
        taken = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(each))
        expected = matrices * weights + tables * others + norm * 4
        expected += (matrices + tables + norm) * sum(moments)
        # Counters, and a scale in float32 for each of 14 matrices in NVFP4.
        assert expected <= taken <= expected + 4 * 8 + 4 * 14
    assert {"float32"} == {str(leaf.dtype) for path, leaf in leaf_paths(state.params)
                           if path.endswith("/scale")}  # fmt: skip


def test_eco_keeps_what_rounding_took_in_the_momentum_and_naive_drops_it():
    (eco, metrics), (naive, _) = (train(setup_of(optimizer=name), 1) for name in ("eco", "naive"))
    assert_trees_equal(eco.params, naive.params)  # Exact: the same first step, the same bits.
    clipped = 1 / metrics.grad_norm
    start_params = dequantize_leaves(initial_state(setup_of(optimizer="eco")).params)
    for path, start in leaf_paths(start_params):
        m_eco, m_naive = (dict(leaf_paths(s.opt_state.m))[path] for s in (eco, naive))
        # Bound: four roundings of 2**-24, of numbers up to 4, and a norm that sums 16,000 terms.
        expected = (1 - 0.9) * clipped * (start - 0.5)
        np.testing.assert_allclose(m_naive, expected, rtol=2**-16, atol=2**-30)
        is_equal = jnp.array_equal(m_eco, m_naive)
        assert is_equal != path.endswith("_proj/weight"), path


@pytest.mark.parametrize("path", [CONFIG, ROOT / "configs" / "llama.py"], ids=lambda p: p.stem)
def test_the_knobs_of_both_configs_reach_the_setup(path):
    arguments = f"--rules {DOWN}=bf16 layers/mlp/.*=quartet2 --recipe-schedule 30:bf16 --steps 40"
    arguments += " --quantize-once --moments e4m3 --param-dtype bfloat16"
    data = [] if path == CONFIG else ["--data", "synthetic"]
    config, identity, _ = parse_command([str(path), *arguments.split(), *data])
    assert [step for step, _ in config.phases] == [0, 30]
    assert [str(r) for _, r in config.model.config.recipe_rules] == [
        "bf16",
        "quartet2",
        "quest_w4a4",
    ]
    assert config.quantize_once
    assert identity.arguments["rules"] == (f"{DOWN}=bf16", "layers/mlp/.*=quartet2")
    stored = config.store({"head": {"weight": jnp.ones((2, 2))}, "norm": {"scale": jnp.ones(2)}})
    assert [str(leaf.dtype) for leaf in jax.tree.leaves(stored)] == ["bfloat16", "float32"]


def test_weights_stored_as_codes_by_the_knobs():
    config = load_config_file(CONFIG).get_config(
        recipe="bf16", optimizer="eco", cage_total_strength=0.0, steps=10
    )
    stored = config.store(make_params())
    codes = [leaf for leaf in jax.tree.leaves(stored, is_leaf=lambda p: isinstance(p, QTensor))
             if isinstance(leaf, QTensor)]  # fmt: skip
    assert {leaf.spec for leaf in codes} == {FP8_E4M3}
    assert len(codes) == 7


def test_quantizing_once_needs_something_to_quantize():
    module = load_config_file(CONFIG)
    with pytest.raises(UsageError, match="quantize_once needs a recipe that quantizes weights"):
        module.get_config(recipe="bf16", quantize_once=True)
    module.get_config(recipe="bf16", recipe_schedule=("5:rtn_w4a4",), quantize_once=True)

"""Updates of weights in few bits: what Optax loses, and what ours keep."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from lowbit_jax.numerics import (
    FP8_E4M3,
    INT8,
    MXFP4,
    NVFP4,
    NVFP4_STOCHASTIC,
    QTensor,
    dequantize_matrices,
    quantize_matrices,
)
from lowbit_jax.numerics import dequantize as eager_dequantize
from lowbit_jax.numerics import quantize as eager_quantize
from lowbit_jax.optim.low_precision import (
    Replacement,
    apply_updates_low_precision,
    apply_updates_with_error_feedback,
    dequantize_leaves,
    init_errors,
    quantize_leaves,
)
from lowbit_jax.optim.masks import match_paths

KEY = jax.random.key(0)
SMALL = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
INT8_ROW = dataclasses.replace(INT8, block_size=None)
MXFP4_16 = dataclasses.replace(MXFP4, block_size=16)

# Compiled: op by op, each operation would compile by itself.
quantize = jax.jit(eager_quantize, static_argnums=1)
dequantize = jax.jit(eager_dequantize)
apply = jax.jit(apply_updates_low_precision, static_argnames="rounding")


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def scan_updates(params, updates, steps, rounding="stochastic"):
    """The same `updates`, `steps` times, in one compiled loop with a new key at each step."""

    @jax.jit
    def run(params, updates):
        def step(p, t):
            key = jax.random.fold_in(KEY, t) if rounding == "stochastic" else None
            return apply_updates_low_precision(p, updates, key=key, rounding=rounding), None

        return jax.lax.scan(step, params, jnp.arange(steps))[0]

    return run(params, updates)


# --- what plain Optax does -----------------------------------------------------------------------


def test_bfloat16_weights_move_under_adam_where_plain_optax_leaves_them():
    lanes, steps, rate = 4096, 50, 1e-4
    tx = optax.adam(rate)

    @jax.jit
    def run(params):
        def step(carry, t):
            ours, plain, state = carry
            updates, state = tx.update(jnp.ones(lanes), state)  # Adam: -rate at every step
            ours = apply_updates_low_precision(ours, updates, key=jax.random.fold_in(KEY, t))
            return (ours, optax.apply_updates(plain, updates), state), None

        start = (params, params, tx.init(jnp.zeros(lanes)))
        return jax.lax.scan(step, start, jnp.arange(steps))[0]

    ours, plain, _ = run(jnp.ones(lanes, jnp.bfloat16))
    assert jnp.all(plain == 1)  # the failure
    ours = np.asarray(ours, np.float64)
    # Statistical: 5 standard errors of the mean; the expected move is 60 of them.
    error = ours.std() / math.sqrt(lanes)
    assert abs(ours.mean() - (1 - steps * rate)) <= 5 * error
    assert steps * rate > 50 * error


def test_int8_codes_are_destroyed_by_plain_optax_and_refused_by_ours():
    codes, updates = {"w": jnp.full((1, 8), 100, jnp.int8)}, {"w": jnp.full((1, 8), -1e-3)}
    # The failure: a thousandth of a code costs a whole one, at every step.
    assert jnp.all(optax.apply_updates(codes, updates)["w"] == 99)
    with pytest.raises(ValueError, match=r"w, int8\[1, 8\], cannot take .*QTensor"):
        apply_updates_low_precision(codes, updates, key=KEY)
    assert jnp.all(optax.apply_updates(jnp.ones(8, jnp.int8), jnp.full(8, -1e-3)) == 0)
    shape = (64, 512)
    quantized = {"w": quantize(jnp.full(shape, 100.0), INT8_ROW)}
    kept = dequantize(scan_updates(quantized, {"w": jnp.full(shape, -1e-3)}, 100)["w"])
    # Statistical: 100 updates of a thousandth, each rounded at random to a step of 100/127 or less,
    # add up to a tenth within 5 standard errors, which see a fifth of it.
    error = math.sqrt(0.1 * 100 / 127 / kept.size)
    assert abs(np.asarray(kept, np.float64).mean() - 99.9) < 5 * error < 0.02


def test_plain_optax_refuses_qtensors_and_replacements():
    params = {"w": quantize(jnp.ones((2, 8)), INT8_ROW)}
    with pytest.raises(ValueError, match="pytree"):
        optax.apply_updates(params, {"w": jnp.ones((2, 8))})
    with pytest.raises(TypeError, match="Replacement"):
        optax.apply_updates({"w": jnp.ones(3)}, {"w": Replacement(jnp.zeros(3))})


# --- stochastic rounding is unbiased -------------------------------------------------------------


def test_small_bfloat16_update_survives_on_average():
    lanes = 200_000
    moved = apply(jnp.ones(lanes, jnp.bfloat16), jnp.full(lanes, 0.0011718), key=KEY)
    mean = np.asarray(moved, np.float64).mean()
    p = 0.0011718 / 2**-7  # probability of the level above 1
    # Statistical: 5 standard errors (6e-6 each), a false alarm in 1.7 million seeds.
    assert abs(mean - 1.0011718) <= 5 * 2**-7 * math.sqrt(p * (1 - p) / lanes)
    assert jnp.all(jnp.ones(1, jnp.bfloat16) + jnp.bfloat16(0.0011718) == 1)  # to nearest


def test_a_thousand_small_bfloat16_updates_add_up_to_one():
    lanes = 4000
    params, updates = jnp.ones(lanes, jnp.bfloat16), jnp.full(lanes, -1e-3)
    assert jnp.all(scan_updates(params, updates, 1000, "nearest") == 1)
    ended = np.asarray(scan_updates(params, updates, 1000), np.float64)
    # Statistical: 5 standard errors of the mean, 5 * sqrt(2) of a standard deviation against one
    # that was estimated from as many lanes (0.041).
    assert abs(ended.mean()) <= 5 * ended.std() / math.sqrt(lanes)
    assert abs(ended.std() - 0.041) <= 5 * math.sqrt(2) * 0.041 / math.sqrt(2 * lanes) + 5e-4


@pytest.mark.parametrize(
    "spec", [INT8_ROW, FP8_E4M3, NVFP4_STOCHASTIC], ids=["int8", "fp8_e4m3", "nvfp4"]
)
def test_quantized_leaves_are_updated_without_bias(spec):
    draws, shape = 2048, (4, 32)
    params = quantize(normal(shape), spec, key=KEY)
    updates = 0.02 * normal(shape, seed=1)
    keys = jax.random.split(KEY, draws)
    results = jax.jit(jax.vmap(lambda key: dequantize(apply(params, updates, key=key))))(keys)
    results = np.asarray(results, np.float64)
    expected = np.asarray(dequantize(params) + updates, np.float64)
    moved = apply(params, updates, key=KEY)
    scale = np.asarray(moved.scales, np.float64)
    scale = scale * (1.0 if moved.global_scale is None else float(moved.global_scale))
    scale = np.repeat(scale, shape[1] // scale.shape[1], axis=1)
    # Bernstein's inequality for `draws` means of two neighbouring levels `gap` apart: fails for
    # any of the 128 entries with probability 1e-6. A float32 scale adds 4 roundings.
    units, grid = expected / scale, spec.format.grid
    above = np.clip(np.searchsorted(grid, units), 1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    variance = np.maximum((units - low) * (high - units), 0)
    log = math.log(2 * expected.size / 1e-6)
    bound = np.sqrt(2 * variance * log / draws) + (high - low) * log / (3 * draws)
    assert np.all(np.abs(results.mean(0) / scale - units) <= bound + 2.0**-22 * np.abs(units))
    assert np.any(results.std(0) > 0)


def test_leaves_and_steps_draw_different_bits_and_the_same_key_the_same():
    params = {"a": jnp.ones(256, jnp.bfloat16), "b": jnp.ones(256, jnp.bfloat16)}
    updates = {"a": jnp.full(256, 1e-3), "b": jnp.full(256, 1e-3)}
    once = apply(params, updates, key=KEY)
    assert_equal(apply_updates_low_precision(params, updates, key=KEY), once)
    assert_equal(apply(params, updates, key=KEY), once)
    other = apply(params, updates, key=jax.random.fold_in(KEY, 1))
    assert jnp.any(once["a"] != once["b"])
    assert jnp.any(once["a"] != other["a"])


# --- each kind of leaf ---------------------------------------------------------------------------


def test_wide_leaves_are_added_to_as_by_optax_and_none_keeps_a_leaf():
    params = {"w": normal((3, 4)), "i": jnp.arange(3), "kept": jnp.arange(2.0), "none": None}
    updates = {"w": normal((3, 4), 1), "i": jnp.ones(3, jnp.int32), "kept": None, "none": None}
    result = apply_updates_low_precision(params, updates)  # no key: nothing needs one
    np.testing.assert_array_equal(result["w"], params["w"] + updates["w"])  # Exact: same sum.
    np.testing.assert_array_equal(result["i"], params["i"] + 1)
    assert result["kept"] is params["kept"]
    assert result["none"] is None
    float0 = jax.grad(lambda i: jnp.float32(i.size), allow_int=True)(params["i"])
    assert apply_updates_low_precision(params["i"], float0) is params["i"]


@pytest.mark.parametrize("dtype", SMALL)
def test_nearest_is_the_cast_of_the_float32_sum(dtype):
    params, updates = normal(4096).astype(dtype), 0.1 * normal(4096, seed=1)
    actual = apply(params, updates, rounding="nearest")
    total = np.asarray(params, np.float32) + np.asarray(updates)
    # Exact: round to nearest, ties to even, as NumPy's types do it.
    np.testing.assert_array_equal(actual, total.astype(getattr(ml_dtypes, dtype, np.dtype("f2"))))
    assert actual.dtype == dtype


def test_float8_saturates_and_non_finite_updates_show():
    params = jnp.full(4, 448, jnp.float8_e4m3fn)
    updates = jnp.array([100.0, -896.0, jnp.nan, -1000.0])
    for rounding in ("nearest", "stochastic"):
        moved = apply(params, updates, key=KEY, rounding=rounding)
        np.testing.assert_array_equal(moved.astype(jnp.float32), [448, -448, jnp.nan, -448])


@pytest.mark.parametrize("spec", [MXFP4, INT8_ROW], ids=["mxfp4", "int8"])
def test_quantized_leaves_without_update_stay(spec):
    params = quantize(normal((8, 32)), spec)
    still = scan_updates(params, jnp.zeros((8, 32)), 20)
    before, after = dequantize(params), dequantize(still)
    # Bound: 20 steps, each of which may round the scale twice; exact for powers of two.
    allowed = 0 if spec == MXFP4 else 40 * 2.0**-24
    assert jnp.all(jnp.abs(after - before) <= allowed * jnp.abs(before))


def test_stacked_matrices_keep_a_global_scale_each():
    w = normal((3, 4, 32)) * jnp.array([1.0, 100.0, 1e4]).reshape(3, 1, 1)
    params = jax.jit(lambda w: quantize_leaves({"w": w}, NVFP4))(w)
    moved = apply(params, {"w": jnp.zeros_like(w)}, rounding="nearest")
    assert moved["w"].global_scale.shape == (3,)
    alone = apply(quantize(w[0], NVFP4), jnp.zeros_like(w[0]), rounding="nearest")
    assert_equal(jax.tree.map(lambda part: part[0], moved["w"]), alone)  # Exact: same matrix.


def test_replacement_is_put_in_place_and_must_be_of_the_leafs_kind():
    params = {"q": quantize(normal((2, 16)), NVFP4), "w": jnp.ones(3)}
    new = quantize(normal((2, 16), 1), NVFP4)
    updates = {"q": Replacement(new), "w": Replacement(jnp.zeros(3))}
    result = apply(params, updates)
    assert_equal(result, {"q": new, "w": jnp.zeros(3)})
    for wrong in (quantize(normal((2, 32)), NVFP4), quantize(normal((2, 16)), MXFP4_16), new.codes):
        with pytest.raises(ValueError, match="what replaces q must be of its kind"):
            apply_updates_low_precision(params, {**updates, "q": Replacement(wrong)})


@pytest.mark.parametrize(
    ("updates", "options", "message"),
    [
        ({"b": jnp.ones(4), "q": None}, {}, r"b, bfloat16\[4\], is rounded .* needs a key"),
        ({"b": None, "q": jnp.ones((2, 16))}, {}, r"q, a QTensor of .* needs a key"),
        ({"b": jnp.ones(1), "q": None}, {"key": KEY}, r"update of b must be .*\(4,\)"),
        ({"b": None, "q": jnp.ones((2, 8))}, {"key": KEY}, r"update of q must be .*\(2, 16\)"),
        ({"b": None, "q": quantize(jnp.ones((2, 16)), NVFP4)}, {"key": KEY}, "got a QTensor"),
        ({"b": None, "q": None}, {"rounding": "up"}, "rounding must be .* got 'up'"),
    ],
)
def test_errors_name_the_leaf(updates, options, message):
    params = {"b": jnp.ones(4, jnp.bfloat16), "q": quantize(jnp.ones((2, 16)), NVFP4)}
    with pytest.raises(ValueError, match=message):
        apply_updates_low_precision(params, updates, **options)


# --- error feedback ------------------------------------------------------------------------------


# Half a step over the largest weight, half an ulp or one of 254 steps; and the mean update.
FED_BACK = {
    "bfloat16": (2.0**-8, 1e-4), "float8_e4m3fn": (2.0**-4, 2e-3), "float8_e5m2": (2.0**-3, 2e-3),
    "int8": (1 / 254, 1e-4), "fp8": (2.0**-4, 2e-3),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
def test_error_feedback_follows_the_exact_sum(dtype):
    steps, shape = 500, (4, 64)
    near_one = {name: 1 + 0.1 * normal(shape) for name in FED_BACK if "float" in name}
    params = {name: w.astype(name) for name, w in near_one.items()} | {
        "int8": quantize(normal(shape), INT8_ROW),
        "fp8": quantize(normal(shape), FP8_E4M3),
    }
    noise = 1 + normal((steps, *shape), seed=2)
    updates = {name: mean * noise for name, (_, mean) in FED_BACK.items()}

    @jax.jit
    def run(params, updates):
        def step(carry, u):
            params, errors = apply_updates_with_error_feedback(carry[0], u, carry[1])
            return (params, errors), None

        return jax.lax.scan(step, (params, init_errors(params, dtype)), updates)[0]

    def values_of(params):
        return jax.tree.map(lambda p: np.asarray(p, np.float64), dequantize_leaves(params))

    ended, errors = run(params, updates)
    assert {error.dtype for error in jax.tree.leaves(errors)} == {np.dtype(dtype)}
    first, last = values_of(params), values_of(ended)
    for name, (half_step, mean) in FED_BACK.items():
        exact = first[name] + np.asarray(updates[name], np.float64).sum(0)
        held = last[name] + np.asarray(errors[name], np.float64)
        largest = 1.1 * np.abs(exact).max()
        # Bound: a residual is at most half a step of the weight and keeps all but 2**-8 of itself
        # in bfloat16; the float32 sums and scales round at most 8 times a step, by 2**-24.
        lost = 2.0**-8 * half_step if dtype == jnp.bfloat16 else 0
        bound = steps * (lost + 8 * 2.0**-24) * largest
        assert bound < steps * mean  # it sees whether the updates arrive at all
        assert np.abs(held - exact).max() <= bound, name
        assert np.abs(last[name] - exact).max() <= bound + half_step * largest, name
    for name in near_one:  # without feedback each of these updates is lost
        small = jnp.full(shape, FED_BACK[name][1])
        assert jnp.all(scan_updates(params[name], small, 2, "nearest") == params[name])


def test_error_feedback_keeps_residuals_only_where_they_are_needed():
    params = {"w": jnp.ones(3), "b": jnp.ones(3, jnp.bfloat16), "none": None}
    errors = init_errors(params)
    assert errors["w"] is None
    assert errors["none"] is None
    updates = {"w": jnp.full(3, 1e-4), "b": None, "none": None}
    moved, after = apply_updates_with_error_feedback(params, updates, errors)
    np.testing.assert_array_equal(moved["w"], params["w"] + updates["w"])  # Exact: same sum.
    assert_equal(after, errors)
    with pytest.raises(ValueError, match=r"b, .* needs a residual of its shape, got None"):
        apply_updates_with_error_feedback(
            params, {**updates, "b": jnp.ones(3)}, {"w": None, "b": None, "none": None}
        )


# --- trees ---------------------------------------------------------------------------------------


def tree():
    return {
        "layers": {"w": normal((2, 4, 32)), "norm": normal((2, 32))},
        "head": normal((8, 32)),
        "bias": normal(8),
    }


def paths_of_qtensors(params):
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda p: isinstance(p, QTensor))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in flat
        if isinstance(leaf, QTensor)
    }


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, {"layers/w", "layers/norm", "head"}),
        (match_paths("layers/w"), {"layers/w"}),
        ({"layers": True, "head": False, "bias": False}, {"layers/w", "layers/norm"}),
    ],
    ids=["none", "function", "prefix"],
)
def test_masks_choose_what_is_quantized(mask, expected):
    quantized = jax.eval_shape(lambda p: quantize_leaves(p, NVFP4, mask), tree())
    assert paths_of_qtensors(quantized) == expected
    values = jax.eval_shape(dequantize_leaves, quantized)
    assert jax.tree.structure(values) == jax.tree.structure(tree())
    halves = jax.eval_shape(lambda q: dequantize_leaves(q, jnp.bfloat16), quantized)
    assert halves["layers"]["w"].dtype == jnp.bfloat16


def test_leaves_are_quantized_matrix_by_matrix_and_once():
    params = {"w": normal((2, 4, 32)), "bias": normal(8)}
    quantized = quantize_leaves(params, INT8_ROW)
    assert_equal(quantized["w"], quantize_matrices(params["w"], INT8_ROW))
    assert quantized["bias"] is params["bias"]
    np.testing.assert_array_equal(
        dequantize_leaves(quantized)["w"], dequantize_matrices(quantized["w"])
    )
    with pytest.raises(ValueError, match=r"w is a QTensor of .* already"):
        quantize_leaves(quantized, INT8_ROW, match_paths("w"))


def test_stochastic_specs_take_a_key_and_round_each_leaf_by_its_own():
    spec = dataclasses.replace(INT8_ROW, rounding="stochastic")
    params = {"a": normal((4, 32)), "b": normal((4, 32))}
    quantized = jax.jit(lambda p: quantize_leaves(p, spec, key=KEY))(params)
    assert jnp.any(quantized["a"].codes != quantized["b"].codes)
    with pytest.raises(ValueError, match="random key"):
        quantize_leaves(params, spec)


def test_sharded_leaves_are_updated_as_on_one_device():
    mesh = jax.make_mesh((4,), ("shard",), (jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("shard"))
    params = {"b": normal((8, 32)).astype(jnp.bfloat16), "q": quantize(normal((8, 32)), FP8_E4M3)}
    updates = {"b": 1e-3 * normal((8, 32), 1), "q": 1e-2 * normal((8, 32), 2)}
    across = jax.device_put((params, updates), rows)
    result = apply(*across, key=KEY)
    assert result["b"].sharding.is_equivalent_to(rows, 2)
    assert result["q"].codes.sharding.is_equivalent_to(rows, 2)
    assert_equal(result, apply(params, updates, key=KEY))  # Exact: same bits, same definition.


def test_quantized_parameters_survive_a_checkpoint(tmp_path):
    params = {"w": quantize(normal((4, 32)), NVFP4), "b": jnp.ones(3, jnp.bfloat16)}
    saved = (params, init_errors(params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "saved", jax.tree.map(jnp.zeros_like, saved))
    assert_equal(restored, saved)  # Exact: bytes on disk.

import dataclasses

import chex
import hypothesis.extra.numpy as hnp
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_jax.numerics import (
    E5M2,
    FP8_E4M3,
    FP8_E4M3_TENSOR,
    INT2,
    INT4,
    INT8,
    MXFP4,
    MXFP4_FITTED_ALIGNED,
    MXFP4_FITTED_STOCHASTIC,
    MXFP6,
    MXFP8,
    NVFP4,
    NVFP4_16X16,
    NVFP4_EDEN,
    NVFP4_EDEN_128,
    NVFP4_FOUR_OVER_SIX,
    NVFP4_STOCHASTIC,
    PRESETS,
    QUEST_INT1,
    QUEST_INT3,
    QUEST_MXFP4,
    QUEST_MXFP4_FLOOR,
    QTensor,
    QuantSpec,
    dequantize,
    fake_quantize,
    integer,
    quantize,
    quantize_values,
    unsigned,
)

# One of each path through the code; every preset would compile for a minute.
SPECS = [
    *(INT2, INT4, INT8, QUEST_INT1, QUEST_INT3, FP8_E4M3, FP8_E4M3_TENSOR, QuantSpec(E5M2, 32)),
    *(MXFP4, MXFP6, MXFP8, QUEST_MXFP4, QUEST_MXFP4_FLOOR, NVFP4, NVFP4_FOUR_OVER_SIX),
    *(MXFP4_FITTED_ALIGNED, MXFP4_FITTED_STOCHASTIC, NVFP4_STOCHASTIC, NVFP4_EDEN),
    QuantSpec(integer(4), 16, "absmax_e4m3"),
    QuantSpec(unsigned(4), 32, "minmax"),
    QuantSpec(integer(4), 32, margin=0.75, block_rows=2),
    dataclasses.replace(NVFP4_FOUR_OVER_SIX, margin=0.9, gain=1.01, block_rows=2),
    dataclasses.replace(NVFP4_EDEN, gain=0.99, correction_block=32),
]
SHAPE = (4, 128)  # one shape, so that every test meets compiled functions

each_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


def numbers(largest, smallest=0.0):
    """float32 arrays with many repeats, zeros and magnitudes far apart."""
    size = st.floats(smallest, largest, width=32)
    elements = st.one_of(st.just(0.0), size, size.map(lambda value: -value))
    return hnp.arrays(np.float32, SHAPE, elements=elements)


def entries_of_blocks(x, spec):
    """`(blocks, entries)`: what shares a scale in a row, rows in the order of the scales."""
    n, k = x.shape
    size = {None: k, "tensor": n * k}.get(spec.block_size, spec.block_size)
    if spec.block_rows == 1:
        return x.reshape(-1, size)
    tiles = x.reshape(n // spec.block_rows, spec.block_rows, k // size, size)
    return tiles.swapaxes(1, 2).reshape(-1, spec.block_rows * size)


def same_bits(a, b):
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_same_leaves(a, b):
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    assert all(map(same_bits, jax.tree.leaves(a), jax.tree.leaves(b)))


@given(numbers(2.0**120))
def test_values_equal_the_dequantized_codes_bit_for_bit(run, x):
    for spec in SPECS:
        q, dequantized, values, units = run(x, spec)
        assert same_bits(dequantized, values), spec
        assert np.isfinite(values).all(), spec
        assert np.isfinite(units).all(), spec
        assert q.shape == x.shape
        assert q.codes.dtype == spec.format.storage


@given(numbers(2.0**120))
def test_bfloat16_input_gives_the_codes_of_its_upcast(run, x):
    low = jnp.asarray(x).astype(jnp.bfloat16)
    for spec in [INT4, QUEST_INT3, MXFP4, QUEST_MXFP4_FLOOR, NVFP4_FOUR_OVER_SIX]:
        assert_same_leaves(run(low, spec)[0], run(low.astype(jnp.float32), spec)[0])


@given(numbers(2.0**30, 2.0**-30), st.integers(-30, 30))
def test_power_of_two_scaling_commutes(run, x, exponent):
    factor = np.float32(2.0**exponent)
    for spec in SPECS:
        assert np.array_equal(run(x * factor, spec)[2], run(x, spec)[2] * factor), spec


@given(numbers(2.0**60, 2.0**-60))
def test_negating_negates_off_ties(run, x):
    for spec in SPECS:
        values, units = run(x, spec)[2:]
        mirrored = -np.asarray(run(-x, spec)[2])
        is_tie = np.asarray(units) == np.floor(units)
        # Ties of mid-rise lie on the integers, and the even one of two codes mirrors to the odd.
        if spec.format.kind != "midrise":
            is_tie = np.zeros_like(is_tie)
        assert np.array_equal(values, np.where(is_tie, values, mirrored)), spec


@given(numbers(2.0**60, 2.0**-60))
def test_values_lie_on_the_grid_of_the_stored_scale(run, x):
    # So rounding again with that scale, instead of a new one, changes nothing.
    for spec in SPECS:
        q, _, values, _ = run(x, spec)
        scales = np.asarray(q.scales)
        scales = scales.astype(np.float64) if scales.dtype != np.uint8 else 2.0 ** (scales - 127.0)
        scales = scales * (1 if q.global_scale is None else np.float64(q.global_scale))
        blocks = entries_of_blocks(np.asarray(values, np.float64), spec)
        scales = scales.reshape(-1, 1)
        live = scales[:, 0] > 0
        units = blocks[live] / scales[live]
        grid = spec.format.grid
        if q.zero_points is not None:  # The grid of signed levels, wide enough for any zero point.
            grid = np.arange(-spec.format.max, spec.format.max + 1)
        above = np.clip(np.searchsorted(grid, units), 1, len(grid) - 1)
        distance = np.minimum(abs(units - grid[above - 1]), abs(units - grid[above]))
        # Bound: a value is the product of three float32, rounded at most twice.
        assert np.all(distance <= 2 * 2.0**-24 * abs(units)), spec
        assert np.all(blocks[~live] == 0), spec


@given(numbers(2.0**60, 2.0**-60))
def test_ocp_formats_are_idempotent_although_the_scale_is_found_again(run, x):
    for spec in [MXFP4, MXFP6, MXFP8]:
        values = run(x, spec)[2]
        assert np.array_equal(run(values, spec)[2], values), spec


@given(numbers(2.0**60))
def test_zero_blocks_store_zero_codes_and_scales(run, x):
    for spec in SPECS:
        rows = slice(spec.block_rows, 2 * spec.block_rows)
        holed = x.copy()
        holed[rows] = np.where(x[rows] < 0, -0.0, 0.0)
        q, _, values, units = run(holed, spec)
        scales, codes, values, units = map(np.asarray, (q.scales, q.codes, values, units))
        if spec.block_size != "tensor":
            assert not np.any(scales[1].view(np.uint8)), spec
        if spec.format.kind != "midrise" and spec.block_size != "tensor":
            assert not np.any(codes[rows].view(np.uint8)), spec
        assert np.all(values[rows] == 0), spec
        assert np.all(units[rows] == 0), spec


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@each_spec
def test_non_finite_blocks_decode_to_nan_as_a_whole_and_alone(run, spec, bad):
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    rows = np.arange(4) // spec.block_rows == 2 // spec.block_rows
    x[rows] /= 2  # so that the abs-max of the array lies elsewhere
    clean = np.asarray(run(np.where(rows[:, None], 0, x), spec)[2])
    x[2, 5] = bad
    q, *results = run(x, spec)
    dequantized, values, units = map(np.asarray, results)
    place = np.zeros(SHAPE, int)
    place[2, 5] = 1
    is_bad = entries_of_blocks(place, spec).any(-1)
    expected = np.zeros(SHAPE, bool)
    index = entries_of_blocks(np.arange(4 * 128).reshape(SHAPE), spec)
    expected.reshape(-1)[index[is_bad]] = True
    for result in (dequantized, values, units):
        np.testing.assert_array_equal(np.isnan(result), expected)
    marker = {1: 0xFF if q.scales.dtype == jnp.uint8 else 0x7F}.get(q.scales.dtype.itemsize)
    if marker is not None:
        stored = np.asarray(q.scales).view(np.uint8)
        np.testing.assert_array_equal((stored == marker).ravel(), is_bad)
    # The other rows are as if the bad one were absent: NVFP4's global scale ignores bad blocks.
    if spec.block_size != "tensor":
        np.testing.assert_array_equal(values[~rows], clean[~rows])


@each_spec
def test_a_single_huge_outlier_survives(run, spec):
    x = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    x[1, 7] = -(2.0**100)
    values = np.asarray(run(x, spec)[2])
    assert np.isfinite(values).all()
    if "rms" in spec.scale or "std" in spec.scale:
        # The outlier clips: alpha times rms, the row's rms being |outlier| / sqrt(block).
        assert 2.0**96 < -values[1, 7] < 2.0**100
    else:
        # Bound: half of the widest step is an eighth; floor clips by at most a quarter, and so does
        # the margin of 3/4. Stochastic rounding goes down by less than the widest step, from at
        # least 3 in the first binade of it, a third at most.
        np.testing.assert_allclose(values[1, 7], x[1, 7], rtol=1 / 3 if spec.needs_key else 0.25)


@pytest.mark.parametrize(
    "spec",
    [
        *(INT4, QUEST_INT3, QUEST_MXFP4_FLOOR, MXFP4_FITTED_ALIGNED, NVFP4_STOCHASTIC),
        *SPECS[-2:],  # four over six, and EDEN, each with all that there is to it
    ],
    ids=str,
)
def test_eager_jit_and_vmap_give_the_same_bits(run, spec):
    rng = np.random.default_rng(2)
    x = (rng.standard_t(3, (3, *SHAPE)) * 2.0 ** rng.integers(-20, 20, (3, 4, 1))).astype("f4")
    x[0, 0, :64] = 0
    x[1, 1, 3] = np.nan
    x[2, 3] *= np.float32(2.0**-115)
    compiled = [run(x[i], spec) for i in range(3)]
    key = jax.random.key(0)  # that of `run`
    eager = quantize(jnp.array(x[0]), spec, key=key)
    assert_same_leaves(eager, compiled[0][0])
    assert same_bits(dequantize(eager), compiled[0][1])
    mapped = jax.jit(jax.vmap(lambda y: quantize(y, spec, key=key)))(x)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(c[0] for c in compiled))
    assert_same_leaves(mapped, stacked)


def test_qtensors_pass_through_jit_vmap_scan_and_tree_map(run):
    x = np.random.default_rng(3).standard_normal((3, *SHAPE)).astype(np.float32)
    for spec in [NVFP4, QUEST_INT3]:
        stack = jax.jit(jax.vmap(lambda y, spec=spec: quantize(y, spec)))(x)
        assert stack.spec is spec

        def step(count, q):
            return count + 1, dequantize(q)

        _, scanned = jax.jit(lambda stack, step=step: jax.lax.scan(step, 0, stack))(stack)
        for i in range(3):
            q = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
            assert isinstance(q, QTensor)
            np.testing.assert_array_equal(scanned[i], run(x[i], spec)[1])
        structure = jax.eval_shape(lambda y, spec=spec: quantize(y, spec), jnp.array(x[0]))
        assert structure.shape == SHAPE
        assert jax.tree.map(np.shape, q).scales == np.shape(q.scales)


def test_leaves_are_dtypes_that_checkpoints_keep(tmp_path):
    x = jnp.array(np.random.default_rng(4).standard_normal((16, 128)), jnp.float32)
    key = jax.random.key(0)
    tree = {
        name: jax.eval_shape(lambda y, s=spec: quantize(y, s, key=key), x)
        for name, spec in PRESETS.items()
    }
    allowed = {"uint8", "int8", "float8_e4m3fn", "float8_e5m2", "float32"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} == allowed
    specs = {"mx": MXFP4, "nv": NVFP4, "fp8": FP8_E4M3}
    saved = jax.jit(lambda x: {name: quantize(x, spec) for name, spec in specs.items()})(x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", saved)
    assert_same_leaves(restored, saved)
    assert restored["nv"].spec == NVFP4


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (INT4, 4 + 32 / 128),
        (MXFP4, 4.25),
        (MXFP6, 6.25),
        (MXFP8, 8.25),
        (NVFP4, 4.5 + 32 / 512),
        (QUEST_INT3, 3 + 32 / 128),
        (FP8_E4M3_TENSOR, 8 + 32 / 512),
        (dataclasses.replace(NVFP4, block_rows=4), 4 + 8 / 64 + 32 / 512),
    ],
    ids=str,
)
def test_bytes_are_what_the_format_promises(spec, expected):
    q = jax.eval_shape(lambda: quantize(jnp.ones(SHAPE), spec))
    assert q.bits_per_param == expected  # Exact, the global scale of 32 bits included.
    assert q.nbytes * 8 == expected * 512
    once = 32 / 512 if spec.scale == "absmax_e4m3" or spec is FP8_E4M3_TENSOR else 0
    assert spec.bits_per_param(128) == expected - once


def test_scales_have_the_documented_shapes():
    def shapes(spec, shape):
        q = jax.eval_shape(lambda: quantize(jnp.ones(shape), spec))
        return q.codes.shape, q.scales.shape, q.shape

    assert shapes(MXFP4, (2, 3, 64)) == ((2, 3, 32), (2, 3, 2), (2, 3, 64))
    assert shapes(QUEST_INT3, (2, 3, 64)) == ((2, 3, 24), (2, 3, 1), (2, 3, 64))
    assert shapes(FP8_E4M3_TENSOR, (2, 3, 64)) == ((2, 3, 64), (2, 1, 1), (2, 3, 64))
    assert shapes(FP8_E4M3_TENSOR, (3, 64)) == ((3, 64), (1, 1), (3, 64))
    assert shapes(FP8_E4M3_TENSOR, (64,)) == ((64,), (1,), (64,))
    assert shapes(NVFP4_16X16, (3, 32, 64)) == ((3, 32, 32), (3, 2, 4), (3, 32, 64))


def test_stochastic_codes_follow_the_key_and_average_to_the_input(run):
    spec = MXFP4_FITTED_STOCHASTIC
    x = np.random.default_rng(5).standard_normal(SHAPE).astype(np.float32)
    first, again = run(x, spec, jax.random.key(0)), run(x, spec, jax.random.key(0))
    assert_same_leaves(first[0], again[0])
    assert same_bits(first[1], first[2])
    assert not same_bits(first[1], run(x, spec, jax.random.key(1))[1])
    keys = jax.random.split(jax.random.key(2), 1024)
    sample = jax.jit(jax.vmap(lambda key: quantize_values(jnp.array(x), spec, key=key)[0]))(keys)
    sample = np.asarray(sample, np.float64)
    # Statistical: the mean over all entries of (mean - x) / standard error is a unit normal over
    # sqrt(512) per entry; 5 of those. Entries on a level have no spread.
    spread = sample.std(0)
    moved = spread > 0
    score = (sample.mean(0) - x)[moved] / (spread[moved] / 32)
    assert abs(score.mean()) < 5 / score.size**0.5
    assert abs(score.std() - 1) < 5 / (2 * score.size) ** 0.5


def scoped_equations(jaxpr, scope):
    """How many equations, at any depth, lie under a named scope."""
    count = 0
    for equation in jaxpr.eqns:
        count += scope in str(equation.source_info.name_stack)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            count += scoped_equations(inner, scope)
    return count


def test_rounding_can_be_found_in_a_jaxpr_by_its_scope():
    x = jnp.ones((2, 32))
    for call in (quantize, quantize_values, lambda x, spec: fake_quantize(x, spec)):
        jaxpr = jax.make_jaxpr(lambda x, call=call: call(x, MXFP4))(x).jaxpr
        assert scoped_equations(jaxpr, "lowbit_quantize") > 0
    jaxpr = jax.make_jaxpr(lambda x: dequantize(quantize(x, MXFP4)))(x).jaxpr
    alone = jax.make_jaxpr(lambda x: quantize(x, MXFP4))(x).jaxpr
    scope = "lowbit_quantize"
    assert scoped_equations(jaxpr, scope) == scoped_equations(alone, scope)


def test_calls_that_cannot_work_say_why():
    x = jnp.ones((2, 40))
    with pytest.raises(ValueError, match=r"multiple of block_size=32, got shape \(2, 40\); pad it"):
        quantize(x, MXFP4)
    with pytest.raises(ValueError, match="quantize_values: the last axis"):
        quantize_values(x, NVFP4)
    with pytest.raises(ValueError, match="x must be floating, got int32"):
        quantize(jnp.ones((2, 32), jnp.int32), MXFP4)
    stochastic = dataclasses.replace(MXFP4, rounding="stochastic")
    with pytest.raises(ValueError, match=r"e2m1/32 absmax_floor stochastic .* needs a random key"):
        quantize(jnp.ones((2, 32)), stochastic)
    with pytest.raises(ValueError, match=r"eden margin 0\.988125 rounds at random and needs"):
        quantize(jnp.ones((2, 32)), NVFP4_EDEN)
    with pytest.raises(ValueError, match=r"block_rows=16, got shape \(8, 32\); pad it"):
        quantize(jnp.ones((8, 32)), NVFP4_16X16)
    with pytest.raises(ValueError, match=r"block_rows=16, got shape \(32,\)"):
        quantize(jnp.ones(32), NVFP4_16X16)
    with pytest.raises(ValueError, match=r"correction_block=128, got shape \(2, 64\); pad it"):
        quantize(jnp.ones((2, 64)), NVFP4_EDEN_128, key=jax.random.key(0))
    with pytest.raises(ValueError, match="whole bytes, got 9 codes of 4 bits"):
        quantize(jnp.ones((2, 9)), dataclasses.replace(INT4, block_size=None))
    values, _ = quantize_values(jnp.ones((2, 9)), dataclasses.replace(INT4, block_size=None))
    np.testing.assert_allclose(values, 1, rtol=2**-22)  # Bound: scale and product round.
    with pytest.raises(ValueError, match=r"at least one axis.*got shape \(\)"):
        quantize(jnp.float32(1), FP8_E4M3_TENSOR)
    with pytest.raises(ValueError, match="dtype must be floating, got int8"):
        dequantize(quantize(jnp.ones((2, 32)), MXFP4), jnp.int8)


def test_numpy_arrays_are_taken_as_jax_takes_them(run):
    x = np.random.default_rng(6).standard_normal(SHAPE)  # float64
    q, _, values, _ = run(x, MXFP4)
    assert_same_leaves(quantize(x, MXFP4), q)
    assert_same_leaves(quantize_values(x, MXFP4)[0], values)

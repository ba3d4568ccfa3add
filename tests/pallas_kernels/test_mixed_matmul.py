import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lowbit_jax.numerics import (
    INT4,
    INT8,
    MXFP4,
    MXFP4_FITTED,
    NVFP4,
    NVFP4_16X16,
    QUEST_INT4,
    QTensor,
    QuantSpec,
    dequantize,
    integer,
    quantize,
    unsigned,
)
from pallas_kernels.compat import kernel_names, lower_for_hopper, mosaic_obstacle
from pallas_kernels.mixed_matmul import (
    Config,
    PackedWeight,
    choose_config,
    decode,
    mixed_matmul,
    mixed_matmul_reference,
    prepack,
    unpack,
)
from pallas_kernels.mixed_matmul.layout import (
    TILE,
    from_thread_order,
    row_factors,
    scheme_of,
)
from pallas_kernels.mixed_matmul.operand import REGISTERS, tile_operand
from pallas_kernels.mixed_matmul.tuning import config_obstacle, lowering_cases
from pallas_kernels.testing import assert_bitwise_equal, run_interpreted

INT4_32 = QuantSpec(integer(4), 32)
INT4_FULL = QuantSpec(integer(4, is_full_range=True), 64)
UINT4 = QuantSpec(unsigned(4), 64, "minmax")
INT4_ROW = QuantSpec(integer(4), None)
SPECS = [
    MXFP4,
    MXFP4_FITTED,
    NVFP4,
    NVFP4_16X16,
    INT4,
    INT4_32,
    INT4_FULL,
    UINT4,
    INT4_ROW,
    QUEST_INT4,
]
KERNEL_SPECS = [MXFP4, NVFP4, INT4, INT4_32, UINT4, QUEST_INT4]
E2M1_LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

mosaic = pytest.mark.skipif(mosaic_obstacle() is not None, reason=str(mosaic_obstacle()))


NON_FINITE_ROWS = [11, 12]

quantize_jit = jax.jit(quantize, static_argnums=1)
dequantize_jit, prepack_jit = jax.jit(dequantize), jax.jit(prepack)
reference_jit = jax.jit(mixed_matmul_reference, static_argnames="out_dtype")


@pytest.fixture(scope="module")
def weights():
    """Blocks of all sizes, zero rows and blocks, an outlier, non-finite entries; (64, 256)."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(64, 256)) * 2.0 ** rng.integers(-9, 3, (64, 16)).repeat(16, axis=1)
    w[3], w[8, 32:64], w[9, 5], w[10, :16] = 0, 0, 300, 1e-9
    w[NON_FINITE_ROWS, [40, 77]] = np.nan, np.inf
    return jnp.asarray(w, jnp.float32)


def dyadic_operands(spec, m, n, k, seed):
    """x and weights of which every partial sum is exact in float32.

    x: multiples of 1/8 up to 1 (4 bits) times a power of two a row. Levels: 4 bits. Scales: of
    normal data, within a factor of 4 in a row; 4 bits each for E4M3, made powers of two where they
    are float32. Sums of 512 add 9 bits: 4 + 4 + 6 + 9 = 23 of 24 in the worst case.
    """
    rng = np.random.default_rng(seed)
    x = rng.integers(-8, 9, (m, k)) / 8 * 2.0 ** rng.integers(-20, 21, (m, 1))
    q = quantize_jit(jnp.asarray(rng.normal(size=(n, k)), jnp.float32), spec)
    if q.scales.dtype == jnp.float32:
        # Not by jnp.exp2, whose powers of two may miss by an ulp on a GPU.
        scales = np.exp2(np.round(np.log2(np.asarray(q.scales))))
        q = dataclasses.replace(q, scales=jnp.asarray(scales))
    return jnp.asarray(x, jnp.bfloat16), q


def normal_operands(spec, m, n, k, seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16)
    return x, quantize_jit(jnp.asarray(rng.normal(size=(n, k)), jnp.float32), spec)


def exact_product(x, q):
    """In float64, and the sum of the magnitudes of its terms."""
    w = np.asarray(dequantize_jit(dataclasses.replace(q, global_scale=None)), np.float64)
    x = np.asarray(x, np.float64)
    factor = 1.0 if q.global_scale is None else float(q.global_scale)
    return x @ w.T * factor, np.abs(x) @ np.abs(w).T * factor


def bits_to_float(bits):
    """bfloat16 bit patterns as float64, subnormal numbers included."""
    return np.asarray(bits).astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_prepacking_is_undone_exactly(spec, weights):
    q = quantize_jit(weights, spec)
    assert_bitwise_equal(jax.jit(lambda q: unpack(prepack(q)))(q), q)


@pytest.mark.parametrize("spec", [MXFP4, NVFP4, INT4], ids=str)
def test_prepacking_adds_no_bytes_but_a_reference_a_row(spec, weights):
    q = jax.eval_shape(lambda w: quantize(w, spec), weights)
    assert jax.eval_shape(prepack, q).nbytes == q.nbytes + (2 * 64 if spec == MXFP4 else 0)


def test_every_e2m1_code_in_every_place_becomes_its_level():
    codes = jax.random.bits(jax.random.key(0), (512, 4, 2), jnp.uint32) & 15
    words = decode.e2m1_words(codes)
    pairs = np.stack([np.asarray(p) for p in decode.e2m1_pairs(words)], axis=1)
    for half in range(2):
        found = bits_to_float(pairs >> (16 * half) & 0xFFFF) * 2.0**126
        expected = E2M1_LEVELS[np.asarray(codes[..., half])]
        np.testing.assert_array_equal(found, expected)  # exact, the signs of zeros aside
        np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


@pytest.mark.parametrize("step", [1, 2])
def test_every_integer_code_in_every_place_becomes_its_number(step):
    codes = jax.random.bits(jax.random.key(1), (512, 4, 2), jnp.uint32) & 15
    words = decode.integer_words(codes)
    pairs = np.stack([np.asarray(p) for p in decode.integer_pairs(words, step=step)], axis=1)
    for half in range(2):
        found = bits_to_float(pairs >> (16 * half) & 0xFFFF)
        np.testing.assert_array_equal(found, 128.0 + step * np.asarray(codes[..., half]))


def test_e4m3_scales_times_levels_are_exact_in_bfloat16():
    bits = np.arange(127, dtype=np.uint8)
    stored = decode.normalize_e4m3(jnp.asarray(bits))
    np.testing.assert_array_equal(decode.denormalize_e4m3(stored), bits)
    for index in range(4):
        words = stored.astype(jnp.uint32) << 8 * index
        pairs = np.asarray(decode.e4m3_pairs(words, index))
        np.testing.assert_array_equal(pairs >> 16, pairs & 0xFFFF)
        scales = bits_to_float(pairs & 0xFFFF)
        values = bits.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        np.testing.assert_array_equal(scales[1:], values[1:] * 2.0**107)
    products = scales[1:, None] * (E2M1_LEVELS * 2.0**-126)
    np.testing.assert_array_equal(products.astype(ml_dtypes.bfloat16), products)
    np.testing.assert_array_equal(
        products * 2.0**-decode.E4M3_FACTOR_LOG2, values[1:, None] * E2M1_LEVELS
    )


def test_a_nan_e4m3_scale_stays_nan():
    stored = decode.normalize_e4m3(jnp.array([0x7F, 0xFF], jnp.uint8))
    bits = decode.e4m3_pairs(stored.astype(jnp.uint32), 0) & 0xFFFF
    assert np.all(np.isnan(bits_to_float(bits)))
    np.testing.assert_array_equal(decode.denormalize_e4m3(stored), [0x7F, 0x7F])


def test_e8m0_bytes_are_exponents():
    words = jnp.arange(256, dtype=jnp.uint32)
    for index in range(4):
        pairs = np.asarray(decode.e8m0_pairs(words << 8 * index, index))
        np.testing.assert_array_equal(pairs >> 16, pairs & 0xFFFF)
        exponents = np.arange(1, 255)
        np.testing.assert_array_equal(
            bits_to_float(pairs & 0xFFFF)[1:255], np.exp2(exponents - 127.0)
        )


def test_registers_hold_what_wgmma_reads_from_them():
    # PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16": thread t of a warpgroup holds in
    # its register a (two numbers, the first in the low half) row 16 (t / 32) + (t % 32) / 4, 8
    # further for odd a, and columns 2 (t % 4), the next, 8 further from a = 2 on.
    numbers = jnp.arange(512 * 4 * 2, dtype=jnp.int32).reshape(1, 1, 512, 4, 2)
    matrix = np.asarray(from_thread_order(numbers, 1, 1))
    for thread in range(128):
        for register, (pair, step) in enumerate(REGISTERS):
            instruction, a = divmod(register, 4)
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (a % 2)
            column = 16 * instruction + 2 * (thread % 4) + 8 * (a // 2)
            word = 4 * thread + step
            np.testing.assert_array_equal(
                matrix[row, column : column + 2], np.asarray(numbers[0, 0, word, pair])
            )


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_decoded_tiles_times_their_factors_are_the_weights(spec, weights):
    q = quantize_jit(weights, spec)
    expected = np.array(dequantize_jit(q))
    if spec in (MXFP4, MXFP4_FITTED):  # a NaN there spreads along the row, as it does in a product
        expected[NON_FINITE_ROWS] = np.nan
    # Exact: decoded numbers are, products by powers of two are, and of the others each weight sees
    # one alone, or two in the order of `dequantize`.
    np.testing.assert_array_equal(decoded(prepack_jit(q)), expected)


@jax.jit
def decoded(w):
    """All tiles as the kernel decodes them, with what it multiplies sums by."""
    scheme = scheme_of(w.spec, w.shape[1])
    groups = [list(rows) for rows in (w.scales, w.zero_points) if rows is not None]
    tiles = []
    for tile in range(w.shape[1] // TILE):
        operand = tile_operand(w.words[0, tile], groups, tile * TILE, scheme=scheme, interpret=True)
        tiles.append(operand.astype(jnp.float32))
    values = jnp.concatenate(tiles, axis=1)
    if scheme.scales == "float32":
        values = values * jnp.repeat(w.scales.T, scheme.group, axis=1)
    return values * jnp.broadcast_to(row_factors(w), values.shape[:1])[:, None]


@pytest.mark.parametrize("spec", [MXFP4, NVFP4, UINT4, QUEST_INT4], ids=str)
def test_reference_is_the_product_of_dequantized_weights(spec):
    x, q = dyadic_operands(spec, 5, 64, 512, seed=0)
    expected, _ = exact_product(x, q)
    # Exact: sums are, and the product by the global scale is rounded once.
    found = reference_jit(x, q, out_dtype=jnp.float32)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@mosaic
@pytest.mark.parametrize(
    ("spec", "m", "config"),
    [
        (MXFP4, 16, Config(2, 2, 128)),
        (MXFP4, 3, Config(1, 1, 256)),
        (NVFP4, 5, Config(1, 2, 256)),
        (INT4, 8, Config(2, 2, 256)),
        (INT4_32, 9, Config(1, 2, 128)),
        (UINT4, 8, Config(2, 4, 128)),
        (QUEST_INT4, 24, Config(1, 2, 128)),
    ],
    ids=str,
)
def test_kernel_equals_reference_on_dyadic_data(spec, m, config):
    x, q = dyadic_operands(spec, m, 128, 512, seed=1)
    found = run_interpreted(interpreted(jnp.float32, config), x, prepack_jit(q))
    assert_bitwise_equal(found, reference_jit(x, q, out_dtype=jnp.float32))


@mosaic
@pytest.mark.parametrize("spec", [NVFP4, INT4], ids=str)
def test_kernel_is_within_the_rounding_of_float32_sums(spec):
    x, q = normal_operands(spec, 4, 64, 512, seed=2)
    found = run_interpreted(interpreted(jnp.float32, Config(1, 2, 128)), x, prepack_jit(q))
    assert_within_rounding(found, x, q)


@mosaic
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_zeros_outliers_and_non_finite_numbers_are_those_of_the_reference():
    # Powers of two: an outlier of 2**40, 2**50 times what else is in its row, a zero row, a zero
    # block, a NaN and an infinite block, NaN and infinity in x. Sums with the outlier are inexact.
    x, q = dyadic_operands(MXFP4, 8, 64, 512, seed=3)
    w, x = np.array(dequantize_jit(q)), np.array(x)
    w[0], w[1, 32:64], w[2, 3], w[3, 70], w[4, 130] = 0, 0, 2.0**40, np.nan, np.inf
    x[5, 100], x[6, 200] = np.nan, np.inf
    x, q = jnp.asarray(x), quantize_jit(jnp.asarray(w), MXFP4)
    found = run_interpreted(interpreted(jnp.bfloat16, Config(1, 2, 256)), x, prepack_jit(q))
    found, expected = (np.asarray(a, np.float32) for a in (found, reference_jit(x, q)))
    exact = np.arange(64) != 2
    np.testing.assert_array_equal(found[:, exact], expected[:, exact])
    # Bound: what float32 sums may lose, 2**-15, and a rounding to bfloat16 each, 2**-8.
    np.testing.assert_allclose(found[:, 2], expected[:, 2], rtol=2**-7 + 2**-14)
    assert np.all(np.isnan(found[:, 3:5]))
    assert np.all(np.isfinite(found[:5, 5:]))


@mosaic
@pytest.mark.parametrize("case", list(lowering_cases()), ids=lambda case: case[0])
def test_every_shape_of_the_table_lowers_for_hopper(case):
    _, fn, args = case
    assert kernel_names(lower_for_hopper(fn, *args)) == ["lowbit_mixed_matmul"]


@pytest.mark.parametrize("sums_group", [None, 32])
@pytest.mark.parametrize("m", [1, 16, 64])
@pytest.mark.parametrize("n", [64, 640, 4096, 14336])
@pytest.mark.parametrize("k", [128, 640, 4096, 14336])
def test_chosen_schedules_fit(m, n, k, sums_group):
    config = choose_config(m, n, k, sums_group=sums_group)
    assert config_obstacle(config, m, n, k) is None


def test_calls_that_do_not_fit_together_are_errors():
    w = packed_ones()
    with pytest.raises(ValueError, match=r"x must be \(m, k\) .* \(4, 64\) and \(64, 128\)"):
        mixed_matmul(jnp.zeros((4, 64), jnp.bfloat16), w)
    with pytest.raises(ValueError, match=r"must be packed in version 1 .* got version 0"):
        mixed_matmul(jnp.zeros((4, 128), jnp.bfloat16), dataclasses.replace(w, version=0))
    with pytest.raises(ValueError, match=r"must be a matrix, got shape \(2, 64, 128\)"):
        packed_ones((2, 64, 128))


@pytest.mark.parametrize(
    ("shape", "spec"), [((64, 128), INT8), ((60, 128), MXFP4), ((64, 96), MXFP4)], ids=str
)
def test_weights_that_are_not_covered_are_refused(shape, spec):
    with pytest.raises(
        NotImplementedError, match=r"(prepack|mixed_matmul): .* got .*; (pad|dequantize)"
    ):
        packed_ones(shape, spec)


@mosaic
def test_products_that_are_not_covered_are_refused():
    w = packed_ones()
    x = jnp.zeros((4, 128), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="x must be bfloat16, got float32"):
        mixed_matmul(x.astype(jnp.float32), w)
    with pytest.raises(NotImplementedError, match="1 to 64 rows, got 65"):
        mixed_matmul(jnp.zeros((65, 128), jnp.bfloat16), w)
    with pytest.raises(NotImplementedError, match=r"out_dtype must be .* got float16"):
        mixed_matmul(x, w, out_dtype=jnp.float16)
    with pytest.raises(NotImplementedError, match=r"columns of 512 for .* choose another config"):
        mixed_matmul(x, w, config=Config(1, 4, 128))


@pytest.mark.gpu
@pytest.mark.parametrize("spec", KERNEL_SPECS, ids=str)
@pytest.mark.parametrize("m", [1, 16, 64])
def test_kernel_equals_reference_on_the_gpu(spec, m):
    for seed in range(2):
        x, q = dyadic_operands(spec, m, 1024, 512, seed)
        found = mixed_matmul(x, prepack(q), out_dtype=jnp.float32)
        assert_bitwise_equal(found, mixed_matmul_reference(x, q, out_dtype=jnp.float32))
        x, q = normal_operands(spec, m, 1024, 1024, seed)
        assert_within_rounding(mixed_matmul(x, prepack(q), out_dtype=jnp.float32), x, q)


def packed_ones(shape=(64, 128), spec=MXFP4):
    return jax.jit(lambda w: prepack(quantize(w, spec)))(jnp.ones(shape))


def interpreted(out_dtype, config):
    def product(x, w: PackedWeight):
        return mixed_matmul(x, w, out_dtype=out_dtype, config=config, interpret=True)

    return product


def assert_within_rounding(found, x, q: QTensor):
    """Bound: of k terms each addition errs by 2**-23 of the partial sum at most, truncation of the
    tensor core included, and few products by scales err besides."""
    expected, magnitudes = exact_product(x, q)
    error = np.abs(np.asarray(found, np.float64) - expected)
    assert np.all(error <= (x.shape[1] + 4) * 2.0**-23 * magnitudes)

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.numerics import MXFP4, dequantize, quantize
from lowbit_jax.rotations.hadamard import hadamard_matrix
from pallas_kernels.compat import (
    abstract_hopper,
    kernel_names,
    lower_for_hopper,
    mosaic_obstacle,
    shared_memory_bytes,
)
from pallas_kernels.folded import fold, pack_mask
from pallas_kernels.scaled_matmul import Config, choose_config, scaled_matmul
from pallas_kernels.scaled_matmul import scaled_matmul_reference as reference
from pallas_kernels.scaled_matmul.epilogue import Epilogue
from pallas_kernels.scaled_matmul.tuning import CONFIGS, Shares, lowering_cases, share_out
from pallas_kernels.testing import assert_bitwise_equal, run_interpreted

needs_mosaic = pytest.mark.skipif(mosaic_obstacle() is not None, reason=str(mosaic_obstacle()))
E4M3, E5M2, BF16, F32 = jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16, jnp.float32
UNIT = 2.0**-24  # half a unit in the last place of 1 in float32


def dyadic_operands(seed, m, n, k, a_dtype=E4M3, b_dtype=E4M3):
    """Operands whose sums, scaled and transformed, need no more than 21 bits.

    Entries are multiples of 1/8 up to 3/8, so that a sum of 1024 products is less than 2**14 of
    its units and one of 512 less than 2**13, which FP8 tensor cores keep. Scales of rows are
    2**-9 to 2**9; of columns 1 or 2, for a transform adds up to 128 columns.
    """
    rng = np.random.default_rng(seed)
    a, b = (jnp.asarray(rng.integers(-3, 4, (rows, k)) / 8, F32) for rows in (m, n))
    a_scales = jnp.asarray(2.0 ** rng.integers(-9, 10, m), F32)
    b_scales = jnp.asarray(2.0 ** rng.integers(0, 2, n), F32)
    mask = None if n % 32 else pack_mask(jnp.asarray(rng.random((m, n)) < 0.7))
    return (a.astype(a_dtype), b.astype(b_dtype), a_scales, b_scales), mask


def assert_equals_reference(
    operands, mask=None, run=run_interpreted, interpret=True, num_cores=None, **options
):
    """The kernel equals the reference bitwise."""
    config = options.pop("config", None)
    run = functools.partial(run, num_cores=num_cores) if num_cores else run

    def kernel(*args):
        return scaled_matmul(
            *args[:-1], mask=args[-1], config=config, interpret=interpret, **options
        )

    actual = run(kernel, *operands, mask)
    expected = jax.jit(functools.partial(reference, **options))(*operands, mask=mask)
    assert_bitwise_equal(np.asarray(actual), np.asarray(expected))


# The reference


def test_the_reference_is_the_product_of_dequantized_operands():
    x, w = (jax.random.normal(jax.random.key(i), (rows, 256)) for i, rows in enumerate((64, 32)))

    @jax.jit
    def product_and_operands(x, w):
        qx, qw = quantize(x, MXFP4), quantize(w, MXFP4)
        fx, fw = fold(qx), fold(qw)
        y = reference(fx.values, fw.values, fx.scales, fw.scales, out_dtype=F32)
        return y, dequantize(qx), dequantize(qw)

    actual, *dequantized = product_and_operands(x, w)
    dx, dw = (np.asarray(d, np.float64) for d in dequantized)
    # Bound: 255 additions in float32, in any order; the factors are powers of two.
    assert np.all(np.abs(actual - dx @ dw.T) <= 256 * UNIT * (np.abs(dx) @ np.abs(dw).T))


def test_the_reference_masks_scaled_sums_and_transforms_last():
    rng = np.random.default_rng(0)
    a = rng.integers(-3, 4, (8, 64)).astype(np.float32)
    keep = rng.random((8, 64)) < 0.5
    scales = np.float32(2.0) ** rng.integers(-2, 3, 8)
    actual = reference(
        jnp.asarray(a, E4M3),
        jnp.eye(64, dtype=E4M3),
        jnp.asarray(scales),
        jnp.float32(4.0),
        out_dtype=F32,
        mask=pack_mask(jnp.asarray(keep)),
        inverse_hadamard=16,
    )
    scaled = np.where(keep, 4 * scales[:, None] * a, 0).reshape(8, 4, 16)
    expected = (scaled @ hadamard_matrix(16) / 4).reshape(8, 64)
    np.testing.assert_array_equal(actual, expected)  # Exact: integers times powers of two.


def test_the_reference_rounds_to_bfloat16_before_and_after_the_transform():
    a = jnp.full((8, 128), 1.0, E4M3).at[:, 0].set(256)
    b = jnp.ones((16, 128), E4M3)
    # 383 needs 9 bits: bfloat16 makes it 384, times 16 / sqrt(16).
    actual = jax.jit(functools.partial(reference, inverse_hadamard=16))(a, b)
    assert float(actual[0, 0]) == 4 * 384
    assert float(reference(a, b, inverse_hadamard=16, out_dtype=F32)[0, 0]) == 4 * 383


# Calls


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": jnp.zeros((64, 64), E4M3)}, r"b \(n, k\), got shapes \(32, 128\) and \(64, 64\)"),
        ({"a_scales": jnp.ones(64)}, r"a_scales must be float32 of shape \(32,\)"),
        ({"b_scales": jnp.ones(64, BF16)}, "b_scales must be float32"),
        ({"mask": jnp.zeros((32, 2), jnp.uint32)}, r"mask must be uint32 of shape \(n / 32, m\)"),
        ({"inverse_hadamard": 128}, "n must be a multiple of inverse_hadamard=128, got n=64"),
    ],
)
def test_wrong_calls_say_what_is_wrong(changes, message):
    arguments = {"a": jnp.zeros((32, 128), E4M3), "b": jnp.zeros((64, 128), E4M3), **changes}
    with pytest.raises(ValueError, match=message):
        scaled_matmul(**arguments)


@needs_mosaic
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_dtype": jnp.float16}, "out_dtype must be bfloat16 or float32, got float16"),
        ({"inverse_hadamard": 8}, "inverse_hadamard must be one of"),
        ({"inverse_hadamard": 128, "config": Config(tile_n=192)}, "tile_n must be a multiple"),
        (
            {"inverse_hadamard": 128, "out_dtype": F32, "config": Config(256, 256, 2)},
            "two stages of .* do not fit",
        ),
    ],
)
def test_what_is_not_covered_is_refused(options, message):
    a = jnp.zeros((128, 256), E4M3)
    with pytest.raises(NotImplementedError, match=message):
        scaled_matmul(a, a, **options)


@needs_mosaic
def test_operands_of_other_dtypes_are_refused():
    a = jnp.zeros((64, 128), E5M2)
    with pytest.raises(NotImplementedError, match="got float8_e5m2 and bfloat16"):
        scaled_matmul(a, a.astype(BF16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile_m": 64}, "multiple of 64 rows, got tile_m=64, consumers=2"),
        ({"tile_m": 320, "consumers": 1}, "tile_m must be 64 to 256, got 320"),
        ({"tile_n": 320}, "tile_n must be 64, 128, 192 or 256, got 320"),
        ({"promote": None, "overlap": 2}, "got promote=None"),
        ({"promote": 0}, "promote and overlap must be 1 or more"),
        ({"stages": 1}, "stages must be 2 or more, got 1"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


@pytest.mark.parametrize(
    ("m", "n", "dtype", "name"),
    [
        (16384, 4096, E4M3, "fp8_192x128_pairs"),  # 20.85 rounds
        (16384, 2048, E4M3, "fp8_192x128_pairs"),  # 10.4 rounds, 11 as no bands fit
        (16384, 640, E4M3, "fp8_192x128"),  # 5 columns of tiles, which pairs make 6
        (1024, 1024, E4M3, "fp8_128x128"),  # 128 bands, not 64 tiles
        (16384, 4096, BF16, "bf16_128x256"),
        (1024, 1024, BF16, "bf16_128x128"),
    ],
)
def test_the_entry_with_the_shortest_rounds_is_chosen(m, n, dtype, name):
    plain = Epilogue(np.dtype(BF16))
    full = Epilogue(np.dtype(BF16), "scalar", "scalar", has_mask=True, inverse_hadamard=32)
    assert choose_config(m, n, dtype, plain) == CONFIGS[name]
    assert choose_config(m, n, dtype, full) == CONFIGS[name]


@pytest.mark.parametrize(
    ("size", "name"),
    [
        (4096, "fp8_192x128_pairs"),  # 5 rounds and one of bands
        (2048, "fp8_128x128"),  # 1.94 rounds, not 1 and one of bands
    ],
)
def test_gradients_get_the_entry_that_was_fastest(size, name):
    gradient = Epilogue(np.dtype(F32), "scalar", "scalar", has_mask=True, inverse_hadamard=32)
    assert choose_config(size, size, E5M2, gradient) == CONFIGS[name]


@needs_mosaic
def test_tiles_of_a_last_round_are_cut_into_bands_where_there_are_blocks():
    single, pairs = CONFIGS["fp8_192x128"], CONFIGS["fp8_192x128_pairs"]
    with abstract_hopper():
        # 22 x 32 tiles are 5 x 132 and 44, of three bands each; or 22 x 16 pairs for 66.
        assert share_out(4096, 4096, single) == Shares((22, 32), 660, 132, 132)
        assert share_out(4096, 4096, pairs) == Shares((22, 16), 330, 66, 66)
        # 86 x 16 tiles leave 56, whose 168 bands are too many.
        assert share_out(16384, 2048, single) == Shares((86, 16), 1376, 0, 132)


def test_a_large_epilogue_gets_a_tile_that_fits():
    epilogue = Epilogue(np.dtype(F32), inverse_hadamard=128)
    assert choose_config(16384, 4096, E4M3, epilogue) == CONFIGS["fp8_128x128"]


# The kernel, interpreted


E5M2S = {"a_dtype": E5M2, "b_dtype": E5M2}
CASES = {  # shape, dtypes, options; on one core no tile is cut into bands
    "every_tile_replaces_scales_and_mask": (  # what only their own barriers order: k ends early
        (256, 384, 256),
        {},
        {"config": Config(stages=2), "mask": True},
    ),
    "unpromoted_no_transform_float32": (
        (128, 256, 384),
        {},
        {"config": CONFIGS["fp8_128x256_unpromoted"], "out_dtype": F32, "num_cores": 1},
    ),
    "unpromoted_bands": (
        (128, 256, 384),
        {},
        {"config": CONFIGS["fp8_128x256_unpromoted"], "has_bands": True},
    ),
    "parts_of_wide_tiles_take_turns": (
        (200, 512, 128),
        {},
        {"config": CONFIGS["fp8_128x256_unpromoted"], "inverse_hadamard": 64},
    ),
    "three_staggered_consumers_ragged_m_mask_hadamard": (
        (200, 192, 640),
        {},
        {"config": CONFIGS["fp8_192x128"], "inverse_hadamard": 32, "mask": True},
    ),
    "chains_with_a_rest_mask": (
        (128, 128, 896),
        {},
        {"config": Config(stages=3, promote=2, overlap=2), "mask": True, "num_cores": 1},
    ),
    "wide_tile_float32_hadamard_in_two_terms": (
        (128, 192, 512),
        {},
        {
            "config": Config(tile_n=192, stages=2),
            "inverse_hadamard": 64,
            "out_dtype": F32,
            "num_cores": 1,
        },
    ),
    "pairs_odd_tiles_mask": (
        (128, 384, 256),
        {},
        {"config": Config(stages=2, multicast=True), "mask": True},
    ),
    "bands_after_whole_tiles": (
        (256, 384, 384),
        E5M2S,
        {
            "config": Config(stages=2, promote=1),
            "mask": True,
            "inverse_hadamard": 32,
            "out_dtype": F32,
            "num_cores": 5,
            "has_bands": True,
        },
    ),
    "pairs_of_bands": (
        (128, 256, 384),
        {},
        {
            "config": Config(stages=2, multicast=True),
            "mask": True,
            "num_cores": 4,
            "has_bands": True,
        },
    ),
    "consumers_without_rows": (
        (136, 64, 384),
        E5M2S,
        {"config": Config(tile_m=192, tile_n=64, consumers=3, stages=2), "mask": True},
    ),
    "bfloat16_hadamard_128": (
        (64, 256, 256),
        {"a_dtype": BF16, "b_dtype": BF16},
        {
            "config": CONFIGS["bf16_128x256"],
            "inverse_hadamard": 128,
            "mask": True,
            "num_cores": 1,
        },
    ),
    "float32_hadamard_128_mask": (
        (64, 128, 256),
        {},
        {
            "config": Config(stages=2),
            "inverse_hadamard": 128,
            "out_dtype": F32,
            "mask": True,
            "num_cores": 1,
        },
    ),
    "band_without_rows_ragged_all_over": (
        (5, 72, 200),
        {"a_dtype": E5M2},
        {"config": Config(stages=2), "has_bands": True},
    ),
    "hadamard_16_chosen_config_e5m2_weights": (
        (64, 64, 128),
        {"b_dtype": E5M2},
        {"inverse_hadamard": 16},
    ),
}


@needs_mosaic
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_equals_the_reference_bitwise(case):
    shape, dtypes, options = CASES[case]
    options = dict(options)
    operands, mask = dyadic_operands(0, *shape, **dtypes)
    masked, has_bands = options.pop("mask", False), options.pop("has_bands", False)
    if "config" in options:
        with abstract_hopper(options.get("num_cores", 2)):
            shares = share_out(shape[0], shape[1], options["config"])
            assert bool(shares.bands) == has_bands
    assert_equals_reference(operands, mask if masked else None, **options)


@needs_mosaic
@pytest.mark.parametrize(
    ("a_kind", "b_kind"),
    [(None, None), ("scalar", None), (None, "rows"), ("scalar", "scalar"), ("rows", "scalar"),
     ("scalar", "rows")],
)  # fmt: skip
def test_scales_of_rows_or_of_all_are_optional(a_kind, b_kind):
    (a, b, _, _), _ = dyadic_operands(1, 64, 64, 128, E5M2, E4M3)
    rng = np.random.default_rng(1)
    # Any numbers: what is multiplied with what shows in the last bit.
    scales = [jnp.asarray(rng.uniform(0.5, 2, 64), F32) for _ in range(2)]
    kinds = {None: lambda s: None, "scalar": lambda s: s[3], "rows": lambda s: s}
    operands = (a, b, kinds[a_kind](scales[0]), kinds[b_kind](scales[1]))
    assert_equals_reference(operands, config=Config(stages=2), out_dtype=F32)


@needs_mosaic
def test_ordinary_numbers_differ_by_rounding_alone():
    m, n, k = 64, 64, 640
    keys = jax.random.split(jax.random.key(2), 4)
    a, b = (jax.random.normal(key, (64, k)).astype(E4M3) for key in keys[:2])
    a_scales, b_scales = (jax.random.uniform(key, (64,), F32, 0.5, 2.0) for key in keys[2:])
    operands = (a, b, a_scales, b_scales)
    options = {"out_dtype": F32, "inverse_hadamard": 32}

    def kernel(*args):
        return scaled_matmul(*args, config=Config(stages=2), interpret=True, **options)

    actual = np.asarray(run_interpreted(kernel, *operands))
    expected = np.asarray(reference(*operands, **options))
    # Bounds: a sum of k products in float32, in either order, errs by k units of the sum of
    # magnitudes, scaling by 2; the transform adds 32 such terms, in float32 both times, and the
    # kernel's two bfloat16 terms stand for an entry but for 2**-17 of it: the first misses an
    # entry of binade 1 by 2**-8 at most, which the second, of binade 2**-9, does by 2**-17.
    a64, b64, r64, c64 = (np.asarray(x, np.float64) for x in operands)
    magnitudes = (np.abs(a64) @ np.abs(b64).T) * r64[:, None] * c64
    per_entry = magnitudes * (2 * (k + 2) * UNIT + 2.0**-17 + 2 * 33 * UNIT)
    bound = per_entry.reshape(m, n // 32, 32).sum(-1) / 32**0.5
    assert np.all(np.abs(actual - expected) <= np.repeat(bound, 32, -1))


def assert_odd_numbers_stay_where_they_belong(is_masked, run=run_interpreted, interpret=True):
    (a, b, a_scales, b_scales), mask = dyadic_operands(3, 64, 64, 256)
    a = a.at[3, 5].set(jnp.nan).at[4].set(0)
    b = b.at[7].set(0)
    a_scales = a_scales.at[9].set(jnp.nan).at[10].set(jnp.inf).at[11].set(0).at[12].set(2.0**120)
    operands, mask = (a, b, a_scales, b_scales), mask if is_masked else None

    call = functools.partial(scaled_matmul, config=Config(stages=2), interpret=interpret)
    actual = run(lambda *args: call(*args[:-1], mask=args[-1]), *operands, mask)
    actual = np.asarray(actual, np.float32)
    expected = np.asarray(reference(*operands, mask=mask), np.float32)
    np.testing.assert_array_equal(actual, expected)  # Exact; NaNs at the same places.
    assert not np.any(np.isnan(np.delete(actual, [3, 9, 10], axis=0)))
    assert np.isnan(actual[[3, 9]]).any(axis=1).all()


@needs_mosaic
@pytest.mark.parametrize("is_masked", [False, True])
def test_odd_numbers_stay_where_they_belong(is_masked):
    assert_odd_numbers_stay_where_they_belong(is_masked)


# Lowering


@needs_mosaic
@pytest.mark.parametrize("case", [case[0] for case in lowering_cases()])
def test_every_entry_lowers_and_fits_into_shared_memory(case):
    (found,) = (c for c in lowering_cases() if c[0] == case)
    _, fn, args = found
    with abstract_hopper():
        shares = share_out(args[0].shape[0], args[1].shape[0], fn.keywords["config"])
        assert min(shares.whole, shares.bands) > 0
        lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",))
    assert kernel_names(lowered.as_text()) == ["lowbit_scaled_matmul"]
    (size,) = shared_memory_bytes(lowered)
    assert size <= 227 * 1024  # what a block may have on an H100


@needs_mosaic
def test_only_the_kernel_runs_where_nothing_is_ragged():
    # 16384 is no multiple of 192, and there are as many scales.
    m, n, k = 16384, 2048, 2048
    args = [jax.ShapeDtypeStruct((rows, k), E5M2) for rows in (m, n)]
    args += [jax.ShapeDtypeStruct(shape, F32) for shape in ((m,), ())]
    args.append(jax.ShapeDtypeStruct((n // 32, m), jnp.uint32))

    def product(a, b, a_scales, b_scale, mask):
        return scaled_matmul(a, b, a_scales, b_scale, mask=mask, inverse_hadamard=32)

    module = lower_for_hopper(product, *args)
    assert kernel_names(module) == ["lowbit_scaled_matmul"]
    found = set(re.findall(r"stablehlo\.(\w+)", module))
    assert found == {"custom_call", "constant", "reshape"}  # of which only the first does anything


@needs_mosaic
def test_ragged_shapes_lower():
    shapes = ((1111, 1800), (1000, 1800), (1111,), (1000,))
    dtypes = (E4M3, E4M3, F32, F32)
    args = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    assert kernel_names(lower_for_hopper(scaled_matmul, *args)) == ["lowbit_scaled_matmul"]


# On the device


def run_on_device(fn, *args):
    return jax.block_until_ready(jax.jit(fn)(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_device_equals_the_reference_bitwise(name, seed):
    # e5m2 in one test, e4m3 in the other.
    dtype = BF16 if name.startswith("bf16") else (E4M3, E5M2)[seed]
    config = CONFIGS[name]
    # Two tiles or more for each of 132 multiprocessors, so that every slot is used again; bands
    # follow; and of three consumers two have no rows of the last tiles.
    m, n = 2904, 3200
    operands, mask = dyadic_operands(seed, m, n, 1024, dtype, dtype)
    shares = share_out(m, n, config)
    assert shares.whole >= 2 * shares.slots
    assert shares.bands > 0
    for options in (
        {},
        {"out_dtype": F32, "inverse_hadamard": 16},
        {"inverse_hadamard": 32, "mask": mask},
        {"inverse_hadamard": 128, "mask": mask},
    ):
        assert_equals_reference(
            operands, run=run_on_device, interpret=False, config=config, **options
        )


@pytest.mark.gpu
@pytest.mark.parametrize("is_masked", [False, True])
def test_odd_numbers_stay_where_they_belong_on_the_device(is_masked):
    assert_odd_numbers_stay_where_they_belong(is_masked, run=run_on_device, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("promote", [1, 4, 8])
def test_the_device_errs_by_what_fp8_sums_keep(promote, seed):
    m, n, k = 1000, 1024, 4096
    keys = jax.random.split(jax.random.key(seed), 2)
    a, b = (
        jax.random.normal(key, (r, k)).astype(E4M3) for key, r in zip(keys, (m, n), strict=True)
    )
    config = dataclasses.replace(CONFIGS["fp8_192x128"], promote=promote)
    actual = scaled_matmul(a, b, out_dtype=F32, config=config)
    a64, b64 = (np.asarray(x, np.float64) for x in (a, b))
    # Bound: 4 `promote` products of 32 columns are added to a sum that keeps 13 bits below the
    # largest of 33 terms, each cut off; no term exceeds the block's sum of magnitudes.
    bound = 0
    for start in range(0, k, 128 * promote):
        block = slice(start, start + 128 * promote)
        magnitudes = np.abs(a64[:, block]) @ np.abs(b64[:, block]).T
        bound += 4 * promote * 33 * 2.0**-13 * magnitudes
    error = np.abs(np.asarray(actual, np.float64) - a64 @ b64.T)
    assert np.all(error <= bound)
    # Statistical: 3.4e-4 of the product's norm was measured with promote=4 on an H100, with
    # normal data; a lost block of k would be 0.35.
    assert np.linalg.norm(error) <= 1e-3 * np.linalg.norm(a64 @ b64.T)

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.numerics import (
    FP8_E4M3,
    FP8_E5M2_TENSOR,
    INT4,
    MXFP4,
    MXFP4_FITTED,
    MXFP6,
    MXFP8,
    NVFP4,
    NVFP4_16X16,
    QuantSpec,
    dequantize,
    quantize,
)
from lowbit_jax.numerics.formats import E5M2
from lowbit_jax.ops.blackwell import block_scaled, device_limit, formats_obstacle

MXFP8_E5M2 = QuantSpec(E5M2, 32, "absmax_floor")
PAIRS = [
    (MXFP8, MXFP8),
    (MXFP8_E5M2, MXFP8),
    (MXFP4, MXFP8),
    (MXFP4_FITTED, MXFP4_FITTED),
    (MXFP6, MXFP4),
    (NVFP4, NVFP4_16X16),
]
F32 = np.dtype(np.float32)

# Where JAX 0.10 lowers the product for a CPU, it makes the call of a GPU.
computes_on_cpu = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax.nn.scaled_matmul has no CPU version before 0.11"
)


quantize_jit = jax.jit(quantize, static_argnums=1)
dequantize_jit = jax.jit(dequantize)


def quantized(spec, rows, seed):
    x = np.random.default_rng(seed).normal(size=(rows, 128)).astype(np.float32)
    x[::3] *= 2.0**-7
    return quantize_jit(x, spec)


def shapes(spec, rows, columns=128):
    x = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
    return jax.eval_shape(lambda x: quantize(x, spec), x)


def names(pair):
    return " x ".join(map(str, pair))


@computes_on_cpu
@pytest.mark.parametrize("specs", PAIRS, ids=names)
def test_the_product_is_that_of_the_dequantized_operands(specs):
    a, b = (
        quantized(spec, rows, i) for i, (spec, rows) in enumerate(zip(specs, (16, 48), strict=True))
    )
    actual = jax.jit(lambda a, b: block_scaled(a, b, F32, F32))(a, b)
    x, w = (np.asarray(dequantize_jit(q), np.float64) for q in (a, b))
    # Bound: 128 float32 additions, an operand rounded once where it was dequantized with its global
    # scale, and one rounding for each global scale.
    bound = (128 + 4) * 2.0**-24 * (np.abs(x) @ np.abs(w).T)
    np.testing.assert_array_less(np.abs(np.asarray(actual, np.float64) - x @ w.T), bound + 1e-30)


@pytest.mark.parametrize("specs", PAIRS, ids=names)
def test_a_gpu_gets_one_block_scaled_call_with_the_stored_bits(specs):
    a, b = (shapes(spec, 16) for spec in specs)
    out = np.dtype(jnp.bfloat16)
    traced = jax.jit(lambda a, b: block_scaled(a, b, out, out)).trace(a, b)
    module = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in module.splitlines() if "__op$block_scaled_dot" in line]
    assert len(calls) == 1
    elements, scales = ("f4E2M1FN", "f8E4M3FN") if NVFP4 in specs else ("f8E", "f8E8M0FNU")
    assert calls[0].count(f"x{elements}") >= 2
    assert calls[0].count(f"x{scales}") >= 2
    has_global_scale = a.global_scale is not None or b.global_scale is not None
    assert f'"dequantize_type": "{"F32" if has_global_scale else "BF16"}"' in calls[0].replace(
        "\\22", '"'
    )


@pytest.mark.parametrize("specs", PAIRS, ids=names)
def test_what_is_covered_has_no_obstacle(specs):
    assert formats_obstacle(*specs) is None
    assert "run along the sum" in formats_obstacle(*specs, is_kept=True)
    assert "float64" in formats_obstacle(*specs, dtypes=(np.float64,))


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (MXFP8, None, "must be quantized"),
        (MXFP4, NVFP4, "by their like"),
        (FP8_E4M3, FP8_E4M3, "by their like"),
        (FP8_E5M2_TENSOR, MXFP8, "by their like"),
        (INT4, INT4, "by their like"),
        (dataclasses.replace(NVFP4, block_size=32), NVFP4, "by their like"),
        (MXFP8_E5M2, MXFP8_E5M2, "e5m2 by e4m3 only"),
    ],
)
def test_other_formats_are_refused_with_a_reason(a, b, said):
    assert said in formats_obstacle(a, b)


@pytest.mark.parametrize(
    ("capability", "said"),
    [(None, "no CUDA device"), ((9, 0), "need compute capability 10.0, this device has 9.0")],
)
def test_older_devices_are_refused_with_a_reason(capability, said):
    assert said in device_limit(capability)


def test_blackwell_is_not_refused():
    assert device_limit((10, 0)) is None


def test_operands_that_do_not_fit_are_refused():
    a = shapes(MXFP8, 16)
    with pytest.raises(ValueError, match="must be \\(p, c\\) and \\(q, c\\)"):
        block_scaled(a, shapes(MXFP8, 16, 64), F32, F32)
    with pytest.raises(NotImplementedError, match="by their like"):
        block_scaled(a, shapes(NVFP4, 16), F32, F32)

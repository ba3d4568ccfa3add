"""Times the entries of `CONFIGS` on exact MXFP4 products beside XLA's products; needs an H100.

Run: python -m pallas_kernels.scaled_matmul.bench --pattern "product 16384x4096x4096"
     python -m pallas_kernels.scaled_matmul.bench --pattern "gradient 4096x4096x16384"
"""

import functools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax import lax
from jaxtyping import PRNGKeyArray

from lowbit_jax.numerics import MXFP4, dequantize, quantize
from pallas_kernels.folded import fold, pack_mask
from pallas_kernels.measure import Case, Comparison, jitted, kernel_obstacle, print_comparisons
from pallas_kernels.measurement import BF16, FP8
from pallas_kernels.scaled_matmul.tuning import CONFIGS, with_epilogue

# m, n, k: layers of 4096 and 2048 wide models, an MLP of 14336, and the 30M model.
SHAPES = (
    (16384, 4096, 4096),
    (16384, 2048, 2048),
    (16384, 14336, 4096),
    (16384, 4096, 14336),
    (16384, 640, 640),
    (16384, 1792, 640),
    (16384, 640, 1792),
)
# Of weights, over 16384 tokens.
GRADIENT_SHAPES = (
    (4096, 4096, 16384),
    (2048, 2048, 16384),
    (14336, 4096, 16384),
    (640, 640, 16384),
)
XLA_BF16, XLA_FP8, XLA_FP8_SCALED = "XLA bf16", "XLA fp8", "XLA fp8, scales"


def _xla(a, b, out_dtype=jnp.bfloat16):
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype)


def _xla_scaled(a, b, a_scales, b_scales):
    return (_xla(a, b, jnp.float32) * a_scales[:, None] * b_scales).astype(jnp.bfloat16)


def comparison(shape: tuple[int, int, int], schedules: Sequence[str] = ()) -> Comparison:
    """XLA's products; the chosen entry, then those named, with scales, and with all it can do.

    Operands of 8 bits are those of MXFP4: folded for the kernel, e4m3 with made up scales of rows
    for XLA. Those of XLA's product in bfloat16 are what was quantized.

    Args:
      shape: m, n, k.
      schedules: Names in `CONFIGS`.
    """
    flops = _flops(shape)
    scaled = _case(XLA_FP8_SCALED, _xla_scaled, {FP8: flops}, lambda i: (*i["fp8"], *i["rows"]))
    cases = [*_xla_cases(flops, jnp.bfloat16), scaled]
    for label, config in _schedules(schedules):
        fn = functools.partial(with_epilogue, config=config)
        cases += [
            _kernel_case(f"{label}, scales", fn, flops, ()),
            _kernel_case(f"{label}, scales, mask, inverse Hadamard", fn, flops, ("mask",)),
        ]
    return _comparison("product", shape, cases)


def gradient_comparison(shape: tuple[int, int, int], schedules: Sequence[str] = ()) -> Comparison:
    """Likewise a float32 product with scales, mask and inverse Hadamard transform alone."""
    flops = _flops(shape)
    cases = _xla_cases(flops, jnp.float32)
    for label, config in _schedules(schedules):
        fn = functools.partial(with_epilogue, config=config, out_dtype=jnp.float32)
        cases.append(_kernel_case(label, fn, flops, ("mask",)))
    return _comparison("gradient", shape, cases)


def comparisons() -> Iterator[Comparison]:
    """All shapes with every entry, of gradients those of 8 bits."""
    for shape in SHAPES:
        yield comparison(shape, tuple(CONFIGS))
    for shape in GRADIENT_SHAPES:
        yield gradient_comparison(shape, [name for name in CONFIGS if name.startswith("fp8")])


def _flops(shape):
    return 2.0 * math.prod(shape)


def _schedules(names):
    return (("MXFP4", None), *((name, CONFIGS[name]) for name in names))  # first as users have it


def _case(name, fn, flops, inputs_of, obstacle=lambda: None):
    return Case(name, jitted(fn, inputs_of, flops=flops), obstacle)


def _xla_cases(flops, out_dtype):
    fn = functools.partial(_xla, out_dtype=out_dtype)
    return [
        _case(XLA_BF16, fn, {BF16: flops}, lambda i: i["bf16"]),
        _case(XLA_FP8, fn, {FP8: flops}, lambda i: i["fp8"]),
    ]


def _kernel_case(label, fn, flops, others):
    unit, scales = (BF16, "rows") if label.startswith("bf16") else (FP8, "scales")
    operands = "bf16" if unit == BF16 else "folded"

    def inputs_of(inputs):
        return (*inputs[operands], *inputs[scales], *(inputs[name] for name in others))

    return _case(label, fn, {unit: flops}, inputs_of, kernel_obstacle)


def _comparison(kind, shape, cases):
    work = f"{kind} {'x'.join(map(str, shape))}"
    make = functools.partial(make_inputs, shape)
    return Comparison("product", work, make, tuple(cases), (XLA_BF16, XLA_FP8))


def make_inputs(shape: tuple[int, int, int], key: PRNGKeyArray) -> dict[str, Any]:
    """Operands in three forms, scales of two, a mask of seven in ten entries.

    Normal operands in bf16; the same in MXFP4, folded, with their scales, and in e4m3; and any
    scales of rows.
    """
    m, n, k = shape
    keys = jax.random.split(key, 5)
    a = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
    b = jax.random.normal(keys[1], (n, k), jnp.bfloat16)
    quantized = [quantize(x, MXFP4) for x in (a, b)]
    folded = [fold(q) for q in quantized]
    return {
        "bf16": (a, b),
        "fp8": tuple(dequantize(q).astype(jnp.float8_e4m3fn) for q in quantized),
        "folded": tuple(x.values for x in folded),
        "scales": tuple(x.scales for x in folded),
        "rows": tuple(jax.random.uniform(keys[2 + i], (x,)) for i, x in enumerate((m, n))),
        "mask": pack_mask(jax.random.bernoulli(keys[4], 0.7, (m, n))),
    }


def main(pattern: str = "", repeats: int = 20) -> int:
    """Prints medians with minimum and maximum, TFLOP/s and the share of the data sheet's floor.

    Args:
      pattern: Only cases whose name contains it.
      repeats: Measurements, each of ten queued calls.
    """
    return print_comparisons(comparisons(), pattern=pattern, repeats=repeats)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))

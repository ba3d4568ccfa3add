"""Times the entries of `CONFIGS` on exact MXFP4 products beside XLA's products; needs an H100.

Run: python -m pallas_kernels.scaled_matmul.bench --pattern 4096x4096
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax import lax

from lowbit_jax.numerics import MXFP4, quantize
from pallas_kernels.folded import fold, pack_mask
from pallas_kernels.measure import (
    BF16,
    FP8,
    Case,
    Comparison,
    jitted,
    kernel_obstacle,
    print_comparisons,
)
from pallas_kernels.scaled_matmul.op import scaled_matmul
from pallas_kernels.scaled_matmul.tuning import CONFIGS

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
XLA_BF16, XLA_FP8, XLA_FP8_SCALED = "XLA bf16", "XLA fp8", "XLA fp8, scales"


def _xla(a, b):
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)


def _xla_scaled(a, b, a_scales, b_scales):
    out = lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return (out * a_scales[:, None] * b_scales).astype(jnp.bfloat16)


def _kernel(a, b, a_scales, b_scales, mask=None, *, config):
    inverse_hadamard = None if mask is None else 32
    return scaled_matmul(
        a, b, a_scales, b_scales, mask=mask, inverse_hadamard=inverse_hadamard, config=config
    )


def comparison(shape: tuple[int, int, int], schedules: Sequence[str] = ()) -> Comparison:
    """XLA's products; the chosen entry, then those named, with scales, and with all it can do.

    Operands of 8 bits are MXFP4 folded into e4m3, the same for all of them; those of XLA's product
    in bfloat16 are what was quantized.

    Args:
      shape: m, n, k.
      schedules: Names in `CONFIGS`.
    """
    m, n, k = shape
    flops = 2.0 * m * n * k

    def case(name, fn, unit, inputs_of, needs_kernel=True):
        def build(inputs):
            return jitted(fn, inputs_of(inputs), flops={unit: flops})

        return Case(name, build, kernel_obstacle if needs_kernel else lambda: None)

    cases = [
        case(XLA_BF16, _xla, BF16, lambda i: i["bf16"], False),
        case(XLA_FP8, _xla, FP8, lambda i: i["fp8"], False),
        case(XLA_FP8_SCALED, _xla_scaled, FP8, lambda i: (*i["fp8"], *i["scales"]), False),
    ]
    chosen = ("MXFP4", None)  # in the words of a user
    for label, config in (chosen, *((name, CONFIGS[name]) for name in schedules)):
        unit = BF16 if label.startswith("bf16") else FP8
        fn = functools.partial(_kernel, config=config)

        def scaled(inputs, unit=unit):
            return (*inputs[unit], *inputs["scales"])

        def full(inputs, scaled=scaled):
            return (*scaled(inputs), inputs["mask"])

        cases.append(case(f"{label}, scales", fn, unit, scaled))
        cases.append(case(f"{label}, scales, mask, inverse Hadamard", fn, unit, full))
    return Comparison(
        "product",
        f"product {m}x{n}x{k}",
        functools.partial(make_inputs, shape),
        tuple(cases),
        (XLA_BF16, XLA_FP8),
    )


def comparisons() -> Iterator[Comparison]:
    """All shapes with every entry."""
    return (comparison(shape, tuple(CONFIGS)) for shape in SHAPES)


def make_inputs(shape: tuple[int, int, int]) -> dict[str, Any]:
    """Normal operands in bf16, the same as folded MXFP4, scales, a mask of seven in ten entries."""
    m, n, k = shape

    def make(key):
        keys = jax.random.split(key, 3)
        a = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
        b = jax.random.normal(keys[1], (n, k), jnp.bfloat16)
        folded = [fold(quantize(x, MXFP4)) for x in (a, b)]
        return {
            "bf16": (a, b),
            "fp8": tuple(x.values for x in folded),
            "scales": tuple(x.scales for x in folded),
            "mask": pack_mask(jax.random.bernoulli(keys[2], 0.7, (m, n))),
        }

    return jax.jit(make)(jax.random.key(0))


def main(pattern: str = "", repeats: int = 20) -> int:
    """Prints medians with minimum and maximum, TFLOP/s and the share of the data sheet's floor.

    Args:
      pattern: Only cases whose name contains it.
      repeats: Measurements, each of ten queued calls.
    """
    return print_comparisons(comparisons(), pattern=pattern, repeats=repeats)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))

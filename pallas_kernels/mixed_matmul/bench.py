"""Times 4-bit weights beside XLA's bfloat16 product for few rows; needs an H100.

Run: python -m pallas_kernels.mixed_matmul.bench --pattern 16x4096x4096 --sweep
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax import lax

from lowbit_jax.numerics import INT4, MXFP4, NVFP4, QuantSpec, quantize
from pallas_kernels.measure import (
    BF16,
    Case,
    Comparison,
    jitted,
    kernel_obstacle,
    print_comparisons,
    tree_bytes,
)
from pallas_kernels.mixed_matmul.layout import prepack
from pallas_kernels.mixed_matmul.op import mixed_matmul
from pallas_kernels.mixed_matmul.tuning import Config, config_obstacle

# m, n, k: the MLP and the square projections of a Llama of 8B parameters.
SHAPES = tuple(
    (m, n, k) for n, k in ((14336, 4096), (4096, 14336), (4096, 4096)) for m in (1, 4, 16, 64)
)
SPECS = {"MXFP4": MXFP4, "NVFP4": NVFP4, "INT4": INT4}
XLA_BF16 = "XLA bf16"
# Weights that are multiplied in turn take at least four times the 50 MB of the L2 cache.
_ROTATED_BYTES = 200e6
_MAX_WEIGHTS = 32  # of shapes so small that a program would have thousands


def comparison(
    shape: tuple[int, int, int], formats: Sequence[str] = tuple(SPECS), *, sweep: bool = False
) -> Comparison:
    """XLA in bfloat16, then each format with its chosen schedule, or with all that fit.

    A call multiplies by several weights in turn, so that none is left in the cache and launches
    hide behind the device's work; times are of one product. The kernel is lowered and compiled
    once for all of them.

    Args:
      shape: m, n, k.
      formats: Names in `SPECS`.
      sweep: Whether to time all schedules.
    """
    m, n, k = shape

    def case(name, weight_format, config=None):
        def build(inputs):
            x, weights = inputs[weight_format]
            result = jax.ShapeDtypeStruct((m, n), jnp.bfloat16)
            return jitted(
                functools.partial(_products, config=config),
                (x, weights),
                flops={BF16: 2.0 * m * n * k},
                bytes=tree_bytes((x, weights[0], result)),
                units=len(weights),
            )

        return Case(name, build, kernel_obstacle if weight_format in SPECS else lambda: None)

    cases = [case(XLA_BF16, XLA_BF16)]
    for name in formats:
        cases.append(case(name, name))
        for config in _configs(*shape) if sweep else ():
            cases.append(case(f"{name} {dataclasses.astuple(config)}", name, config))
    make = functools.partial(make_inputs, shape, formats)
    return Comparison("decode", f"W4A16 {m}x{n}x{k}", make, tuple(cases), (XLA_BF16,))


def comparisons(*, sweep: bool = False) -> Iterator[Comparison]:
    """All shapes with every format."""
    return (comparison(shape, sweep=sweep) for shape in SHAPES)


def make_inputs(shape: tuple[int, int, int], formats: Sequence[str]) -> dict[str, Any]:
    """By format or `XLA_BF16`: normal x, and so many weights that none stays in the cache."""
    m, n, k = shape
    x = jax.random.normal(jax.random.key(0), (m, k), jnp.bfloat16)
    made = {}
    # Packing takes time: none is packed for kernels that cannot run.
    for name in (XLA_BF16, *(formats if kernel_obstacle() is None else ())):
        spec = SPECS.get(name)
        first = _weight(jax.random.key(1), n, k, spec)
        count = min(max(4, int(_ROTATED_BYTES / tree_bytes(first)) + 1), _MAX_WEIGHTS)
        keys = jax.random.split(jax.random.key(2), count - 1)
        made[name] = (x, [first, *(_weight(key, n, k, spec) for key in keys)])
    return made


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _weight(key, n: int, k: int, spec: QuantSpec | None):
    w = 0.02 * jax.random.normal(key, (n, k))
    return w.astype(jnp.bfloat16) if spec is None else prepack(quantize(w, spec))


def _products(x, weights, *, config: Config | None):
    """Multiplies by one weight after the other; returns all products, lest XLA leave some out."""
    products = []
    for w in weights:
        if isinstance(w, jax.Array):
            y = lax.dot_general(x, w, (((1,), (1,)), ((), ())))
        else:
            y = mixed_matmul(x, w, config=config)
        # So that XLA neither merges products nor runs them side by side.
        x, y = lax.optimization_barrier((x, y))
        products.append(y)
    return products


def _configs(m, n, k):
    for warpgroups in (1, 2, 4):
        for chunk in (128, 256):
            for splits in (1, 2, 4, 7, 8, 14, 16):
                config = Config(warpgroups, splits, chunk)
                if config_obstacle(config, m, n, k) is None:
                    yield config


def main(pattern: str = "", sweep: bool = False, repeats: int = 20) -> int:
    """Prints medians with minimum and maximum a product, and the time that its bytes take.

    Args:
      pattern: Only cases whose name contains it.
      sweep: Every schedule that fits, besides the chosen one.
      repeats: Measurements, each of ten queued programs.
    """
    return print_comparisons(comparisons(sweep=sweep), pattern=pattern, repeats=repeats)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))

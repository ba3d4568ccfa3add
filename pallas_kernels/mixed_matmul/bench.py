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
from jaxtyping import PRNGKeyArray

from lowbit_jax.numerics import INT4, MXFP4, NVFP4, QuantSpec, quantize
from pallas_kernels.measure import (
    Case,
    Comparison,
    jitted,
    kernel_obstacle,
    print_comparisons,
    tree_bytes,
)
from pallas_kernels.measurement import BF16
from pallas_kernels.mixed_matmul.layout import prepack
from pallas_kernels.mixed_matmul.op import mixed_matmul
from pallas_kernels.mixed_matmul.tuning import Config, config_obstacle

# m, n, k: the MLP and the square projections of a Llama of 8B parameters.
SHAPES = tuple(
    (m, n, k) for n, k in ((14336, 4096), (4096, 14336), (4096, 4096)) for m in (1, 4, 16, 64)
)
SPECS = {"MXFP4": MXFP4, "NVFP4": NVFP4, "INT4": INT4}
XLA_BF16 = "XLA bf16"
# That a program multiplies by in turn: a decoding step has hundreds of products, and the smallest
# of the shapes takes 285 MB in 4 bits, where the L2 cache has 50.
_WEIGHTS = 32


def comparison(
    shape: tuple[int, int, int], formats: Sequence[str] = tuple(SPECS), *, sweep: bool = False
) -> Comparison:
    """XLA in bfloat16, then each format with its chosen schedule, or with all that fit.

    A call multiplies by several weights in turn, as a decoding step does, so that none is left in
    the cache; times are of one product, launches included, as a step of a model has them. XLA
    records launches as a CUDA graph; `XLA_FLAGS=--xla_gpu_enable_command_buffer=-CUSTOM_CALL`
    has those of kernels made one by one. The time of the kernels alone, by the profiler, leaves
    out launches and gaps for all contenders alike. The kernel is compiled once for all weights.

    Args:
      shape: m, n, k.
      formats: Names in `SPECS`.
      sweep: Whether to time all schedules.
    """
    m, n, k = shape

    def case(name, weight_format, config=None):
        result = jax.ShapeDtypeStruct((m, n), jnp.bfloat16)
        build = jitted(
            functools.partial(_products, config=config),
            lambda inputs: inputs[weight_format],
            flops={BF16: 2.0 * m * n * k},
            bytes=lambda args: tree_bytes((args[0], args[1][0], result)),
            units=_WEIGHTS,
        )
        return Case(name, build, kernel_obstacle if weight_format in SPECS else lambda: None)

    cases = [case(XLA_BF16, XLA_BF16)]
    for name in formats:
        cases.append(case(name, name))
        for config in _configs(*shape) if sweep else ():
            cases.append(case(f"{name} {dataclasses.astuple(config)}", name, config))
    make = functools.partial(make_inputs, shape, formats)
    work = f"W4A16 {m}x{n}x{k}"
    return Comparison("decode", work, make, tuple(cases), (XLA_BF16,), is_profiled=True)


def comparisons(*, sweep: bool = False) -> Iterator[Comparison]:
    """All shapes with every format."""
    return (comparison(shape, sweep=sweep) for shape in SHAPES)


def make_inputs(
    shape: tuple[int, int, int], formats: Sequence[str], key: PRNGKeyArray
) -> dict[str, Any]:
    """By format or `XLA_BF16`: normal x, and weights."""
    m, n, k = shape
    x_key, key = jax.random.split(key)
    x = jax.random.normal(x_key, (m, k), jnp.bfloat16)
    made = {}
    # Packing takes time: none is packed for kernels that cannot run.
    for name in (XLA_BF16, *(formats if kernel_obstacle() is None else ())):
        make = functools.partial(_weight, n=n, k=k, spec=SPECS.get(name))
        stacked = lax.map(make, jax.random.split(key, _WEIGHTS))
        made[name] = (x, [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(_WEIGHTS)])
    return made


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
      repeats: Measurements, each of queued programs.
    """
    return print_comparisons(comparisons(sweep=sweep), pattern=pattern, repeats=repeats)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))

"""Times 4-bit weights beside XLA's bfloat16 product for few rows; needs an H100.

Run: python -m pallas_kernels.mixed_matmul.bench --pattern 16x4096x4096 --sweep
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax import lax

from lowbit_jax.numerics import INT4, MXFP4, NVFP4, QuantSpec, quantize
from pallas_kernels.mixed_matmul.layout import prepack
from pallas_kernels.mixed_matmul.op import mixed_matmul
from pallas_kernels.mixed_matmul.tuning import Config, config_obstacle
from pallas_kernels.testing import time_device

# m, n, k: the MLP and the square projections of a Llama of 8B parameters.
SHAPES = tuple(
    (m, n, k) for n, k in ((14336, 4096), (4096, 14336), (4096, 4096)) for m in (1, 4, 16, 64)
)
SPECS = {"MXFP4": MXFP4, "NVFP4": NVFP4, "INT4": INT4}
# Weights that are multiplied in turn take at least four times the 50 MB of the L2 cache.
_ROTATED_BYTES = 200e6
_BYTES_PER_SECOND = 3.35e12  # data sheet of an H100 SXM; a copy reaches 2.76e12


@dataclasses.dataclass(frozen=True)
class Case:
    """One product of a shape: by 4-bit weights of a spec, or by bfloat16 ones."""

    shape: tuple[int, int, int]
    spec_name: str | None
    config: Config | None = None  # None: the chosen one

    @property
    def name(self) -> str:
        """Shape, format and schedule."""
        what = "XLA bf16" if self.spec_name is None else self.spec_name
        schedule = "" if self.config is None else f" {dataclasses.astuple(self.config)}"
        return f"{'x'.join(map(str, self.shape))} {what}{schedule}"


def cases(*, sweep: bool = False) -> Iterator[Case]:
    """XLA in bfloat16, then each format with its chosen schedule, or with all that fit."""
    for shape in SHAPES:
        yield Case(shape, None)
        for name in SPECS:
            yield Case(shape, name)
            if sweep:
                yield from (Case(shape, name, config) for config in _configs(*shape))


def _configs(m, n, k):
    for warpgroups in (1, 2, 4):
        for chunk in (128, 256):
            for splits in (1, 2, 4, 7, 8, 14, 16):
                config = Config(warpgroups, splits, chunk)
                if config_obstacle(config, m, n, k) is None:
                    yield config


def function(case: Case) -> Callable[..., jax.Array]:
    """Of x and weights: multiplies by one after the other, and returns the last product."""

    def product(x, w):
        if case.spec_name is None:
            return lax.dot_general(x, w, (((1,), (1,)), ((), ())))
        return mixed_matmul(x, w, config=case.config)

    def products(x, weights):
        for w in weights[:-1]:
            # So that XLA neither merges products nor runs them side by side.
            x, _ = lax.optimization_barrier((x, product(x, w)))
        return product(x, weights[-1])

    return products


def arguments(case: Case) -> tuple[jax.Array, list[Any]]:
    """Normal activations, and so many weights that none is left in the cache."""
    m, n, k = case.shape
    x = jax.random.normal(jax.random.key(0), (m, k), jnp.bfloat16)
    spec = SPECS.get(case.spec_name or "")
    first = _weight(jax.random.key(1), n, k, spec)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(first))
    count = max(4, int(_ROTATED_BYTES / size) + 1)
    keys = jax.random.split(jax.random.key(2), count - 1)
    return x, [first, *(_weight(key, n, k, spec) for key in keys)]


def _weight(key, n: int, k: int, spec: QuantSpec | None):
    def make(key):
        w = 0.02 * jax.random.normal(key, (n, k))
        return w.astype(jnp.bfloat16) if spec is None else prepack(quantize(w, spec))

    return jax.jit(make)(key)


def main(pattern: str = "", sweep: bool = False, repeats: int = 20) -> int:
    """Prints medians with minimum and maximum a product, and the time that its bytes take.

    Args:
      pattern: Only cases whose name contains it.
      sweep: Every schedule that fits, besides the chosen one.
      repeats: Measurements, each of ten queued programs.
    """
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    baseline = {}
    for case in cases(sweep=sweep):
        if pattern not in case.name:
            continue
        x, weights = arguments(case)
        timing = time_device(jax.jit(function(case)), x, weights, repeats=repeats)
        median, low, high = (
            1e6 * seconds / len(weights)
            for seconds in (timing.median_s, timing.min_s, timing.max_s)
        )
        m, n, _ = case.shape
        leaves = jax.tree.leaves((x, weights[0]))
        read = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        floor = 1e6 * (read + 2 * m * n) / _BYTES_PER_SECOND
        if case.spec_name is None:
            baseline[case.shape] = median
        ratio = baseline[case.shape] / median if case.shape in baseline else float("nan")
        print(
            f"{case.name:40} {median:6.1f} us ({low:.1f} to {high:.1f}), floor {floor:5.1f}"
            f" ({floor / median:4.0%}), {ratio:5.2f} x bf16",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))

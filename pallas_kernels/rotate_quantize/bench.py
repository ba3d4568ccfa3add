"""Times `rotate_quantize` beside a copy and beside its reference; needs an H100.

Run: python -m pallas_kernels.rotate_quantize.bench --pattern 4096
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from lowbit_jax.numerics import MXFP4
from lowbit_jax.rotations.hadamard import Hadamard
from pallas_kernels.rotate_quantize.reference import Target, rotate_quantize_reference
from pallas_kernels.rotate_quantize.tuning import lowering_cases
from pallas_kernels.testing import time_device

# m, k: layers of 4096 and 2048 wide models, an MLP of 14336, and the 30M model.
SHAPES = ((16384, 4096), (16384, 2048), (16384, 14336), (16384, 640))
_BYTES_PER_S = 3.35e12  # of an H100 SXM by NVIDIA's data sheet


def cases() -> Iterator[tuple[str, Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]]:
    """A copy of x and of as many bytes more, the reference, and what the tests lower."""
    target = Target(MXFP4, Hadamard(32))
    reference = functools.partial(rotate_quantize_reference, rows=target, columns=target)
    for m, k in SHAPES:
        x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
        yield f"{m}x{k} copy", jnp.negative, (x,)
        yield f"{m}x{k} reference", reference, (x,)
        for name, fn, shapes in lowering_cases(m, k):
            yield f"{m}x{k} {name}", fn, shapes


def arguments(shapes: tuple[jax.ShapeDtypeStruct, ...]) -> list[jax.Array]:
    """Normal x, words of a key, and references of 4, above every scale of such an x."""
    made = []
    for shape in shapes:
        if shape.dtype == jnp.uint32:
            made.append(jnp.arange(shape.shape[0], dtype=jnp.uint32))
        elif len(shape.shape) == 1:
            made.append(jnp.full(shape.shape, 4, shape.dtype))
        else:
            made.append(jax.random.normal(jax.random.key(0), shape.shape, shape.dtype))
    return made


def main(pattern: str = "", repeats: int = 20) -> int:
    """Prints medians with minimum and maximum, and the share of the time that the bytes need.

    Bytes are those of the arguments and the results, each once.

    Args:
      pattern: Only cases whose name contains it.
      repeats: Measurements, each of ten queued calls.
    """
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for name, fn, shapes in cases():
        if pattern not in name:
            continue
        timing = time_device(jax.jit(fn), *arguments(shapes), repeats=repeats)
        arrays = jax.tree.leaves((shapes, jax.eval_shape(fn, *shapes)))
        floor_s = sum(a.size * a.dtype.itemsize for a in arrays) / _BYTES_PER_S
        print(f"{name:44} {timing!s:36} {floor_s / timing.median_s:6.1%} of bytes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))

"""Times `rotate_quantize` beside a copy and beside its reference; needs an H100.

Run: python -m pallas_kernels.rotate_quantize.bench --pattern 4096
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from lowbit_jax.numerics import MXFP4
from lowbit_jax.rotations.hadamard import Hadamard
from pallas_kernels.measure import Case, Comparison, jitted, kernel_obstacle, print_comparisons
from pallas_kernels.rotate_quantize.reference import Target, rotate_quantize_reference
from pallas_kernels.rotate_quantize.tuning import lowering_cases

# m, k: layers of 4096 and 2048 wide models, an MLP of 14336, and the 30M model.
SHAPES = ((16384, 4096), (16384, 2048), (16384, 14336), (16384, 640))
COPY = "copy"
# What the layers of Quartet need of it, and what the simplest pair of operands takes.
OF_QUARTET = (
    "both",
    "both, exact",
    "Quartet forward",
    "Quartet forward, exact",
    "Quartet backward",
    "Quartet backward, exact",
)


def comparison(shape: tuple[int, int], names: Sequence[str] | None = None) -> Comparison:
    """A copy, which writes 2 bytes an entry as two operands do, and what the tests lower.

    Args:
      shape: m, k.
      names: Of the lowering cases; None: all of them, and the reference.
    """
    m, k = shape
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    target = Target(MXFP4, Hadamard(32))
    reference = functools.partial(rotate_quantize_reference, rows=target, columns=target)
    found = {name: (fn, shapes) for name, fn, shapes in lowering_cases(m, k)}
    chosen = {name: found[name] for name in (found if names is None else names)}

    def case(name, fn, shapes, obstacle=lambda: None):
        def pick(inputs):
            return tuple(inputs[_label(shape)] for shape in shapes)

        return Case(name, jitted(fn, pick), obstacle)

    cases = [case(COPY, jnp.negative, (x,))]
    if names is None:
        cases.append(case("reference", reference, (x,)))
    cases += [case(name, fn, shapes, kernel_obstacle) for name, (fn, shapes) in chosen.items()]
    shapes = {_label(s): s for _, shapes in (("", (x,)), *chosen.values()) for s in shapes}
    make = functools.partial(_arrays, shapes)
    return Comparison("quantizer", f"rotate_quantize {m}x{k}", make, tuple(cases), (COPY,))


def comparisons() -> Iterator[Comparison]:
    """All shapes with every case."""
    return map(comparison, SHAPES)


def _arrays(shapes: dict[str, jax.ShapeDtypeStruct], key) -> dict[str, Any]:
    return {label: _array(shape, key) for label, shape in shapes.items()}


def _array(shape, key) -> jax.Array:
    """Normal x, words of a key, or a reference above every entry of such an x."""
    if shape.dtype == jnp.uint32:
        return jnp.arange(shape.shape[0], dtype=jnp.uint32)
    if not shape.shape:
        return jnp.full(shape.shape, 8, shape.dtype)
    return jax.random.normal(key, shape.shape, shape.dtype)


def _label(shape: jax.ShapeDtypeStruct) -> str:
    return f"{shape.dtype}{shape.shape}"


def main(pattern: str = "", repeats: int = 20) -> int:
    """Prints medians with minimum and maximum, and the share of the time that the bytes need.

    Bytes are those of the arguments and the results, each once.

    Args:
      pattern: Only cases whose name contains it.
      repeats: Measurements, each of ten queued calls.
    """
    return print_comparisons(comparisons(), pattern=pattern, repeats=repeats)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))

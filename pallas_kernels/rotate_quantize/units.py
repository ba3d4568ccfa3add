"""Powers of two that the numbers of a pass are multiplied by: a bound of `|x|` gives them all."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lowbit_jax.numerics.floats import floor_log2, power_of_two
from pallas_kernels.folded import folded_scale
from pallas_kernels.rotate_quantize.reference import Target, largest_level, largest_scale_of

# Numbers to be rounded at random are made so small that a block's scale has an inverse times
# `2**-126`, even where they exceed their bound by `2**40` and a transform makes them larger yet:
# entries of x within the bound lie below `2**_TOP`, rounded ones, in units of their scale, below
# `2**16`. For bounds above `2**84` the power stays at its smallest; then numbers cannot exceed the
# bound by as much.
_TOP = -42
ROUNDED_POWER = np.float32(2.0**-58)


class Units(NamedTuple):
    """Float32, in the shape of the reference; of sides with blocks by "rows" and "columns".

    Attributes:
      power: x is multiplied by it first; None: 1.
      inverse: One over the power; None: 1.
      scales: `Folded.scales`, the global scale aside.
      inverses: What turns the rotated numbers into units of the scale.
    """

    power: Any
    inverse: Any
    scales: dict[str, Any]
    inverses: dict[str, Any]


def find_units(targets: Mapping[str, Target], requantize: bool, reference) -> Units:
    """See `Units`; the same in a kernel as outside."""
    power = inverse = None
    on_x = [t for name, t in targets.items() if not (requantize and name == "columns")]
    if any(target.has_blocks and target.is_random for target in on_x):
        power = power_of_two(jnp.clip(_TOP - 1 - floor_log2(reference), -126, 126))
        inverse = _inverse(power)
    scales, inverses = {}, {}
    for name, target in targets.items():
        if not target.has_blocks:
            continue
        bound, multiplied = reference, power
        if requantize and name == "columns":
            bound = largest_level(targets["rows"], reference)
            multiplied = _inverse(scales["rows"])
            if target.is_random:
                multiplied = multiplied * ROUNDED_POWER
        scales[name] = folded_scale(largest_scale_of(target, bound), target.spec)
        scale = scales[name] if multiplied is None else scales[name] * multiplied
        inverses[name] = _inverse(scale)
    return Units(power, inverse, scales, inverses)


def _inverse(power):
    """One over a power of two, exactly."""
    return power_of_two(jnp.clip(-floor_log2(power), -126, 127))

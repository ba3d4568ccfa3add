"""Numbers that say why a matrix was hard to quantize: outliers, scales, codes at the limits."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from lowbit_jax.numerics import QTensor, decode, unpack
from lowbit_jax.numerics.scales import multiply_by_scales


def weight_statistics(w: Float[Array, "n k"]) -> dict[str, float]:
    """`weight_kurtosis`, `E (w - mean)^4 / variance^2`, 3 of normal ones; `weight_max_to_rms`.

    Both are 0 of a matrix of zeros, or of equal ones.
    """
    return _floats(_weight_statistics(w))


def input_statistics(matrix: Float[Array, "k k"], absmax: Float[Array, ""]) -> dict[str, float]:
    """`input_max_to_rms`, and `input_max_to_median` of the channels' powers.

    Args:
      matrix: The Hessian of the inputs, whose diagonal has the mean squares of the channels.
      absmax: Largest magnitude of an input.

    Returns:
      The largest input relative to the root mean square of all; and the largest mean square of a
      channel relative to the median one, among channels that are not always 0. 0 where none is.
    """
    return _floats(_input_statistics(matrix, absmax))


def code_statistics(kept: PyTree) -> dict[str, float]:
    """Of the first `QTensor` in what is kept of a matrix; {} where there is none.

    Returns:
      `scale_min`, `scale_median` and `scale_max`: the scales of its blocks, times the global one,
      without those of blocks of zeros; 0 if there is no other. `zero_codes`: the share of codes
      that stand for 0. `limit_codes`: the share at the lowest or highest level. Where abs-max sets
      the scale, one of each block at least lies there; more of them tell of clipping.
    """
    leaves = jax.tree.leaves(kept, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    found = [leaf for leaf in leaves if isinstance(leaf, QTensor)]
    return _floats(_code_statistics(jax.tree.map(jnp.asarray, found[0]))) if found else {}


def _floats(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _quotient(a, b):
    """`a / b`, 0 where b is."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def _median_of(values, is_counted):
    """The median of some, the lower one of two."""
    ordered = jnp.sort(jnp.where(is_counted, values, jnp.inf).reshape(-1))
    count = jnp.sum(is_counted)
    return jnp.where(count == 0, 0, ordered[jnp.maximum(count - 1, 0) // 2])


@jax.jit
def _weight_statistics(w):
    w = w.astype(jnp.float32)
    # Relative to the largest: fourth powers of small numbers underflow.
    largest = jnp.max(jnp.abs(w))
    w = _quotient(w, largest)
    square = jnp.square(w - jnp.mean(w))
    return {
        "weight_kurtosis": _quotient(jnp.mean(jnp.square(square)), jnp.square(jnp.mean(square))),
        "weight_max_to_rms": _quotient(jnp.max(jnp.abs(w)), jnp.sqrt(jnp.mean(jnp.square(w)))),
    }


@jax.jit
def _input_statistics(matrix, absmax):
    power = jnp.diagonal(matrix)
    return {
        "input_max_to_rms": _quotient(absmax, jnp.sqrt(jnp.mean(power))),
        "input_max_to_median": _quotient(jnp.max(power), _median_of(power, power > 0)),
    }


@jax.jit
def _code_statistics(q):
    format = q.spec.format
    if format.bits < 8:
        codes = unpack(q.codes, format.bits)
    else:
        codes = lax.bitcast_convert_type(q.codes, jnp.uint8)
    levels = decode(codes, format)
    scales = multiply_by_scales(jnp.ones(q.scales.shape), q.scales, q.global_scale)
    is_live = (q.scales != 0) & (scales > 0)
    zeros: Any = 0
    if q.zero_points is not None:
        n, k = q.shape
        zeros = jnp.repeat(q.zero_points.astype(jnp.float32), n // q.zero_points.shape[0], axis=0)
        zeros = jnp.repeat(zeros, k // q.zero_points.shape[1], axis=1)
    return {
        "scale_min": jnp.where(
            jnp.any(is_live), jnp.min(scales, initial=jnp.inf, where=is_live), 0
        ),
        "scale_median": _median_of(scales, is_live),
        "scale_max": jnp.max(scales, initial=0, where=is_live),
        "zero_codes": jnp.mean(levels == zeros),
        "limit_codes": jnp.mean((levels <= format.min) | (levels >= format.max)),
    }

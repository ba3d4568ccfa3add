"""The grid of a layer: scales that are fixed before a solver rounds the first weight.

A grid is a `QTensor` of which only scales, zero points and spec matter. Solvers keep them while
they move the weights, so that groups stay what they are in any order of the columns, and what they
return lies on the grid that they were given.

Grids are searched over the scales that the format can store, and compared by the error after the
scale was rounded: a scale that is best among real numbers may be worse than the abs-max once it
is a power of two.
"""

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Shaped

from lowbit_jax.numerics import QTensor, QuantSpec, encode, pack, quantize, round_to_grid
from lowbit_jax.numerics.scales import divide_by_scales, is_nan_scale, multiply_by_scales
from lowbit_jax.numerics.spec import E4M3_RULES, POWER_OF_TWO_RULES, RMS_RULES

Search = Literal["rule", "mse", "alternating"]

# Factors or steps of the code, the rule's own scale first, which wins a tie.
# GPTQ's published code: 80 shrinkings of the abs-max down to 0.2.
_SHRINK = 1 - np.arange(80) / 100
# Round the Gaussian clipping point, which is close to the best already.
_STRETCH = np.concatenate([[1.0], np.linspace(0.5, 1.5, 50)])
# Eight codes of E4M3 double it: from 0.35 times the rule's scale to twice, beyond four over six.
_E4M3_OFFSETS = np.array([0, *range(-12, 0), *range(1, 9)])
_E8M0_OFFSETS = np.array([0, -2, -1, 1])
_LARGEST_E4M3 = 0x7E
# Of the alternation. On matrices of 32 x 128 and 256 x 512, Gaussian and Laplace, six lower the
# squared error by 0.2 % more at most; all of them by 0.001 % to 1.1 %.
_ROUNDS = 4


@functools.partial(jax.jit, static_argnames=("spec", "search"))
def find_grid(w: Float[ArrayLike, "..."], spec: QuantSpec, search: Search = "rule") -> QTensor:
    """The grid of `w`; the codes of the result are those of `w` rounded to it.

    Args:
      w: `(n, k)`, computed in float32. Matrices that must share a global scale, such as those of
        queries, keys and values, are stacked along n, and their codes cut apart afterwards.
      spec: Target. Rounding to nearest; gain 1.
      search: "rule": the scales of the spec, as `quantize` has them. "mse": for each block the
        scale of least squared error among those of the storage format near the rule's; the global
        scale stays. Published code minimises `|error|^2.4`, to the same layer errors within 1 %.
        "alternating": for the E4M3 rules, by turns that and the global scale of least squared error
        for the codes, a quotient of sums; a round that does not lower the squared error of the
        matrix is not taken.

    Raises:
      ValueError: If `w` is no matrix, the spec rounds at random or has a gain, or the search
        does not go with it.

    References:
      Frantar et al., GPTQ, arXiv:2210.17323, published code (grid search); Egiazarian et al.,
      arXiv:2509.23202, section 4 (alternating scales).
    """
    w = jnp.asarray(w)
    _check(w, spec, search)
    w = w.astype(jnp.float32)
    grid = quantize(w, spec)
    if search == "rule":
        return grid
    searched = _search_blocks(w, grid)[0] if search == "mse" else _alternate(w, grid)
    return round_on_grid(w, searched)


def expand(values: Shaped[Array, "..."], grid: QTensor) -> Shaped[Array, "n k"]:
    """What blocks share, scales or zero points of `grid`, for each weight: `(n, k)`."""
    n, k = grid.shape
    if grid.spec.block_size == "tensor":
        return jnp.broadcast_to(values, (n, k))
    values = jnp.repeat(values, grid.spec.block_rows, axis=0)
    return jnp.repeat(values, k // values.shape[1], axis=1)


def round_weights(
    w: Float[Array, "..."],
    scales: Shaped[Array, "..."],
    zero_points: Shaped[Array, "..."] | None,
    grid: QTensor,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Nearest levels of `w` and the values that they stand for, as `dequantize` has them.

    Args:
      w: Any part of the matrix.
      scales: For each entry, in the dtype that `grid` stores.
      zero_points: Likewise, or None.
      grid: For its global scale and spec.

    Returns:
      `(levels, values)`, float32. Levels and values are 0 where the scale is.
    """
    zeros = jnp.float32(0) if zero_points is None else zero_points.astype(jnp.float32)
    units = divide_by_scales(w, scales, grid.global_scale) + zeros
    # Code 0 of E8M0 is not zero, yet stands for a block of zeros; NaN must come through.
    is_zero = scales == 0
    levels = round_to_grid(jnp.where(is_zero | is_nan_scale(scales), 0, units), grid.spec.format)
    levels = jnp.where(is_zero, 0, levels)
    return levels, multiply_by_scales(levels - zeros, scales, grid.global_scale)


def with_levels(grid: QTensor, levels: Float[Array, "n k"]) -> QTensor:
    """`grid` with the codes of `levels`, which must lie on its format."""
    format = grid.spec.format
    codes = encode(levels, format)
    if format.bits < 8:
        codes = pack(codes, format.bits)
    else:
        codes = lax.bitcast_convert_type(codes, format.storage)
    return dataclasses.replace(grid, codes=codes)


def round_on_grid(w: Float[ArrayLike, "n k"], grid: QTensor) -> QTensor:
    """`w` rounded to the nearest levels of `grid`."""
    return with_levels(grid, _rounded(jnp.asarray(w), grid)[0])


def _rounded(w, grid):
    zero_points = None if grid.zero_points is None else expand(grid.zero_points, grid)
    return round_weights(w, expand(grid.scales, grid), zero_points, grid)


def _values(w, grid):
    return _rounded(w, grid)[1]


def _block_errors(w, grid):
    """Squared error of each block, in the shape of the scales."""
    error = jnp.square(_values(w, grid) - w)
    if grid.spec.block_size == "tensor":
        return jnp.sum(error, keepdims=True)
    n, groups = grid.scales.shape
    rows = grid.spec.block_rows
    return jnp.sum(error.reshape(n, rows, groups, -1), axis=(1, 3))


def _candidates(spec):
    if spec.scale in E4M3_RULES:
        return _E4M3_OFFSETS
    if spec.scale in POWER_OF_TWO_RULES:
        return _E8M0_OFFSETS
    return _STRETCH if spec.scale in RMS_RULES else _SHRINK


def _moved(scales, candidate, spec):
    """The scales of a candidate: so many codes up or down, or times a factor."""
    if scales.dtype == jnp.float32:
        return scales * candidate.astype(jnp.float32)
    codes = lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.int32)
    largest = 254 - spec.format.max_exponent - 1 if scales.dtype == jnp.uint8 else _LARGEST_E4M3
    moved = jnp.clip(codes + candidate, 1, jnp.maximum(largest, codes)).astype(jnp.uint8)
    moved = jnp.where((codes == 0) | is_nan_scale(scales), codes.astype(jnp.uint8), moved)
    return lax.bitcast_convert_type(moved, scales.dtype)


def _search_blocks(w, grid):
    """`grid` with the best scale of each block, and the squared error of the matrix."""

    def step(best, candidate):
        scales, errors = best
        moved = _moved(grid.scales, candidate, grid.spec)
        error = _block_errors(w, dataclasses.replace(grid, scales=moved))
        is_better = error < errors
        return (jnp.where(is_better, moved, scales), jnp.where(is_better, error, errors)), None

    start = (grid.scales, jnp.full(grid.scales.shape, jnp.inf))
    (scales, errors), _ = lax.scan(step, start, jnp.asarray(_candidates(grid.spec)))
    return dataclasses.replace(grid, scales=scales), jnp.sum(errors)


def _alternate(w, grid):
    """Block scales and global scale by turns, as long as the squared error falls."""

    def step(best, _):
        grid, error = best
        values = _values(w, grid)
        energy = jnp.sum(values * values)
        # The first round searches the blocks alone, as "mse" does.
        is_free = jnp.isfinite(error) & (energy > 0)
        gain = jnp.where(is_free, jnp.sum(w * values) / jnp.where(is_free, energy, 1), 1)
        moved, moved_error = _search_blocks(
            w, dataclasses.replace(grid, global_scale=grid.global_scale * gain)
        )
        take = functools.partial(jnp.where, moved_error < error)
        return jax.tree.map(take, (moved, moved_error), best), None

    (grid, _), _ = lax.scan(step, (grid, jnp.float32(jnp.inf)), length=1 + _ROUNDS)
    return grid


def _check(w, spec, search):
    if w.ndim != 2:
        raise ValueError(
            f"find_grid: weights are one matrix (n, k), got shape {w.shape}; solve stacked layers"
            " one by one."
        )
    if spec.needs_key or spec.gain != 1:
        raise ValueError(
            f"find_grid: a solver rounds to nearest and gives back what it rounded, got {spec}; use"
            " dataclasses.replace(spec, rounding='nearest', gain=1.0)."
        )
    if search not in get_args(Search):
        raise ValueError(f"find_grid: search must be one of {get_args(Search)}, got {search!r}.")
    if search == "alternating" and spec.scale not in E4M3_RULES:
        raise ValueError(
            "find_grid: 'alternating' scales are for rules with a free global scale,"
            f" {', '.join(E4M3_RULES)}, got {spec}; use 'mse'."
        )

"""GPTQ as Babai's nearest-plane algorithm: column by column, each with the errors of the last ones.

Rounding column after column and moving what is left so that the outputs change least is the same
as finding a near lattice point, one plane after the other (Chen et al., The Geometry of LLM
Quantization: GPTQ as Babai's Nearest Plane Algorithm, arXiv:2507.18553, theorem 4). With the
columns in their order of processing and `H = M^T D M`, M unit lower triangular and D the diagonal
of *pivots*, column a is rounded at

    u_a = w_a + sum_{b < a} M[a, b] (w_b - q_b),     and     loss = sum_a D_a |u_a - q_a|^2.

One factorisation, no inverse; H a multiple of the identity gives round-to-nearest, bit for bit.
Frantar et al., GPTQ, arXiv:2210.17323, move all later columns after each one instead, by rows of
the Cholesky factor of the inverse; that gives the same integers, clipped or not.

Unclipped, each loss term is at most `D_a s_a^2 / 4` with the scale s_a (theorem 5), and a third of
that on average where weights are spread evenly over a step.

Where we differ from published code: scales are fixed from the original weights before the first
column is rounded (there "static groups"), so that an order of processing costs nothing at
inference; a column whose input is always zero is rounded to nearest and not set to zero.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

from lowbit_jax.numerics import QTensor, QuantSpec, dequantize
from lowbit_jax.ptq.grids import Search, expand, find_grid, round_weights, with_levels
from lowbit_jax.ptq.hessian import damped, layer_error, with_more_damping
from lowbit_jax.ptq.info import Info

Order = Literal["front", "activation", "min_pivot"]


class Factor(NamedTuple):
    """`H[order][:, order] = unit^T diag(pivots) unit`, H damped.

    Attributes:
      unit: `(k, k)`, lower triangular with ones on the diagonal.
      pivots: `(k,)`, positive.
      damping: `()` float32, the fraction of the mean diagonal that was added.
      failures: `()` int32, factorisations that failed before this one. At 12 this one has, too,
        and all its numbers are NaN.
    """

    unit: jax.Array
    pivots: jax.Array
    damping: jax.Array
    failures: jax.Array


def gptq(
    w: Float[ArrayLike, "..."],
    matrix: Float[ArrayLike, "..."],
    spec: QuantSpec,
    *,
    order: Order = "activation",
    damping: float | Float[Array, ""] = 0.01,
    search: Search = "rule",
    grid: QTensor | None = None,
    columns_per_block: int = 128,
) -> tuple[QTensor, Info]:
    """Rounds `w` so that `tr((w - w_hat) H (w - w_hat)^T)` becomes small.

    Rows do not depend on one another: n may be cut over devices.

    Args:
      w: `(n, k)` weights, (out, in), any float dtype; float32 inside, float64 where `w` is.
      matrix: `(k, k)`, the Hessian as it came.
      spec: Target; groups along k.
      order: In which columns are rounded; groups stay where they are. "front": first to last.
        "activation": those of large `H[j, j]` first. "min_pivot": greedily, so that the columns
        rounded last have small pivots; O(k^3), hardly better than "activation".
      damping: Added to the diagonal, as a fraction of its mean. 0.01 is enough for float32. Where
        the factorisation fails it is repeated with 0.01 more, 0.03 more, 0.07 more and so on.
      search: Which scales; see `find_grid`.
      grid: Scales to use instead; from `find_grid`, with the same spec.
      columns_per_block: Later columns learn of errors by one matrix product a block. Changes
        rounding errors alone.

    Returns:
      The quantized weights and an `Info` with the damping that was used. If no factorisation
      succeeded, weights and error are NaN: see `check_info`.

    Raises:
      ValueError: As `find_grid`; if shapes do not go together or there is no such order.
    """
    w, matrix = jnp.asarray(w), jnp.asarray(matrix)
    _check(w, matrix, spec, grid)
    w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    matrix = matrix.astype(w.dtype)
    if grid is None:
        grid = find_grid(w, spec, search)
    # Compiled apart: the orders share the rest, and the searches share what is not the grid.
    columns, factor = _order_and_factor(matrix, damping, order=order)
    return _solve(w, matrix, grid, columns, factor, columns_per_block=columns_per_block)


@functools.partial(jax.jit, static_argnames="order")
def _order_and_factor(matrix, damping, *, order):
    columns = column_order(damped(matrix, damping), order)
    return columns, factorize(matrix, columns, damping)


@functools.partial(jax.jit, static_argnames="columns_per_block")
def _solve(w, matrix, grid, columns, factor, *, columns_per_block):
    zero_points = None if grid.zero_points is None else expand(grid.zero_points, grid).T[columns]
    scales = expand(grid.scales, grid).T[columns]

    def round_column(u, parts):
        scales, zero_points = parts
        levels, values = round_weights(u, scales, zero_points, grid)
        return values, levels

    _, levels = nearest_plane(
        w.T[columns], factor.unit, round_column, (scales, zero_points), columns_per_block
    )
    levels = jnp.zeros_like(levels).at[columns].set(levels).T
    # Nothing was solved if nothing was factored; codes cannot say so, scales and the error can.
    is_solved = jnp.all(jnp.isfinite(factor.pivots))
    q = _spoiled_unless(is_solved, with_levels(grid, levels))
    error = layer_error(w, dequantize(q), matrix).astype(jnp.float32)
    return q, Info(error, factor.damping, factor.failures)


def nearest_plane(
    w: Float[Array, "k n"],
    unit: Float[Array, "k k"],
    round_column: Callable[[Float[Array, "n"], Any], tuple[Float[Array, "n"], Any]],
    parts: Any = None,
    columns_per_block: int = 128,
) -> tuple[Float[Array, "k n"], Any]:
    """`q_a = round(u_a)` with `u_a = w_a + sum_{b < a} unit[a, b] (w_b - q_b)`, a = 0, 1, ...

    Args:
      w: `(k, n)`: a column of the weights is a row here; in the order of processing.
      unit: From `factorize`.
      round_column: `(u_a, parts[a]) -> (q_a, out_a)`, all `(n,)` but for `parts`.
      parts: A pytree whose leaves have k in front.
      columns_per_block: See `gptq`.

    Returns:
      `(u - q, out)`: the distances to the planes `(k, n)`, of which `pivots` times the squares is
      the loss, and `out_a`, stacked.
    """
    k, n = w.shape
    size = min(columns_per_block, k)
    count = -(-k // size)
    # Columns of zeros behind the last: what is rounded there is cut off, and nobody learns of it.
    w, unit, parts = jax.tree.map(
        lambda x: jnp.pad(x, [(0, count * size - k)] + [(0, 0)] * (x.ndim - 1)), (w, unit, parts)
    )
    unit = jnp.pad(unit, [(0, 0), (0, count * size - k)])
    blocks = jax.tree.map(lambda x: x.reshape(count, size, *x.shape[1:]), (w, unit, parts))

    def solve_block(errors, xs):
        start, (w, unit, parts) = xs
        # The rows of later columns are still zero in `errors`.
        u = w + jnp.matmul(unit, errors, precision="highest")
        near = lax.dynamic_slice(unit, (0, start), (size, size))

        def solve_column(block_errors, xs):
            a, w, u, near, parts = xs
            u = u + jnp.matmul(near, block_errors, precision="highest")
            q, out = round_column(u, parts)
            return block_errors.at[a].set(w - q), (u - q, out)

        # Unrolled, the loop costs an H100 two thirds of the time; more helps little.
        block_errors, outs = lax.scan(
            solve_column, jnp.zeros_like(w), (jnp.arange(size), w, u, near, parts), unroll=4
        )
        return lax.dynamic_update_slice(errors, block_errors, (start, 0)), outs

    starts = jnp.arange(count) * size
    _, outs = lax.scan(solve_block, jnp.zeros((count * size, n), w.dtype), (starts, blocks))
    return jax.tree.map(lambda x: x.reshape(count * size, *x.shape[2:])[:k], outs)


def factorize(
    matrix: Float[ArrayLike, "k k"],
    order: Int[Array, "k"],
    damping: float | Float[Array, ""] = 0.01,
) -> Factor:
    """The unit triangular factor of H in the order of processing, with more damping if need be.

    Args:
      matrix: `(k, k)`, as it came.
      order: `(k,)`, from `column_order`.
      damping: The first fraction to try; with 0 and a singular H the next is 0.01.
    """
    # From the last column to the first: Cholesky eliminates from the front, and the column that is
    # rounded last is the one to eliminate first.
    backward = order[::-1]

    def attempt(fraction):
        moved = damped(matrix, fraction)[backward][:, backward]
        return lax.linalg.cholesky(moved, symmetrize_input=False)

    lower, fraction, failures = with_more_damping(attempt, damping)
    diagonal = jnp.diagonal(lower)
    unit = (lower / diagonal)[::-1, ::-1].T
    return Factor(unit, jnp.square(diagonal)[::-1], fraction, failures)


def column_order(matrix: Float[ArrayLike, "k k"], order: Order) -> Int[Array, "k"]:
    """In which order GPTQ rounds the columns: `(k,)` int32, a permutation.

    Args:
      matrix: `(k, k)`, damped.
      order: See `gptq`. "min_pivot" is algorithm 3 of arXiv:2507.18553: the column rounded last is
        that of the smallest diagonal, it is eliminated, and so on backward.

    Raises:
      ValueError: If there is no such order.
    """
    matrix = jnp.asarray(matrix)
    k = len(matrix)
    if order == "front":
        return jnp.arange(k, dtype=jnp.int32)
    if order == "activation":
        return jnp.argsort(-jnp.diagonal(matrix), stable=True).astype(jnp.int32)
    if order != "min_pivot":
        raise ValueError(f"column_order: order must be one of {get_args(Order)}, got {order!r}.")

    def eliminate(step, state):
        schur, is_left, backward = state
        j = jnp.argmin(jnp.where(is_left, jnp.diagonal(schur), jnp.inf))
        row = schur[j]
        # A pivot that rounding has made 0 or less ends what can be eliminated.
        pivot = jnp.where(row[j] > 0, row[j], jnp.inf)
        schur = schur - jnp.outer(row, row / pivot)
        return schur, is_left.at[j].set(False), backward.at[step].set(j.astype(jnp.int32))

    start = (matrix, jnp.ones(k, bool), jnp.zeros(k, jnp.int32))
    return lax.fori_loop(0, k, eliminate, start)[2][::-1]


def error_bound(
    scales: Float[ArrayLike, "n k"], order: Int[Array, "k"], pivots: Float[Array, "k"]
) -> Float[Array, "n"]:
    """`sum_j D_j s_j^2 / 4`: the most that `(w - q) H (w - q)^T` can be for each row, unclipped.

    A third of it is what to expect. For the integers, whose steps are their scales; for the H that
    was factored, damping and all.

    Args:
      scales: `(n, k)`, the step of each weight.
      order: The columns, as they were processed.
      pivots: In that order; see `Factor`.

    References:
      Chen et al., arXiv:2507.18553, theorem 5.
    """
    return jnp.square(jnp.asarray(scales)[:, order]) @ pivots / 4


def _spoiled_unless(is_solved, q):
    """`q`, with NaN for a scale unless it is solved."""
    if q.scales.dtype == jnp.uint8:
        spoiled = jnp.full_like(q.scales, 0xFF)
    else:
        spoiled = jnp.full_like(q.scales, jnp.nan)
    return dataclasses.replace(q, scales=jnp.where(is_solved, q.scales, spoiled))


def _check(w, matrix, spec, grid):
    if w.ndim != 2 or matrix.shape != (w.shape[-1],) * 2:
        raise ValueError(
            f"gptq: weights (n, k) go with a Hessian (k, k), got {w.shape} and {matrix.shape};"
            " solve stacked layers one by one, each with its Hessian."
        )
    if grid is not None and (grid.spec != spec or grid.shape != w.shape):
        raise ValueError(
            f"gptq: the grid must be one of {spec} for weights of shape {w.shape}, got {grid.spec}"
            f" for {grid.shape}; make it by find_grid(w, spec)."
        )

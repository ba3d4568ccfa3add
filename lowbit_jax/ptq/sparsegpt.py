"""SparseGPT: GPTQ whose rounding is "keep or zero", the rest moves to make up for what goes.

Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot,
arXiv:2301.00774. With `H = M^T D M`, M unit lower triangular and D the pivots (`factorize`),
zeroing column a costs `D_a u_a^2`, u_a the weight as the columns before it have moved it. A mask is
chosen a block of columns at a time, by the weights as they are when the block begins; within the
block those that stay move on. Survivors may be rounded in the same pass.

Where we differ from the released code: every block has exactly the zeros that were asked for (there
a threshold that drops its ties, and one more); weights of inputs that were never on go first, not
beyond the budget (there all of them); the scales of a quantized result are fixed from the dense
weights before the first column is solved.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from lowbit_jax.numerics import QTensor, QuantSpec, dequantize
from lowbit_jax.ptq.gptq import factorize
from lowbit_jax.ptq.grids import Search, expand, find_grid, round_weights, with_levels
from lowbit_jax.ptq.hessian import layer_error
from lowbit_jax.ptq.info import Info
from lowbit_jax.sparsity import NM, Pattern, mask_of
from lowbit_jax.sparsity.patterns import Comparison


@functools.partial(
    jax.jit, static_argnames=("pattern", "per", "spec", "search", "columns_per_block")
)
def sparsegpt(
    w: Shaped[Array, "n k"],
    matrix: Float[Array, "..."],
    pattern: Pattern,
    *,
    per: Comparison = "matrix",
    damping: float | Float[Array, ""] = 0.01,
    spec: QuantSpec | None = None,
    search: Search = "rule",
    columns_per_block: int = 128,
) -> tuple[Float[Array, "n k"] | QTensor, Info]:
    """Prunes `w` so that `tr((w - w_hat) H (w - w_hat)^T)` stays small.

    Args:
      w: `(n, k)` weights, (out, in), any float dtype; float32 inside, float64 where `w` is.
      matrix: `(k, k)`, the Hessian as it came.
      pattern: What stays. An `Unstructured` one holds in every block of columns.
      per: Entries of a block that compete, see `mask_of`: "row" gives every row its budget.
      damping: As in `gptq`, repeated with more where the factorisation fails.
      spec: Format of the survivors; None: not quantized. It needs a level at zero.
      search: Of its scales, see `find_grid`.
      columns_per_block: Columns that get their mask at once; where it does not divide k, the
        largest divisor of k below it.

    Returns:
      `(n, k)` of the dtype of the work, or a `QTensor` if there is a spec; and an `Info`. If no
      factorisation succeeded the error is NaN: see `check_info`.

    Raises:
      ValueError: If shapes do not go together, the pattern does not divide k, or the spec has no
        level at zero.
    """
    n, k = w.shape
    _check(w, matrix, pattern, spec)
    w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    matrix = matrix.astype(w.dtype)
    run = pattern.m if isinstance(pattern, NM) else None
    size = _columns(k, columns_per_block, run or 1)
    run = run or size  # columns that get their mask together
    factor = factorize(matrix, jnp.arange(k, dtype=jnp.int32), damping)

    grid, scales, zero_points = None, None, None
    if spec is not None:
        grid = find_grid(w, spec, search)
        scales = expand(grid.scales, grid).T
        zero_points = None if grid.zero_points is None else expand(grid.zero_points, grid).T

    def solve_column(errors, xs):
        a, w, u, unit, stays, scales, zero_points = xs
        u = u + jnp.matmul(unit, errors, precision="highest")
        if grid is None:
            level = value = jnp.where(stays, u, 0)
        else:
            zero = jnp.float32(0) if zero_points is None else zero_points.astype(jnp.float32)
            level, value = round_weights(u, scales, zero_points, grid)
            level, value = jnp.where(stays, level, zero), jnp.where(stays, value, 0)
        return errors.at[a].set(w - value.astype(w.dtype)), level

    def solve_run(errors, xs):
        """Columns that share a mask; `errors` are those of their block, zero from here on."""
        start, (w, u, unit, pivots, scales, zero_points) = xs
        u = u + jnp.matmul(unit, errors, precision="highest")
        near = lax.dynamic_slice(unit, (0, start), (run, run))
        # The weights as they are now: with these, what the errors so far cost is least.
        now = w + lax.linalg.triangular_solve(
            near, u - w, left_side=True, lower=True, unit_diagonal=True
        )
        stays = mask_of((now * jnp.sqrt(pivots)[:, None]).T, pattern, per).T
        own, levels = lax.scan(
            solve_column,
            jnp.zeros_like(w),
            (jnp.arange(run), w, u, near, stays, scales, zero_points),
        )
        return lax.dynamic_update_slice(errors, own, (start, 0)), levels

    def solve_block(errors, xs):
        start, (w, unit, pivots, scales, zero_points) = xs
        u = w + jnp.matmul(unit, errors, precision="highest")
        near = lax.dynamic_slice(unit, (0, start), (size, size))
        parts = _split((w, u, near, pivots, scales, zero_points), run)
        own, levels = lax.scan(solve_run, jnp.zeros_like(w), (jnp.arange(size // run) * run, parts))
        return lax.dynamic_update_slice(errors, own, (start, 0)), levels

    # Damping gives an input that was never on a pivot; its weights cost nothing and go first.
    pivots = jnp.where(jnp.diagonal(matrix) == 0, 0, factor.pivots)
    blocks = _split((w.T, factor.unit, pivots, scales, zero_points), size)
    _, levels = lax.scan(solve_block, jnp.zeros_like(w.T), (jnp.arange(k // size) * size, blocks))
    levels = levels.reshape(k, n).T
    if grid is None:
        result = values = levels
    else:
        result = with_levels(grid, levels)
        values = dequantize(result)
    error = layer_error(w, values.astype(w.dtype), matrix)
    error = jnp.where(jnp.all(jnp.isfinite(factor.pivots)), error, jnp.nan)
    return result, Info(error.astype(jnp.float32), factor.damping, factor.failures)


def _split(tree, size: int):
    """Each array cut along its first axis into parts of `size`."""
    return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), tree)


def _columns(k: int, most: int, multiple: int) -> int:
    """The largest divisor of k that is at most `most` and a multiple of `multiple`."""
    return max(s for s in range(1, max(most, multiple) + 1) if k % s == 0 and s % multiple == 0)


def _check(w, matrix, pattern, spec):
    k = w.shape[1]
    if matrix.shape != (k, k):
        raise ValueError(
            f"sparsegpt: weights (n, k) go with a Hessian (k, k), got {w.shape} and {matrix.shape}."
        )
    if isinstance(pattern, NM) and k % pattern.m:
        raise ValueError(
            f"sparsegpt: {pattern} needs a width that is a multiple of {pattern.m}, got {k}; choose"
            " another pattern for this matrix."
        )
    if spec is not None and spec.format.kind == "midrise":
        raise ValueError(
            f"sparsegpt: a pruned weight needs a level at zero, got {spec}, which has none; use an"
            " integer or a float format, for example INT4."
        )

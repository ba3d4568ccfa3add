"""One global scale for matrices that servers multiply by as one.

vLLM reads queries, keys and values as one matrix, gate and up as another, and gives each a single
global scale of NVFP4. Codes that were made under several would have to be rounded again. Here the
matrices that take one input are solved as one, their rows stacked: rows do not depend on one
another but through that scale, which is then that of the largest (Egiazarian et al., Bridging the
Gap Between Promise and Performance for Microscaling FP4 Quantization, arXiv:2509.23202, published
code: the least divisor of the fused ones).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from lowbit_jax.numerics import QTensor
from lowbit_jax.ptq.calibrate import Compression
from lowbit_jax.ptq.hessian import Hessian, layer_error
from lowbit_jax.ptq.info import Info


def sharing_scales(compression: Compression) -> Compression:
    """`compression` with one global scale for all matrices that take the same input.

    Without a global scale, or one scale of the tensor, the codes are what they would be alone; the
    Hessian is then factored once, and not for each matrix.

    Args:
      compression: Its solver keeps a `QTensor`, and does not look at the path.

    Raises:
      ValueError: While solving, if something else is kept, or rows that share scales are those of
        two matrices.
    """

    def solve_together(
        weights: dict[str, Array], hessian: Hessian
    ) -> dict[str, tuple[PyTree, Info]]:
        stacked = jnp.concatenate(list(weights.values()))
        q, info = compression.solve("+".join(weights), stacked, hessian)
        if not isinstance(q, QTensor):
            raise ValueError(
                f"sharing_scales: the solver must keep a QTensor, got a {type(q).__name__}; solve"
                " matrices with transforms of their own one by one."
            )
        solved, start = {}, 0
        for path, w in weights.items():
            part = cut_rows(q, start, start + len(w))
            error = _error(w, compression.weight(path, part), hessian.matrix)
            solved[path] = (part, dataclasses.replace(info, error=error))
            start += len(w)
        return solved

    return compression._replace(solve_together=solve_together)


def cut_rows(q: QTensor, start: int, stop: int) -> QTensor:
    """The rows from `start` to before `stop` of a matrix, as a matrix of the same global scale.

    Raises:
      ValueError: If rows share scales (`block_rows`) with rows that are cut off.
    """
    rows = q.spec.block_rows
    if start % rows or stop % rows:
        raise ValueError(
            f"cut_rows: rows must be cut where their blocks end, at multiples of {rows}, got"
            f" {start} to {stop}."
        )
    scales, zero_points = q.scales, q.zero_points
    if q.spec.block_size != "tensor":
        kept = slice(start // rows, stop // rows)
        scales, zero_points = jax.tree.map(lambda part: part[kept], (scales, zero_points))
    return dataclasses.replace(q, codes=q.codes[start:stop], scales=scales, zero_points=zero_points)


@jax.jit
def _error(w, w_hat, matrix):
    return layer_error(w, w_hat, matrix).astype(jnp.float32)

"""WUSH before a solver: weights and Hessian move to the basis of the transform, then it solves.

Rounding to nearest and GPTQ know weights and a Hessian, no basis. With `w' = w T^-1` and
`H' = T H T^T` the error of a layer is what it was, so that WUSH + RTN and WUSH + GPTQ are these
solvers on transformed arguments. That GPTQ is the one that carries errors from block to block in
the original coordinates and rounds inside a block in the transformed ones, for a block-diagonal
change of basis leaves the triangular factor of H triangular in blocks.

Where we differ from the released code: T and the scales are found before the first column is
rounded, from the weights as they were (there block by block, from weights that carry the errors of
later blocks), so that one product transforms all, and GPTQ may take the columns in any order; the
damping of GPTQ is relative to H' and not to H.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lowbit_jax.numerics import QTensor, QuantSpec
from lowbit_jax.ptq.gptq import gptq
from lowbit_jax.ptq.hessian import damped, with_more_damping
from lowbit_jax.ptq.info import Info
from lowbit_jax.ptq.rtn import rtn
from lowbit_jax.rotations.wush import (
    BlockTransform,
    block_moments,
    damped_moments,
    wush_of_factor,
)

Moments = Literal["marginal", "schur"]
Solver = Literal["gptq", "rtn"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["error", "damping", "failures", "transform"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class WushInfo(Info):
    """`Info` with the transform that the layer's inputs need.

    `failures` counts the factorisations of the transform and of the solver, `damping` is the larger
    of theirs.

    Attributes:
      transform: A `BlockTransform`; the layer is `transform.apply(x) @ dequantize(q).T`.
    """

    transform: Any


class LayerTransform(NamedTuple):
    """What `wush_transform` found.

    Attributes:
      transform: Of the layer's inputs.
      damping: That the moments got, as a fraction; see `with_more_damping`.
      failures: Factorisations that failed; where the last did, too, the transform is NaN.
    """

    transform: BlockTransform
    damping: Array
    failures: Array


@functools.partial(
    jax.jit, static_argnames=("block_size", "moments", "has_hadamard", "damping", "dtype")
)
def wush_transform(
    w: Float[Array, "n k"],
    matrix: Float[Array, "k k"],
    block_size: int,
    *,
    moments: Moments = "marginal",
    has_hadamard: bool = True,
    damping: float = 0.01,
    dtype: DTypeLike = jnp.float32,
) -> LayerTransform:
    """The transforms of a layer, from its weights and its Hessian.

    Moments that are not positive definite are damped more, as GPTQ's Hessian is.

    Args:
      w: `(n, k)` weights; for layers that share a transform, their rows.
      matrix: `(k, k)`, the Hessian as it came.
      block_size: B, that of the scales: 32 for MXFP4, 16 for NVFP4.
      moments: "marginal", the paper's formula: the diagonal blocks of H. "schur", the released
        code's: those of a block when the ones before it are eliminated, so that only what they do
        not explain counts. With quantized activations the first is better.
      has_hadamard: See `wush`.
      damping: See `wush`; for "schur" H itself is damped as well.
      dtype: See `wush`.

    Raises:
      ValueError: If the block size does not divide k, or there are no such moments.
    """
    if moments not in get_args(Moments):
        raise ValueError(
            f"wush_transform: moments must be one of {get_args(Moments)}, got {moments!r}."
        )

    def attempt(fraction):
        if moments == "marginal":
            blocks = block_moments(matrix, block_size)
        else:
            factor = block_moments(lax.linalg.cholesky(damped(matrix, fraction)), block_size)
            blocks = jnp.matmul(factor, factor.swapaxes(-1, -2), precision="highest")
        return jnp.linalg.cholesky(damped_moments(blocks, fraction))

    lower, fraction, failures = with_more_damping(attempt, damping)
    found = wush_of_factor(w, lower, has_hadamard=has_hadamard, damping=damping, dtype=dtype)
    return LayerTransform(found, fraction, failures)


def transform_layer(
    w: Float[Array, "n k"], matrix: Float[Array, "k k"], transform: BlockTransform
) -> tuple[Float[Array, "n k"], Float[Array, "k k"]]:
    """`(w T^-1, T H T^T)`: weights and Hessian in the basis of the transform."""
    moved = transform.apply(transform.apply(matrix).T)
    return transform.apply_to_weights(w), (moved + moved.T) / 2


def wush_quantize(
    w: Float[Array, "n k"],
    matrix: Float[Array, "k k"],
    spec: QuantSpec,
    *,
    solver: Solver = "gptq",
    transform: BlockTransform | None = None,
    moments: Moments = "marginal",
    has_hadamard: bool = True,
    block_size: int | None = None,
    transform_damping: float = 0.01,
    dtype: DTypeLike = jnp.float32,
    **options: Any,
) -> tuple[QTensor, WushInfo]:
    """Weights quantized in the basis of WUSH, and the transform that the inputs then need.

    Args:
      w: `(n, k)` weights, (out, in).
      matrix: `(k, k)`, the Hessian as it came.
      spec: Target.
      solver: "gptq" or "rtn".
      transform: To use instead of one of its own: that of several layers with one input.
      moments: See `wush_transform`.
      has_hadamard: See `wush`.
      block_size: B; None: the block size of the spec.
      transform_damping: See `wush`.
      dtype: Of T, of which a layer keeps `k B` numbers.
      **options: Of the solver: `order`, `damping`, `search`, ...

    Returns:
      The quantized `w T^-1`, and the solver's `Info` with T; its error is that of the layer's
      outputs.

    Raises:
      ValueError: As `wush_transform` and the solver; or if the spec has no integer block size and
        none is given.
    """
    if solver not in get_args(Solver):
        raise ValueError(
            f"wush_quantize: solver must be one of {get_args(Solver)}, got {solver!r}."
        )
    if transform is not None:
        found = LayerTransform(transform, jnp.float32(0), jnp.int32(0))
    else:
        size = block_size or spec.block_size
        if not isinstance(size, int):
            raise ValueError(
                f"wush_quantize: needs the size of a block, got block_size=None and {spec}; pass"
                " block_size=32 or another power of two."
            )
        found = wush_transform(
            w,
            matrix,
            size,
            moments=moments,
            has_hadamard=has_hadamard,
            damping=transform_damping,
            dtype=dtype,
        )
    solve = {"gptq": gptq, "rtn": rtn}[solver]
    q, info = solve(*transform_layer(w, matrix, found.transform), spec, **options)
    damping = jnp.maximum(info.damping, found.damping)
    return q, WushInfo(info.error, damping, info.failures + found.failures, found.transform)

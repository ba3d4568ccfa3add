"""WUSH: the block transform that makes quantized products least wrong, from second moments.

A rotation does not look at the data. WUSH gives each block of B input channels an invertible B x B
matrix T, not orthogonal: `x' = T x` for activations and `w' = w T^-1` for weights, so that
`w' x' = w x`. With the second moments `M_X = R^T R` and `M_W` of a block (R upper triangular),

    R w^T / sqrt(n) = V S (..)^T         singular value decomposition, n rows of weights
    T = H S^(1/2) V^T R^-T               H: Hadamard over sqrt(B)

Both moments become `H S H^T`, whose diagonal is constant: `T M_X T^T = T^-T M_W T^-1`. To first
order the error of independent rounding is `sum_i a_i b_i` with a, b the diagonals where the error
of a coordinate follows its own power (floating point), and `sum(a) sum(b) / B` where it follows
that of its group (integers). No T gets either below `tr(S)^2 / B`, and this one attains both; a
Hadamard transform cannot change the second at all.

WUSH: near-optimal adaptive transforms for LLM quantization, arXiv:2512.00956. The paper writes T as
`H S^(-1/2) U^T W'^T` with `M_W = W' W'^T` and `W'^T X' = U S V^T`, which is the same matrix.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from lowbit_jax.rotations.hadamard import hadamard_matrix


@functools.partial(jax.tree_util.register_dataclass, data_fields=["matrices"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class BlockTransform:
    """`x -> T x` in blocks along the last axis, and what undoes it in the other operand. A pytree.

    Unlike a `Rotation` it treats the two operands of a product differently:
    `apply(x) apply_to_weights(w)^T = x w^T`. All results are float32, or float64 for float64.

    Attributes:
      matrices: `(k // B, B, B)`, T of each block, as it is stored, for example in bfloat16; not
        checked, for a pytree may hold anything.
    """

    matrices: Any

    @property
    def block_size(self) -> int:
        """B."""
        return self.matrices.shape[-1]

    def apply(self, x: Shaped[Array, "..."]) -> Float[Array, "..."]:
        """`T x` of each block of `(*batch, k)`."""
        return self._multiply(x, self._wide(x))

    def inverse(self, x: Shaped[Array, "..."]) -> Float[Array, "..."]:
        """`T^-1 x`: undoes `apply`."""
        return self._multiply(x, jnp.linalg.inv(self._wide(x)))

    def apply_to_weights(self, w: Shaped[Array, "..."]) -> Float[Array, "..."]:
        """`w T^-1` of each block of `(*batch, k)`, by the T that is stored, rounded as it is."""
        return self._multiply(w, jnp.linalg.inv(self._wide(w)).swapaxes(-1, -2))

    def inverse_of_weights(self, w: Shaped[Array, "..."]) -> Float[Array, "..."]:
        """`w T`: undoes `apply_to_weights`."""
        return self._multiply(w, self._wide(w).swapaxes(-1, -2))

    def _wide(self, x):
        dtype = jnp.promote_types(jnp.promote_types(self.matrices.dtype, x.dtype), jnp.float32)
        return self.matrices.astype(dtype)

    def _multiply(self, x, matrices):
        count, size, _ = matrices.shape
        if x.ndim == 0 or x.shape[-1] != count * size:
            raise ValueError(
                f"BlockTransform: the last axis must be {count} blocks of {size}, got shape"
                f" {x.shape}; a transform belongs to the layer that it was made for."
            )
        blocks = x.reshape(*x.shape[:-1], count, size).astype(matrices.dtype)
        return jnp.einsum("...cb,cdb->...cd", blocks, matrices, precision="highest").reshape(
            x.shape
        )


def wush(
    w: Shaped[Array, "n k"],
    moments: Float[Array, "c b b"],
    *,
    has_hadamard: bool = True,
    damping: float = 0.01,
    dtype: DTypeLike = jnp.float32,
) -> BlockTransform:
    """The transforms of all blocks of a layer, in closed form.

    Args:
      w: `(n, k)` weights, (out, in). Layers that share their input may share T: stack their rows.
      moments: `(k // B, B, B)`, the mean of `x x^T` of each block of inputs; see `block_moments`.
        float64 moments are computed with in float64.
      has_hadamard: Whether H spreads the channels; B must be a power of two. Without it ("WUS") the
        floating-point objective is `sum S^2`, and integers, whose step is the group's abs-max, can
        become far worse than without any transform.
      damping: Added to the diagonal of each block of moments as a fraction of its mean, and to the
        singular values as a fraction of theirs. With 0, few tokens or weights let T explode.
      dtype: T is rounded to it, once; what is derived from T uses the rounded one.

    Returns:
      The transforms.

    Raises:
      ValueError: If shapes do not go together or B is no power of two.
    """
    count, size = moments.shape[0], moments.shape[-1]
    if w.shape[-1] != count * size:
        raise ValueError(
            f"wush: weights (n, k) go with moments (k // B, B, B), got {w.shape} and"
            f" {moments.shape}; see block_moments."
        )
    lower = jnp.linalg.cholesky(damped_moments(moments, damping))
    return wush_of_factor(w, lower, has_hadamard=has_hadamard, damping=damping, dtype=dtype)


def damped_moments(
    moments: Float[Array, "c b b"], fraction: float | Float[Array, ""]
) -> Float[Array, "c b b"]:
    """Each block with that fraction of its mean diagonal added; one of zeros becomes the identity.

    For inputs that were always zero any T will do.
    """
    work = jnp.promote_types(moments.dtype, jnp.float32)
    diagonal = jnp.mean(jnp.diagonal(moments, axis1=-2, axis2=-1), axis=-1)
    added = jnp.where(diagonal == 0, 1, fraction * diagonal).astype(work)
    return moments.astype(work) + added[:, None, None] * jnp.eye(moments.shape[-1], dtype=work)


def wush_of_factor(
    w: Shaped[Array, "n k"],
    lower: Float[Array, "c b b"],
    *,
    has_hadamard: bool = True,
    damping: float = 0.01,
    dtype: DTypeLike = jnp.float32,
) -> BlockTransform:
    """`wush` from the Cholesky factors R^T of the damped moments; computed in their dtype."""
    count, size, work = lower.shape[0], lower.shape[-1], lower.dtype
    blocks = w.astype(work).reshape(-1, count, size).transpose(1, 2, 0)
    y = jnp.matmul(lower.swapaxes(-1, -2), blocks, precision="highest") / len(w) ** 0.5
    # V of y y^T, for GPUs take tens of milliseconds for singular values of such blocks and one for
    # this; S as the lengths of V^T y, which have the accuracy that roots of eigenvalues lose.
    _, v = jnp.linalg.eigh(jnp.matmul(y, y.swapaxes(-1, -2), precision="highest"))
    v = v[..., ::-1]  # the largest first
    # Eigenvectors have no sign, and H mixes them: the same one on every device.
    largest = jnp.take_along_axis(v, jnp.argmax(jnp.abs(v), axis=-2, keepdims=True), axis=-2)
    v = jnp.where(largest < 0, -v, v)
    s = jnp.linalg.norm(jnp.matmul(v.swapaxes(-1, -2), y, precision="highest"), axis=-1)
    mean = jnp.mean(s, axis=-1, keepdims=True)
    s = jnp.where(mean == 0, 1, s + damping * mean)
    # V^T R^-T by a triangular solve: (R^-1 V)^T.
    transform = jax.lax.linalg.triangular_solve(
        lower, v, left_side=True, lower=True, transpose_a=True
    ).swapaxes(-1, -2)
    transform = jnp.sqrt(s)[..., None] * transform
    if has_hadamard:
        hadamard = jnp.asarray(hadamard_matrix(size), work) / jnp.sqrt(jnp.asarray(size, work))
        transform = jnp.matmul(hadamard, transform, precision="highest")
    return BlockTransform(transform.astype(dtype))


def block_moments(matrix: Float[Array, "k k"], block_size: int) -> Float[Array, "c b b"]:
    """The diagonal blocks of a Hessian: each block's own second moments, whatever the others do.

    Raises:
      ValueError: If the block size does not divide k.
    """
    k = matrix.shape[-1]
    if k % block_size:
        raise ValueError(
            f"block_moments: the block size must divide the width of the layer, got {block_size}"
            f" and {k}; choose a smaller power of two."
        )
    count = k // block_size
    blocks = matrix.reshape(count, block_size, count, block_size)
    return jnp.einsum("cbcd->cbd", blocks)

"""What a layer-wise solver knows of a layer's inputs: `H = mean over tokens of x x^T`.

With the output `x w^T`, the error that a changed weight makes on the calibration tokens is
`E |x (w - w_hat)^T|^2 = tr((w - w_hat) H (w - w_hat)^T)`, so that H is all of the data that GPTQ,
SparseGPT and others need. It is a mean and not a sum: no factor depends on how much was seen.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Shaped

_MAX_FAILURES = 12


class Hessian(NamedTuple):
    """A running mean; a pytree.

    Attributes:
      matrix: `(k, k)` float32, the mean of `x x^T` over the tokens so far.
      count: `()` float32, the tokens so far.
    """

    matrix: jax.Array
    count: jax.Array


def empty_hessian(k: int) -> Hessian:
    """That of no tokens, for inputs of width `k`."""
    return Hessian(jnp.zeros((k, k), jnp.float32), jnp.zeros((), jnp.float32))


def add_inputs(hessian: Hessian, x: Shaped[ArrayLike, "..."]) -> Hessian:
    """The mean with more tokens; what order they come in changes it by rounding alone.

    Args:
      hessian: So far.
      x: `(*batch, k)` inputs of the layer, any float dtype. Products and sums are float32, at the
        highest precision: one pass of a tensor core would leave H with 8 or 11 good bits, and its
        small eigenvalues with none. Where x is cut over devices, so is the sum, within `jax.jit`.

    Raises:
      ValueError: If `x` is not floating point or its last axis is not that of the matrix.
    """
    x = jnp.asarray(x)
    k = hessian.matrix.shape[-1]
    if x.ndim == 0 or x.shape[-1] != k or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"add_inputs: x must be floating point (*batch, {k}), as the Hessian is ({k}, {k}), got"
            f" {x.dtype} {x.shape}; pass the inputs of the layer that the Hessian was made for."
        )
    x = x.astype(jnp.float32).reshape(-1, k)
    count = hessian.count + x.shape[0]
    product = jnp.matmul(x.T, x, precision="highest")
    # An empty batch of an empty mean keeps zeros.
    share = 1 / jnp.maximum(count, 1)
    return Hessian(hessian.matrix * (hessian.count * share) + product * share, count)


def merge(a: Hessian, b: Hessian) -> Hessian:
    """The Hessian of the tokens of both, which were accumulated apart."""
    count = a.count + b.count
    share = 1 / jnp.maximum(count, 1)
    return Hessian(a.matrix * (a.count * share) + b.matrix * (b.count * share), count)


def damped(
    matrix: Float[ArrayLike, "k k"], fraction: float | Float[Array, ""] = 0.01
) -> Float[Array, "k k"]:
    """`H + fraction * mean(diag H) * I`; an input that was never on gets 1 on the diagonal first.

    An input that is zero on every token has a row and a column of zeros, so it is independent of
    the others and any positive number will do.

    Args:
      matrix: `(k, k)`, symmetric and positive semidefinite.
      fraction: Relative to the mean of the diagonal, as it comes.
    """
    matrix = jnp.asarray(matrix)
    diagonal = jnp.diagonal(matrix)
    addition = jnp.where(diagonal == 0, 1, 0) + fraction * jnp.mean(diagonal)
    return matrix + jnp.diag(addition.astype(matrix.dtype))


def with_more_damping(
    attempt: Callable[[Float[Array, ""]], PyTree], damping: float | Float[Array, ""]
) -> tuple[Any, Float[Array, ""], Int[Array, ""]]:
    """`attempt(fraction)`, again with more damping as long as something of it is not finite.

    A Cholesky factorisation of what is not positive definite gives NaN.

    Args:
      attempt: From a fraction as `damped` takes it to arrays.
      damping: The first fraction; what follow are `damping` + 0.01, 0.03, 0.07, ...

    Returns:
      The arrays, the last fraction and how many attempts failed, 12 at most: then NaN are left.
    """

    def tried(failures):
        fraction = damping + 0.01 * (2.0**failures - 1)
        return attempt(fraction), jnp.asarray(fraction, jnp.float32), failures

    def has_failed(state):
        found, _, failures = state
        is_finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(found)]
        return ~jnp.all(jnp.stack(is_finite)) & (failures < _MAX_FAILURES)

    return lax.while_loop(has_failed, lambda state: tried(state[2] + 1), tried(jnp.int32(0)))


def layer_error(
    w: Float[ArrayLike, "..."], w_hat: Float[ArrayLike, "..."], matrix: Float[ArrayLike, "..."]
) -> Float[Array, ""]:
    """`tr((w - w_hat) H (w - w_hat)^T) / tr(w H w^T)`: squared error of the outputs, relative.

    Args:
      w: `(n, k)`, the weights as they were.
      w_hat: `(n, k)`, the weights as they will be.
      matrix: `(k, k)`, H as it came, not damped.

    Returns:
      A scalar, 0 where nothing is lost of nothing.

    Raises:
      ValueError: If shapes do not go together.
    """
    w, w_hat, matrix = jnp.asarray(w), jnp.asarray(w_hat), jnp.asarray(matrix)
    if w.ndim != 2 or w_hat.shape != w.shape or matrix.shape != (w.shape[-1],) * 2:
        raise ValueError(
            f"layer_error: two matrices (n, k) go with a Hessian (k, k), got {w.shape},"
            f" {w_hat.shape} and {matrix.shape}; solve stacked layers one by one, each with its"
            " Hessian."
        )

    def energy(x):
        return jnp.sum(jnp.matmul(x, matrix, precision="highest") * x)

    error, total = energy(w - w_hat), energy(w)
    return jnp.where(error == 0, 0, error / jnp.where(error == 0, 1, total))

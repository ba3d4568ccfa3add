"""The block Hadamard transform, plain and with random signs."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Shaped

Method = Literal["matrix", "butterfly"]


def hadamard_matrix(n: int) -> np.ndarray:
    """Sylvester's matrix, `H[i, j] = (-1) ** popcount(i & j)`: `(n, n)` int8, entries +1 and -1.

    Symmetric, and `H H = n I`; the orthogonal matrix is `H / sqrt(n)`.

    Raises:
      ValueError: If `n` is not a power of two from 2 on.
    """
    _check_power_of_two("hadamard_matrix", "n", n)
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def hadamard_transform(
    x: Shaped[ArrayLike, "..."],
    block_size: int,
    method: Method = "matrix",
    *,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "..."]:
    """`x H / sqrt(block_size)` in blocks along the last axis; it is its own inverse.

    The data are multiplied by +1 and -1, which is exact in every dtype, summed in float32 and
    scaled last: `H / sqrt(d)` rounded to bfloat16 is off by 1.07e-4 for d = 128, so that
    `H H^T = 0.99979 I`.

    Args:
      x: `(*batch, k)`, bfloat16, float16 or float32. The 16-bit types are multiplied as they are
        (one pass of a tensor core), float32 at the highest precision.
      block_size: d, a power of two that divides `k`.
      method: "matrix" is one product with `H`, `2 d` operations an element, made for matrix
        units; "butterfly" is log2(d) rounds of sums and differences, for everything else.
      dtype: Dtype of the result.

    Returns:
      `(*batch, k)`.

    Raises:
      ValueError: If the block size is no power of two or does not divide `k`, if `x` is not of a
        floating-point dtype, or if there is no such method.
    """
    x = jnp.asarray(x)
    _check_input(x, block_size)
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // block_size, block_size)
    # float64 stays what it is, where somebody has enabled it.
    sum_dtype = jnp.promote_types(x.dtype, jnp.float32)
    if jax.default_backend() == "cpu":
        # Exact, and what XLA does there by itself, but for a transposed array of one block a row:
        # for that product of 16-bit operands it has no code and says so only when it runs.
        blocks = blocks.astype(sum_dtype)
    # Only where the operands have more bits than a tensor core's single pass takes.
    precision = jax.lax.Precision.HIGHEST if blocks.dtype.itemsize >= 4 else None
    if method == "matrix":
        rotated = jax.lax.dot_general(
            blocks,
            jnp.asarray(hadamard_matrix(block_size), blocks.dtype),
            (((blocks.ndim - 1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=sum_dtype,
        )
    elif method == "butterfly":
        rotated = _butterflies(blocks.astype(sum_dtype))
    else:
        raise ValueError(
            f"hadamard_transform: method must be 'matrix' or 'butterfly', got {method!r}."
        )
    return (rotated * (1 / math.sqrt(block_size))).astype(dtype).reshape(x.shape)


def _butterflies(blocks: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """`x H` without a matrix: in round i, sums and differences at a distance of 2^i."""
    shape = blocks.shape
    distance = 1
    while distance < shape[-1]:
        pairs = blocks.reshape(*shape[:-1], -1, 2, distance)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        blocks = jnp.stack([low + high, low - high], axis=-2)
        distance *= 2
    return blocks.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Hadamard:
    """`x -> (x * signs) H / sqrt(block_size)` in blocks along the last axis.

    Random signs multiply the *input* coordinates. On the other side, `(x H) * signs`, they would
    only flip signs of outputs, which a symmetric quantizer does not notice.

    Attributes:
      block_size: Size of a block, a power of two. The last axis must be a multiple of it.
      randomized: Whether to draw signs, one for each coordinate of the last axis, from the key
        that `apply` and `inverse` then need. Arrays transformed with one key share their signs,
        so that `(xR)(wR)^T = x w^T`.
      method: See `hadamard_transform`.

    References:
      Panferov et al., QuEST, arXiv:2502.05003 (plain, 128); Castro et al., Quartet,
      arXiv:2505.14669 (32, randomized in the backward pass).
    """

    block_size: int = 128
    randomized: bool = False
    method: Method = "matrix"

    def __post_init__(self):
        _check_power_of_two("Hadamard", "block_size", self.block_size)

    def __str__(self) -> str:
        return f"{'randomized ' if self.randomized else ''}Hadamard {self.block_size}"

    @property
    def needs_key(self) -> bool:
        """Whether `apply` and `inverse` need a key."""
        return self.randomized

    def apply(
        self, x: Shaped[ArrayLike, "..."], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "..."]:
        """`(x * signs) H / sqrt(block_size)`, `(*batch, k)` to `(*batch, k)` float32.

        Raises:
          ValueError: If `k` is not a multiple of the block size, or a needed `key` is missing.
        """
        if self.randomized:
            x = jnp.asarray(x)
            x = x * self._signs(x, key)
        return hadamard_transform(x, self.block_size, self.method)

    def inverse(
        self, x: Shaped[ArrayLike, "..."], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "..."]:
        """`(x H / sqrt(block_size)) * signs`; arguments and result as those of `apply`."""
        x = hadamard_transform(x, self.block_size, self.method)
        return x * self._signs(x, key) if self.randomized else x

    def _signs(self, x, key):
        if key is None:
            raise ValueError(
                "Hadamard: randomized=True draws its signs from a key, got key=None;"
                " pass key=jax.random.key(...), the same to `apply` and `inverse`."
            )
        return jax.random.rademacher(key, x.shape[-1:], x.dtype)


def _check_power_of_two(who: str, name: str, n: int) -> None:
    if n < 2 or n & (n - 1):
        raise ValueError(f"{who}: {name} must be a power of two from 2 on, got {n}.")


def _check_input(x, block_size: int) -> None:
    _check_power_of_two("hadamard_transform", "block_size", block_size)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"hadamard_transform: x must be floating point, got {x.dtype}; cast it first."
        )
    if x.ndim == 0 or x.shape[-1] % block_size:
        raise ValueError(
            f"hadamard_transform: the last axis must be a multiple of block_size={block_size},"
            f" got shape {x.shape}; pad it or choose a smaller power of two."
        )

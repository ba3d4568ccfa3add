"""HPTQ: GPTQ to unclipped integers of one scale, whose size is that of their Huffman code.

Chen et al., The Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm,
arXiv:2507.18553. Clipping is what breaks GPTQ's error bound, and a larger scale raises it; integers
without limits keep it, and an entropy code makes frequent ones short. A study of compression: no
product reads such weights.
"""

import functools
import heapq
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from lowbit_jax.ptq.gptq import Order, column_order, factorize, nearest_plane
from lowbit_jax.ptq.hessian import damped, layer_error
from lowbit_jax.ptq.info import Info

_BISECTIONS = 20  # of a range of 2^14: the scale to 1e-5


class EntropyCoded(NamedTuple):
    """`w ~ integers * scale`; a pytree.

    Attributes:
      integers: `(n, k)` int32, without limits.
      scale: `()` float32.
    """

    integers: jax.Array
    scale: jax.Array


def hptq(
    w: Float[ArrayLike, "n k"],
    matrix: Float[ArrayLike, "k k"],
    bits_per_param: float,
    *,
    order: Order = "activation",
    damping: float = 0.01,
) -> tuple[EntropyCoded, Info]:
    """The integers of the smallest scale whose Huffman code takes no more than the bits given.

    Bisects the scale; the size of each trial is counted on the host, so it cannot be traced. With
    the identity for a Hessian it is the same of round-to-nearest, HRTN.

    Args:
      w: `(n, k)` weights, (out, in).
      matrix: `(k, k)`, the Hessian as it came.
      bits_per_param: Average length of a code word, 1 or more; the table is not counted.
      order: See `gptq`.
      damping: See `gptq`.

    Raises:
      ValueError: If there are fewer bits than a Huffman code needs, or nothing could be factored.
    """
    if not bits_per_param >= 1:
        raise ValueError(
            f"hptq: a Huffman code takes at least 1 bit a weight, got {bits_per_param}."
        )
    w, matrix = jnp.asarray(w, jnp.float32), jnp.asarray(matrix, jnp.float32)
    columns, factor = _factorize(matrix, damping, order=order)
    if not bool(jnp.all(jnp.isfinite(factor.pivots)) & jnp.all(jnp.isfinite(w))):
        raise ValueError(
            f"hptq: weights and Hessian must be finite and the latter positive semidefinite, got"
            f" {int(factor.failures)} failed factorisations; look at the layer's inputs."
        )
    high = 4 * float(jnp.max(jnp.abs(w))) or 1.0  # most integers are 0 there
    low = high / 2**14
    # Errors that columns hand on may be larger than any weight.
    while huffman_bits(_round_to_lattice(w, columns, factor.unit, high)) > bits_per_param:
        high *= 2
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        integers = _round_to_lattice(w, columns, factor.unit, middle)
        if huffman_bits(integers) > bits_per_param:
            low = middle
        else:
            high = middle
    integers = _round_to_lattice(w, columns, factor.unit, high)
    error = layer_error(w, integers * jnp.float32(high), matrix)
    return EntropyCoded(integers, jnp.float32(high)), Info(error, factor.damping, factor.failures)


@functools.partial(jax.jit, static_argnames="order")
def _factorize(matrix, damping, *, order):
    columns = column_order(damped(matrix, damping), order)
    return columns, factorize(matrix, columns, damping)


@jax.jit
def _round_to_lattice(w, columns, unit, scale):
    def round_column(u, _):
        integers = jnp.round(u / scale)
        return integers * scale, integers.astype(jnp.int32)

    _, integers = nearest_plane(w.T[columns], unit, round_column)
    return jnp.zeros_like(integers).at[columns].set(integers).T


def huffman_bits(integers: Int[Array, "..."]) -> float:
    """Average length in bits of the code words of a Huffman code for these; 1 for one kind.

    References:
      Huffman, A Method for the Construction of Minimum-Redundancy Codes, 1952.
    """
    counts = np.unique(np.asarray(integers), return_counts=True)[1].tolist()
    total = sum(counts)
    if len(counts) == 1:
        return 1.0
    # Each merger makes the words of all that is merged one bit longer.
    heapq.heapify(counts)
    bits = 0
    while len(counts) > 1:
        merged = heapq.heappop(counts) + heapq.heappop(counts)
        bits += merged
        heapq.heappush(counts, merged)
    return bits / total

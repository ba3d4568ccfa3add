"""Weights that wait in the host's memory and come to the device where they are used.

A type knows where its array lies: that of an array in pinned host memory has the memory space
`jax.memory.Space.Host`. What a loop over layers reads of a stacked array in host memory is one
layer, so that no more than that is copied to the device; the gradient of the copy is a copy back.

References:
  Schultheis and Alistarh, LLMQ: Efficient Lower-Precision LLM Training for Consumer GPUs,
  arXiv:2512.15306: master weights, gradients and residuals of blocks in host memory.
"""

import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array, Float

HOST = "pinned_host"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OffloadedWeight:
    """A weight whose gradient lies elsewhere than the weight itself.

    Attributes:
      weight: Read, not differentiated.
      gradient: An array of its shape and dtype in the memory where the gradient is to lie; never
        read, but differentiated: its gradient is that of the weight.
    """

    weight: Float[Array, "..."]
    gradient: Float[Array, "..."]


def is_on_host(x: Any) -> bool:
    """Whether an array, a tracer or a shape with its sharding is of pinned host memory."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def to_device(x: Array) -> Array:
    """`x`, copied to the device if it is in the host's memory; within `jax.jit`."""
    return jax.device_put(x, jax.memory.Space.Device) if is_on_host(x) else x


def to_host(x: Array) -> Array:
    """`x`, copied to the host's memory if it is on the device; within `jax.jit`."""
    return x if is_on_host(x) else jax.device_put(x, jax.memory.Space.Host)


def fetched(weight: Any) -> Any:
    """The weight on the device; what is neither in host memory nor an `OffloadedWeight`, as is.

    The gradient goes back to the memory that the weight came from, or to that of
    `OffloadedWeight.gradient`.
    """
    if isinstance(weight, OffloadedWeight):
        return _fetch(weight.weight, weight.gradient, is_on_host(weight.gradient))
    return to_device(weight) if isinstance(weight, jax.Array) else weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fetch(weight, gradient, to):
    del gradient, to
    return to_device(weight)


def _fetch_fwd(weight, gradient, to):
    del gradient, to
    # No call of `_fetch`: of a weight that is on the device a loop over layers then keeps no copy.
    return to_device(weight), None


def _fetch_bwd(gradient_is_on_host, _, g):
    return None, to_host(g) if gradient_is_on_host else g


_fetch.defvjp(_fetch_fwd, _fetch_bwd)

"""Collectives that move codes and scales in the place of numbers, for use within `jax.shard_map`.

A device quantizes what it sends, so every number is rounded once: where it leaves the device. The
sums are float32. With stochastic rounding the result has no bias, and since devices draw their
random bits apart, their errors add up like independent ones: over n devices the squared error is
the sum of n, not n times as large again.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

from lowbit_jax.numerics import QTensor, QuantSpec, dequantize, quantize


def quantized_all_gather(
    x: Float[Array, "..."],
    spec: QuantSpec,
    axis_name: str | tuple[str, ...],
    *,
    axis: int = 0,
    key: PRNGKeyArray | UInt32[Array, "2"] | None = None,
) -> Float[Array, "..."]:
    """Parts of all devices, quantized, one after the other along `axis`; the same on each device.

    Args:
      x: This device's part, float; its last axis a multiple of the block size.
      spec: What is sent; it should round to nearest unless the gathered values must be unbiased.
      axis_name: Of the mesh; several count as one, the first of them the slowest.
      axis: Along which the parts are put together.
      key: The same on all devices, new every step; where `spec` rounds stochastically.

    Returns:
      Float32: `dequantize(quantize(part, spec))` of every device's part.

    Raises:
      ValueError: As `quantize`.
    """
    q = quantize(x, spec, key=_own_key(key, axis_name))
    parts = _dequantized(_moved(q, lambda leaf: lax.all_gather(leaf, axis_name)))
    return jnp.concatenate(list(parts), axis)


def quantized_reduce_scatter(
    x: Float[Array, "..."],
    spec: QuantSpec,
    axis_name: str | tuple[str, ...],
    *,
    axis: int = 0,
    key: PRNGKeyArray | UInt32[Array, "2"] | None = None,
) -> Float[Array, "..."]:
    """The sum over devices of `x`, of which device i gets the i-th of equal parts along `axis`.

    The error of an entry is at most the sum, over the devices, of the distance between the two
    levels round it; its mean is zero if `spec` rounds stochastically (and never clips), and then
    its square is on average at most a quarter of the sum of the squares of those distances.

    Args:
      x: Of one shape on all devices, float.
      spec: What is sent, of each part by itself: a scale for the whole array is one of a part.
      axis_name: Of the mesh; several count as one, the first of them the slowest.
      axis: Along which `x` is cut into parts; the last axis of a part must be a multiple of the
        block size.
      key: The same on all devices, new every step; where `spec` rounds stochastically.

    Returns:
      Float32, `axis` shorter by the number of devices.

    Raises:
      ValueError: If `axis` cannot be cut equally, or as `quantize`.

    References:
      Alistarh et al., QSGD, arXiv:1610.02132: unbiased quantized gradients and their variance.
    """
    count = lax.axis_size(axis_name)
    if x.shape[axis] % count:
        raise ValueError(
            f"quantized_reduce_scatter: axis {axis} must be a multiple of the {count} devices along"
            f" {axis_name!r}, got shape {x.shape}; pad it or choose another axis."
        )
    parts = jnp.stack(jnp.split(x, count, axis))
    keys = None
    if (own := _own_key(key, axis_name)) is not None:
        keys = jax.random.split(own, count)
    q = jax.vmap(lambda part, key: quantize(part, spec, key=key))(parts, keys)
    received = _moved(q, lambda leaf: lax.all_to_all(leaf, axis_name, 0, 0))
    return jnp.sum(_dequantized(received), axis=0)


def _dequantized(q: QTensor) -> Float[Array, "parts ..."]:
    """Of quantized arrays behind one another along a leading axis; float32."""
    return jax.vmap(dequantize)(q)


def _own_key(key, axis_name):
    """A key that each device has for itself: else their errors would not cancel."""
    return None if key is None else jax.random.fold_in(key, lax.axis_index(axis_name))


def _moved(q: QTensor, collective) -> QTensor:
    """Every array of `q` through a collective, float8 numbers as the bytes that they are."""

    def move(leaf):
        if leaf.dtype.itemsize > 1:
            return collective(leaf)
        moved = collective(lax.bitcast_convert_type(leaf, jnp.uint8))
        return lax.bitcast_convert_type(moved, leaf.dtype)

    return jax.tree.map(move, q)

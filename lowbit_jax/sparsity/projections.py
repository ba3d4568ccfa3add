"""Projections: `Projection = Callable[[Array], Array]`, what optimizers pull weights towards."""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from lowbit_jax.numerics import QuantSpec, quantize_values

Projection = Callable[[Array], Array]


@runtime_checkable
class InvertibleMap(Protocol):
    """What a projection asks of a rotation: a map along the last axis and its inverse."""

    def apply(self, x: Array, *, key=None) -> Array:
        """To the basis in which the array is quantized."""
        ...

    def inverse(self, x: Array, *, key=None) -> Array:
        """Back to the basis of the argument."""
        ...


def identity(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`: the projection of a weight that is not quantized; no gradient passes, as with others."""
    return jax.lax.stop_gradient(x)


@dataclasses.dataclass(frozen=True)
class GridProjection:
    """`x -> Q(x R) R^T`: see `onto_grid`. Equal settings are equal values and hash alike."""

    spec: QuantSpec
    rotation: InvertibleMap | None = None

    def __call__(self, x: Shaped[ArrayLike, "..."]) -> Float[Array, "..."]:
        """Projects `(*batch, k)`; same shape and dtype, float32 arithmetic, no gradient."""
        x = jax.lax.stop_gradient(jnp.asarray(x))
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"onto_grid: x must be floating point, got {x.dtype}; project float weights,"
                " not their codes."
            )
        values = x.astype(jnp.float32)
        if self.rotation is not None:
            values = self.rotation.apply(values)
        values, _ = quantize_values(values, self.spec)
        if self.rotation is not None:
            values = self.rotation.inverse(values)
        return values.astype(x.dtype)


def onto_grid(spec: QuantSpec, rotation: InvertibleMap | None = None) -> GridProjection:
    """The projection `x -> Q(x R) R^T` onto what `spec` can represent, in the basis of `x`.

    Rotates along the last axis, quantizes, dequantizes and rotates back, for `(*batch, k)` with
    any leading axes. The scales are those of `x` itself, so that `P(c x) = c P(x)` for powers of
    two (and negative c off ties). Not idempotent where the scale fits the mean square: `P(P(x))`
    is a little shorter than `P(x)`.

    Args:
      spec: Format, block and scale rule, rounding to nearest.
      rotation: Map along the last axis in whose basis the array is quantized; None: as it is.

    Returns:
      A hashable `Projection`: same shape and dtype, float32 inside, no gradient.

    Raises:
      ValueError: If `spec` rounds at random or `rotation` draws signs: a projection is a
        function of its argument alone.
    """
    if spec.needs_key:
        raise ValueError(
            f"onto_grid: a projection has no key to round with, got rounding={spec.rounding!r} in"
            f" {spec}; use dataclasses.replace(spec, rounding='nearest')."
        )
    if getattr(rotation, "needs_key", False):
        raise ValueError(
            f"onto_grid: a projection has no key to draw signs from, got {rotation};"
            " use a rotation without random signs."
        )
    return GridProjection(spec, rotation)

"""What every rotation offers."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, PRNGKeyArray, Shaped


@runtime_checkable
class Rotation(Protocol):
    """An orthogonal map along the last axis: `inverse(apply(x)) = x` and `(xR)(wR)^T = x w^T`.

    Implementations are frozen dataclasses of plain data, so that a recipe that holds one hashes.
    """

    @property
    def needs_key(self) -> bool:
        """Whether the map is random, so that `apply` and `inverse` take the same `key`."""
        ...

    def apply(
        self, x: Shaped[Array, "..."], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "..."]:
        """`x R` in float32, over blocks of the last axis."""
        ...

    def inverse(
        self, x: Shaped[Array, "..."], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "..."]:
        """`x R^T` in float32; with a random map, that of the same `key`."""
        ...

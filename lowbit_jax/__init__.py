"""Low-bit language models in JAX. This level has the numerics; the rest are namespaces."""

from lowbit_jax import numerics
from lowbit_jax.numerics import *  # noqa: F403 - the public names are written once, there

__all__ = []
__all__ += numerics.__all__

"""Text from a model: decoders take a function to logits and know no model."""

from lowbit_jax.decoding.generate import generate

__all__ = ["generate"]

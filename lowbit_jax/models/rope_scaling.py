"""Rotary frequencies of models whose context was stretched after pretraining."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class LinearRopeScaling:
    """All frequencies divided by `factor`: positions are interpolated.

    References:
      Chen et al., Extending Context Window of Large Language Models via Positional Interpolation,
      arXiv:2306.15595, eq. 4.
    """

    factor: float

    def __post_init__(self):
        _check(self)


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling:
    """Low frequencies divided by `factor`, high ones kept, and a ramp between them.

    With wavelength `w` in positions, `r = original_length / w` turns fit into the context of
    pretraining: above `high_frequency_factor` a frequency stays, below `low_frequency_factor` it is
    divided, in between it is the mean of both weighted linearly in `r`.

    References:
      Grattafiori et al., The Llama 3 Herd of Models, arXiv:2407.21783; the rule is that of the
      model code published with Llama 3.1.
    """

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        _check(self)
        if self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError(
                "Llama3RopeScaling: low_frequency_factor must be below high_frequency_factor, got"
                f" {self.low_frequency_factor} and {self.high_frequency_factor}; Llama 3.1 has 1"
                " and 4."
            )


RopeScaling = LinearRopeScaling | Llama3RopeScaling


def scale_frequencies(
    frequency: Float[Array, "half"], scaling: RopeScaling | None
) -> Float[Array, "half"]:
    """`frequency`, radians a position, as `scaling` changes it; `None` changes nothing."""
    if scaling is None:
        return frequency
    divided = frequency / scaling.factor
    if isinstance(scaling, LinearRopeScaling):
        return divided
    turns = scaling.original_length / (2 * math.pi / frequency)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * divided + kept * frequency


def _check(scaling: RopeScaling) -> None:
    for name, value in dataclasses.asdict(scaling).items():
        if not value > 0 or math.isinf(value):
            raise ValueError(
                f"{type(scaling).__name__}: {name} must be positive, got {value};"
                " take the number from the model's config.json."
            )

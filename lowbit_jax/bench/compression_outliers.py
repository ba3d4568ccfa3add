"""Outliers injected into a Llama without changing what it computes.

Large channels are what block formats fear and small models lack. A norm whose weight is multiplied
by a factor in some channels, with the columns that read those channels divided by it, gives the
same outputs; the inputs of the matrices, and their columns, then have the outliers.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

_READERS = {
    "attention_norm": ("attention", ("q_proj", "k_proj", "v_proj")),
    "mlp_norm": ("mlp", ("gate_proj", "up_proj")),
}


def inject_outliers(
    params: PyTree, *, seed: int = 0, channels: int = 4, factor: float = 30.0
) -> dict[str, Any]:
    """The parameters with `factor` times the weight of some channels of each norm of each block.

    The final norm stays: what reads it, the head, is not quantized, and may be the embedding.

    Args:
      params: Of a `Llama`, stacked over layers, float32 matrices.
      seed: Of the channels, which differ from norm to norm.
      channels: Of each norm.
      factor: Not a power of two by default, so that a column divided by it lands elsewhere on a
        grid of powers of two. The function changes by rounding.

    Returns:
      The same tree; changed leaves are NumPy arrays.

    Raises:
      ValueError: If a norm has fewer channels, or the factor is not positive and finite.

    References:
      Egiazarian et al., arXiv:2509.23202, section 4: outliers are what MXFP4 suffers from. The
      injection is ours.
    """
    layers = {part: dict(value) for part, value in params["layers"].items()}
    generator = np.random.default_rng(seed)
    for norm, (part, names) in _READERS.items():
        scale = np.array(layers[norm]["scale"], np.float32)
        count, width = scale.shape
        if not 1 <= channels <= width or not (np.isfinite(factor) and factor > 0):
            raise ValueError(
                f"inject_outliers: channels must be 1 to {width}, the width of the norm, and factor"
                f" positive and finite, got channels={channels} and factor={factor}."
            )
        chosen = np.stack([generator.choice(width, channels, replace=False) for _ in range(count)])
        factors = np.ones_like(scale)
        np.put_along_axis(factors, chosen, np.float32(factor), axis=1)
        layers[norm] = {**layers[norm], "scale": scale * factors}
        for name in names:
            weight = np.asarray(jax.device_get(layers[part][name]["weight"]))
            folded = (weight / factors[:, None, :]).astype(weight.dtype)
            layers[part][name] = {**layers[part][name], "weight": folded}
    return {**params, "layers": layers}

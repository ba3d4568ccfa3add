"""Linear maps along the last axis, each with its inverse."""

from lowbit_jax.rotations.base import Rotation
from lowbit_jax.rotations.hadamard import Hadamard, hadamard_matrix, hadamard_transform
from lowbit_jax.rotations.wush import BlockTransform, block_moments, wush

__all__ = [
    "BlockTransform",
    "Hadamard",
    "Rotation",
    "block_moments",
    "hadamard_matrix",
    "hadamard_transform",
    "wush",
]

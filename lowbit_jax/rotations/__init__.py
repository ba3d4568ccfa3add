"""Orthogonal maps along the last axis, each with its inverse."""

from lowbit_jax.rotations.base import Rotation
from lowbit_jax.rotations.hadamard import Hadamard, hadamard_matrix, hadamard_transform

__all__ = ["Hadamard", "Rotation", "hadamard_matrix", "hadamard_transform"]

"""Masks, and projections: arrays to their nearest neighbours in a set."""

from lowbit_jax.sparsity.patterns import (
    NM,
    Pattern,
    Unstructured,
    mask_of,
    masks_of_tree,
    parse_pattern,
)
from lowbit_jax.sparsity.projections import GridProjection, Projection, identity, onto_grid
from lowbit_jax.sparsity.sparse_projection import SparseProjection, apply_masks, onto_pattern

__all__ = [
    "NM",
    "GridProjection",
    "Pattern",
    "Projection",
    "SparseProjection",
    "Unstructured",
    "apply_masks",
    "identity",
    "mask_of",
    "masks_of_tree",
    "onto_grid",
    "onto_pattern",
    "parse_pattern",
]

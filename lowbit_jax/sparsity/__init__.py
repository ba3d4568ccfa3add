"""Projections: arrays to their nearest neighbours in a set."""

from lowbit_jax.sparsity.projections import GridProjection, Projection, identity, onto_grid

__all__ = ["GridProjection", "Projection", "identity", "onto_grid"]

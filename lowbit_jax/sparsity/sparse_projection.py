"""The nearest sparse point of a tree of arrays, plainly or in the metric of an importance."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lowbit_jax.sparsity.patterns import Comparison, Pattern, Unstructured, mask_of, masks_of_tree

Budget = Literal["leaf", "tree"]


@dataclasses.dataclass(frozen=True)
class SparseProjection:
    """`x -> x * mask`: see `onto_pattern`. Equal settings are equal values and hash alike."""

    pattern: Pattern
    per: Comparison = "matrix"
    budget: Budget = "leaf"

    def masks(self, tree: PyTree, importance: PyTree | None = None) -> PyTree:
        """True where an entry stays; bools in the structure of `tree`."""
        tree = jax.lax.stop_gradient(tree)
        if self.budget == "tree":
            assert isinstance(self.pattern, Unstructured)  # as onto_pattern demands
            scores = jax.tree.map(_scores, *_trees(tree, importance))
            return masks_of_tree(scores, self.pattern)

        def mask(*leaf):
            if leaf[0].ndim > 2:  # a matrix after the other: the counting takes 12 bytes an entry
                return jax.lax.map(lambda part: mask(*part), leaf)
            return mask_of(_scores(*leaf), self.pattern, self.per)

        return jax.tree.map(mask, *_trees(tree, importance))

    def __call__(self, tree: PyTree, importance: PyTree | None = None) -> PyTree:
        """The projection; same shapes and dtypes. Kept entries are the argument's, bit for bit."""
        return apply_masks(tree, self.masks(tree, importance))


def onto_pattern(
    pattern: Pattern, per: Comparison = "matrix", budget: Budget = "leaf"
) -> SparseProjection:
    """`argmin sum F (z - x)^2` over the z that `pattern` allows: the least `sqrt(F) |x|` go.

    With uniform F, the default, it is the nearest point: magnitude pruning. Idempotent.

    Args:
      pattern: `Unstructured(sparsity)` or `NM(n, m)`.
      per: Entries that compete under an `Unstructured` pattern within a leaf, see `mask_of`;
        stacked matrices `(*layers, n, k)` have a budget each.
      budget: "leaf", or "tree" for one budget over all leaves and their whole extent.

    Returns:
      A hashable function of `(tree, importance=None)`; a single array is a tree, too, so that it
      serves wherever a `Projection` does.

    Raises:
      ValueError: If a budget for the tree is asked of a pattern that fixes every row.
    """
    if budget not in ("leaf", "tree"):
        raise ValueError(f"onto_pattern: budget must be 'leaf' or 'tree', got {budget!r}.")
    if budget == "tree" and not isinstance(pattern, Unstructured):
        raise ValueError(
            f"onto_pattern: a budget for the tree needs an Unstructured pattern, got {pattern},"
            " which leaves no choice between leaves; use budget='leaf'."
        )
    return SparseProjection(pattern, per, budget)


def _trees(tree: PyTree, importance: PyTree | None) -> tuple[PyTree, ...]:
    trees = (tree,) if importance is None else (tree, jax.lax.stop_gradient(importance))
    return tuple(jax.tree.map(jnp.asarray, t) for t in trees)


def _scores(x, f=None):
    """What is compared: `|x|`, or the root of `F x^2`, in the same order; the square underflows."""
    x = x.astype(jnp.float32)
    return x if f is None else jnp.sqrt(f.astype(jnp.float32)) * x


def apply_masks(tree: PyTree, masks: PyTree) -> PyTree:
    """`tree` with zeros where `masks` are False, NaNs included."""
    return jax.tree.map(lambda x, m: jnp.where(m, x, jnp.zeros((), x.dtype)), tree, masks)

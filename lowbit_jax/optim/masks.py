"""Masks of parameter trees by path, for `optax.masked` and what takes a mask."""

import re
from collections.abc import Callable

import jax
from jaxtyping import PyTree

from lowbit_jax.numerics.qtensor import QTensor

Mask = PyTree | Callable[[PyTree], PyTree] | None


def match_paths(*patterns: str) -> Callable[[PyTree], PyTree]:
    """`mask(params)`: True on each leaf whose path one of `patterns` matches in full.

    A path is the leaf's keys joined by `/`: dictionary keys, positions in lists and tuples, field
    names of named tuples and dataclasses, as in `"layers/0/attention/q_proj/weight"`. A `QTensor`
    is one leaf, so that a mask chooses the same weights whether they are quantized or not.

    Args:
      *patterns: Regular expressions in the syntax of `re`, each to match a whole path.

    Returns:
      A function from a tree to a tree of the same structure with Python bools as leaves. Optax
      takes it wherever it takes a mask, and calls it while tracing only.

    Raises:
      ValueError: Here, if there is no pattern; from the returned function, if a pattern matches
        no path, for a misspelt rule would otherwise leave its parameters silently untouched.
    """
    if not patterns:
        raise ValueError("match_paths: needs a pattern, got none; '.*' matches every path.")
    compiled = [re.compile(pattern) for pattern in patterns]

    def mask_fn(params: PyTree) -> PyTree:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(
            params, is_leaf=lambda p: isinstance(p, QTensor)
        )
        paths = [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in leaves]
        for regex in compiled:
            if not any(map(regex.fullmatch, paths)):
                raise ValueError(
                    "match_paths: each pattern must match a whole path, got"
                    f" {regex.pattern!r}, which matches none of {paths}; correct or drop it."
                )
        return treedef.unflatten(
            [any(regex.fullmatch(path) for regex in compiled) for path in paths]
        )

    return mask_fn


def resolve_mask(mask: Mask, tree: PyTree) -> PyTree:
    """The bool of each leaf of `tree` under `mask`.

    Args:
      mask: As `optax.masked` takes it: a tree of bools, of which `tree` may be a refinement, or a
        function from `tree` to one. None: True everywhere.
      tree: Parameters, or the gradients of parameters; a `QTensor` is one leaf.

    Returns:
      Bools in the structure of `tree`.
    """
    flags = mask(tree) if callable(mask) else True if mask is None else mask
    return jax.tree.map(
        lambda flag, branch: jax.tree.map(
            lambda _: bool(flag), branch, is_leaf=lambda p: isinstance(p, QTensor)
        ),
        flags,
        tree,
    )

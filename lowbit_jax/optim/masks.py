"""Masks of parameter trees by path, for `optax.masked` and what takes a mask."""

import re
from collections.abc import Callable

import jax
from jaxtyping import PyTree


def match_paths(*patterns: str) -> Callable[[PyTree], PyTree]:
    """`mask(params)`: True on each leaf whose path one of `patterns` matches in full.

    A path is the leaf's keys joined by `/`: dictionary keys, positions in lists and tuples, field
    names of named tuples and dataclasses, as in `"layers/0/attention/q_proj/weight"`.

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
        leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
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

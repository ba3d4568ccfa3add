"""Where a step that was not finite went wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lowbit_jax.optim import dequantize_leaves
from lowbit_jax.train.state import leaf_paths
from lowbit_jax.train.step import Metrics
from lowbit_jax.train.streaming import Group, leaf_squares, make_groups


def first_offender(metrics: Metrics, params: PyTree, stacked: str = "layers") -> str:
    """Says where a step that was not finite went wrong, from the norms that it returned.

    A parameter that is not finite is named first, in the order of the layers. Otherwise the
    backward pass made it: it runs from the last layer to the first and spoils everything after
    the place where it went wrong, so the gradient of the last layer that is not finite is named.

    Args:
      metrics: Of the step that went wrong.
      params: As they were before that step.
      stacked: Top-level parameter key whose leaves stack the layers, as in `StepPlan`.
    """
    values = dequantize_leaves(params)
    places = jax.tree.map(lambda x: x.sharding, values)
    groups = make_groups(values, stacked, places)
    norms = jax.device_get(_leaf_norms(values, groups, stacked))
    bad_params = _nonfinite(norms)
    bad_grads = _nonfinite(jax.device_get(metrics.leaf_norms))
    if bad_params:
        where = "parameter " + min(bad_params, key=lambda found: found[1])[0]
    elif bad_grads and np.isfinite(metrics.loss):
        where = "gradient of " + max(bad_grads, key=lambda found: found[1])[0]
    elif bad_grads:
        where = "the forward pass (all parameters are finite, the loss is not)"
    else:
        where = "the loss or the global norm alone; every tensor is finite"
    return (
        f"{where}; loss {float(metrics.loss):g}, {len(bad_grads)} of"
        f" {len(leaf_paths(metrics.leaf_norms))} gradient tensors not finite"
    )


def _nonfinite(norms: PyTree) -> list[tuple[str, tuple[int, int]]]:
    """Names of the bad tensors with their place in the forward pass (rank, layer)."""
    rank = {"embedding": 0, "final_norm": 2, "head": 3}  # stacked layers, and all else: 1
    found = []
    for path, norm in leaf_paths(norms):
        bad = np.flatnonzero(~np.isfinite(np.atleast_1d(norm)))
        names = [path] if np.ndim(norm) == 0 else [f"{path}, layer {layer}" for layer in bad]
        place = rank.get(path.split("/")[0], 1)
        found += [(name, (place, int(layer))) for name, layer in zip(names, bad, strict=False)]
    return found


@functools.partial(jax.jit, static_argnums=(1, 2))
def _leaf_norms(tree: PyTree, groups: tuple[Group, ...], stacked: str) -> PyTree:
    return jax.tree.map(jnp.sqrt, leaf_squares(tree, groups, stacked))

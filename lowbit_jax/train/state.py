"""What training carries from step to step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from lowbit_jax.models.host_memory import is_on_host
from lowbit_jax.train.streaming import count_slices, over_slices


class TrainState(NamedTuple):
    """Everything that a checkpoint holds. Data order and randomness follow from `step` alone."""

    step: Int[Array, ""]  # int32: updates applied so far
    params: PyTree  # as they are stored: float32 masters, bfloat16, or QTensors
    opt_state: PyTree


def create_state(
    params: PyTree,
    tx: optax.GradientTransformation,
    store: Callable[[PyTree], PyTree] | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
      params: Freshly drawn.
      tx: The optimizer.
      store: Gives `params` the form in which they are stored, with `QTensor`s in place of some
        matrices for example; None: as they are.
    """
    params = params if store is None else store(params)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def abstract_state(state: Any) -> Any:
    """Shapes, dtypes and shardings of `state`: the target onto which a checkpoint is restored."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        state,
    )


def leaf_paths(tree: PyTree) -> list[tuple[str, Any]]:
    """Leaves of `tree` with their paths, keys joined by "/": `("layers/mlp/up_proj/weight", w)`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in flat]


def nonfinite_leaves(tree: PyTree) -> list[str]:
    """Paths of the floating leaves of `tree` that hold a NaN or an infinity."""
    floating = {
        path: leaf for path, leaf in leaf_paths(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    leaves = list(floating.values())
    parts = tuple(count_slices(x.shape, x.sharding) if is_on_host(x) else 1 for x in leaves)
    finite = jax.device_get(_are_finite(leaves, parts))
    return [path for path, ok in zip(floating, finite, strict=True) if not ok]


@functools.partial(jax.jit, static_argnums=1)
def _are_finite(leaves: list[Array], parts: tuple[int, ...]) -> list[Array]:
    """One program for all: on several devices each operation by itself would be one."""
    return [
        over_slices(lambda x: jnp.isfinite(x).all(), leaf, slices).all()
        for leaf, slices in zip(leaves, parts, strict=True)
    ]

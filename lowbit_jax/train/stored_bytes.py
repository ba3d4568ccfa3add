"""Bytes that a training run holds from step to step, by category, read off its state."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lowbit_jax.models import LlamaConfig
from lowbit_jax.numerics import QTensor
from lowbit_jax.ops.dot_recipe import DotRecipe
from lowbit_jax.ops.quantized_weight import quantize_weight
from lowbit_jax.optim import dequantize_leaves
from lowbit_jax.train.state import TrainState, leaf_paths

# What is divided over the devices at each stage of ZeRO, beside what is at the stages before.
SHARDED_FROM = {"master": 1, "m": 1, "v": 1, "gradients": 2, "sums": 2, "weights": 3}


class Held(NamedTuple):
    """Bytes that a device holds of a category where nothing is offloaded."""

    matrices: int = 0  # the seven of each block, all layers
    tables: int = 0  # embedding and head
    vectors: int = 0  # norms and biases

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


@dataclasses.dataclass(frozen=True)
class Stored:
    """What one device holds of a run, and what its loss makes of it.

    Attributes:
      held: By category: "weights", what products read, embedding and head included; "master",
        stored matrices where weights are codes or values made of them; "gradients"; "sums" of them
        over micro-batches; "m" and "v", the moments.
      logit: Bytes of a logit of one chunk, with its gradient.
      head: Bytes an entry of what the loss makes of the head: a cast copy, a sum over chunks.
      entry: Of a table, and of the gradients, as they are stored.
    """

    held: Mapping[str, Held]
    logit: int
    head: int
    entry: int


def stored_by_run(
    config: LlamaConfig,
    state: TrainState,
    *,
    quantized_once: Mapping[str, DotRecipe] | None = None,
    micro_batches: int = 1,
    places: TrainState | None = None,
    gradient_places: PyTree = None,
) -> Stored:
    """What a run with this state holds on each device.

    Args:
      config: Of the model.
      state: Shapes and dtypes.
      quantized_once: Recipes of the weights that are quantized once a step, by their paths.
      micro_batches: More than one are summed in float32.
      places: Shardings of the state; None: one device.
      gradient_places: Of the gradients, one for each parameter.
    """
    values = jax.eval_shape(dequantize_leaves, state.params)
    sizes: dict[str, dict[str, int]] = {"weights": _kinds(state.params, places and places.params)}
    recipes = quantized_once or {}
    cuts = _cuts(state.params, places and places.params)
    made = {
        path: _bytes_of(jax.eval_shape(functools.partial(_quantize, recipes[path]), leaf))
        for path, leaf in leaf_paths(values)
        if path in recipes
    }
    # Weights stored as codes are read as float32 values, of all layers at once.
    made |= {path: _bytes_of(_values_of(leaf)) for path, leaf, _ in cuts if _is_qtensor(leaf)}
    if made:
        sizes["master"] = {"matrices": sizes["weights"]["matrices"]}
        parts = {path: part for path, _, part in cuts}
        copies = sum(math.ceil(size * parts[path]) for path, size in made.items())
        sizes["weights"]["matrices"] = copies
    sizes["gradients"] = _kinds(values, gradient_places)
    if micro_batches > 1:
        sums = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), values)
        sizes["sums"] = _kinds(sums, gradient_places)
    for name in ("m", "v"):
        sizes[name] = _kinds(state.opt_state, places and places.opt_state, moment=name)
    entry = values["embedding"]["weight"].dtype.itemsize
    return Stored(
        {name: Held(**kinds) for name, kinds in sizes.items()},
        4 + jnp.dtype(config.dtype).itemsize,
        _head_bytes(config, entry),
        entry,
    )


def _values_of(leaf: QTensor) -> jax.ShapeDtypeStruct:
    """What products read in place of a stored `QTensor`."""
    return jax.eval_shape(dequantize_leaves, leaf)


def _is_qtensor(x: Any) -> bool:
    return isinstance(x, QTensor)


def _quantize(recipe: DotRecipe, w: Any) -> QTensor:
    return quantize_weight(w, recipe, key=jax.random.key(0))


def _bytes_of(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _cuts(params: PyTree, places: PyTree) -> list[tuple[str, Any, float]]:
    """Path, leaf (`QTensor`s whole) and the part of it that a device holds."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_qtensor)
    shardings = [None] * len(flat)
    if places is not None:
        shardings = jax.tree.leaves(places, is_leaf=_is_qtensor)

    def part(leaf: Any, sharding: Any) -> float:
        if sharding is None:
            return 1.0
        leaf, place = jax.tree.leaves(leaf)[0], jax.tree.leaves(sharding)[0]  # of a QTensor, codes
        return math.prod(place.shard_shape(leaf.shape)) / leaf.size

    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf, part(leaf, sharding))
        for (path, leaf), sharding in zip(flat, shardings, strict=True)
    ]


def _head_bytes(config: LlamaConfig, stored: int) -> int:
    """The loss casts a head that is stored otherwise, and adds its gradient up in float32."""
    compute = jnp.dtype(config.dtype).itemsize
    return 4 + (compute if stored != compute else 0)


def _kinds(tree: PyTree, places: PyTree, moment: str | None = None) -> dict[str, int]:
    """Bytes on a device of matrices, tables and vectors; of one moment of an optimizer's state."""
    leaves = leaf_paths(tree)
    cut = [None] * len(leaves) if places is None else jax.tree.leaves(places)
    found: dict[str, int] = {"matrices": 0, "tables": 0, "vectors": 0}
    for (path, leaf), place in zip(leaves, cut, strict=True):
        parts = path.split("/")
        is_second = bool({"v", "nu"} & set(parts))
        if moment is not None and (moment == "v") != is_second:
            continue
        shape = leaf.shape if place is None else place.shard_shape(leaf.shape)
        kind = "vectors"
        if "weight" in parts:
            kind = "matrices" if "layers" in parts else "tables"
        found[kind] += math.prod(shape) * leaf.dtype.itemsize
    return found

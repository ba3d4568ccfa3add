"""Arrays in the host's memory, worked on slice by slice: the optimizer, norms, sums.

A stacked parameter `(layers, ...)` is cut into its layers, embedding and head into rows of at most
`MAX_ENTRIES` entries. A loop brings a slice of weight, gradient and moments to the device, computes
its update and puts it back in the place that it came from; the next slice may be on its way in the
meantime. So the device holds a slice of each, and no copy is made in the host's memory.

Schultheis and Alistarh, LLMQ, arXiv:2512.15306, stream moments and master weights in this way.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from lowbit_jax.models.host_memory import is_on_host, to_device, to_host
from lowbit_jax.numerics import QTensor
from lowbit_jax.optim import apply_updates_low_precision
from lowbit_jax.parallel.sharding import Parameter, constrain, owner_of, path_text

# Of a slice of a table. A layer of 7 billion parameters, also a slice, has seven times as many.
MAX_ENTRIES = 2**25


class Group(NamedTuple):
    """Parameters that are cut together.

    Attributes:
      paths: Theirs, keys joined by "/".
      slices: Into how many parts their first axes are cut.
      rows: Of each part.
    """

    paths: tuple[str, ...]
    slices: int
    rows: int


def make_groups(params: PyTree, stacked: str, places: PyTree | None = None) -> tuple[Group, ...]:
    """The stacked parameters, and each other matrix by itself; the rest is in no group.

    Args:
      params: Arrays, shapes or `QTensor`s of either, as they are stored.
      stacked: Top-level key of the stacked parameters.
      places: Shardings of the values; a table whose rows are cut over devices is not cut further.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_qtensor)
    shardings = [None] * len(flat) if places is None else treedef.flatten_up_to(places)
    layers, tables, n_layers = [], [], 0
    for (path, leaf), place in zip(flat, shardings, strict=True):
        name = path_text(path)
        if name.split("/")[0] == stacked and len(leaf.shape):
            layers.append(name)
            n_layers = leaf.shape[0]
        elif is_matrix(name, len(leaf.shape), stacked):
            slices = count_slices(leaf.shape, place)
            tables.append(Group((name,), slices, leaf.shape[0] // slices))
    return (*((Group(tuple(layers), n_layers, 1),) if layers else ()), *tables)


def is_matrix(path: str, ndim: int, stacked: str) -> bool:
    """Whether a parameter is worth moving: one of two axes or more, that of the layers aside."""
    return ndim - (path.split("/")[0] == stacked) >= 2


def count_slices(shape: tuple[int, ...], place: Any = None) -> int:
    """The fewest parts of at most `MAX_ENTRIES` into which the first axis divides.

    Args:
      shape: Of an array.
      place: Its sharding; where it cuts the first axis over devices there is one part.
    """
    spec: Any = getattr(place, "spec", ())
    if len(spec) and spec[0] is not None:
        return 1
    wanted = -(-math.prod(shape) // MAX_ENTRIES)
    return next((n for n in range(max(wanted, 1), shape[0]) if shape[0] % n == 0), shape[0])


def check_cuts(params: PyTree, groups: tuple[Group, ...], stacked: str) -> None:
    """Refuses tables whose rows divide into far more slices than there need be.

    Each slice is an iteration of its own, and with a row in each there are as many as words.

    Args:
      params: As they are stored.
      groups: Theirs.
      stacked: Top-level key of the stacked parameters, which are cut into layers.

    Raises:
      ValueError: If there are more than eight times as many slices of a table.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_qtensor)
    shapes = {path_text(path): leaf.shape for path, leaf in leaves}
    for (path, *_), slices, _ in groups:
        wanted = -(-math.prod(shapes[path]) // MAX_ENTRIES)
        if path.split("/")[0] != stacked and slices > 8 * wanted:
            raise ValueError(
                f"offload: {path} is worked on in slices of equal length, and its"
                f" {shapes[path][0]} rows divide into {slices} instead of {wanted} at the least;"
                " pad the vocabulary to a multiple of 128."
            )


def over_slices(fn: Callable[[Any], Any], tree: PyTree, slices: int) -> PyTree:
    """`fn` of each of the parts into which the first axes of all leaves are cut, stacked.

    Args:
      fn: Takes parts, on the device, and returns arrays.
      tree: Arrays in either memory.
      slices: How many; a divisor of the first axes.
    """

    def body(_, index):
        return None, fn(jax.tree.map(lambda x: _cut(x, index, slices), tree))

    if slices == 1:
        return jax.tree.map(lambda x: x[None], body(None, 0)[1])
    return jax.lax.scan(body, None, jnp.arange(slices))[1]


def leaf_squares(
    tree: PyTree,
    groups: tuple[Group, ...],
    stacked: str,
    finish: Callable[[str, Array], Array] = lambda path, x: x,
) -> PyTree:
    """Sums of squares, `()` a leaf or `(layers,)` a stacked one, in float32.

    Args:
      tree: Gradients, for example.
      groups: Of its leaves, if any is in host memory.
      stacked: Top-level key of the stacked ones.
      finish: What is done to a slice first, of its path and itself.
    """

    def square(name, x):
        axes = tuple(range(1, x.ndim)) if name.split("/")[0] == stacked and x.ndim else None
        return jnp.sum(jnp.square(finish(name, x).astype(jnp.float32)), axis=axes)

    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {path_text(path): leaf for path, leaf in flat}
    found = {}
    for group in groups:
        moved = {name: leaves[name] for name in group.paths if is_on_host(leaves[name])}
        if not moved:
            continue
        parts = over_slices(
            lambda part: {name: square(name, x) for name, x in part.items()}, moved, group.slices
        )
        for name, part in parts.items():
            found[name] = part.reshape(-1) if name.split("/")[0] == stacked else part.sum()
    for name, leaf in leaves.items():
        if name not in found:
            found[name] = square(name, leaf)
    return treedef.unflatten([found[name] for name in leaves])


def host_zeros(tree: PyTree, groups: tuple[Group, ...], stacked: str) -> PyTree:
    """float32 zeros like `tree`, those of matrices in host memory, filled slice by slice."""

    def zeros(path, leaf):
        if not is_matrix(path_text(path), leaf.ndim, stacked):
            return jnp.zeros(leaf.shape, jnp.float32)
        slices = _slices_of(path_text(path), groups)
        shape = (leaf.shape[0] // slices, *leaf.shape[1:])

        def body(_, index):
            del index
            return None, to_host(jnp.zeros(shape, jnp.float32))

        return jax.lax.scan(body, None, jnp.arange(slices))[1].reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(zeros, tree)


def add(total: PyTree, part: PyTree, groups: tuple[Group, ...]) -> PyTree:
    """`total + part` in the dtype and memory of `total`; in place, where that is in host memory."""

    def add_leaf(path, s, g):
        if not is_on_host(s):
            return s + g.astype(s.dtype)
        slices = _slices_of(path_text(path), groups)

        def body(s, index):
            new = _cut(s, index, slices) + _cut(g, index, slices).astype(s.dtype)
            return _put(s, new, index, slices), None

        return jax.lax.scan(body, s, jnp.arange(slices))[0]

    return jax.tree_util.tree_map_with_path(add_leaf, total, part)


class Streams(NamedTuple):
    """What `streamed_update` works on.

    Attributes:
      params: As they are stored.
      opt_state: Of the optimizer.
      gradients: Of the values of `params`.
    """

    params: PyTree
    opt_state: PyTree
    gradients: PyTree


def streamed_update(
    tx: optax.GradientTransformation,
    streams: Streams,
    groups: tuple[Group, ...],
    *,
    key: PRNGKeyArray,
    ok: Array,
    finish: Callable[[str, Array], Array],
    places: Streams | None = None,
) -> tuple[PyTree, PyTree]:
    """New parameters and state of the optimizer, computed slice by slice.

    The optimizer sees a slice as it would see a smaller model; of other groups it sees zeros, and
    what it makes of them is dropped. It gets a key for each slice, if it takes one.

    Args:
      tx: One that `sliceable.check_sliceable` has passed.
      streams: Arrays in either memory; those of the results are in the same.
      groups: How parameters are cut.
      key: Of the step. Slice i of group g draws from `fold_in(fold_in(key, g), i)`.
      ok: Whether to take the new values; otherwise the old ones stay.
      finish: What is done to a slice of a gradient first, of its path and itself.
      places: Shardings of parameters, of the state and of the gradients that the optimizer gets.
    """
    tx = optax.with_extra_args_support(tx)
    flat = flatten_streams(streams, groups)
    values = [entry.value for entry in flat.entries]

    def update(group, index, values):
        """The slices of a group, old ones replaced by new; None: what is in no group."""
        slices = 1 if group is None else groups[group].slices
        parts = []
        for entry, value in zip(flat.entries, values, strict=True):
            if entry.group in (group, None) or entry.is_shared:
                part = _cut(value, index, slices) if entry.group == group else value
                part = finish(entry.owner, part) if entry.kind == 2 else part
            else:
                rows = groups[entry.group].rows
                part = jnp.zeros((rows, *value.shape[1:]), value.dtype)
            parts.append(part)
        if places is not None:
            parts = [
                constrain(part, _on_device(place)) if entry.group == group else part
                for entry, part, place in zip(
                    flat.entries, parts, flat.aligned(places), strict=True
                )
            ]
        # Slices of their own: fused with what reads and writes the whole array on the device, it
        # would be copied first.
        parts = jax.lax.optimization_barrier(parts)
        old = flat.unflatten(parts)
        slice_key = jax.random.fold_in(
            jax.random.fold_in(key, len(groups) if group is None else group), index
        )
        tx_key, rounding_key = jax.random.split(slice_key)
        updates, opt_state = tx.update(old.gradients, old.opt_state, old.params, key=tx_key)
        params = apply_updates_low_precision(old.params, updates, key=rounding_key)
        new = flat.aligned(Streams(params, opt_state, old.gradients))
        new = [
            jnp.where(ok, a, b) if entry.kind < 2 else b
            for entry, a, b in zip(flat.entries, new, parts, strict=True)
        ]
        return [
            jax.lax.optimization_barrier(part) if entry.group == group else part
            for entry, part in zip(flat.entries, new, strict=True)
        ]

    results = list(values)
    for number, group in enumerate(groups):
        members = [i for i, e in enumerate(flat.entries) if e.group == number and e.kind < 2]

        def body(carry, index, number=number, group=group, members=members):
            current = list(values)
            for i, value in zip(members, carry, strict=True):
                current[i] = value
            new = update(number, index, current)
            return [
                _put(value, new[i], index, group.slices)
                for i, value in zip(members, carry, strict=True)
            ], None

        carry = [values[i] for i in members]
        carry, _ = jax.lax.scan(body, carry, jnp.arange(group.slices))
        for i, value in zip(members, carry, strict=True):
            results[i] = value
    rest = update(None, 0, values)
    results = [
        new if entry.group is None else result
        for entry, result, new in zip(flat.entries, results, rest, strict=True)
    ]
    new = flat.unflatten(results)
    return new.params, new.opt_state


class Entry(NamedTuple):
    """An array of `Streams`, and the parameter that it belongs to."""

    kind: int  # 0 parameters, 1 state, 2 gradients
    owner: str  # path of the parameter that it belongs to
    group: int | None
    is_shared: bool  # belongs to no parameter: counts of steps
    value: Any


class FlatStreams(NamedTuple):
    """The arrays of `Streams` in the order of its leaves."""

    entries: list[Entry]
    treedef: Any

    def unflatten(self, leaves: list) -> Streams:
        """A tree of other leaves."""
        return self.treedef.unflatten(leaves)

    def aligned(self, streams: Streams) -> list:
        """What another tree holds in the places of the leaves."""
        return self.treedef.flatten_up_to(streams)


def flatten_streams(streams: Streams, groups: tuple[Group, ...]) -> FlatStreams:
    """The arrays of `streams`, each with its parameter and that one's group."""
    owners = {
        path_text(path): Parameter((), leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(streams.params, is_leaf=_is_qtensor)[
            0
        ]
    }
    of_path = {name: number for number, group in enumerate(groups) for name in group.paths}
    entries = []
    for kind, tree in enumerate(streams):
        for path, value in jax.tree_util.tree_flatten_with_path(tree)[0]:
            owner = owner_of(path_text(path), owners) or ""
            entries.append(Entry(kind, owner, of_path.get(owner), not owner, value))
    return FlatStreams(entries, jax.tree.structure(streams))


def _slices_of(path: str, groups: tuple[Group, ...]) -> int:
    return next((group.slices for group in groups if path in group.paths), 1)


def _cut(x: Array, index: Any, slices: int) -> Array:
    if slices > 1:
        x = jax.lax.dynamic_slice_in_dim(x, index * (x.shape[0] // slices), x.shape[0] // slices)
    return to_device(x)


def _put(x: Array, part: Array, index: Any, slices: int) -> Array:
    part = to_host(part) if is_on_host(x) else part
    if slices == 1:
        return part
    return jax.lax.dynamic_update_slice_in_dim(x, part, index * (x.shape[0] // slices), 0)


def _on_device(place: Any) -> Any:
    return place.with_memory_kind("device")


def _is_qtensor(x: Any) -> bool:
    return isinstance(x, QTensor)

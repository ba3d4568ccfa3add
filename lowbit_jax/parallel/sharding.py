"""Which device holds which part of parameters, gradients and optimizer state.

An axis of a parameter has a logical name. Two rules cut it:

- The mesh axis `tensor` cuts the axis named `heads`, `kv_heads`, `mlp` or `vocab`.
- ZeRO cuts, over the devices that share nothing but the model, the first axis of the parameter with
  a name that is not `layers` or `norm`. That is the rows of a matrix `(out, in)`: scales of
  quantized values lie along the last axis, and so do the sums behind them, and stay on one device.

An axis that does not divide stays whole; the table of a run says so. What belongs to a parameter
lies as it does: gradients, moments, and all parts of a `QTensor`, as far as their own axes divide.

References:
  Rajbhandari et al., ZeRO, arXiv:1910.02054: the stages.
  Zhao et al., PyTorch FSDP, arXiv:2304.11277, section 3.2.2: parameters cut over a part of the
  devices, copies over the others (`fsdp` and `data` here).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from lowbit_jax.numerics import QTensor

TENSOR_NAMES = ("heads", "kv_heads", "mlp", "vocab")
ZERO_NAMES = (*TENSOR_NAMES, "embed")


@dataclasses.dataclass(frozen=True)
class ZeroStage:
    """The mesh axes over which a stage of ZeRO cuts each kind of array; () leaves it whole.

    Attributes:
      parameters: The stored weights, gathered where they are used.
      gradients: Those of a micro-batch, and the sums of them.
      optimizer: Its state, and what the optimizer computes.
    """

    parameters: tuple[str, ...]
    gradients: tuple[str, ...]
    optimizer: tuple[str, ...]


# fsdp first, so that the part of a moment lies within the part of its parameter.
_ALL = ("fsdp", "data")
ZERO_STAGES: dict[int, ZeroStage] = {
    1: ZeroStage((), (), _ALL),
    2: ZeroStage((), _ALL, _ALL),
    # Parameters over data where fsdp has one device, see make_layout.
    3: ZeroStage(("fsdp",), _ALL, _ALL),
}


class Parameter(NamedTuple):
    """Logical names and sizes of a parameter's axes."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where arrays lie: a mesh and the rules that cut over it.

    Attributes:
      mesh: From `make_mesh`.
      stage: Of ZeRO.
      pieces: Pairs of a logical name and the number of pieces into which the axis `tensor` may cut
        at most, where that is not its size: an axis of heads times width has as many as heads.
    """

    mesh: Mesh
    stage: ZeroStage
    pieces: tuple[tuple[str, int], ...] = ()

    def place(
        self, parameter: Parameter, shape: tuple[int, ...], over: tuple[str, ...]
    ) -> NamedSharding:
        """Of an array that belongs to a parameter; one with other axes is whole on each device.

        Args:
          parameter: All layers, or one of them; what else there is lies as it does.
          shape: Of the array, that of the parameter for its gradient.
          over: The mesh axes of ZeRO; `tensor` comes on top.
        """
        if len(shape) != len(parameter.axes):
            return self.replicated
        cut, _ = self.cut(parameter, over)
        # A scale for many columns has fewer of them than its codes.
        fits = (size % self.count(axes) == 0 for size, axes in zip(shape, cut, strict=True))
        entries = [axes if fit else () for axes, fit in zip(cut, fits, strict=True)]
        spec = (axes[0] if len(axes) == 1 else axes or None for axes in entries)
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def cut(
        self, parameter: Parameter, over: tuple[str, ...]
    ) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
        """The mesh axes that cut each axis, and those that should but divide none."""
        axes, shape = parameter
        cut: list[tuple[str, ...]] = [()] * len(shape)
        undivided: tuple[str, ...] = ()
        rules = ((("tensor",), TENSOR_NAMES, dict(self.pieces)), (over, ZERO_NAMES, {}))
        for mesh_axes, names, pieces in rules:
            mesh_axes = tuple(axis for axis in mesh_axes if self.mesh.shape[axis] > 1)
            named = [i for i, name in enumerate(axes) if name in names]
            if not (mesh_axes and named):
                continue
            for i in named:
                whole = pieces.get(axes[i], shape[i])
                if whole % self.count(cut[i] + mesh_axes) == 0:
                    cut[i] += mesh_axes
                    break
            else:
                undivided += mesh_axes
        return cut, undivided

    def count(self, mesh_axes: tuple[str, ...]) -> int:
        """Devices along these axes together."""
        return math.prod(self.mesh.shape[axis] for axis in mesh_axes)

    @property
    def replicated(self) -> NamedSharding:
        """A copy on each device."""
        return NamedSharding(self.mesh, PartitionSpec())


def make_layout(mesh: Mesh, zero: int = 1, pieces: Mapping[str, int] | None = None) -> Layout:
    """The layout of a stage on a mesh.

    Stage 3 cuts parameters over fsdp and keeps a copy for each of data, which gathers over few
    devices; where fsdp has one device it cuts over data.

    Args:
      mesh: From `make_mesh`.
      zero: 1, 2 or 3.
      pieces: See `Layout`.

    Raises:
      ValueError: If there is no such stage.
    """
    if zero not in ZERO_STAGES:
        raise ValueError(
            f"make_layout: zero must be one of {', '.join(map(str, ZERO_STAGES))}, got {zero}; 1"
            " cuts the optimizer state, 2 gradients as well, 3 parameters as well."
        )
    stage = ZERO_STAGES[zero]
    if stage.parameters and mesh.shape["fsdp"] == 1:
        stage = dataclasses.replace(stage, parameters=("data",))
    return Layout(mesh, stage, tuple((pieces or {}).items()))


def parameters_of(params: PyTree, axes: PyTree) -> dict[str, Parameter]:
    """Path, keys joined by "/", to names and sizes of the axes.

    Args:
      params: Arrays, shapes or `QTensor`s of either.
      axes: A tree like it with a tuple of names for each, as from `models.logical_axes`.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_qtensor)
    names = treedef.flatten_up_to(axes)
    return {
        path_text(path): Parameter(name, p.shape)
        for (path, p), name in zip(flat, names, strict=True)
    }


def shardings(
    tree: PyTree, parameters: Mapping[str, Parameter], layout: Layout, over: tuple[str, ...]
) -> PyTree:
    """The `NamedSharding` of each leaf of a tree that holds something for some parameters.

    A leaf belongs to the parameter whose path its own contains, as `0/m/layers/mlp/up_proj/weight`
    does in the state of an optimizer. Leaves of no parameter, and those with other axes than it,
    are whole on each device.

    Args:
      tree: Parameters, gradients, state of an optimizer: arrays or shapes.
      parameters: From `parameters_of`.
      layout: The rules.
      over: The mesh axes of ZeRO that cut this kind, a field of `layout.stage`.
    """

    def place(path, leaf):
        owner = owner_of(path_text(path), parameters)
        if owner is None:
            return layout.replicated
        return layout.place(parameters[owner], leaf.shape, over)

    return jax.tree_util.tree_map_with_path(place, tree)


def constrain(tree: PyTree, places: PyTree | None) -> PyTree:
    """`tree` with each leaf on its sharding, inside `jax.jit`; as it is if `places` is None."""
    return tree if places is None else jax.lax.with_sharding_constraint(tree, places)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(
    x: Any,
    used: NamedSharding | None,
    gradient: NamedSharding,
    send: Callable[[Any], Any] | None = None,
) -> Any:
    """`x`, placed as `used`; its gradient is placed as `gradient`, summed over devices on the way.

    Without it the compiler may as well move the activations to the parts of a weight.

    Args:
      x: An array.
      used: Where it is read; None: where it is, so that a loop over layers whose backward pass
        reads it once more keeps no copy of all layers' weights.
      gradient: Where its gradient is summed.
      send: Makes of x what travels, and of that `x` on `used`, in the place of x itself. It is not
        differentiated.
    """
    del gradient
    return _sent(x, used, send)


def _sent(x, used, send):
    if send is not None:
        return send(x)
    return x if used is None else jax.lax.with_sharding_constraint(x, used)


def _gather_fwd(x, used, gradient, send):
    del gradient
    return _sent(x, used, send), None


def _gather_bwd(used, gradient, send, _, g):
    del used, send
    return (jax.lax.with_sharding_constraint(g, gradient),)


gather.defvjp(_gather_fwd, _gather_bwd)


def device_bytes(tree: PyTree, places: PyTree) -> int:
    """Bytes of the parts of `tree` that one device holds; cut axes divide, so all hold as many."""

    def part_bytes(leaf, place):
        return math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(part_bytes, tree, places)))


def owner_of(path: str, parameters: Mapping[str, Parameter]) -> str | None:
    """The parameter whose path is part of `path`, the longest if there are several."""
    found = [name for name in parameters if f"/{name}/" in f"/{path}/"]
    return max(found, key=len, default=None)


def path_text(path: tuple[Any, ...]) -> str:
    """The keys of a path, joined by "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_qtensor(x: Any) -> bool:
    return isinstance(x, QTensor)

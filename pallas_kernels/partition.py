"""Kernels on several devices, each on its part, in programs that `jax.jit` partitions.

XLA's partitioner cuts its own operations, but no kernels: on a mesh it would give each device the
whole arrays. So a kernel is put into `jax.shard_map`, which says how its arrays are cut. What a
kernel needs of the whole, such as a bound of an array, is found outside, where the partitioner adds
the exchange between the devices.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Partition:
    """Devices that hold equal parts of the rows of some arrays, one after the other.

    Attributes:
      mesh: Whose axes are Auto, as those of `parallel.make_mesh` are.
      axes: The mesh axes that cut the rows, the first one into the largest parts; (): each device
        has them all. Over the other axes of the mesh there are copies.
    """

    mesh: Mesh
    axes: tuple[str, ...] = ()

    def __post_init__(self):
        unknown = [axis for axis in self.axes if axis not in self.mesh.shape]
        if unknown or len(set(self.axes)) < len(self.axes):
            raise ValueError(
                f"Partition: axes must be different ones of the mesh {dict(self.mesh.shape)}, got"
                f" {self.axes}; name those that cut the rows."
            )

    @property
    def count(self) -> int:
        """Parts."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def uncut(self) -> "Partition":
        """The same devices with all rows on each."""
        return Partition(self.mesh)


def map_parts(
    fn: Callable[..., Any], partition: Partition | None, in_axes: Any, out_axes: Any
) -> Callable[..., Any]:
    """`fn` of what each device has, without exchange between them; `fn` itself without partition.

    Args:
      fn: Of arrays in positional arguments.
      partition: Which devices, and how rows are cut.
      in_axes: As for `jax.vmap`: for each argument the axis along which the rows lie, None where
        each device has all.
      out_axes: Likewise. An array that is whole must be the same on all devices.
    """
    if partition is None:
        return fn

    def spec(axis):
        if axis is None or not partition.axes:
            return PartitionSpec()
        return PartitionSpec(*(None,) * axis, partition.axes)

    def specs(tree):
        return jax.tree.map(spec, tree, is_leaf=lambda axis: axis is None)

    return jax.shard_map(
        fn, mesh=partition.mesh, in_specs=specs(in_axes), out_specs=specs(out_axes)
    )

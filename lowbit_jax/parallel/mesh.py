"""Meshes of three axes: copies of the model, parts of its state, parts of its matrices.

- `data`: each device has its own sequences.
- `fsdp`: likewise, and the third stage of ZeRO cuts the parameters over these devices alone. Give
  it those with the fastest links to each other, one machine's for example, and `data` the rest.
- `tensor`: the devices share their sequences and cut heads, MLP and vocabulary. They exchange
  activations in every layer, and so are neighbours.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of `data * fsdp * tensor` devices, whose axes `jax.jit` partitions by itself (Auto).

    Args:
      data: Size of the axis of that name, like the two that follow.
      fsdp: See there.
      tensor: See there.
      devices: To choose the first ones from; None: `jax.devices()`.

    Raises:
      ValueError: If a size is below 1 or there are fewer devices.
    """
    shape = (data, fsdp, tensor)
    if min(shape) < 1:
        raise ValueError(
            f"make_mesh: data, fsdp and tensor must be at least 1, got {shape}; 1 leaves an axis"
            " out."
        )
    devices = jax.devices() if devices is None else list(devices)
    count = math.prod(shape)
    if count > len(devices):
        raise ValueError(
            f"make_mesh: {data} x {fsdp} x {tensor} needs {count} devices, got {len(devices)};"
            " choose a smaller mesh. On a CPU, XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{count} simulates that many."
        )
    return jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * 3, devices=devices[:count])


def parse_mesh(text: str) -> tuple[int, int, int]:
    """`"2x4x1"` to `(2, 4, 1)`: the sizes of data, fsdp and tensor.

    Raises:
      ValueError: If the text is not of that form.
    """
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise ValueError(
            f"parse_mesh: a mesh must be DATAxFSDPxTENSOR, got {text!r}; 2x4x1 for example."
        )
    data, fsdp, tensor = map(int, text.split("x"))
    return data, fsdp, tensor


def batch_sharding(mesh: Mesh, batch_axis: int = 0) -> NamedSharding:
    """Cuts the axis of sequences over data and fsdp; the other axes stay whole."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * batch_axis, BATCH_AXES))

"""The table of what lies where, for the start of a run."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from lowbit_jax.parallel.sharding import (
    Layout,
    Parameter,
    device_bytes,
    owner_of,
    path_text,
    shardings,
)


class ShardingRow(NamedTuple):
    """One parameter of a `ShardingTable`.

    Attributes:
      path: Of the parameter.
      shape: Layers first.
      cuts: Of the weights, their gradient and their optimizer state: `heads:tensor` is the axis of
        heads over the mesh axis tensor; "whole" if nothing is cut.
      undivided: Mesh axes whose number of devices divides no axis that they could cut.
      device_bytes: What one device holds of the three.
    """

    path: str
    shape: tuple[int, ...]
    cuts: tuple[str, str, str]
    undivided: tuple[str, ...]
    device_bytes: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class ShardingTable:
    """What lies where; `str()` aligns it for print.

    Attributes:
      mesh: Sizes of data, fsdp and tensor.
      rows: The parameters.
      device_bytes: What one device holds of parameters, gradients and optimizer state, counters
        included.
    """

    mesh: tuple[int, ...]
    rows: tuple[ShardingRow, ...]
    device_bytes: tuple[int, int, int]

    def __str__(self) -> str:
        """A line for each parameter, then the totals."""
        cells = [("parameter", "shape", "weights", "gradients", "moments", "bytes a device")]
        for row in self.rows:
            shape = " x ".join(map(str, row.shape))
            note = f" ({', '.join(row.undivided)} divides no axis)" if row.undivided else ""
            cells.append((row.path, shape, *row.cuts, f"{sum(row.device_bytes):,}{note}"))
        widths = [max(len(row[i]) for row in cells) for i in range(5)]
        sizes = "data {} x fsdp {} x tensor {}".format(*self.mesh)
        parameters, gradients, optimizer = self.device_bytes
        return "\n".join(
            [
                *(
                    "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[5]])
                    for row in cells
                ),
                f"each device of {sizes} holds {parameters:,} bytes of weights, {gradients:,} of"
                f" gradients, {optimizer:,} of optimizer state",
            ]
        )


def sharding_table(
    layout: Layout,
    parameters: Mapping[str, Parameter],
    params: PyTree,
    grads: PyTree,
    sums: PyTree | None,
    state: Any,
) -> ShardingTable:
    """The table of a training state.

    Args:
      layout: The rules.
      parameters: From `parameters_of`.
      params: As they are stored; shapes will do, as for the three that follow.
      grads: Likewise, an array for each parameter.
      sums: Of them over micro-batches, cut as the optimizer's state, where there are both; they
        count as gradients. None: there is one of the two.
      state: Of the optimizer.
    """
    stage = layout.stage
    overs = (stage.parameters, stage.gradients, stage.optimizer)

    def held(tree: PyTree, over: tuple[str, ...]) -> dict[str | None, int]:
        """Bytes for each parameter, and for what belongs to none."""
        owned: dict[str | None, int] = dict.fromkeys([*parameters, None], 0)
        places = jax.tree.leaves(shardings(tree, parameters, layout, over))
        for (path, leaf), place in zip(
            jax.tree_util.tree_leaves_with_path(tree), places, strict=True
        ):
            owned[owner_of(path_text(path), parameters)] += device_bytes(leaf, place)
        return owned

    weights, gradients, optimizer = map(held, (params, grads, state), overs)
    for path, size in held(sums, stage.optimizer).items():
        gradients[path] += size

    def row(path, parameter):
        cuts = [layout.cut(parameter, over) for over in overs]
        undivided = dict.fromkeys(axis for _, left in cuts for axis in left)
        return ShardingRow(
            path,
            parameter.shape,
            (_text(parameter, cuts[0]), _text(parameter, cuts[1]), _text(parameter, cuts[2])),
            tuple(undivided),
            (weights[path], gradients[path], optimizer[path]),
        )

    return ShardingTable(
        tuple(layout.mesh.shape.values()),
        tuple(row(path, parameter) for path, parameter in parameters.items()),
        (sum(weights.values()), sum(gradients.values()), sum(optimizer.values())),
    )


def _text(parameter: Parameter, cut: tuple[list[tuple[str, ...]], tuple[str, ...]]) -> str:
    pairs = zip(parameter.axes, cut[0], strict=True)
    return " ".join(f"{name}:{','.join(axes)}" for name, axes in pairs if axes) or "whole"

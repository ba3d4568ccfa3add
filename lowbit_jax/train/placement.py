"""Where the arrays of a run lie on several devices, and where its weights are used."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from lowbit_jax.models import QuantizedLinear
from lowbit_jax.models.llama import Block, Table
from lowbit_jax.ops.quantized_weight import QuantizedWeight
from lowbit_jax.optim import dequantize_leaves
from lowbit_jax.parallel import (
    Layout,
    Parameter,
    ShardingTable,
    batch_sharding,
    constrain,
    gather,
    make_layout,
    make_mesh,
    parameters_of,
    parse_mesh,
    sharding_table,
    shardings,
)
from lowbit_jax.train.config import Config, RunOptions, UsageError
from lowbit_jax.train.state import TrainState

_TABLE_AXES = ("vocab", "embed")


@dataclasses.dataclass(frozen=True)
class Placement:
    """The shardings of everything in a training step.

    Attributes:
      layout: The rules behind them.
      state: Of the state between steps, a `TrainState` of shardings.
      params: Of the stored parameters while the optimizer works on its part of them.
      gradients: Of the gradients of a micro-batch and their sums.
      updates: Of the gradients that the optimizer gets.
      table: What lies where, for people.
    """

    layout: Layout
    state: TrainState
    params: PyTree
    gradients: PyTree
    updates: PyTree
    table: ShardingTable

    @property
    def batch(self) -> NamedSharding:
        """Of inputs and targets `(b, t)`."""
        return batch_sharding(self.layout.mesh)

    def cut_batch(self, parts: PyTree) -> PyTree:
        """Micro-batches `(parts, b, t)`, each over all devices that have sequences of their own."""
        return jax.lax.with_sharding_constraint(parts, batch_sharding(self.layout.mesh, 1))


def open_mesh(config: Config, options: RunOptions) -> Mesh | None:
    """The mesh that a run asks for; None: one device.

    Raises:
      UsageError: If there are fewer devices, a micro-batch does not divide among them, or a stage
        of ZeRO has nothing to cut over.
    """
    try:
        shape = parse_mesh(options.mesh)
        if options.zero > 1 and shape[0] * shape[1] == 1:
            raise ValueError(
                f"--zero {options.zero} cuts over devices of data and fsdp, of which there is one;"
                " choose another mesh or leave --zero out."
            )
        if math.prod(shape) == 1:
            return None
        mesh = make_mesh(*shape)
    except ValueError as error:
        raise UsageError(f"--mesh {options.mesh}: {error}") from error
    parts = config.micro_batches * mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % parts:
        raise UsageError(
            f"--mesh {options.mesh}: batch_size must be a multiple of micro_batches * data * fsdp ="
            f" {parts}, got {config.batch_size}; choose another batch or mesh."
        )
    return mesh


def make_placement(
    state: TrainState,
    axes: PyTree,
    mesh: Mesh,
    zero: int = 1,
    *,
    pieces: Mapping[str, int] | None = None,
    micro_batches: int = 1,
) -> Placement:
    """Where a training state lies on a mesh.

    Args:
      state: Shapes and dtypes.
      axes: Names of the axes of each parameter, as from `models.logical_axes`.
      mesh: From `parallel.make_mesh`.
      zero: Stage of ZeRO, see `parallel.make_layout`.
      pieces: See `parallel.Layout`; heads of a `Llama`.
      micro_batches: As in `StepPlan`: sums over them are float32.

    Raises:
      ValueError: If there is no such stage.
    """
    layout = make_layout(mesh, zero, pieces)
    parameters = parameters_of(state.params, axes)
    values = jax.eval_shape(dequantize_leaves, state.params)
    if micro_batches > 1:
        values = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), values)
    stage = layout.stage

    def place(tree: PyTree, over: tuple[str, ...]) -> PyTree:
        return shardings(tree, parameters, layout, over)

    step: Any = layout.replicated
    return Placement(
        layout,
        TrainState(
            step, place(state.params, stage.parameters), place(state.opt_state, stage.optimizer)
        ),
        params=place(state.params, stage.optimizer),
        gradients=place(values, stage.gradients),
        updates=place(values, stage.optimizer),
        table=sharding_table(layout, parameters, state.params, values, state.opt_state),
    )


def placed_use(layout: Layout | None) -> contextlib.AbstractContextManager:
    """Within it a `Llama` gathers each weight where it multiplies, and keeps its tokens cut.

    What a step stores and sums may be cut over devices that have different tokens. Left alone, the
    compiler may then move tokens to weights; here it is told to move one layer's weights: the codes
    of a `QuantizedWeight`, other weights as they are stored, float32.

    Args:
      layout: The rules; None: nothing is placed.
    """
    if layout is None:
        return contextlib.nullcontext()

    def gathered(weight: Any, axes: tuple[str, str]) -> Any:
        if not isinstance(weight, QuantizedWeight):
            used, _, gradient = _of_layer(layout, axes, weight.shape)
            return gather(weight, used, gradient)
        _, stored, gradient = _of_layer(layout, axes, weight.master.shape)
        parameter = Parameter(axes, weight.master.shape)
        codes = jax.tree.map(
            lambda part: constrain(part, layout.place(parameter, part.shape, ())),
            weight.quantized,
        )
        return QuantizedWeight(gather(weight.master, stored, gradient), codes)

    def intercept(
        next_method: Callable, args: tuple, kwargs: dict, context: InterceptorContext
    ) -> Any:
        module, name = context.module, context.method_name
        if isinstance(module, QuantizedLinear) and name == "matrix":
            return gathered(next_method(*args, **kwargs), module.axes)
        if isinstance(module, Table) and name == "__call__":
            return gathered(next_method(*args, **kwargs), _TABLE_AXES)
        if isinstance(module, Block) and name == "__call__":
            x, *others = args
            return next_method(constrain(x, batch_sharding(layout.mesh)), *others, **kwargs)
        return next_method(*args, **kwargs)

    return nn.intercept_methods(intercept)


def _of_layer(layout: Layout, axes: tuple[str, str], shape: tuple[int, ...]):
    """Of a weight of one layer: the shardings where it is used, as stored, and of its gradient."""
    stage, parameter = layout.stage, Parameter(axes, shape)
    overs = ((), stage.parameters, stage.gradients)
    return (layout.place(parameter, shape, over) for over in overs)

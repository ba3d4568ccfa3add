"""Where the arrays of a run lie on several devices, and where its weights are used."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import PyTree

from lowbit_jax.models import QuantizedLinear
from lowbit_jax.models.llama import Block, Table
from lowbit_jax.ops.dot_recipe import DotRecipe
from lowbit_jax.ops.quantized_weight import (
    QuantizedWeight,
    move_bits,
    quantize_weight,
    with_estimator,
)
from lowbit_jax.optim import dequantize_leaves
from lowbit_jax.parallel import (
    BATCH_AXES,
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
from lowbit_jax.train.gradient_exchange import GradientExchange, parse_exchange
from lowbit_jax.train.state import TrainState
from pallas_kernels.partition import Partition

_TABLE_AXES = ("vocab", "embed")


@dataclasses.dataclass(frozen=True)
class Placement:
    """The shardings of everything in a training step.

    Attributes:
      layout: The rules behind them.
      state: Of the state between steps, a `TrainState` of shardings.
      params: Of the stored parameters while the optimizer works on its part of them.
      gradients: Of the gradients of a micro-batch and their sums; under an `exchange` of the sums
        alone, for each device has all gradients of its own tokens.
      updates: Of the gradients that the optimizer gets.
      table: What lies where, for people.
      offload: What waits in the host's memory, see `train.offload`.
      exchange: How devices send their gradients; None: as the compiler does, in float32.
    """

    layout: Layout
    state: TrainState
    params: PyTree
    gradients: PyTree
    updates: PyTree
    table: ShardingTable
    offload: str = "none"
    exchange: GradientExchange | None = None

    @property
    def batch(self) -> NamedSharding:
        """Of inputs and targets `(b, t)`."""
        return batch_sharding(self.layout.mesh)

    def cut_batch(self, parts: PyTree) -> PyTree:
        """Micro-batches `(parts, b, t)`, each over all devices that have sequences of their own."""
        return jax.lax.with_sharding_constraint(parts, batch_sharding(self.layout.mesh, 1))


def open_mesh(config: Config, options: RunOptions) -> Mesh | None:
    """The mesh that a run asks for; None: one device, and nothing offloaded.

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
        exchange = parse_exchange(options.gradient_exchange)
        if exchange is not None and (
            shape[0] * shape[1] == 1
            or shape[2] > 1
            or options.zero > 1
            or options.offload != "none"
            or config.quantize_once
        ):
            raise ValueError(
                f"--gradient-exchange {options.gradient_exchange} is for devices of data and fsdp"
                " alone, each with whole gradients, and whole weights that its layers quantize; use"
                " --zero 1 on a mesh DATAxFSDPx1, without --offload and quantize_once."
            )
        if math.prod(shape) == 1 and options.offload == "none":
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
    exchange: GradientExchange | None = None,
) -> Placement:
    """Where a training state lies on a mesh.

    Args:
      state: Shapes and dtypes.
      axes: Names of the axes of each parameter, as from `models.logical_axes`.
      mesh: From `parallel.make_mesh`.
      zero: Stage of ZeRO, see `parallel.make_layout`.
      pieces: See `parallel.Layout`; heads of a `Llama`.
      micro_batches: As in `StepPlan`: sums over them are float32.
      exchange: Of gradients, whose sums over micro-batches then are cut as the optimizer's state.

    Raises:
      ValueError: If there is no such stage.
    """
    layout = make_layout(mesh, zero, pieces)
    parameters = parameters_of(state.params, axes)
    values = jax.eval_shape(dequantize_leaves, state.params)
    sums = values
    if micro_batches > 1:
        sums = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), values)
    stage = layout.stage
    # What a device sends it has as a whole, beside the sums of what it has received.
    held = (sums, None) if exchange is None else (values, sums if micro_batches > 1 else None)

    def place(tree: PyTree, over: tuple[str, ...]) -> PyTree:
        return shardings(tree, parameters, layout, over)

    step: Any = layout.replicated
    return Placement(
        layout,
        TrainState(
            step, place(state.params, stage.parameters), place(state.opt_state, stage.optimizer)
        ),
        params=place(state.params, stage.optimizer),
        gradients=place(sums, stage.gradients if exchange is None else stage.optimizer),
        updates=place(sums, stage.optimizer),
        table=sharding_table(layout, parameters, state.params, *held, state.opt_state),
        exchange=exchange,
    )


def placed_use(
    layout: Layout | None, dtype: DTypeLike | None = None
) -> contextlib.AbstractContextManager:
    """Within it a `Llama` gathers each weight where it multiplies, and keeps its tokens cut.

    What a step stores and sums may be cut over devices that have different tokens. Left alone, the
    compiler may then move tokens to weights; here it is told to move one layer's weights, as few
    bytes as give the same products:

    - codes and scales, where a recipe quantizes the weights of the forward product without random
      numbers: each device quantizes its part, once for each pass over the layer, unless it holds
      a `QuantizedWeight` already. Backward gathers them once more. Float32 beside them where
      backward quantizes the original once more (`requantize=False`).
    - `dtype`, where nothing of a weight is quantized: tables, too.
    - as stored otherwise, in float32 for example.

    Products of quantized operands learn how their tokens are cut, so that they run on kernels,
    unless `tensor` has several devices: matrices would have to be cut for them.

    Args:
      layout: The rules; None: nothing is placed.
      dtype: Of the products, to which their weights are cast; None: not known.
    """
    if layout is None:
        return contextlib.nullcontext()
    mesh = layout.mesh
    tokens = tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)
    partition = None if mesh.shape["tensor"] > 1 else Partition(mesh, tokens)

    def intercept(
        next_method: Callable, args: tuple, kwargs: dict, context: InterceptorContext
    ) -> Any:
        module, name = context.module, context.method_name
        if isinstance(module, QuantizedLinear) and name == "partition":
            return partition
        if isinstance(module, QuantizedLinear) and name == "parameters":
            weight, bias = next_method(*args, **kwargs)
            return _gathered_matrix(layout, weight, module.axes, module.recipe, dtype), bias
        if isinstance(module, Table) and name == "__call__":
            weight = next_method(*args, **kwargs)
            return _gathered(layout, weight, _TABLE_AXES, dtype)
        if isinstance(module, Block) and name == "__call__":
            x, *others = args
            return next_method(constrain(x, batch_sharding(mesh)), *others, **kwargs)
        return next_method(*args, **kwargs)

    return nn.intercept_methods(intercept)


def _gathered_matrix(
    layout: Layout,
    weight: Any,
    axes: tuple[str, str],
    recipe: DotRecipe,
    dtype: DTypeLike | None,
) -> Any:
    """The weight of a product, as codes where its recipe allows that."""
    again = recipe.dx_w is not None
    if isinstance(weight, QuantizedWeight):
        master, q = weight.master, cast(Any, weight.quantized)
    else:
        rotation, spec = recipe.rotation_of("y"), recipe.y_w
        is_random = spec is not None and spec.needs_key
        is_random |= rotation is not None and rotation.needs_key
        if spec is None or is_random or not _is_cut(layout, axes, weight.shape):
            is_plain = spec is None and rotation is None and not again
            return _gathered(layout, weight, axes, dtype if is_plain else None)
        master, q = with_estimator(weight, recipe), quantize_weight(weight, recipe)
    shape = cast(Any, master).shape
    places = None
    if _is_cut(layout, axes, shape):
        # Each device quantizes its own part: nothing else of the codes is said to lie anywhere.
        parameter, overs = Parameter(axes, shape), (layout.stage.parameters, ())
        places = tuple(
            tuple(layout.place(parameter, part.shape, over) for over in overs)
            for part in jax.tree.leaves(cast(Any, q))
        )
    at_use, at_rest, gradient = _of_layer(layout, axes, shape)
    reads_master = again and not recipe.requantize
    used = None if at_use == at_rest else at_use if reads_master else at_rest
    master = gather(master, used, gradient)
    return QuantizedWeight(master, q, cast(Any, places))


def _gathered(layout: Layout, weight: Any, axes: tuple[str, str], dtype: DTypeLike | None) -> Any:
    """A weight, sent in a dtype that its reader casts it to anyway; None: as it is."""
    used, stored, gradient = _of_layer(layout, axes, weight.shape)
    if used == stored:
        return gather(weight, None, gradient)
    if dtype is None or dtype == weight.dtype:
        return gather(weight, used, gradient)

    def send(w):
        return move_bits(w.astype(dtype), stored, used).astype(w.dtype)

    return gather(weight, used, gradient, send)


def _is_cut(layout: Layout, axes: tuple[str, str], shape: tuple[int, ...]) -> bool:
    """Whether devices that have different tokens have different parts of a weight."""
    used, stored, _ = _of_layer(layout, axes, shape)
    return used != stored


def _of_layer(layout: Layout, axes: tuple[str, str], shape: tuple[int, ...]):
    """Of a weight of one layer: the shardings where it is used, as stored, and of its gradient."""
    stage, parameter = layout.stage, Parameter(axes, shape)
    overs = ((), stage.parameters, stage.gradients)
    return (layout.place(parameter, shape, over) for over in overs)

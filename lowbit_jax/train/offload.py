"""What of a training state waits in the host's memory, and how a step finds it there.

    moments     what the optimizer keeps of matrices
    weights     the stored matrices; the loop over layers fetches one layer at a time, for the
                backward pass once more
    gradients   those of matrices, each sent off when its layer is done
    residuals   the inputs of blocks, kept for the backward pass

Matrices are the seven of a layer, the embedding and the head; norms, biases and counts of steps
stay on the device. Where an array lies changes what is computed in two ways: sums are taken in
another order, and the random bits of stochastic rounding in the optimizer are drawn for each slice
(`streaming.streamed_update`) and no longer for a whole leaf: others, of the same distribution.

References:
  Schultheis and Alistarh, LLMQ: Efficient Lower-Precision LLM Training for Consumer GPUs,
  arXiv:2512.15306, whose --offload flags these are.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import PRNGKeyArray, PyTree

from lowbit_jax.models import Llama
from lowbit_jax.models.host_memory import HOST, OffloadedWeight, is_on_host, to_host
from lowbit_jax.models.recompute import NONE, parse_flags
from lowbit_jax.numerics import QTensor
from lowbit_jax.parallel.sharding import Parameter, owner_of, path_text
from lowbit_jax.train.placement import Placement
from lowbit_jax.train.state import TrainState
from lowbit_jax.train.streaming import check_cuts, is_matrix, make_groups

OFFLOADABLE = ("moments", "weights", "gradients", "residuals")


def offload_flags(offload: str) -> frozenset[str]:
    """The flags of a text.

    Args:
      offload: "none", or names of `OFFLOADABLE` joined by "+", as in "moments+weights".

    Raises:
      ValueError: If there is no such flag.
    """
    return frozenset(parse_flags("offload", offload, OFFLOADABLE))


def check_quantized_once(offload: str) -> None:
    """Refuses what cannot be offloaded where weights are quantized once a step.

    Raises:
      ValueError: If weights or gradients are: the former are read as a whole then, and so are the
        gradients, on their way through the quantizer.
    """
    if offload_flags(offload) & {"weights", "gradients"}:
        raise ValueError(
            "offload: weights that are quantized once a step are read as a whole, and so are their"
            f" gradients, got {offload!r}; leave weights and gradients out of it, or quantize in"
            " the layers (quantize_once=False)."
        )


def offloading_model(model: Llama, offload: str) -> Llama:
    """The model whose blocks offload what `offload` says, and keep no copies of what it fetches.

    With weights in the host's memory the backward pass fetches them anew, and makes operands of
    them anew: kept, they would take the place on the device that was to be saved.

    Raises:
      ValueError: If several layers make one iteration of the loop: XLA copies such slices as a
        whole, or does not compile them for a GPU.
    """
    flags, config = offload_flags(offload), model.config
    if flags - {"moments"} and config.scan_unroll > 1:
        raise ValueError(
            f"offload: {offload!r} needs a loop over layers of scan_unroll 1, got"
            f" {config.scan_unroll}; set it to 1."
        )
    recompute = config.recompute
    if "weights" in flags and "block" not in recompute.split("+"):
        kept = [flag for flag in recompute.split("+") if flag not in (NONE, "weights")]
        recompute = "+".join([*kept, "weights"])
    residuals = config.offload_residuals or "residuals" in flags
    return Llama(dataclasses.replace(config, recompute=recompute, offload_residuals=residuals))


def offloading_placement(
    placement: Placement, state: TrainState, offload: str, stacked: str = "layers"
) -> Placement:
    """`placement` with the state's matrices in the host's memory as `offload` says.

    Args:
      placement: On a mesh, which may be of one device.
      state: Shapes.
      offload: See `offload_flags`.
      stacked: Top-level key of the stacked parameters.

    Raises:
      ValueError: If the devices cannot read pinned host memory, weights to be offloaded are
        `QTensor`s, or a table cannot be cut into slices.
    """
    flags = offload_flags(offload)
    _check_memory(placement.layout.mesh, offload)
    if flags - {"residuals"}:
        check_cuts(state.params, make_groups(state.params, stacked, placement.updates), stacked)
    flat, _ = jax.tree_util.tree_flatten_with_path(state.params, is_leaf=_is_qtensor)
    owners = {path_text(path): Parameter((), leaf.shape) for path, leaf in flat}
    codes = [path_text(path) for path, leaf in flat if _is_qtensor(leaf)]
    if "weights" in flags and codes:
        raise ValueError(
            f"offload: weights that are stored as codes stay on the device, got {offload!r} and"
            f" codes for {codes[0]}; leave 'weights' out."
        )

    def move(places: PyTree, tree: PyTree) -> PyTree:
        def place(path, sharding, leaf):
            owner = owner_of(path_text(path), owners)
            if owner is None or not is_matrix(owner, len(owners[owner].shape), stacked):
                return sharding
            return sharding.with_memory_kind(HOST) if leaf.ndim else sharding

        return jax.tree_util.tree_map_with_path(place, places, tree)

    step, params, opt_state = placement.state
    if "weights" in flags:
        params = move(params, state.params)
    if "moments" in flags:
        opt_state = move(opt_state, state.opt_state)
    moved = TrainState(step, params, opt_state)
    return dataclasses.replace(placement, state=moved, offload=offload)


def draw_slowly(
    create: Callable[[PRNGKeyArray], TrainState], key: PRNGKeyArray, places: PyTree
) -> TrainState:
    """`create(key)`, a leaf at a time, so that the device never holds more than one.

    Args:
      create: Draws a state.
      key: For it.
      places: Shardings of the state.
    """
    program = jax.make_jaxpr(create)(key)
    run = jaxpr_as_fun(program)
    flat, treedef = jax.tree.flatten(places)

    def leaf(index, place):
        return jax.jit(lambda key: run(key)[index], out_shardings=place)(key)

    return treedef.unflatten([leaf(index, place) for index, place in enumerate(flat)])


def offloaded_value_and_grad(loss_fn: Callable, offload: str, stacked: str) -> Callable:
    """`jax.value_and_grad(loss_fn)`, gradients of matrices in the memory that `offload` says.

    The loss gets an `OffloadedWeight` for each matrix that lies in another memory than that.
    """
    to = "gradients" in offload_flags(offload)

    def value_and_grad(params, *args):
        def differentiated(path, p):
            name = path_text(path)
            if not is_matrix(name, p.ndim, stacked) or is_on_host(p) == to:
                return p
            place = jnp.zeros(p.shape, p.dtype)
            return to_host(place) if to else place

        def attach(p, place):
            return p if place is p else OffloadedWeight(jax.lax.stop_gradient(p), place)

        places = jax.tree_util.tree_map_with_path(differentiated, params)
        is_other = jax.tree.map(lambda p, place: place is not p, params, places)

        def loss(places):
            weights = jax.tree.map(
                lambda p, place, other: attach(p, place) if other else place,
                params, places, is_other,
            )  # fmt: skip
            return loss_fn(weights, *args)

        return jax.value_and_grad(loss)(places)

    return value_and_grad


def _check_memory(mesh: Mesh | AbstractMesh, offload: str) -> None:
    if isinstance(mesh, AbstractMesh):
        return
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise ValueError(
            f"offload: {offload!r} needs devices that read memory of the kind {HOST!r}, got"
            f" {device} with {', '.join(kinds) or 'none'}; use 'none' here."
        )


def _is_qtensor(x: Any) -> bool:
    return isinstance(x, QTensor)

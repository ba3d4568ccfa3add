"""One optimizer step as a single compiled function."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from lowbit_jax.models import Llama
from lowbit_jax.models.host_memory import is_on_host
from lowbit_jax.ops.recipes import DotRecipe
from lowbit_jax.optim import apply_updates_low_precision, dequantize_leaves, match_paths
from lowbit_jax.optim.quartet import attach_quantized, quantize_params, quartet_gradients
from lowbit_jax.parallel import Layout, constrain
from lowbit_jax.train.config import Config, quantized_weights
from lowbit_jax.train.offload import (
    check_quantized_once,
    offload_flags,
    offloaded_value_and_grad,
)
from lowbit_jax.train.placement import Placement, placed_use
from lowbit_jax.train.sliceable import check_sliceable
from lowbit_jax.train.state import TrainState, leaf_paths
from lowbit_jax.train.streaming import (
    Streams,
    add,
    host_zeros,
    leaf_squares,
    make_groups,
    streamed_update,
)

# (params, (inputs, targets), key or None) -> mean loss over the batch, scalar float32
LossFn = Callable[[PyTree, Any, PRNGKeyArray | None], Float[Array, ""]]


@dataclass(frozen=True)
class StepPlan:
    """How a step is computed.

    `clip_norm` changes what is computed, all else rounding and random bits alone.

    Attributes:
      micro_batches: Parts into which the batch is cut; gradients accumulate in float32.
      seed: The key of step t is `fold_in(key(seed), t)`, so a resumed run draws the same bits.
      needs_key: Whether the loss draws random bits at all; if not it receives None.
      weights_once: Paths of the weights that are quantized once a step, outside the loss, with
        their recipes; the loss must take `QuantizedWeight`s there. Empty: in the layers.
      stacked: Top-level parameter key whose leaves stack the layers along their first axis.
      clip_norm: Global norm to which gradients are clipped before the optimizer sees them; None:
        not clipped.
    """

    micro_batches: int = 1
    seed: int = 0
    needs_key: bool = False
    weights_once: tuple[tuple[str, DotRecipe], ...] = ()
    stacked: str = "layers"
    clip_norm: float | None = None

    def __post_init__(self):
        if self.micro_batches < 1:
            raise ValueError(
                f"StepPlan: micro_batches must be at least 1, got {self.micro_batches}."
            )
        norm = self.clip_norm
        if norm is not None and not (math.isfinite(norm) and norm > 0):
            raise ValueError(
                f"StepPlan: clip_norm must be finite and above 0, got {norm}; None does not clip."
            )


class Metrics(NamedTuple):
    """What a step measured, on the device: fetching is the caller's decision."""

    loss: Float[Array, ""]  # mean over the batch, nats
    grad_norm: Float[Array, ""]  # global, before clipping
    leaf_norms: PyTree  # gradient norms, () per leaf or (layers,) per stacked leaf
    learning_rate: Float[Array, ""]  # NaN if no schedule was given


def loss_function(model: nn.Module, layout: Layout | None = None) -> LossFn:
    """`model.loss` as a plain function; the key feeds the rng stream "quantize".

    Args:
      model: Module with a method `loss(inputs, targets)`.
      layout: Of a run on several devices, see `placed_use`.
    """
    dtype = model.config.dtype if isinstance(model, Llama) else None

    def loss_fn(params, batch, key):
        inputs, targets = batch
        rngs = None if key is None else {"quantize": key}
        with placed_use(layout, dtype):
            loss = model.apply({"params": params}, inputs, targets, method="loss", rngs=rngs)
        return jnp.asarray(loss)

    return loss_fn


def step_plan(config: Config, model: Llama) -> StepPlan:
    """The plan of `config` while `model`, one of its phases, is trained."""
    return StepPlan(
        config.micro_batches,
        config.seed,
        needs_key=any(recipe.needs_key for _, recipe in model.config.recipe_rules),
        weights_once=quantized_weights(model) if config.quantize_once else (),
        clip_norm=config.clip_norm,
    )


def make_train_step(
    model: nn.Module | LossFn,
    tx: optax.GradientTransformation,
    plan: StepPlan = StepPlan(),
    *,
    learning_rate: optax.Schedule | None = None,
    placement: Placement | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """`params += tx(mean gradient)`, compiled once, the old state's memory reused for the new.

    Weights stored as `QTensor`s are dequantized once, before the micro-batches, and differentiated
    at their values. Updates are added by `apply_updates_low_precision`: float32 weights as by
    `optax.apply_updates`, all others with stochastic rounding.

    A loss or gradient that is not finite leaves `params` and `opt_state` exactly as they were;
    `step` still counts. The caller sees it in the metrics and stops (`offender.first_offender`).

    Args:
      model: Module with a method `loss(inputs, targets)`, or a loss function.
      tx: The optimizer; clipping by the global norm is better left to `plan.clip_norm`.
      plan: See `StepPlan`. Where a quantizer's scale spans several tokens (per-tensor scales),
        cutting the batch also changes those scales.
      learning_rate: Schedule, for the metrics only.
      placement: Of state, batch and gradients on several devices, or in the host's memory; None:
        where the arguments are.

    Returns:
      Function of the state, which is donated, and `(inputs, targets)`, each `(b, t)` int32.

    Raises:
      ValueError: If `placement` offloads weights or gradients and `plan` has `weights_once`. While
        tracing, if `b` is not a multiple of `micro_batches`, or `placement` offloads and the
        optimizer cannot work slice by slice (`check_sliceable`).
    """
    layout = None if placement is None else placement.layout
    loss_fn = loss_function(model, layout) if isinstance(model, nn.Module) else model
    offload = "none" if placement is None else placement.offload
    flags = offload_flags(offload)
    if plan.weights_once:
        check_quantized_once(offload)
    streams = bool(flags & {"moments", "weights", "gradients"})
    groups = _groups(plan.weights_once)
    gradient_places = None if placement is None else placement.gradients

    def loss_and_gradient(params, batch, key):
        if streams and not groups:
            value_and_grad = offloaded_value_and_grad(loss_fn, offload, plan.stacked)
            return sum_over_parts(value_and_grad, params, batch, key)
        if not groups:
            return mean_over_parts(jax.value_and_grad(loss_fn), params, batch, key)
        # A key that no micro-batch has.
        weights_key = None if key is None else jax.random.fold_in(key, 2**32 - 1)
        quantized = [quantize_params(params, r, mask, key=weights_key) for r, mask in groups]

        def loss_at_codes(params, batch, key):
            for codes in quantized:
                params = attach_quantized(params, codes)
            return loss_fn(params, batch, key)

        loss, grads = mean_over_parts(jax.value_and_grad(loss_at_codes), params, batch, key)
        for to_master in (quartet_gradients(r, mask) for r, mask in groups):
            grads, _ = to_master.update(grads, to_master.init(params), params)
        return loss, grads

    def mean_over_parts(value_and_grad, params, batch, key):
        loss, total = sum_over_parts(value_and_grad, params, batch, key)
        if plan.micro_batches == 1:
            return loss, total
        grads = jax.tree.map(lambda s: s / plan.micro_batches, total)
        return loss, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)

    def sum_over_parts(value_and_grad, params, batch, key):
        """Mean loss; the gradient, or of several micro-batches the sum of theirs in float32."""
        if plan.micro_batches == 1:
            return value_and_grad(params, batch, key)

        def accumulate(total, numbered):
            index, part = numbered
            part_key = None if key is None else jax.random.fold_in(key, index)
            value, grads = value_and_grad(params, part, part_key)
            return (total[0] + value, placed(add(total[1], grads, slices))), None

        def placed(sums):
            if gradient_places is None:
                return sums
            return jax.tree.map(
                lambda s, place: s if is_on_host(s) else constrain(s, place), sums, gradient_places
            )

        slices = make_groups(params, plan.stacked, gradient_places) if streams else ()
        parts = jax.tree.map(lambda x: _cut_batch(x, plan.micro_batches), batch)
        if placement is not None:
            parts = placement.cut_batch(parts)
        if "gradients" in flags:
            zeros = host_zeros(params, slices, plan.stacked)
        else:
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        zeros = (jnp.zeros(()), placed(zeros))
        total, _ = jax.lax.scan(accumulate, zeros, (jnp.arange(plan.micro_batches), parts))
        # Said of the result, too: the loop would else carry its sums as the optimizer wants them.
        return total[0] / plan.micro_batches, placed(total[1])

    def clipped(g, grad_norm):
        """As `optax.clip_by_global_norm`."""
        if plan.clip_norm is None:
            return g
        scaled = (g / grad_norm.astype(g.dtype)) * plan.clip_norm
        return jnp.where(grad_norm < plan.clip_norm, g, scaled)

    def whole(state, loss, grads, key):
        stored = state.params
        if placement is not None:  # from here on each device has its part of the optimizer's work
            grads, stored = constrain((grads, stored), (placement.updates, placement.params))
        squares = leaf_squares(grads, (), plan.stacked)
        grad_norm = _global_norm(squares)
        grads = jax.tree.map(lambda g: clipped(g, grad_norm), grads)
        updates, opt_state = tx.update(grads, state.opt_state, stored)
        params = apply_updates_low_precision(stored, updates, key=key)
        ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old),
            (params, opt_state),
            (stored, state.opt_state),
        )
        return squares, grad_norm, params, opt_state

    def streamed(state, loss, grads, key):
        assert placement is not None
        slices = make_groups(state.params, plan.stacked, placement.updates)
        streams = Streams(state.params, state.opt_state, grads)
        check_sliceable(tx, streams, slices, offload)
        dtypes = dict(leaf_paths(jax.eval_shape(dequantize_leaves, state.params)))

        def mean(path, g):
            if plan.micro_batches == 1 or groups:  # it is one already
                return g
            return (g / plan.micro_batches).astype(dtypes[path].dtype)

        squares = leaf_squares(grads, slices, plan.stacked, mean)
        grad_norm = _global_norm(squares)
        params, opt_state = streamed_update(
            tx,
            streams,
            slices,
            key=key,
            ok=jnp.isfinite(loss) & jnp.isfinite(grad_norm),
            finish=lambda path, g: clipped(mean(path, g), grad_norm),
            places=Streams(placement.state.params, placement.state.opt_state, placement.updates),
        )
        return squares, grad_norm, params, opt_state

    def train_step(state: TrainState, batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(plan.seed), state.step)
        loss, grads = loss_and_gradient(
            dequantize_leaves(state.params), batch, key if plan.needs_key else None
        )
        update_key = jax.random.fold_in(key, 2**32 - 2)
        update = streamed if streams else whole
        squares, grad_norm, params, opt_state = update(state, loss, grads, update_key)
        rate = jnp.float32(jnp.nan if learning_rate is None else learning_rate(state.step))
        metrics = Metrics(loss, grad_norm, jax.tree.map(jnp.sqrt, squares), rate)
        return TrainState(state.step + 1, params, opt_state), metrics

    if placement is None:
        return jax.jit(train_step, donate_argnums=0)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(placement.state, placement.batch),
        out_shardings=(placement.state, placement.layout.replicated),
    )


def _groups(weights: tuple[tuple[str, DotRecipe], ...]) -> list[tuple[DotRecipe, Callable]]:
    """The recipes of `weights`, each with the mask of its leaves."""
    paths: dict[DotRecipe, list[str]] = {}
    for path, recipe in weights:
        paths.setdefault(recipe, []).append(re.escape(path))
    return [(recipe, match_paths(*found)) for recipe, found in paths.items()]


def _global_norm(squares: PyTree) -> Float[Array, ""]:
    return jnp.sqrt(sum(jnp.sum(s) for s in jax.tree.leaves(squares)))


def _cut_batch(x: Array, parts: int) -> Array:
    if x.shape[0] % parts:
        raise ValueError(
            f"make_train_step: the batch must be a multiple of micro_batches={parts}, got"
            f" shape {x.shape}; choose another batch size or number of parts."
        )
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])

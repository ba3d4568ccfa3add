"""One optimizer step as a single compiled function."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from lowbit_jax.models import Llama
from lowbit_jax.ops.recipes import DotRecipe
from lowbit_jax.optim import apply_updates_low_precision, dequantize_leaves, match_paths
from lowbit_jax.optim.quartet import attach_quantized, quantize_params, quartet_gradients
from lowbit_jax.parallel import Layout, constrain
from lowbit_jax.train.config import Config, quantized_weights
from lowbit_jax.train.placement import Placement, placed_use
from lowbit_jax.train.state import TrainState, leaf_paths

# (params, (inputs, targets), key or None) -> mean loss over the batch, scalar float32
LossFn = Callable[[PyTree, Any, PRNGKeyArray | None], Float[Array, ""]]


@dataclass(frozen=True)
class StepPlan:
    """How a step is computed; none of it changes what is computed, but for rounding.

    Attributes:
      micro_batches: Parts into which the batch is cut; gradients accumulate in float32.
      seed: The key of step t is `fold_in(key(seed), t)`, so a resumed run draws the same bits.
      needs_key: Whether the loss draws random bits at all; if not it receives None.
      weights_once: Paths of the weights that are quantized once a step, outside the loss, with
        their recipes; the loss must take `QuantizedWeight`s there. Empty: in the layers.
      stacked: Top-level parameter key whose leaves stack the layers along their first axis.
    """

    micro_batches: int = 1
    seed: int = 0
    needs_key: bool = False
    weights_once: tuple[tuple[str, DotRecipe], ...] = ()
    stacked: str = "layers"


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

    def loss_fn(params, batch, key):
        inputs, targets = batch
        rngs = None if key is None else {"quantize": key}
        with placed_use(layout):
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
    `step` still counts. The caller sees it in the metrics and stops (`first_offender`).

    Args:
      model: Module with a method `loss(inputs, targets)`, or a loss function.
      tx: Gradient clipping, if wanted, is part of it.
      plan: See `StepPlan`. Where a quantizer's scale spans several tokens (per-tensor scales),
        cutting the batch also changes those scales.
      learning_rate: Schedule, for the metrics only.
      placement: Of state, batch and gradients on several devices; None: where the arguments are.

    Returns:
      Function of the state, which is donated, and `(inputs, targets)`, each `(b, t)` int32.

    Raises:
      ValueError: While tracing, if `b` is not a multiple of `micro_batches`.
    """
    layout = None if placement is None else placement.layout
    loss_fn = loss_function(model, layout) if isinstance(model, nn.Module) else model
    if plan.micro_batches < 1:
        raise ValueError(
            f"make_train_step: micro_batches must be at least 1, got {plan.micro_batches}."
        )

    groups = _groups(plan.weights_once)
    gradient_places = None if placement is None else placement.gradients

    def loss_and_gradient(params, batch, key):
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
        if plan.micro_batches == 1:
            return value_and_grad(params, batch, key)

        def accumulate(total, numbered):
            index, part = numbered
            part_key = None if key is None else jax.random.fold_in(key, index)
            value = value_and_grad(params, part, part_key)
            loss, grads = jax.tree.map(lambda s, v: s + v.astype(s.dtype), total, value)
            return (loss, constrain(grads, gradient_places)), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        zeros = (jnp.zeros(()), constrain(zeros, gradient_places))
        parts = jax.tree.map(lambda x: _cut(x, plan.micro_batches), batch)
        if placement is not None:
            parts = placement.cut_batch(parts)
        total, _ = jax.lax.scan(accumulate, zeros, (jnp.arange(plan.micro_batches), parts))
        # Said of the result, too: the loop would else carry its sums as the optimizer wants them.
        total = total[0], constrain(total[1], gradient_places)
        loss, grads = jax.tree.map(lambda s: s / plan.micro_batches, total)
        return loss, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)

    def train_step(state: TrainState, batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(plan.seed), state.step)
        loss, grads = loss_and_gradient(
            dequantize_leaves(state.params), batch, key if plan.needs_key else None
        )
        stored = state.params
        if placement is not None:  # from here on each device has its part of the optimizer's work
            grads, stored = constrain((grads, stored), (placement.updates, placement.params))
        squares = _leaf_squares(grads, plan.stacked)
        grad_norm = jnp.sqrt(sum(jnp.sum(s) for s in jax.tree.leaves(squares)))
        updates, opt_state = tx.update(grads, state.opt_state, stored)
        params = apply_updates_low_precision(
            stored, updates, key=jax.random.fold_in(key, 2**32 - 2)
        )
        ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old),
            (params, opt_state),
            (stored, state.opt_state),
        )
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


def first_offender(metrics: Metrics, params: PyTree, plan: StepPlan = StepPlan()) -> str:
    """Says where a step that was not finite went wrong, from the norms that it returned.

    A parameter that is not finite is named first, in the order of the layers. Otherwise the
    backward pass made it: it runs from the last layer to the first and spoils everything after
    the place where it went wrong, so the gradient of the last layer that is not finite is named.

    Args:
      metrics: Of the step that went wrong.
      params: As they were before that step.
      plan: The step's plan.
    """
    norms = jax.device_get(_leaf_norms(dequantize_leaves(params), plan.stacked))
    bad_params = _nonfinite(norms)
    bad_grads = _nonfinite(jax.device_get(metrics.leaf_norms))
    if bad_params:
        where = "parameter " + min(bad_params, key=lambda found: found[1])[0]
    elif bad_grads and np.isfinite(metrics.loss):
        where = "gradient of " + max(bad_grads, key=lambda found: found[1])[0]
    elif bad_grads:
        where = "the forward pass (all parameters are finite, the loss is not)"
    else:
        where = "the loss or the global norm alone; every tensor is finite"
    return (
        f"{where}; loss {float(metrics.loss):g}, {len(bad_grads)} of"
        f" {len(leaf_paths(metrics.leaf_norms))} gradient tensors not finite"
    )


def _groups(weights: tuple[tuple[str, DotRecipe], ...]) -> list[tuple[DotRecipe, Callable]]:
    """The recipes of `weights`, each with the mask of its leaves."""
    paths: dict[DotRecipe, list[str]] = {}
    for path, recipe in weights:
        paths.setdefault(recipe, []).append(re.escape(path))
    return [(recipe, match_paths(*found)) for recipe, found in paths.items()]


def _nonfinite(norms: PyTree) -> list[tuple[str, tuple[int, int]]]:
    """Names of the bad tensors with their place in the forward pass (rank, layer)."""
    rank = {"embedding": 0, "final_norm": 2, "head": 3}  # stacked layers, and all else: 1
    found = []
    for path, norm in leaf_paths(norms):
        bad = np.flatnonzero(~np.isfinite(np.atleast_1d(norm)))
        names = [path] if np.ndim(norm) == 0 else [f"{path}, layer {layer}" for layer in bad]
        place = rank.get(path.split("/")[0], 1)
        found += [(name, (place, int(layer))) for name, layer in zip(names, bad, strict=False)]
    return found


def _leaf_squares(tree: PyTree, stacked: str) -> PyTree:
    def square(path, leaf):
        first = jax.tree_util.keystr(path[:1], simple=True)
        axes = tuple(range(1, leaf.ndim)) if first == stacked and leaf.ndim else None
        return jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes)

    return jax.tree_util.tree_map_with_path(square, tree)


def _leaf_norms(tree: PyTree, stacked: str) -> PyTree:
    return jax.tree.map(jnp.sqrt, _leaf_squares(tree, stacked))


def _cut(x: Array, parts: int) -> Array:
    if x.shape[0] % parts:
        raise ValueError(
            f"make_train_step: the batch must be a multiple of micro_batches={parts}, got"
            f" shape {x.shape}; choose another batch size or number of parts."
        )
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])

"""CAGE: training with quantized weights pulls the master weights towards their grid.

Tabesh et al., CAGE: Curvature-Aware Gradient Estimation for Accurate Quantization-Aware Training,
arXiv:2510.18784. The straight-through gradient minimises `f(P(x))` and is blind to the residual
`x - P(x)`. CAGE looks for points with `grad f + lambda (x - P(x)) = 0` instead: it adds
`lambda_t (x - P(x))` to the direction that the preconditioner returns. As that happens after
Adam's division by `sqrt(v)`, a stationary point weighs each residual by Adam's diagonal proxy of
the curvature; there is no other curvature estimate and no state but a step counter.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

# The nearest point of a grid, in the basis of the parameters, one leaf at a time.
Projection = Callable[[Array], Array]
Scalar = int | float | jax.Array

_KINDS = ("linear_ramp", "constant")
_ORDERS = ("fused", "coupled", "post")


class CageState(NamedTuple):
    """State of the CAGE transforms."""

    count: jax.Array  # (), int32: updates applied so far


def _residual(x: Array, projection: Projection) -> Array:
    # In float32 even for bfloat16 parameters: near the grid, x - P(x) loses all of its bits there.
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    nearest = projection(x)
    if nearest.shape != x.shape:
        raise ValueError(
            f"cage: a projection must keep the shape, got {x.shape} -> {nearest.shape};"
            " mask out the leaves that it cannot take."
        )
    return x - jax.lax.stop_gradient(nearest)


def _as_schedule(value: Scalar | optax.Schedule) -> optax.Schedule:
    return value if callable(value) else lambda count: value


def _counted(who: str, weight: optax.Schedule, update_leaf: Callable):
    """A transform that replaces `u` by `update_leaf(u, p, weight(count))` in `u`'s dtype."""

    def init_fn(params):
        del params
        return CageState(count=jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(f"{who}: needs the parameters, got None; call update(.., params).")
        factor = weight(state.count)
        updates = jax.tree.map(
            lambda u, p: None if u is None else update_leaf(u, p, factor).astype(u.dtype),
            updates,
            params,
            is_leaf=lambda u: u is None,
        )
        return updates, CageState(count=jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformation(init_fn, update_fn)


def add_cage_correction(
    projection: Projection, strength: Scalar | optax.Schedule
) -> optax.GradientTransformation:
    """`u + strength(count) * (p - projection(p))`, dimensionless, before the learning rate.

    After the preconditioner (`scale_by_adam`) it is the paper's decoupled update, before it the
    coupled one. Wrap it in `optax.masked` to choose leaves; two of them under two masks give two
    groups of leaves two projections. Residual and sum are computed in float32 (float64 for
    float64 parameters) and rounded once to the dtype of the update. Nothing is differentiated.

    Args:
      projection: `P`, the quantizer that the forward pass applies, returning values in the basis
        of the parameters: one that rotates must rotate back. Its reductions see whole leaves
        under `jax.jit`, however sharded, but only a shard under `jax.shard_map`.
      strength: `lambda_t` as a number or as a function of the count of updates already applied,
        such as `cage_strength`.

    Returns:
      A transform with state `CageState`. `update` raises ValueError without `params`, or if
      the projection changes a leaf's shape.

    References:
      Tabesh et al., CAGE, arXiv:2510.18784.
    """
    return _counted(
        "add_cage_correction",
        _as_schedule(strength),
        lambda u, p, factor: u + factor * _residual(p, projection),
    )


def add_cage_post_correction(
    projection: Projection,
    strength: Scalar | optax.Schedule,
    learning_rate: Scalar | optax.Schedule,
) -> optax.GradientTransformation:
    """`u - learning_rate(count + 1) * strength(count) * (y - projection(y))`, `y = p + u`.

    The correction as the authors' released optimizer applies it: to the parameters that the base
    optimizer has just updated, with the learning rate that its scheduler has just advanced. Last
    in a chain, after `scale_by_learning_rate`. It differs from `add_cage_correction` by
    `O(learning_rate**2 * strength)` a step. `y` is taken in float32, not rounded to the dtype of
    the parameters.

    Args:
      projection: As in `add_cage_correction`.
      strength: As in `add_cage_correction`.
      learning_rate: The learning rate of the base optimizer.

    Returns:
      A transform with state `CageState`. `update` raises ValueError without `params`, or if
      the projection changes a leaf's shape.
    """
    lambdas, rates = _as_schedule(strength), _as_schedule(learning_rate)

    def update_leaf(u, p, factor):
        wide = jnp.promote_types(p.dtype, jnp.float32)
        return u - factor * _residual(p.astype(wide) + u.astype(wide), projection)

    return _counted(
        "add_cage_post_correction",
        lambda count: rates(count + 1) * lambdas(count),
        update_leaf,
    )


def cage_strength(
    strength: Scalar, total_steps: int, silence: int | float = 0.8, kind: str = "linear_ramp"
) -> optax.Schedule:
    """`lambda_t`, `t = count + 1`: 0 while `t / total_steps <= silence`, then up to `strength`.

    `"linear_ramp"` is `strength * (t / total_steps - silence) / (1 - silence)`, which reaches
    `strength` in the last step; `"constant"` is `strength` at once. Later steps keep `strength`.

    Args:
      strength: `lambda`; 10 in the released scripts.
      total_steps: Length of the run. A run that resumes must pass the same number.
      silence: Fraction of the run without correction, in `[0, 1)`; 0.8 in the released scripts.
      kind: `"linear_ramp"` or `"constant"`.

    Returns:
      A function of the count of updates already applied, float32.

    Raises:
      ValueError: If `total_steps`, `silence` or `kind` is out of range.
    """
    if total_steps < 1:
        raise ValueError(f"cage_strength: total_steps must be at least 1, got {total_steps}.")
    if not 0 <= silence < 1:
        raise ValueError(f"cage_strength: silence must lie in [0, 1), got {silence}.")
    if kind not in _KINDS:
        raise ValueError(f"cage_strength: kind must be one of {_KINDS}, got {kind!r}.")
    # The last silent step as an integer: 0.29 * 100 < 29, yet 29 / 100 <= 0.29.
    silent = math.floor(silence * total_steps)
    silent += (silent + 1) / total_steps <= silence
    remainder = silent - silence * total_steps  # in (-1, 0] but for rounding
    length = total_steps - silence * total_steps

    def schedule(count):
        elapsed = jnp.asarray(count + 1 - silent, jnp.float32)
        ramp = jnp.minimum((elapsed + remainder) / length, 1.0)
        return jnp.where(elapsed > 0, ramp if kind == "linear_ramp" else 1.0, 0.0) * strength

    return schedule


def cage_strength_for_total(
    total_strength: int | float,
    learning_rate: Scalar | optax.Schedule,
    total_steps: int,
    silence: int | float = 0.8,
    kind: str = "linear_ramp",
) -> float:
    """The `strength` with `sum_t learning_rate_t * lambda_t = total_strength`.

    Against a fixed grid and without gradient, a run divides `x - P(x)` by
    `prod_t 1 / (1 - learning_rate_t lambda_t)`, about `exp(total_strength)`. The published runs
    with `strength` 10 have total strengths of 1.6 (30M parameters) and 2.7 (50M to 200M). The
    same 10 gives only 0.43 over 3,000 steps at a peak learning rate of 1.2e-3, where 64 gives
    2.7: a shorter run needs a larger strength.

    Args:
      total_strength: The sum, dimensionless, at least 0.
      learning_rate: A number, or a function of the count of updates already applied.
      total_steps: As in `cage_strength`, like the two that follow.
      silence: See there.
      kind: See there.

    Returns:
      `lambda`, for `cage_strength`. Computed once, in float64, from all learning rates.

    Raises:
      ValueError: If `total_strength` is negative, if no learning rate after the silence is
        positive, or for what `cage_strength` refuses.
    """
    if total_strength < 0:
        raise ValueError(
            f"cage_strength_for_total: total_strength must be at least 0, got {total_strength}."
        )
    unit_strength, rate = (
        cage_strength(1.0, total_steps, silence, kind),
        _as_schedule(learning_rate),
    )
    with jax.ensure_compile_time_eval():
        # vmap: a schedule need not take arrays, and a constant one may return a plain number.
        both = jax.jit(jax.vmap(lambda count: (unit_strength(count), rate(count))))
        ramp, rates = both(np.arange(total_steps))
    unit = float(np.sum(np.asarray(ramp, np.float64) * np.asarray(rates, np.float64)))
    if not unit > 0:
        raise ValueError(
            "cage_strength_for_total: learning rates after the silence must have a positive sum,"
            f" got {unit} over {total_steps} steps with silence={silence}; check the schedule."
        )
    return total_strength / unit


def cage(
    learning_rate: Scalar | optax.Schedule,
    projection: Projection,
    *,
    total_steps: int | None = None,
    strength: Scalar | optax.Schedule = 10.0,
    total_strength: int | float | None = None,
    silence: int | float = 0.8,
    kind: str = "linear_ramp",
    order: str = "fused",
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.1,
    decay_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    max_grad_norm: Scalar | None = None,
) -> optax.GradientTransformation:
    """AdamW whose updates pull the parameters towards `projection`, `strength` 0 being AdamW.

    The gradient passed in is the straight-through or trust gradient at `P(x)`. `"fused"`, the
    algorithm of the paper, is `x - learning_rate * (m / (sqrt(v) + eps) + weight_decay * x +
    lambda_t * (x - P(x)))` with bias-corrected `m`, `v`; `"coupled"` adds the correction to the
    gradient before Adam's moments see it; `"post"` reproduces the released implementation, see
    `add_cage_post_correction`. Clipping comes first in the chain and never sees the correction.

    **Choosing the strength.** What counts is `total_strength`, the sum over steps of learning
    rate times `lambda_t`; `cage_strength_for_total` says how much the published runs have and
    why a small one needs a larger `strength`. `learning_rate * lambda_t < 1` keeps `x` on its
    side of the grid point, from 2 on it diverges; common values stay below 0.02.

    **Grids that follow the data.** A grid scaled by the rms of a row is not idempotent: it
    shrinks what already lies on it by `sqrt(1 - MSE)`, with `MSE` its relative error on Gaussian
    data. The residual then never vanishes, it tends to `(1 - sqrt(1 - MSE)) * x`, and CAGE acts
    as an extra decoupled weight decay of `lambda_t * (1 - sqrt(1 - MSE))`. At `lambda` 10 that
    is 0.058 for `QUEST_INT4`, 0.19 for `QUEST_INT3` and 0.61 for `QUEST_INT2`, to be compared
    with a `weight_decay` of 0.1.

    Args:
      learning_rate: A number or a function of the count of updates already applied.
      projection: `P`, as in `add_cage_correction`; one for all leaves under `mask`.
      total_steps: Length of the run in optimizer steps, not micro-batches; needed unless
        `strength` is a schedule.
      strength: `lambda`, shaped over time by `cage_strength`, or a schedule taken as it is.
      total_strength: If given, replaces a number as `strength` by the one that yields this sum.
      silence: As in `cage_strength`.
      kind: As in `cage_strength`.
      order: `"fused"`, `"coupled"` or `"post"`.
      mask: Leaves whose weights are quantized in the forward pass, as `optax.masked` takes it
        (`match_paths` builds one); None: all of them.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      weight_decay: Decoupled, multiplied by the learning rate.
      decay_mask: Leaves that decay; None: all of them.
      max_grad_norm: Global norm to which gradients are clipped; None: not clipped.

    Returns:
      The chain. Under `optax.inject_hyperparams` name `projection`, `total_steps`, `silence`,
      `mask`, `decay_mask` and, where given, `total_strength` and a schedule for `strength` in
      `static_args`. With an injected learning rate `"post"` uses the one of the step itself, and
      `total_strength` cannot be computed: pass `strength`.

    Raises:
      ValueError: If `order` is unknown, if `total_steps` is missing, if `total_strength` comes
        with a schedule as `strength`, or for what `cage_strength` refuses.

    References:
      Tabesh et al., CAGE: Curvature-Aware Gradient Estimation for Accurate Quantization-Aware
      Training, arXiv:2510.18784. Kingma and Ba, Adam, arXiv:1412.6980. Loshchilov and Hutter,
      Decoupled Weight Decay Regularization, arXiv:1711.05101.
    """
    if order not in _ORDERS:
        raise ValueError(f"cage: order must be one of {_ORDERS}, got {order!r}.")
    if callable(strength):
        if total_strength is not None:
            raise ValueError(
                "cage: total_strength scales a number, got a schedule for strength as well;"
                " drop one of the two."
            )
        lambdas = strength
    else:
        if total_steps is None:
            raise ValueError("cage: needs total_steps, got None; or pass a schedule as strength.")
        if total_strength is not None:
            rates = _as_schedule(learning_rate)
            strength = cage_strength_for_total(
                total_strength,
                # The post-step is taken with the learning rate of the step that follows.
                (lambda count: rates(count + 1)) if order == "post" else rates,
                total_steps,
                silence,
                kind,
            )
        lambdas = cage_strength(strength, total_steps, silence, kind)

    if order == "post":
        correction = add_cage_post_correction(projection, lambdas, learning_rate)
    else:
        correction = add_cage_correction(projection, lambdas)
    if mask is not None:
        correction = optax.masked(correction, mask)
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    decay = optax.add_decayed_weights(weight_decay, decay_mask)
    rate = optax.scale_by_learning_rate(learning_rate)
    steps = {
        "fused": (adam, decay, correction, rate),
        "coupled": (correction, adam, decay, rate),
        "post": (adam, decay, rate, correction),
    }[order]
    if max_grad_norm is not None:
        steps = (optax.clip_by_global_norm(max_grad_norm), *steps)
    return optax.chain(*steps)

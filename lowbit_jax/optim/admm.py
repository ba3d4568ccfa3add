"""ADMM against the true loss: Elsa's way to extreme sparsity, for any constraint with a projection.

Elsa (Extreme LLM sparsity by surrogate-free ADMM, arXiv:2510.01650) minimises the training loss
`f(x)` itself under `x in S`, not the error of single layers. It splits x from a copy z in S and
alternates, with the augmented Lagrangian `f(x) + lam/2 |x - z + u|^2 - lam/2 |u|^2` and u its
scaled dual,

    x <- ordinary optimizer steps on f with lam (x - z + u) added to the gradient
    z <- P(x + u)        every `interval` steps
    u <- u + x - z

P is passed in: masks, N:M patterns or a quantizer's grid. The objective-aware projection measures
distances by Adam's second moments, a diagonal proxy of the curvature.

Where we differ from the released code: z and u are first updated after `interval` steps, not after
a single noisy one; the dual is rescaled at the moment when lam changes, not an interval later, and
kept where lam was 0; P keeps exact counts (a threshold alone drops all ties).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from lowbit_jax.numerics import E4M3, QTensor, QuantSpec, dequantize_matrices, quantize_matrices
from lowbit_jax.optim.low_precision_adam import (
    MOMENT_E4M3_128,
    AdamLowPrecisionState,
    scale_by_adam_low_precision,
)
from lowbit_jax.optim.masks import Mask, resolve_mask

Scalar = int | float | jax.Array
# (tree, importance of the same structure or None) -> the nearest tree in S.
TreeProjection = Callable[[PyTree, PyTree | None], PyTree]

# One float32 scale a matrix, 5 % above its abs-max, as the released code stores z.
SPLIT_E4M3 = QuantSpec(E4M3, "tensor", margin=1.05)

_KINDS = ("constant", "linear", "cosine", "exponential")


class AdmmState(NamedTuple):
    """State of `admm`. Leaves that the mask leaves out have no z and no u."""

    count: jax.Array  # (), int32: updates applied so far
    strength: jax.Array  # (), float32: lam
    z: PyTree  # the point of S that x is pulled to: float32, bfloat16 or QTensor
    u: PyTree  # the scaled dual: likewise
    inner: PyTree  # state of the optimizer of x


def admm_strength(
    start: Scalar, end: Scalar, total_steps: int, kind: str = "cosine"
) -> optax.Schedule:
    """`lam` over the run, with `s = count / total_steps` in [0, 1].

    Args:
      start: `lam` at `s = 0`.
      end: `lam` at `s = 1`; later it stays.
      total_steps: Length of the run.
      kind: "constant" (`start`), "linear", "cosine" `start + (end - start) (1 - cos(pi s)) / 2`, or
        "exponential" `start (end / start)^s`, where a `start` of 0 counts as 1e-12.

    Returns:
      A function of the count of updates already applied, float32.

    Raises:
      ValueError: If there is no such kind or `total_steps` is not positive.
    """
    if kind not in _KINDS:
        raise ValueError(f"admm_strength: kind must be one of {_KINDS}, got {kind!r}.")
    if total_steps < 1:
        raise ValueError(f"admm_strength: total_steps must be at least 1, got {total_steps}.")

    def schedule(count):
        s = jnp.clip(jnp.asarray(count, jnp.float32) / total_steps, 0, 1)
        if kind == "exponential":
            first = jnp.maximum(jnp.float32(start), 1e-12)
            return first * (end / first) ** s
        share = {"constant": 0 * s, "linear": s, "cosine": (1 - jnp.cos(jnp.pi * s)) / 2}[kind]
        return start * (1 - share) + end * share

    return schedule


def admm(
    inner: optax.GradientTransformation,
    projection: TreeProjection,
    strength: Scalar | optax.Schedule,
    *,
    interval: int = 32,
    mask: Mask = None,
    importance: Callable[[PyTree], PyTree] | None = None,
    z: str | QuantSpec = "float32",
    u: str | QuantSpec = "float32",
) -> optax.GradientTransformationExtraArgs:
    """`inner` on `g + lam (x - z + u)`; every `interval` steps `z = P(x + u)` and `u += x - z`.

    The new x is needed inside, so `inner` must be the whole optimizer, learning rate included, and
    nothing may change its updates afterwards; what clips gradients goes before, in `optax.chain`.
    Penalty, z and u are float32 arithmetic even for bfloat16 parameters, whose `x - z` would have
    no bits left. Averaged gradients are assumed: lam is not divided by the number of devices.

    Args:
      inner: The optimizer of x.
      projection: P on the tree of the chosen leaves, for example `sparsity.onto_pattern(...)`.
      strength: lam, or a function of the count of updates already applied, such as
        `admm_strength`, read when z and u are updated. u is then multiplied by `lam / new lam`, so
        that the dual `lam u` stays; where either is 0, u stays.
      interval: Steps from one update of z and u to the next.
      mask: Leaves that are constrained, as `optax.masked` takes it; None: all of them. Leave tied
        embeddings, norms and the output head out.
      importance: From the state of `inner`, F for the projection, in the structure of the
        parameters: `adam_second_moments`. None: P without it.
      z: How z is stored: "float32", "bfloat16" or a `QuantSpec` (each matrix by itself, to
        nearest). u is updated with z as it was before.
      u: How u is stored, likewise.

    Returns:
      A transform with state `AdmmState`. `update` raises ValueError without `params`. At a strength
      of 0 the parameters move as under `inner`.
    """
    who = "admm"
    if isinstance(interval, int) and interval < 1:
        raise ValueError(f"{who}: interval must be at least 1, got {interval}.")
    _check_storage(who, z=z, u=u)
    schedule = strength if callable(strength) else lambda count: strength

    def project(params, u, inner_state, flags):
        f = None if importance is None else _select(importance(inner_state), flags)
        target = jax.tree.map(lambda p, u: p + u, params, u)
        return target, projection(target, f)

    def init_fn(params):
        chosen = _wide(_select(params, resolve_mask(mask, params)))
        first = jnp.asarray(schedule(jnp.zeros([], jnp.int32)), jnp.float32)
        duals = _store(jax.tree.map(jnp.zeros_like, chosen), u)
        split = _store(projection(chosen, None), z)
        return AdmmState(jnp.zeros([], jnp.int32), first, split, duals, inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(f"{who}: needs the parameters, got None; call update(.., params).")
        flags = resolve_mask(mask, params)
        chosen, duals = _wide(_select(params, flags)), _load(state.u)
        pulls = jax.tree.map(
            lambda p, z, u: state.strength * (p - z + u), chosen, _load(state.z), duals
        )
        gradients = jax.tree.map(
            lambda flag, g, pull: (g.astype(pull.dtype) + pull).astype(g.dtype) if flag else g,
            flags,
            updates,
            pulls,
        )
        steps, inner_state = optax.with_extra_args_support(inner).update(
            gradients, state.inner, params, **extra_args
        )
        count = jnp.asarray(optax.safe_increment(state.count))

        def update_split(_):
            # Loaded once more in here, for what a branch takes is kept whole in memory.
            wide = _wide(_select(params, flags)), _load(state.u)
            moved = jax.tree.map(lambda p, s: p + s, wide[0], _select(steps, flags))
            target, split = project(moved, wide[1], inner_state, flags)
            new = jnp.asarray(schedule(count), jnp.float32)
            is_zero = (new == 0) | (state.strength == 0)
            ratio = jnp.where(is_zero, 1, state.strength / jnp.where(is_zero, 1, new))
            rest = jax.tree.map(lambda t, z: (t - z) * ratio, target, split)
            return new, _store(split, z), _store(rest, u)

        def keep(_):
            return state.strength, state.z, state.u

        strength_now, split, rest = jax.lax.cond(
            count % interval == 0, update_split, keep, operand=None
        )
        return steps, AdmmState(count, strength_now, split, rest, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def elsa(
    learning_rate: Scalar | optax.Schedule,
    projection: TreeProjection,
    *,
    strength: Scalar | optax.Schedule = 0.01,
    interval: int = 32,
    is_objective_aware: bool = True,
    mask: Mask = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    max_grad_norm: Scalar | None = 1.0,
    z: str | QuantSpec = "float32",
    u: str | QuantSpec = "float32",
    m: str | QuantSpec = "float32",
    v: str = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Adam under ADMM: clip the gradient of f, add `lam (x - z + u)`, then Adam, which sees both.

    The defaults are those of the released code: lam 0.01, interval 32, `b2` 0.95, no weight decay;
    learning rates there are 1e-5 (50 % of a 125M model) to 2e-4 (90 %), decayed linearly to 0. The
    sparser the target, the larger the learning rate and the smaller lam. At the end the weights are
    only near S: `admm_finish` projects them.

    Args:
      learning_rate: A number, or a function of the count of updates already applied.
      projection: As in `admm`, like all not listed.
      strength: See there.
      interval: See there.
      is_objective_aware: Whether P weighs with Adam's second moments.
      mask: See there.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root.
      max_grad_norm: Global norm to which the gradients of f are clipped; None: not clipped.
      z: See there.
      u: See there.
      m: Storage of the first moment, as in `scale_by_adam_low_precision`.
      v: Storage of the second moment.

    References:
      Elsa, arXiv:2510.01650. Boyd et al., Distributed Optimization and Statistical Learning via the
      Alternating Direction Method of Multipliers, 2011, section 3.1.1 (the scaled form).
    """
    if (m, v) == ("float32", "float32"):
        adam = optax.scale_by_adam(b1, b2, eps)
    else:
        adam = scale_by_adam_low_precision(b1, b2, eps, m=m, v=v)
    constrained = admm(
        optax.chain(adam, optax.scale_by_learning_rate(learning_rate)),
        projection,
        strength,
        interval=interval,
        mask=mask,
        importance=adam_second_moments if is_objective_aware else None,
        z=z,
        u=u,
    )
    if max_grad_norm is None:
        return constrained
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), constrained)


def elsa_low_precision(
    learning_rate: Scalar | optax.Schedule,
    projection: TreeProjection,
    *,
    strength: Scalar | optax.Schedule = 0.01,
    interval: int = 32,
    is_objective_aware: bool = True,
    mask: Mask = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    max_grad_norm: Scalar | None = 1.0,
    z: str | QuantSpec = SPLIT_E4M3,
    u: str | QuantSpec = "bfloat16",
    m: str | QuantSpec = MOMENT_E4M3_128,
    v: str = "bfloat16",
) -> optax.GradientTransformationExtraArgs:
    """Elsa-L: `elsa` with z in E4M3, u in bfloat16 and Adam's moments in E4M3 and bfloat16.

    6 bytes a constrained parameter (and a float32 scale for each matrix and each 128 first moments)
    where `elsa` has 16. The paper's Adam has both moments in 8 bits, 5 bytes; why the second is
    bfloat16 here, `scale_by_adam_low_precision` says. Updates are float32, as there.

    Args:
      learning_rate: As in `elsa`, like all the others; four defaults differ.
      projection: See there.
      strength: See there.
      interval: See there.
      is_objective_aware: See there.
      mask: See there.
      b1: See there.
      b2: See there.
      eps: See there.
      max_grad_norm: See there.
      z: See there.
      u: See there.
      m: See there.
      v: See there.
    """
    return elsa(
        learning_rate,
        projection,
        strength=strength,
        interval=interval,
        is_objective_aware=is_objective_aware,
        mask=mask,
        b1=b1,
        b2=b2,
        eps=eps,
        max_grad_norm=max_grad_norm,
        z=z,
        u=u,
        m=m,
        v=v,
    )


def admm_finish(
    params: PyTree,
    state: PyTree,
    projection: TreeProjection,
    *,
    mask: Mask = None,
    is_objective_aware: bool = True,
) -> PyTree:
    """`P(x; F)`: the parameters on S at last; leaves that the mask leaves out as they are.

    Args:
      params: After the last step.
      state: Of the optimizer then; an `AdmmState` or a tree that holds one.
      projection: As in training.
      mask: As in training.
      is_objective_aware: As in training.
    """
    flags = resolve_mask(mask, params)
    f = None
    if is_objective_aware:
        f = _select(adam_second_moments(find_admm_state(state).inner), flags)
    chosen = projection(_wide(_select(params, flags)), f)
    return jax.tree.map(
        lambda flag, p, new: new.astype(p.dtype) if flag else p, flags, params, chosen
    )


def constraint_gap(params: PyTree, state: PyTree) -> Float[Array, ""]:
    """`|x - z| / |x|` over the constrained leaves: how far the final projection will jump.

    Args:
      params: The parameters that `state` belongs to.
      state: An `AdmmState` or a tree that holds one.
    """
    split = _load(find_admm_state(state).z)
    pairs = jax.tree.map(
        lambda z, p: None if _is_masked(z) else (p.astype(z.dtype), z),
        split,
        params,
        is_leaf=_is_masked,
    )
    pairs = jax.tree.leaves(pairs, is_leaf=lambda pair: isinstance(pair, tuple))
    gap = optax.tree.norm([p - z for p, z in pairs])
    return gap / jnp.maximum(optax.tree.norm([p for p, _ in pairs]), 1e-30)


def find_admm_state(state: PyTree) -> AdmmState:
    """The `AdmmState` inside the state of a chain.

    Raises:
      ValueError: If there is not exactly one.
    """
    leaves = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, AdmmState))
    found = [leaf for leaf in leaves if isinstance(leaf, AdmmState)]
    if len(found) != 1:
        raise ValueError(
            f"find_admm_state: needs a state with one AdmmState in it, got {len(found)}; pass the"
            " state of `elsa` or `admm`."
        )
    return found[0]


def adam_second_moments(state: PyTree) -> PyTree:
    """Adam's second moments, in the structure of the parameters, float32; without bias correction.

    The correction is one factor for all of them and would change no comparison.

    Raises:
      ValueError: If `state` holds no Adam, or more than one.
    """
    kinds = (optax.ScaleByAdamState, AdamLowPrecisionState)
    leaves = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, kinds))
    found = [leaf for leaf in leaves if isinstance(leaf, kinds)]
    if len(found) != 1:
        raise ValueError(
            f"adam_second_moments: needs the state of one Adam, got {len(found)}; pass an"
            " `importance` function of your own to `admm`, or is_objective_aware=False."
        )
    adam = found[0]
    return _wide(adam.nu if isinstance(adam, optax.ScaleByAdamState) else adam.v)


def _check_storage(who, **kinds):
    for name, kind in kinds.items():
        is_spec = isinstance(kind, QuantSpec)
        if not (is_spec or kind in ("float32", "bfloat16")) or (is_spec and kind.needs_key):
            raise ValueError(
                f"{who}: {name} must be 'float32', 'bfloat16' or a QuantSpec that rounds to"
                f" nearest, got {kind}."
            )


def _is_masked(node) -> bool:
    return isinstance(node, optax.MaskedNode)


def _select(tree: PyTree, flags: PyTree) -> PyTree:
    """`tree` with an empty node in the place of each leaf that is not constrained."""
    return jax.tree.map(lambda flag, leaf: leaf if flag else optax.MaskedNode(), flags, tree)


def _wide(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _load(tree: PyTree) -> PyTree:
    def load(x):
        return dequantize_matrices(x) if isinstance(x, QTensor) else x

    return _wide(jax.tree.map(load, tree, is_leaf=lambda x: isinstance(x, QTensor)))


def _store(tree: PyTree, kind: str | QuantSpec) -> PyTree:
    if isinstance(kind, QuantSpec):
        return jax.tree.map(lambda x: quantize_matrices(x, kind), tree)
    if kind == "float32":
        return tree
    return jax.tree.map(lambda x: x.astype(kind), tree)

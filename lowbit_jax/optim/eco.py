"""ECO: training without master weights; the momentum carries what rounding took away.

Nikdan, Zandieh, Alistarh and Mirrokni, ECO: Quantized Training without Full-Precision Master
Weights, arXiv:2601.22101. Only the quantized weight is stored. Each step takes the optimizer's
step in float32, rounds the result, and folds the residual, scaled, into the first moment, which
is there anyway; the next step moves along that momentum and so applies the residual again. Error
feedback, without a buffer for the error and without a new hyperparameter.

Where the scale comes from. Let `th` be what a run with master weights `W` and momentum `M` would
round, `e` the residual, `rate * D` the factor from momentum to step (`D = 1` for SGD, `1 /
(c1 * (sqrt(v / c2) + eps))` for Adam) and `k = (1 - rate * weight_decay) / (rate * D)`. The two
runs agree iff `M - m = k * e / b1` after each step, that is

    m_t <- m_t + k * e_(t-1) - (k / b1) * e_t          exact, and needs e_(t-1) stored
    m_t <- m_t + k * (1 - 1 / b1) * e_t                ECO, which takes e_(t-1) for e_t

It holds for momentum in the form of a running mean, `m = b1 * m + (1 - b1) * g`, as it is here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from lowbit_jax.numerics import QTensor, QuantSpec
from lowbit_jax.numerics.matrices import dequantize_matrices, quantize_matrices
from lowbit_jax.numerics.rounding import stochastic_cast
from lowbit_jax.optim.low_precision import Replacement
from lowbit_jax.optim.masks import Mask, resolve_mask

# A point of the grid near x, same shape; the key is a new one for every leaf and step.
Quantizer = Callable[[Array, PRNGKeyArray], Array]
Scalar = int | float | jax.Array

_OPTIMIZERS = ("adam", "sgd")
_INJECTION_RATES = ("current", "next")
_MOMENT_DTYPES = ("bfloat16", "float32", "float64")


class EcoState(NamedTuple):
    """State of `scale_by_eco`: neither residuals nor keys."""

    count: jax.Array  # (), int32: updates applied so far
    m: PyTree  # first moment, residuals folded in; the shapes of the weights' values
    v: PyTree  # second moment; None for "sgd"


def scale_by_eco(
    quantizer: QuantSpec | Quantizer,
    learning_rate: Scalar | optax.Schedule,
    *,
    optimizer: str = "adam",
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    decay_mask: Mask = None,
    mask: Mask = None,
    inject: bool = True,
    learning_rate_for_injection: str = "current",
    exact_weight_decay: bool = True,
    moment_dtype: DTypeLike = jnp.float32,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """`q(th) - p` with `th = p - learning_rate * (direction + weight_decay * p)`.

    The direction is `(m / c1) / (sqrt(v / c2) + eps)` of Adam, with bias corrections `c = 1 -
    b**t`, or `m` itself for "sgd". The learning rate is included: nothing comes after it in a
    chain. What is stored in `m` is the running mean plus `k * (1 - 1 / b1) * (th - q(th))`, see
    the module; `v` never sees the residual.

    Differentiate at the weights as they are stored: they lie on the grid, so the forward pass has
    nothing to round and needs no gradient estimator. A weight is stored in one of two forms.

    - A `QTensor`, only codes and scales. Its gradient is a float array of the shape of its values;
      its update is a `Replacement`, which `apply_updates_low_precision` puts in place.
    - A float array whose values lie on the grid, for `optax.apply_updates`. `p + (q - p)` misses q
      by at most an ulp of p, wherever `q - p` is not exact; the next step rounds afresh.

    Everything is computed in float32 (float64 for float64 parameters): the residual is a
    difference of nearly equal numbers. Where nothing was rounded the update is the optimizer's
    own, so that the identity as quantizer, and every leaf outside `mask`, is plain AdamW or SGD.

    **What to expect.** Stochastic rounding is the recommended arm. With rounding to nearest, ECO
    is sound on fine grids (FP8) but can be worse than no compensation on a grid of 4 bits. `v`
    fluctuates between writing the residual and reading it back, which at learning rates near 1e-4
    costs part of the compensation: raise `b2` to 0.99 or keep the learning rate from falling
    further. Trust ratios and clipping of updates break the identity of the module. A scale rule
    that clips or shrinks (`rms`, `absmax_floor`) leaves residuals larger than half a step, which
    then pile up in `m`: prefer `absmax`.

    Args:
      quantizer: A `QuantSpec`, whose field `rounding` is the arm, to nearest or stochastic, and
        which sees stacked matrices one by one; or a function `(x, key) -> q`.
      learning_rate: A number or a function of the count of updates already applied. Where it is
        not positive nothing is injected.
      optimizer: "adam" or "sgd".
      b1: Decay of the first moment, in (0, 1).
      b2: Decay of the second moment, of "adam" only.
      eps: Added to the root of the second moment, of "adam" only.
      weight_decay: Decoupled, multiplied by the learning rate.
      decay_mask: Leaves that decay, as `optax.masked` takes it; None: all of them. Functions get
        the gradients, which have arrays where the parameters have `QTensor`s.
      mask: Leaves whose weights live on the grid, likewise. None: the `QTensor` leaves if there
        are any, otherwise all leaves.
      inject: False leaves the residual out: the naive arm, for comparison.
      learning_rate_for_injection: "current" is the paper's. "next", `learning_rate(count + 1)`, is
        the one that will apply the residual, so that a schedule does not rescale what waits in
        `m`. Alike for a plain number.
      exact_weight_decay: False drops the factor `1 - learning_rate * weight_decay`, as the paper
        does.
      moment_dtype: float32; bfloat16, then rounded stochastically; or float64.
      seed: The key of a step is `fold_in(key(seed), count)`, unless `update` is given `key=`; that
        of leaf i is `fold_in(key, i)`. No key is stored.

    Returns:
      A transform with state `EcoState`. Updates have the dtype of the gradients. `update` raises
      ValueError without `params`, or for a `QTensor` that `mask` leaves out or whose spec is not
      the quantizer's.

    Raises:
      ValueError: If `optimizer`, `b1`, `learning_rate_for_injection` or `moment_dtype` is none of
        the above.

    References:
      Nikdan et al., ECO, arXiv:2601.22101, algorithms 2 and 3.
    """
    _check(optimizer, b1, learning_rate_for_injection, moment_dtype)
    rates = learning_rate if callable(learning_rate) else lambda count: learning_rate
    is_adam = optimizer == "adam"

    def init_fn(params):
        def zeros():  # of the shape and sharding of the values
            return jax.tree.map(
                lambda p: jnp.zeros_like(_values(p), dtype=moment_dtype),
                params,
                is_leaf=_is_qtensor,
            )

        return EcoState(jnp.zeros([], jnp.int32), zeros(), zeros() if is_adam else None)

    def update_leaf(g, p, m, v, on_grid, decays, step: _Step):
        """The update of one leaf and its moments; equations of the module."""
        _check_leaf(quantizer, p, on_grid)
        weights_key, m_key, v_key = jax.random.split(step.key, 3)
        x, dtype = _values(p), g.dtype
        g = g.astype(x.dtype)
        m = optax.tree.update_moment(g, m.astype(x.dtype), b1, 1)
        if is_adam:
            v = optax.tree.update_moment_per_elem_norm(g, v.astype(x.dtype), b2, 2)
            denominator = jnp.sqrt(optax.tree.bias_correction(v, b2, step.number)) + eps
            direction = optax.tree.bias_correction(m, b1, step.number) / denominator
            inverse = (1 - b1**step.number).astype(x.dtype) * denominator  # 1 / D
        else:
            direction, inverse = m, 1
        if decays:
            direction = direction + weight_decay * x
        update = -jnp.asarray(step.rate, x.dtype) * direction
        if on_grid:
            target = x + update
            rounded, stored = _quantize(quantizer, target, p, weights_key)
            residual = target - rounded
            if inject:
                rate = jnp.asarray(step.injection_rate, x.dtype)
                kept = 1 - rate * weight_decay if decays and exact_weight_decay else 1
                injected = (1 - 1 / b1) * kept * inverse * (residual / rate)
                m = m + jnp.where(rate > 0, injected, 0)
            if _is_qtensor(p):
                update = Replacement(stored)
            else:
                update = jnp.where(residual == 0, update, rounded - x).astype(dtype)
        else:
            update = update.astype(dtype)
        m = _store_moment(m, moment_dtype, m_key)
        return update, m, _store_moment(v, moment_dtype, v_key) if is_adam else None

    def update_fn(updates, state, params=None, *, key=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "scale_by_eco: needs the parameters, got None; call update(.., params)."
            )
        number = jnp.asarray(optax.safe_increment(state.count))
        rate = rates(state.count)
        injection_rate = rates(number) if learning_rate_for_injection == "next" else rate
        if key is None:
            key = jax.random.fold_in(jax.random.key(seed), state.count)

        gradients, treedef = jax.tree.flatten(updates, is_leaf=lambda g: g is None)
        leaves = treedef.flatten_up_to(params)
        ms = treedef.flatten_up_to(state.m)
        vs = treedef.flatten_up_to(state.v) if is_adam else [None] * len(ms)
        decays = treedef.flatten_up_to(resolve_mask(decay_mask, updates))
        on_grid = _leaves_on_grid(mask, updates, treedef, leaves)
        results = []
        for i, (g, p, m, v) in enumerate(zip(gradients, leaves, ms, vs, strict=True)):
            if g is None:
                results.append((None, m, v))
                continue
            step = _Step(number, rate, injection_rate, jax.random.fold_in(key, i))
            results.append(update_leaf(g, p, m, v, on_grid[i], decays[i], step))
        columns = zip(*results, strict=True) if results else ((), (), ())
        new_updates, m, v = (treedef.unflatten(column) for column in columns)
        return new_updates, EcoState(number, m, v if is_adam else None)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def eco(
    learning_rate: Scalar | optax.Schedule,
    spec: QuantSpec | Quantizer,
    *,
    optimizer: str = "adam",
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.1,
    decay_mask: Mask = None,
    mask: Mask = None,
    max_grad_norm: Scalar | None = None,
    inject: bool = True,
    learning_rate_for_injection: str = "current",
    exact_weight_decay: bool = True,
    moment_dtype: DTypeLike = jnp.float32,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW or SGD whose weights are stored quantized and nowhere else.

    `scale_by_eco`, with the gradients clipped before the moments see them. Quantize the parameters
    first (`quantize_leaves`), differentiate at their values (`dequantize_leaves`), and apply the
    updates with `apply_updates_low_precision`:

        params = quantize_leaves(params, spec, match_paths(".*/weight"))
        grads = jax.grad(loss)(dequantize_leaves(params))
        updates, state = tx.update(grads, state, params)
        params = apply_updates_low_precision(params, updates)

    A parameter in `FP8_E4M3` takes 1 byte, 4 of each moment, and 4 bytes a row for the scale: 9
    instead of the 12 of float32 AdamW; 5 with moments in bfloat16, 8.5 with weights of 4 bits.

    Args:
      learning_rate: As in `scale_by_eco`, like all that is not listed here.
      spec: Its `quantizer`. Stochastic rounding is recommended.
      optimizer: See there.
      b1: See there.
      b2: See there.
      eps: See there.
      weight_decay: See there.
      decay_mask: See there.
      mask: See there.
      max_grad_norm: Global norm to which gradients are clipped; None: not clipped.
      inject: See there.
      learning_rate_for_injection: See there.
      exact_weight_decay: See there.
      moment_dtype: See there.
      seed: See there.

    Returns:
      The chain. Under `optax.inject_hyperparams` name `spec`, `moment_dtype` and `seed`, and where
      given `mask` and `decay_mask`, in `static_args`; "next" is then no different from "current".
      `optax.MultiSteps` takes float arrays only and refuses a `QTensor`: accumulate its gradients
      before `update`.

    References:
      Nikdan et al., ECO: Quantized Training without Full-Precision Master Weights,
      arXiv:2601.22101. The factor for weight decay is not in the paper; it follows from the
      identity of the module.
    """
    step = scale_by_eco(
        spec,
        learning_rate,
        optimizer=optimizer,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        decay_mask=decay_mask,
        mask=mask,
        inject=inject,
        learning_rate_for_injection=learning_rate_for_injection,
        exact_weight_decay=exact_weight_decay,
        moment_dtype=moment_dtype,
        seed=seed,
    )
    if max_grad_norm is None:
        return step
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), step)


class _Step(NamedTuple):
    """What a leaf needs to know of its step."""

    number: jax.Array  # t = count + 1
    rate: ArrayLike
    injection_rate: ArrayLike
    key: PRNGKeyArray


def _is_qtensor(p: Any) -> bool:
    return isinstance(p, QTensor)


def _values(p: Any) -> Float[Array, "..."]:
    if _is_qtensor(p):
        return dequantize_matrices(p)
    p = jnp.asarray(p)
    return p if p.dtype == jnp.float64 else p.astype(jnp.float32)


def _quantize(quantizer, target, p, key):
    """`target` on the grid: its values, and the `QTensor` that replaces `p` if that is one."""
    if isinstance(quantizer, QuantSpec):
        q = quantize_matrices(target, quantizer, key=key)
        values = dequantize_matrices(q, target.dtype)
        if _is_qtensor(p):
            return values, dataclasses.replace(q, spec=p.spec)
    else:
        values, q = quantizer(target, key), None
        if values.shape != target.shape:
            raise ValueError(
                f"scale_by_eco: a quantizer must keep the shape, got {target.shape} ->"
                f" {values.shape}; mask out the leaves that it cannot take."
            )
    # To the dtype of the weight, so that the residual counts that rounding as well.
    return values.astype(p.dtype).astype(target.dtype), q


def _leaves_on_grid(mask, updates, treedef, leaves):
    """For each leaf, whether it lives on the grid."""
    are_qtensors = [_is_qtensor(p) for p in leaves]
    if mask is None:
        return are_qtensors if any(are_qtensors) else [True] * len(leaves)
    return treedef.flatten_up_to(resolve_mask(mask, updates))


def _check_leaf(quantizer, p, on_grid):
    if not _is_qtensor(p):
        return
    if not on_grid:
        raise ValueError(
            "scale_by_eco: every QTensor must be under `mask`, for it cannot leave its grid; got"
            f" one of shape {p.shape} ({p.spec}) outside; widen the mask or dequantize that leaf."
        )
    if not isinstance(quantizer, QuantSpec):
        raise ValueError(
            "scale_by_eco: QTensor leaves need a QuantSpec as quantizer, got a function; pass"
            f" {p.spec} with the rounding of your choice."
        )
    if _grid(p.spec) != _grid(quantizer):
        raise ValueError(
            "scale_by_eco: a QTensor must have the quantizer's spec, but for the rounding, got"
            f" {p.spec} for {quantizer}; quantize the parameters to that spec, or give each group"
            " of leaves its own transform with optax.partition."
        )


def _grid(spec):
    """All of a spec but its rounding."""
    return {**vars(spec), "rounding": None}


def _store_moment(x, dtype, key):
    return stochastic_cast(x, dtype, key) if np.dtype(dtype).itemsize < 4 else x.astype(dtype)


def _check(optimizer, b1, learning_rate_for_injection, moment_dtype):
    if optimizer not in _OPTIMIZERS:
        raise ValueError(
            f"scale_by_eco: optimizer must be one of {_OPTIMIZERS}, got {optimizer!r}."
        )
    if isinstance(b1, int | float) and not 0 < b1 < 1:
        raise ValueError(
            f"scale_by_eco: b1 must lie in (0, 1), got {b1}; the momentum carries the residual."
        )
    if learning_rate_for_injection not in _INJECTION_RATES:
        raise ValueError(
            "scale_by_eco: learning_rate_for_injection must be one of"
            f" {_INJECTION_RATES}, got {learning_rate_for_injection!r}."
        )
    if np.dtype(moment_dtype).name not in _MOMENT_DTYPES:
        raise ValueError(
            f"scale_by_eco: moment_dtype must be one of {_MOMENT_DTYPES}, got"
            f" {np.dtype(moment_dtype)}; float16 overflows where 1 / learning_rate is large."
        )

"""Weights in few bits without a float32 copy: updates that are not lost where they are added.

`optax.apply_updates` adds in the dtype of the weight, to nearest: a bfloat16 weight at 1.0 never
feels updates below 0.002, and codes are no numbers to add to. Here sums are taken in float32 and
put back into the leaf by stochastic rounding, whose expectation is the sum, or to nearest with the
residual carried to the next step.

Schultheis and Alistarh, LLMQ: Efficient Lower-Precision LLM Training for Consumer GPUs,
arXiv:2512.15306: bfloat16 weights as the only copy, with stochastic rounding.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from lowbit_jax.numerics import (
    QTensor,
    QuantSpec,
    dequantize_matrices,
    quantize_matrices,
    round_to_grid,
    stochastic_cast,
)
from lowbit_jax.numerics.quantize import Key
from lowbit_jax.numerics.rounding import CAST_FORMATS
from lowbit_jax.optim.masks import Mask, resolve_mask

_BFLOAT16 = np.dtype(jnp.bfloat16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replacement:
    """An update that is the new leaf itself: an array, or a `QTensor` of the leaf's own spec.

    For optimizers that round the weights themselves. `optax.apply_updates` refuses it.
    """

    value: Any


def apply_updates_low_precision(
    params: PyTree,
    updates: PyTree,
    *,
    key: Key = None,
    rounding: str = "stochastic",
) -> PyTree:
    """`params + updates`, summed in float32, each leaf rounded to what it is stored in.

    - float32, float64: `optax.apply_updates`, bit for bit.
    - bfloat16, float16, float8_e4m3fn, float8_e5m2: the float32 sum, rounded; the float8 types
      saturate.
    - `QTensor`: dequantized, added to, quantized again by its spec with `rounding` in place of
      the spec's own; the scales are computed anew. Unbiased where the scale rule never clips, and
      weights without an update stay where they are where the rule maps its own grid onto itself:
      `absmax` does both. An `rms` rule shrinks the weights a little at every step.
    - integers: an integer update is added, a floating one refused.

    A `Replacement` is put in place. None, or the float0 of an integer leaf's gradient, leaves the
    leaf as it is.

    Args:
      params: Tree of arrays and `QTensor`s.
      updates: Tree of the same structure with, at each leaf, an array of the leaf's shape (for a
        `QTensor`, of the array that it stands for), a `Replacement` or None.
      key: A new one every step, such as `fold_in(run_key, step)`; leaf i uses `fold_in(key, i)`.
        Needed only if a leaf is rounded stochastically.
      rounding: "stochastic", or "nearest", which loses updates below half a step.

    Returns:
      Tree with the structure, shapes, dtypes and specs of `params`.

    Raises:
      ValueError: If an update does not fit its leaf, or a leaf needs a key and there is none.
    """
    who = "apply_updates_low_precision"
    if rounding not in ("stochastic", "nearest"):
        raise ValueError(f"{who}: rounding must be 'stochastic' or 'nearest', got {rounding!r}.")

    def add(leaf: _Leaf, p, u):
        if not _is_low_precision(p):
            return jnp.asarray(p + u).astype(p.dtype)
        leaf_key = None
        if rounding == "stochastic":
            if key is None:
                raise ValueError(
                    f"{who}: {leaf.path}, {_describe(p)}, is rounded stochastically and needs a"
                    " key, got key=None; pass a new one every step, or rounding='nearest'."
                )
            leaf_key = jax.random.fold_in(key, leaf.index)
        return _rounded(leaf, _values(p) + u.astype(jnp.float32), p, leaf_key)[0]

    return _map_updates(who, add, params, updates)


def init_errors(params: PyTree, dtype: DTypeLike = jnp.bfloat16) -> PyTree:
    """Zero residuals for `apply_updates_with_error_feedback`, one for each leaf in few bits.

    Args:
      params: Tree of arrays and `QTensor`s.
      dtype: In which the residuals are kept.

    Returns:
      Tree of the structure of `params`; None at leaves that are float32, float64 or integer.
    """
    return jax.tree.map(
        lambda p: jnp.zeros(p.shape, dtype) if _is_low_precision(p) else None,
        params,
        is_leaf=_is_leaf,
    )


def apply_updates_with_error_feedback(
    params: PyTree, updates: PyTree, errors: PyTree
) -> tuple[PyTree, PyTree]:
    """`y = params + updates + errors` rounded to nearest, and the residual `y - round(y)`.

    What a step cannot store, the next one adds again, so that `params + errors` follows the
    float32 sum of all updates. A residual in bfloat16 loses up to `2**-8` of itself a step, which
    for a bfloat16 weight w is `2**-16 |w|`: what a master copy with 16 significant bits would.
    For a weight in E4M3 that is `2**-12 |w|`, more than many an update: give `init_errors` float32.
    No random bits; the cost is one more number a weight.

    Args:
      params: Tree of arrays and `QTensor`s; leaves that are not in few bits are added to as by
        `optax.apply_updates`.
      updates: As in `apply_updates_low_precision`. A `Replacement` or None keeps the residual.
      errors: From `init_errors`, then from the step before.

    Returns:
      `(params, errors)`, structures, shapes and dtypes unchanged.

    Raises:
      ValueError: If an update does not fit its leaf, or `errors` is not from these `params`.
    """
    who = "apply_updates_with_error_feedback"
    treedef = jax.tree.structure(params, is_leaf=_is_leaf)
    residuals = treedef.flatten_up_to(errors)

    def add(leaf: _Leaf, p, u):
        if not _is_low_precision(p):
            return jnp.asarray(p + u).astype(p.dtype)
        error = residuals[leaf.index]
        if error is None or error.shape != p.shape:
            raise ValueError(
                f"{who}: {leaf.path}, {_describe(p)}, needs a residual of its shape, got"
                f" {None if error is None else error.shape}; use init_errors(params)."
            )
        total = _values(p) + u.astype(jnp.float32) + error.astype(jnp.float32)
        stored, value = _rounded(leaf, total, p, None)
        residuals[leaf.index] = (total - value).astype(error.dtype)
        return stored

    params = _map_updates(who, add, params, updates)
    return params, treedef.unflatten(residuals)


def quantize_leaves(
    params: PyTree,
    spec: QuantSpec,
    mask: Mask = None,
    *,
    key: Key = None,
) -> PyTree:
    """`params` with a `QTensor` in place of each leaf under `mask`.

    Args:
      params: Tree of arrays. Leaves of three and more axes are stacked matrices, each of which
        is quantized by itself (`quantize_matrices`).
      spec: What to quantize to.
      mask: Tree of bools, or a function from `params` to one (`match_paths` builds one); a prefix
        of the tree will do. None: all leaves of two and more axes, so embeddings and stacked
        vectors too.
      key: For a spec that needs one; leaf i uses `fold_in(key, i)`.

    Returns:
      The tree; other leaves are the very same arrays.

    Raises:
      ValueError: If a leaf under the mask is quantized already, or cannot be.
    """
    if mask is None:
        mask = jax.tree.map(lambda p: len(p.shape) >= 2, params, is_leaf=_is_qtensor)
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_qtensor)
    chosen = treedef.flatten_up_to(resolve_mask(mask, params))

    def quantize_leaf(index, path, p):
        if isinstance(p, QTensor):
            raise ValueError(
                f"quantize_leaves: {_path(path)} is a QTensor of {p.spec} already; leave it out of"
                " the mask, or dequantize_leaves first."
            )
        leaf_key = None if key is None else jax.random.fold_in(key, index)
        return quantize_matrices(p, spec, key=leaf_key)

    return treedef.unflatten(
        [
            quantize_leaf(index, path, p) if chosen[index] else p
            for index, (path, p) in enumerate(flat)
        ]
    )


def dequantize_leaves(params: PyTree, dtype: DTypeLike = jnp.float32) -> PyTree:
    """`params` with each `QTensor` replaced by its values in `dtype`; other leaves unchanged.

    Gradients are taken at this tree: quantized weights lie on their grid, so that the gradient
    needs no straight-through estimator.
    """
    return jax.tree.map(
        lambda p: dequantize_matrices(p, dtype) if _is_qtensor(p) else p,
        params,
        is_leaf=_is_qtensor,
    )


@dataclasses.dataclass(frozen=True)
class _Leaf:
    who: str
    path: str
    index: int


def _map_updates(who: str, add: Callable, params: PyTree, updates: PyTree) -> PyTree:
    """`add(leaf, p, u)` where `u` is an array that fits `p`; all other cases are settled here."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_leaf)
    changes = treedef.flatten_up_to(updates)
    return treedef.unflatten(
        [
            _updated(_Leaf(who, _path(path), index), add, p, u)
            for index, ((path, p), u) in enumerate(zip(flat, changes, strict=True))
        ]
    )


def _updated(leaf, add, p, u):
    if p is None or u is None or getattr(u, "dtype", None) == jax.dtypes.float0:
        return p
    if isinstance(u, Replacement):
        return _same_kind(leaf, u.value, p)
    p = p if _is_qtensor(p) else jnp.asarray(p)
    if isinstance(u, QTensor) or not hasattr(u, "dtype") or u.shape != p.shape:
        raise ValueError(
            f"{leaf.who}: the update of {leaf.path} must be an array of shape {p.shape}, a"
            f" Replacement or None, got {_describe(u)}."
        )
    is_integer = not _is_qtensor(p) and not jnp.issubdtype(p.dtype, jnp.inexact)
    if is_integer and jnp.issubdtype(u.dtype, jnp.inexact):
        raise ValueError(
            f"{leaf.who}: {leaf.path}, {_describe(p)}, cannot take the floating update"
            f" {_describe(u)}; if these are codes, keep them with their scales in a QTensor"
            " (quantize_leaves), otherwise leave the leaf out of the optimizer."
        )
    return add(leaf, p, u)


def _rounded(leaf, total, p, key):
    """float32 `total` as `p` is stored, and the value of that; to nearest if `key` is None."""
    if _is_qtensor(p):
        rounding = "nearest" if key is None else "stochastic"
        spec = dataclasses.replace(p.spec, rounding=rounding)
        # Under its own spec again: a spec is static, and another one would be another tree.
        q = dataclasses.replace(quantize_matrices(total, spec, key=key), spec=p.spec)
        return _same_kind(leaf, q, p), dequantize_matrices(q)
    if key is not None:
        cast = stochastic_cast(total, p.dtype, key)
        return cast, cast.astype(jnp.float32)
    value = _nearest(total, p.dtype)
    return value.astype(p.dtype), value


def _nearest(x: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """`x` to the nearest value of `dtype`, in float32.

    Not `x.astype(dtype).astype(float32)`: compiled, XLA may take the two conversions for none,
    and the residual would be zero.
    """
    if dtype == _BFLOAT16:
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return jnp.where(jnp.isfinite(x), round_to_grid(x, CAST_FORMATS[np.dtype(dtype)]), x)


def _values(p):
    return dequantize_matrices(p) if _is_qtensor(p) else p.astype(jnp.float32)


def _same_kind(leaf, new, old):
    if jax.tree.structure(new) != jax.tree.structure(old) or any(
        (a.shape, a.dtype) != (b.shape, b.dtype)
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    ):
        raise ValueError(
            f"{leaf.who}: what replaces {leaf.path} must be of its kind, {_describe(old)}, got"
            f" {_describe(new)}."
        )
    return new


def _is_qtensor(x) -> bool:
    return isinstance(x, QTensor)


def _is_leaf(x) -> bool:
    return x is None or isinstance(x, QTensor)


def _is_low_precision(p) -> bool:
    return _is_qtensor(p) or (p is not None and np.dtype(p.dtype) in (_BFLOAT16, *CAST_FORMATS))


def _path(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _describe(x) -> str:
    if isinstance(x, QTensor):
        parts = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(x))
        return f"a QTensor of {x.spec} ({parts})"
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else repr(x)

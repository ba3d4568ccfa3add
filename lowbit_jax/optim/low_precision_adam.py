"""AdamW with moments in few bits, rounded stochastically.

Schultheis and Alistarh, LLMQ: Efficient Lower-Precision LLM Training for Consumer GPUs,
arXiv:2512.15306: float32 arithmetic, moments stored in bfloat16, the first one also in E4M3 with a
float32 scale for 128 elements (of the flattened tensor; here of a row, which may be sharded).
Their released code draws the noise for the first moment from a constant seed, so that an element
meets the same threshold at every step and its rounding errors add up; here every step draws anew.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray, PyTree

from lowbit_jax.numerics import (
    E4M3,
    QTensor,
    QuantSpec,
    dequantize_matrices,
    quantize_matrices,
    stochastic_cast,
)
from lowbit_jax.optim.low_precision import dequantize_leaves
from lowbit_jax.optim.masks import Mask

Scalar = int | float | jax.Array

MOMENT_E4M3_128 = QuantSpec(E4M3, 128, "absmax", "stochastic")


class AdamLowPrecisionState(NamedTuple):
    """State of `scale_by_adam_low_precision`."""

    count: jax.Array  # (), int32: updates applied so far
    m: PyTree  # first moments: float32, bfloat16 or QTensor
    v: PyTree  # second moments: float32 or bfloat16


def scale_by_adam_low_precision(
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    *,
    m: str | QuantSpec = "bfloat16",
    v: str = "bfloat16",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """`(m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)`, the moments stored in few bits.

    The step uses the moments before they are rounded; all arithmetic is float32, and so are the
    updates, whatever the gradients are, for `apply_updates_low_precision` to add. Stochastic
    rounding keeps the expectation of a moment right: to nearest, a bfloat16 `v` with
    `1 - b2 < 2**-9` would never decay.

    `v` is never E4M3. It is a sum of squares, so that a block of 18 binary orders (448 down to
    `2**-9`) spans only 9 of the gradient: what lies below is stored as zero every now and then,
    and the step, divided by `eps` instead of the root, is off by orders of magnitude.

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root.
      m: How to store the first moment: "float32", "bfloat16" or a `QuantSpec`. A spec, such as
        `MOMENT_E4M3_128`, rounds by its own rounding; leaves whose last axis is no multiple of its
        block get one scale a row, and scalars stay float32. Stacked leaves are quantized matrix
        by matrix.
      v: How to store the second moment: "float32" or "bfloat16".
      seed: The key of a step is `fold_in(key(seed), count)`, unless `update` is given `key=`, as it
        is for each layer where layers are updated one by one. No key is kept in the state: a
        resumed run draws the bits of an unbroken one.

    Returns:
      A transform with state `AdamLowPrecisionState`. With both moments in float32 it is
      `optax.scale_by_adam`.

    Raises:
      ValueError: If `m` or `v` is none of the above.
    """
    who = "scale_by_adam_low_precision"
    if v not in ("float32", "bfloat16"):
        raise ValueError(
            f"{who}: v must be 'float32' or 'bfloat16', got {v!r}; fewer bits would flush second"
            " moments to zero."
        )
    if not isinstance(m, QuantSpec) and m not in ("float32", "bfloat16"):
        raise ValueError(f"{who}: m must be 'float32', 'bfloat16' or a QuantSpec, got {m!r}.")

    def init_fn(params):
        def zeros(p):
            if isinstance(p, QTensor):
                return jnp.zeros(p.shape, jnp.float32)
            return jnp.zeros_like(p, jnp.float32)  # with the sharding of p

        def start(dtype):  # buffers of its own for each moment: a step that donates needs them
            tree = jax.tree.map(zeros, params, is_leaf=_is_qtensor)
            return _store(tree, dtype, jax.random.key(seed))

        return AdamLowPrecisionState(jnp.zeros([], jnp.int32), start(m), start(v))

    def update_fn(updates, state, params=None, *, key=None, **extra_args):
        del params, extra_args
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        new_m = optax.tree.update_moment(gradients, _load(state.m), b1, 1)
        new_v = optax.tree.update_moment(gradients, _load(state.v), b2, 2)
        m_hat = optax.tree.bias_correction(new_m, b1, count)
        v_hat = optax.tree.bias_correction(new_v, b2, count)
        steps = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), m_hat, v_hat)
        if key is None:
            key = jax.random.fold_in(jax.random.key(seed), state.count)
        key_m, key_v = jax.random.split(key)
        state = AdamLowPrecisionState(count, _store(new_m, m, key_m), _store(new_v, v, key_v))
        return steps, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adamw_low_precision(
    learning_rate: Scalar | optax.Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.1,
    decay_mask: Mask = None,
    max_grad_norm: Scalar | None = None,
    m: str | QuantSpec = "bfloat16",
    v: str = "bfloat16",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW over `scale_by_adam_low_precision`; put its updates in place without losing them.

    Parameters may be `QTensor`s, with gradients at their values (`dequantize_leaves`). The
    updates are float32: add them by `apply_updates_low_precision`. Bytes a parameter, scales and
    gradients aside: bfloat16 weights and moments 6, with the first moment in E4M3 5, E4M3 weights
    with bfloat16 moments 5; float32 AdamW has 12.

    Args:
      learning_rate: A number, or a function of the count of updates already applied.
      b1: As in `scale_by_adam_low_precision`, like all not listed.
      b2: See there.
      eps: See there.
      weight_decay: Decoupled, multiplied by the learning rate.
      decay_mask: Leaves that decay; None: all of them.
      max_grad_norm: Global norm to which gradients are clipped; None: not clipped.
      m: See there.
      v: See there.
      seed: See there.

    Returns:
      The chain: clip, Adam, decay, learning rate.

    References:
      Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv:1711.05101.
    """
    steps = [
        scale_by_adam_low_precision(b1, b2, eps, m=m, v=v, seed=seed),
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    ]
    if max_grad_norm is not None:
        steps.insert(0, optax.clip_by_global_norm(max_grad_norm))
    chain = optax.chain(*steps)

    def values(params):  # in float32 for the decay, which float8 leaves could not enter
        return jax.tree.map(lambda p: p.astype(jnp.float32), dequantize_leaves(params))

    def update_fn(updates, state, params=None, **extra_args):
        return chain.update(updates, state, values(params), **extra_args)

    return optax.GradientTransformationExtraArgs(chain.init, update_fn)


def _load(moments: PyTree) -> PyTree:
    """`moments` in float32."""
    return jax.tree.map(
        lambda x: dequantize_matrices(x) if _is_qtensor(x) else x.astype(jnp.float32),
        moments,
        is_leaf=_is_qtensor,
    )


def _store(moments: PyTree, kind: str | QuantSpec, key: PRNGKeyArray) -> PyTree:
    """float32 `moments` as `kind`, each leaf with random bits of its own."""

    def store_leaf(x, leaf_key):
        if isinstance(kind, QuantSpec) and x.ndim:
            fits = not isinstance(kind.block_size, int) or x.shape[-1] % kind.block_size == 0
            spec = kind if fits else dataclasses.replace(kind, block_size=None)
            return quantize_matrices(x, spec, key=leaf_key)
        return stochastic_cast(x, jnp.bfloat16, leaf_key) if kind == "bfloat16" else x

    leaves, treedef = jax.tree.flatten(moments)
    return treedef.unflatten(
        [store_leaf(x, jax.random.fold_in(key, index)) for index, x in enumerate(leaves)]
    )


def _is_qtensor(x) -> bool:
    return isinstance(x, QTensor)

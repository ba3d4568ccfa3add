"""Quartet as a gradient transformation: weights quantized once a step, outside the loss.

Castro et al., Quartet, arXiv:2505.14669, takes the gradient of the *quantized, rotated* weights and
carries it to the master weights by a mask and the rotation back. In a layer that happens in every
backward pass. Here it is the first link of an Optax chain, and the layers get codes:

    quantized = quantize_params(params, recipe, mask)
    def loss(params):
        return loss_of_model(attach_quantized(params, quantized))
    grads = jax.grad(loss)(params)                         # or the mean over micro-batches
    updates, state = quartet(learning_rate, recipe, mask=mask).update(grads, state, params)

Micro-batches and recomputed activations then share one quantization, and a run with sharded
parameters gathers codes, 4 bits an entry, if `quantized` is constrained to be replicated; left to
itself, XLA may gather float arrays in their place. The method is that of any recipe that quantizes
weights: QuEST, FP8 and NVFP4 recipes work alike.
"""

import jax
import optax
from jaxtyping import PRNGKeyArray, PyTree

from lowbit_jax.ops.dot_recipe import DotRecipe
from lowbit_jax.ops.quantized_weight import QuantizedWeight, gradient_to_master, quantize_weight
from lowbit_jax.optim.masks import Mask, resolve_mask

Scalar = int | float | jax.Array


def quantize_params(
    params: PyTree, recipe: DotRecipe, mask: Mask = None, *, key: PRNGKeyArray | None = None
) -> PyTree:
    """`Q(p R)` for the leaves under `mask`, in the format and rotation of the recipe's weights.

    Once a step, outside the loss. No gradient passes.

    Args:
      params: Tree of float arrays; stacked matrices `(layers, n, k)` are quantized one by one.
      recipe: If it does not quantize weights, the result is None everywhere.
      mask: True on the leaves that the layers multiply by with `recipe`, as `optax.masked` takes
        it (`match_paths` builds one). None: every leaf of two axes or more, which is right only
        where these are all weights of such layers: an embedding has two as well, and so have
        stacked vectors.
      key: Randomness, if the weights are rounded at random; split over the leaves.

    Returns:
      A tree like `params` with a `QTensor` or None in place of each leaf.

    Raises:
      ValueError: As `quantize_weight`.
      NotImplementedError: As `quantize_weight`.
    """
    leaves, treedef = jax.tree.flatten(params)
    wanted = jax.tree.leaves(_matrices_under(mask, params))
    keys = [None] * len(leaves) if key is None else list(jax.random.split(key, len(leaves)))
    return treedef.unflatten(
        quantize_weight(leaf, recipe, key=leaf_key)
        if is_wanted and recipe.y_w is not None
        else None
        for leaf, is_wanted, leaf_key in zip(leaves, wanted, keys, strict=True)
    )


def attach_quantized(params: PyTree, quantized: PyTree) -> PyTree:
    """`QuantizedWeight(p, q)` where `quantized` holds a `q`, `p` where it holds None.

    Call it inside the loss, so that the gradient of the loss has the structure of `params`. What
    `quantized` holds gets none. Leaves that are `QuantizedWeight`s already stay, so that models of
    several recipes attach one tree after the other.

    Args:
      params: The master weights.
      quantized: From `quantize_params`, of these very weights.
    """

    def attach(p, q):
        return p if q is None else QuantizedWeight(p, jax.lax.stop_gradient(q))

    return jax.tree.map(
        attach, params, quantized, is_leaf=lambda leaf: isinstance(leaf, QuantizedWeight)
    )


def quartet_gradients(recipe: DotRecipe, mask: Mask = None) -> optax.GradientTransformation:
    """`(g * M) R^T` with `M = mask(p R)`: the gradient of the quantized weights for the masters.

    First in a chain, before clipping. Without state. The identity for a recipe that does not
    quantize weights; several of them under masks serve a model of several recipes.

    Args:
      recipe: As in `quantize_params`.
      mask: As in `quantize_params`.

    Returns:
      A transform whose `update` raises ValueError without `params`.

    References:
      Castro et al., Quartet, arXiv:2505.14669, algorithm 1.
    """

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(
                "quartet_gradients: needs the parameters, got None; call update(.., params)."
            )

        def to_master(p, is_wanted, g):
            return gradient_to_master(g, p, recipe) if is_wanted and g is not None else g

        # Mapped over the parameters, so that a gradient may be None.
        updates = jax.tree.map(to_master, params, _matrices_under(mask, params), updates)
        return updates, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)


def quartet(
    learning_rate: Scalar | optax.Schedule,
    recipe: DotRecipe,
    *,
    mask: Mask = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.1,
    decay_mask: Mask = None,
    max_grad_norm: Scalar | None = None,
) -> optax.GradientTransformation:
    """`quartet_gradients`, clipping, AdamW: for gradients from a loss with `attach_quantized`.

    With a recipe that does not quantize weights it is AdamW.

    Args:
      learning_rate: A number or a function of the count of updates already applied.
      recipe: As in `quantize_params`.
      mask: As in `quantize_params`.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      weight_decay: Decoupled, multiplied by the learning rate.
      decay_mask: Leaves that decay; None: all of them.
      max_grad_norm: Global norm to which the gradients of the master weights are clipped; None:
        not clipped.

    References:
      Castro et al., Quartet: Native FP4 Training Can Be Optimal for Large Language Models,
      arXiv:2505.14669. Loshchilov and Hutter, Decoupled Weight Decay Regularization,
      arXiv:1711.05101.
    """
    clip = () if max_grad_norm is None else (optax.clip_by_global_norm(max_grad_norm),)
    adamw = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=decay_mask)
    return optax.chain(quartet_gradients(recipe, mask), *clip, adamw)


def _matrices_under(mask: Mask, params: PyTree) -> PyTree:
    """The bool of each leaf; without a mask those of two axes or more."""
    if mask is None:
        return jax.tree.map(lambda p: p.ndim >= 2, params)
    return resolve_mask(mask, params)

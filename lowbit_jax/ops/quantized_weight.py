"""Weights quantized once a step, outside the loss, and the estimator of their gradient.

A layer that gets the float weights quantizes them in each forward pass: once for every micro-batch,
and once more where activations are recomputed. They change only between steps. So

    quantized = quantize_weight(w, recipe)                  # once a step
    y = quantized_dot(x, QuantizedWeight(w, quantized), recipe)
    g = gradient_to_master(d loss / d master, w, recipe)    # once a step, on the mean gradient

gives the products and gradients of `quantized_dot(x, w, recipe)`, up to the order of float32 sums:
mask and rotation back are linear in the gradient, so that they can wait for its sum over
micro-batches. Weights that are rounded at random are drawn once a step here, and once a micro-batch
there. `lowbit_jax.optim.quartet` does it for trees of parameters.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from lowbit_jax.numerics import QTensor, QuantSpec, gradient_mask, quantize_matrices
from lowbit_jax.ops.dot_recipe import DotRecipe
from lowbit_jax.rotations import Rotation


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["master", "quantized"], meta_fields=["places"]
)
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A weight with its quantized values: `quantized_dot` multiplies by these.

    The gradient of the quantized values arrives at `master` as it is, in the rotated basis and
    unmasked; `gradient_to_master` makes it that of the master weights. `quantized` gets none.

    Attributes:
      master: `(*layers, n, k)`. Not read, unless the recipe quantizes the original once more for
        `dx` (`requantize=False` with a `dx_w`).
      quantized: `Q(master R)` from `quantize_weight`, with the same leading axes.
      places: Two shardings for each array of `quantized`: as it lies, cut over devices for
        example, and as a product reads it. What is kept for the backward pass lies as at first, and
        is moved once more. None: it is read where it lies.
    """

    master: Any
    quantized: Any  # a QTensor; not checked, for a pytree may hold anything, such as cotangents
    places: tuple[tuple[Sharding, Sharding], ...] | None = None

    def moved(self) -> QTensor:
        """`quantized` where it is used, within `jax.jit`: integers and bytes travel, no floats."""
        if self.places is None:
            return self.quantized
        parts, treedef = jax.tree.flatten(self.quantized)
        moved = [move_bits(part, *pair) for part, pair in zip(parts, self.places, strict=True)]
        return treedef.unflatten(moved)


def move_bits(x: Shaped[Array, "..."], *places: Sharding) -> Shaped[Array, "..."]:
    """`x` on each sharding after the other, within `jax.jit`, as the bits that it is stored in.

    The compiler may make more of a move than it has to: send a floating-point array in a wider
    type, or what it is computed from. It has no derivative.
    """
    bits = jax.lax.stop_gradient(x)
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    if is_float:
        bits = jax.lax.bitcast_convert_type(bits, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    for place in places:
        # What lies between two barriers is the move alone.
        bits = jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(bits), place)
    bits = jax.lax.optimization_barrier(bits)
    return jax.lax.bitcast_convert_type(bits, x.dtype) if is_float else bits


def quantize_weight(
    w: Shaped[Array, "..."], recipe: DotRecipe, *, key: PRNGKeyArray | None = None
) -> QTensor:
    """`Q(w R)`: the quantized weights of the forward product, for each matrix by itself.

    Args:
      w: `(*layers, n, k)`, any float dtype; no gradient passes.
      recipe: Whose format and rotation.
      key: Randomness, if the format of the weights rounds at random.

    Returns:
      A `QTensor` whose parts all have the leading axes of `w`, so that a scan can cut it.

    Raises:
      ValueError: If the recipe does not quantize weights, `w` is no matrix, or for what `quantize`
        refuses.
      NotImplementedError: If the rotation of the forward product is random: the signs belong to
        one product, not to a step.
    """
    spec, rotation = _format_and_rotation("quantize_weight", w, recipe)
    w = jax.lax.stop_gradient(w)
    if rotation is not None:
        w = rotation.apply(w)
    return quantize_matrices(w, spec, key=key if spec.needs_key else None)


def gradient_to_master(
    g: Float[Array, "..."], w: Float[Array, "..."], recipe: DotRecipe
) -> Float[Array, "..."]:
    """`(g * M) R^T`: from the gradient of `Q(w R)` to that of `w`, `M` the estimator's mask.

    Args:
      g: `(*layers, n, k)`, the gradient that a `QuantizedWeight` left at its master.
      w: The master weights for which it was taken, of the same shape.
      recipe: As in the product.

    Returns:
      Shape and dtype of `g`; float32 inside. `g` itself if the recipe does not quantize weights,
      for then the product has returned the gradient of `w`.

    Raises:
      ValueError: If the shapes differ or `w` is no matrix.
      NotImplementedError: As `quantize_weight`.

    References:
      Panferov et al., QuEST, arXiv:2502.05003; Castro et al., Quartet, arXiv:2505.14669.
    """
    if recipe.y_w is None:
        return g
    spec, rotation = _format_and_rotation("gradient_to_master", w, recipe)
    if g.shape != w.shape:
        raise ValueError(
            "gradient_to_master: the gradient must have the shape of the weights, got"
            f" {g.shape} for {w.shape}; pass the parameters that the gradient was taken for."
        )

    def of_matrix(g, w):
        g = g.astype(jnp.promote_types(g.dtype, jnp.float32))
        if rotation is not None:
            w = rotation.apply(w)
        mask = gradient_mask(w, spec, recipe.estimator, recipe.clip_scale)
        if mask is not None:
            g = jnp.where(mask, g, 0)
        return g if rotation is None else rotation.inverse(g)

    for _ in range(w.ndim - 2):  # a mask depends on the scales, and those on one matrix alone
        of_matrix = jax.vmap(of_matrix)
    return of_matrix(g, jax.lax.stop_gradient(w)).astype(g.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def with_estimator(w: Float[Array, "..."], recipe: DotRecipe) -> Float[Array, "..."]:
    """`w`, whose gradient is `gradient_to_master` of the one that arrives.

    A `QuantizedWeight` of this master gives the gradient of `w` in each backward pass, where one of
    `w` itself leaves the estimator to the caller.
    """
    del recipe
    return w


def _with_estimator_fwd(w, recipe):
    return with_estimator(w, recipe), w


def _with_estimator_bwd(recipe, w, g):
    return (gradient_to_master(g, w, recipe),)


with_estimator.defvjp(_with_estimator_fwd, _with_estimator_bwd)


def _format_and_rotation(who: str, w, recipe: DotRecipe) -> tuple[QuantSpec, Rotation | None]:
    """Those of the weights, once it is clear that they can be quantized apart."""
    if recipe.y_w is None:
        raise ValueError(
            f"{who}: the recipe must quantize weights, got {recipe}, which does not; use the"
            " weights as they are."
        )
    if w.ndim < 2:
        raise ValueError(
            f"{who}: weights must be matrices (*layers, n, k), got shape {w.shape}; mask other"
            " parameters out."
        )
    rotation = recipe.rotation_of("y")
    if rotation is not None and rotation.needs_key:
        raise NotImplementedError(
            f"{who}: a random rotation of the forward product is drawn for each product, got"
            f" {rotation} in {recipe}; hand the float weights to quantized_dot instead."
        )
    return recipe.y_w, rotation

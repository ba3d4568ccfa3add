"""The product of a linear layer, quantized forward and backward as a recipe says."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray, Shaped

from lowbit_jax.numerics import (
    QTensor,
    QuantSpec,
    dequantize,
    quantize,
    quantize_and_mask,
    quantize_values,
)
from lowbit_jax.ops import dispatch
from lowbit_jax.ops.dispatch import Operand
from lowbit_jax.ops.dot_recipe import DotRecipe, Product
from lowbit_jax.ops.quantized_weight import QuantizedWeight

_COMPUTE_DTYPES = ("bfloat16", "float16", "float32", "float64")


def quantized_dot(
    x: Shaped[ArrayLike, "..."],
    w: Shaped[ArrayLike, "..."] | QuantizedWeight,
    recipe: DotRecipe,
    *,
    key: PRNGKeyArray | None = None,
    implementation: str | None = None,
) -> Float[Array, "..."]:
    """`y = Q(x R) Q(w R)^T`, with R the rotation of the recipe; `x w^T` if nothing is quantized.

    The gradients are those of the straight-through estimator, masked, in the rotated basis:

        dx = (g Q(w R) * M_x) R^T        dw = (g^T Q(x R) * M_w) R^T

    with the operands of these two products quantized once more if the recipe says so, or the
    original ones in their place. Scales and masks are not differentiated.

    Quantizers compute in float32, from `w` as it comes: hand over the float32 master weights.
    Operands of the products are in the dtype of `x`, sums in float32; a GPU may shorten float32
    operands to TF32 unless `jax.default_matmul_precision` forbids it. `dx` is rounded to the dtype
    of `x` before it is rotated back; `dw` stays float32 to the end.
    Kept for the backward pass: the quantized operands, in the dtype of `x` or as float8 codes, and
    the masks, one byte an entry; `x` and `w` themselves only where they are not quantized, or
    where backward quantizes the original. Of a `QuantizedWeight` the codes that it holds anyway.

    Args:
      x: `(*batch, k)`, bfloat16, float16 or float32. `*batch` is flattened to tokens: a format
        with one scale a tensor has one for all of them.
      w: `(n, k)`, any floating dtype; or the same quantized in advance, whose gradient then comes
        without mask and rotation back, see `QuantizedWeight`.
      recipe: What to quantize to; static under `jit`.
      key: Randomness of stochastic rounding and random signs. Needed if `recipe.needs_key`,
        unused otherwise; new for every step and layer.
      implementation: "dequantize" or "fp8"; taken for all three products or refused. None: chosen
        for each product, and `explain` tells which and why.

    Returns:
      `(*batch, n)` in the dtype of `x`.

    Raises:
      ValueError: If shapes or dtypes do not fit each other or the recipe, a needed key is missing,
        or no implementation has that name. What concerns `n` and the number of tokens is raised
        when the gradient is traced, so that other sizes can be evaluated.
      NotImplementedError: If the implementation asked for does not cover the recipe.

    References:
      Panferov et al., QuEST, arXiv:2502.05003; Castro et al., Quartet, arXiv:2505.14669.
    """
    x = jnp.asarray(x)
    w = w if isinstance(w, QuantizedWeight) else jnp.asarray(w)
    return _quantized_dot(x, w, recipe, key, implementation, x.dtype)


def quantized_dot_general(
    lhs,
    rhs,
    dimension_numbers,
    recipe: DotRecipe,
    *,
    precision,
    preferred_element_type,
    out_sharding,
    key,
    implementation,
):
    """The body of `DotRecipe.dot_general`, which documents it."""
    (lhs_axes, rhs_axes), (lhs_batch, rhs_batch) = dimension_numbers
    if len(lhs_batch) or len(rhs_batch):
        raise NotImplementedError(
            f"dot_general: batch axes are not covered, got lhs_batch={tuple(lhs_batch)},"
            f" rhs_batch={tuple(rhs_batch)}; use jax.vmap over quantized_dot."
        )
    if precision is not None:
        raise NotImplementedError(
            f"dot_general: precision must be None, got {precision}; the products follow"
            " `with jax.default_matmul_precision(...)`."
        )
    if out_sharding is not None:
        raise NotImplementedError(
            f"dot_general: out_sharding must be None, got {out_sharding}; use"
            " jax.lax.with_sharding_constraint on the result."
        )
    if recipe.needs_key and key is None:
        raise ValueError(
            f"dot_general: the recipe {recipe} is random and the layer has no key to give; pass"
            " dot_general=functools.partial(recipe.dot_general, key=key), or call quantized_dot."
        )
    contracted = [lhs.shape[i] for i in lhs_axes], [rhs.shape[i] for i in rhs_axes]
    if contracted[0] != contracted[1]:
        raise ValueError(
            f"dot_general: contracted axes must agree, got {contracted[0]} of lhs {lhs.shape} and"
            f" {contracted[1]} of rhs {rhs.shape}; mind dimension_numbers={dimension_numbers}."
        )
    k = math.prod(contracted[0])
    flat = []
    free = []
    for array, axes in ((lhs, lhs_axes), (rhs, rhs_axes)):
        axes = [i % array.ndim for i in axes]
        rest = [i for i in range(array.ndim) if i not in axes]
        free += [array.shape[i] for i in rest]
        flat.append(array.transpose(*rest, *axes).reshape(-1, k))
    out_dtype = lhs.dtype if preferred_element_type is None else preferred_element_type
    x, w = flat
    y = _quantized_dot(x, w, recipe, key, implementation, out_dtype)
    return y.reshape(free)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of a call."""

    recipe: DotRecipe
    implementation: str | None
    x_dtype: np.dtype
    w_dtype: np.dtype
    out_dtype: np.dtype
    is_quantized: bool  # whether w came as a QuantizedWeight


def _quantized_dot(x, w, recipe, key, implementation, out_dtype) -> Array:
    _check_call(x, w, recipe, key, implementation)
    dtypes = jnp.dtype(x.dtype), jnp.dtype(_master(w).dtype), jnp.dtype(out_dtype)
    call = _Call(recipe, implementation, *dtypes, isinstance(w, QuantizedWeight))
    return _dot(x, w, key if recipe.needs_key else None, call)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dot(x, w, key, call: _Call):
    return _dot_fwd(x, w, key, call)[0]


class _Residual(NamedTuple):
    """Of one forward operand, for the backward pass."""

    saved: Operand | QTensor  # what the other operand's gradient is multiplied by
    mask: Bool[Array, "rows k"] | None


def _dot_fwd(x, w, key, call: _Call):
    recipe = call.recipe
    key_r, key_x, key_w = _split(_split(key)[0])
    keeps_x = not recipe.requantize and recipe.dw_x is not None
    keeps_w = not recipe.requantize and recipe.dx_w is not None
    x_q, of_x = _forward_operand(x, recipe.y_x, call, key_r, key_x, keeps_x)
    if call.is_quantized:
        w_q = _operand(w.quantized, call)
        saved = _unquantized(w.master, call, key_r) if keeps_w else w.quantized
        of_w = _Residual(saved, None)
    else:
        w_q, of_w = _forward_operand(w, recipe.y_w, call, key_r, key_w, keeps_w)
    y = _product("y", _rows(x_q), w_q, call, call.out_dtype)
    return y.reshape(*x.shape[:-1], w_q.values.shape[0]), (of_x, of_w, key)


def _dot_bwd(call: _Call, residuals, g):
    of_x, of_w, key = residuals
    recipe = call.recipe
    x_saved, w_saved = _rows(_operand(of_x.saved, call)), _operand(of_w.saved, call)
    key_y, key_dx, key_dw = _split(key)
    x_shape = (*g.shape[:-1], w_saved.values.shape[1])
    g = g.astype(call.x_dtype).reshape(-1, g.shape[-1])
    dx = _backward_product(
        "dx", g, recipe.dx_g, _transposed(w_saved), recipe.dx_w, key_dx, call, call.x_dtype
    )
    dw_dtype = jnp.promote_types(call.x_dtype, jnp.float32)
    dw = _backward_product(
        "dw", g.T, recipe.dw_g, _transposed(x_saved), recipe.dw_x, key_dw, call, dw_dtype
    )
    key_r = _split(key_y)[0]
    dx = _to_original_basis(dx, of_x.mask, call, key_r).astype(call.x_dtype)
    if call.is_quantized:
        return dx.reshape(x_shape), QuantizedWeight(dw.astype(call.w_dtype), None), None
    dw = _to_original_basis(dw, of_w.mask, call, key_r).astype(call.w_dtype)
    return dx.reshape(x_shape), dw, None


_dot.defvjp(_dot_fwd, _dot_bwd)


def _forward_operand(z, spec: QuantSpec | None, call: _Call, key_rotation, key, keeps_original):
    """`Q(z R)` as rows and what backward needs of it; `z` itself where there is nothing to do."""
    if spec is None:
        q = _unquantized(z, call, key_rotation)
        return q, _Residual(q, None)
    original = z
    z = z.reshape(-1, z.shape[-1])
    rotation = call.recipe.rotation_of("y")
    if rotation is not None:
        z = rotation.apply(z, key=key_rotation)
    values, mask = quantize_and_mask(
        z, spec, call.recipe.estimator, call.recipe.clip_scale, key=_key_for(spec, key)
    )
    if dispatch.has_float8_codes(spec):
        q = _float8_operand(quantize(z, spec, key=_key_for(spec, key)))
    else:
        q = Operand(values.astype(call.x_dtype), None)
    saved = _unquantized(original, call, key_rotation) if keeps_original else q
    return q, _Residual(saved, mask)


def _unquantized(z, call: _Call, key_rotation) -> Operand:
    """`z R` as rows; `z` as it is where there is no rotation.

    An untouched argument is neither cast nor reshaped: kept for the backward pass as it is, it is
    shared by all products that take it, and `w` by the parameters.
    """
    rotation = call.recipe.rotation_of("y")
    if rotation is None:
        return Operand(z, None)
    z = rotation.apply(z.reshape(-1, z.shape[-1]), key=key_rotation)
    return Operand(z.astype(call.x_dtype), None)


def _operand(saved: Operand | QTensor, call: _Call) -> Operand:
    """A quantized weight as the operand that the in-layer quantizer would have left."""
    if isinstance(saved, Operand):
        return saved
    if dispatch.has_float8_codes(saved.spec):
        return _float8_operand(saved)
    return Operand(dequantize(saved, call.x_dtype), None)


def _backward_product(
    product: Product,
    g: Float[Array, "p c"],
    g_spec: QuantSpec | None,
    saved: Operand,
    spec: QuantSpec | None,
    key,
    call: _Call,
    out_dtype,
) -> Float[Array, "p q"]:
    """`Q(g R') Q(saved R')^T` with R' the rotation of the product along its contraction axis.

    `spec` is the format to which `saved` is quantized; None keeps it as it is.
    """
    rotation = call.recipe.rotation_of(product)
    _check_contraction(product, g.shape[-1], call.recipe)
    key_r, key_g, key_saved = _split(key)

    def operand(z, spec, key):
        if rotation is not None:
            z = rotation.apply(z, key=key_r)
        if dispatch.has_float8_codes(spec):
            return _float8_operand(quantize(z, spec, key=_key_for(spec, key)))
        if spec is not None:
            z, _ = quantize_values(z, spec, key=_key_for(spec, key))
        return Operand(z.astype(call.x_dtype), None)

    g_q = operand(g, g_spec, key_g)
    if rotation is not None or spec is not None:
        saved = operand(_dense(saved), spec, key_saved)
    return _product(product, g_q, saved, call, out_dtype)


def _product(product: Product, a: Operand, b: Operand, call: _Call, out_dtype):
    specs = call.recipe.formats_of(product)
    plan = dispatch.choose(product, *specs, call.implementation, dispatch.cuda_capability())
    return dispatch.run(product, plan, a, b, specs, call.x_dtype, out_dtype)


def _float8_operand(q: QTensor) -> Operand:
    return Operand(q.codes, q.scales.reshape(()))


def _dense(operand: Operand) -> Float[Array, "rows c"]:
    """The array that an operand stands for, float32 if it was scaled."""
    if operand.scale is None:
        return operand.values
    return operand.values.astype(jnp.float32) * operand.scale


def _rows(operand: Operand) -> Operand:
    """The operand with its leading axes made one."""
    return operand._replace(values=operand.values.reshape(-1, operand.values.shape[-1]))


def _transposed(operand: Operand) -> Operand:
    """The operand for a product over its rows; one scale a tensor has no direction."""
    return operand._replace(values=operand.values.T)


def _to_original_basis(z, mask, call: _Call, key):
    """`(z * mask) R^T`."""
    if mask is not None:
        z = jnp.where(mask, z, 0)
    rotation = call.recipe.rotation_of("y")
    return z if rotation is None else rotation.inverse(z, key=key)


def _split(key):
    """Three keys: for y, dx and dw; and within a product for the rotation and its two operands."""
    return (None,) * 3 if key is None else tuple(jax.random.split(key, 3))


def _key_for(spec: QuantSpec, key):
    return key if spec.needs_key else None


def _master(w) -> Array:
    return w.master if isinstance(w, QuantizedWeight) else w


def _check_call(x, w, recipe: DotRecipe, key, implementation) -> None:
    dispatch.check_implementation(implementation)
    if x.dtype.name not in _COMPUTE_DTYPES:
        raise ValueError(
            f"quantized_dot: x must be one of {', '.join(_COMPUTE_DTYPES)}, the dtype to compute"
            f" in, got {x.dtype}; cast it first."
        )
    if isinstance(w, QuantizedWeight):
        _check_quantized(w, recipe)
        w = w.master
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(
            f"quantized_dot: w must be floating point, got {w.dtype}; pass the weights, not codes."
        )
    if w.ndim != 2 or x.ndim == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(
            "quantized_dot: x must be (*batch, k) and w (n, k), got"
            f" {x.shape} and {w.shape}; a weight of (k, n) is passed as w.T."
        )
    if recipe.needs_key and key is None:
        raise ValueError(
            f"quantized_dot: the recipe {recipe} is random (stochastic rounding or random signs),"
            " got key=None; pass key=jax.random.fold_in(key, step), another for each layer."
        )
    _check_contraction("y", w.shape[1], recipe)


def _check_quantized(w: QuantizedWeight, recipe: DotRecipe) -> None:
    """The weights were quantized as the recipe would, and belong to their master."""
    if w.quantized.spec != recipe.y_w:
        raise ValueError(
            f"quantized_dot: the weights must be quantized to {recipe.y_w}, the format of the"
            f" recipe {recipe}, got {w.quantized.spec}; make them with quantize_weight(w, recipe)."
        )
    rotation = recipe.rotation_of("y")
    if rotation is not None and rotation.needs_key:
        raise NotImplementedError(
            f"quantized_dot: weights cannot be quantized in advance for {recipe}, whose {rotation}"
            " is drawn for each product; pass the float weights."
        )
    if w.quantized.shape != w.master.shape:
        raise ValueError(
            "quantized_dot: a QuantizedWeight holds one matrix twice, got"
            f" {w.master.shape} and, quantized, {w.quantized.shape}; cut both alike."
        )


def _check_contraction(product: Product, size: int, recipe: DotRecipe) -> None:
    """Blocks of formats and rotation must divide the contraction axis of the product."""
    axis = {"y": "k, the last axis of x and w", "dx": "n, the rows of w", "dw": "all tokens of x"}
    new = {
        "y": (recipe.y_x, recipe.y_w),
        "dx": (recipe.dx_g, recipe.dx_w),
        "dw": (recipe.dw_g, recipe.dw_x),
    }
    rotation = recipe.rotation_of(product)
    blocks = {str(spec): spec.block_size for spec in new[product] if spec is not None}
    blocks[str(rotation)] = getattr(rotation, "block_size", None)
    for what, block_size in blocks.items():
        if isinstance(block_size, int) and size % block_size:
            raise ValueError(
                f"quantized_dot: the product {product!r} sums over {axis[product]}, whose size must"
                f" be a multiple of {block_size} for {what}, got {size}; pad it, or use"
                " dataclasses.replace on the recipe for a smaller block."
            )

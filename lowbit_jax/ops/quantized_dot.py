"""The product of a linear layer, quantized forward and backward as a recipe says."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Shaped

from lowbit_jax.numerics import QTensor
from lowbit_jax.ops import dispatch
from lowbit_jax.ops.call import Call, check_contraction, split_keys
from lowbit_jax.ops.dot_recipe import DotRecipe
from lowbit_jax.ops.operands import (
    backward_operand,
    forward_operand,
    gradient_operands,
    masked_gradient,
    operand_of_quantized,
    operand_under_scale,
    run_product,
    scope,
)
from lowbit_jax.ops.quantized_weight import QuantizedWeight
from pallas_kernels.compat import is_interpreting, vary_alike
from pallas_kernels.partition import Partition

_COMPUTE_DTYPES = ("bfloat16", "float16", "float32", "float64")


def quantized_dot(
    x: Shaped[ArrayLike, "..."],
    w: Shaped[ArrayLike, "..."] | QuantizedWeight,
    recipe: DotRecipe,
    *,
    key: PRNGKeyArray | None = None,
    implementation: str | None = None,
    partition: Partition | None = None,
) -> Float[Array, "..."]:
    """`y = Q(x R) Q(w R)^T`, with R the rotation of the recipe; `x w^T` if nothing is quantized.

    The gradients are those of the straight-through estimator, masked, in the rotated basis:

        dx = (g Q(w R) * M_x) R^T        dw = (g^T Q(x R) * M_w) R^T

    with the operands of these two products quantized once more if the recipe says so, or the
    original ones in their place. Scales and masks are not differentiated.

    Quantizers compute in float32, from `w` as it comes: hand over the float32 master weights.
    Operands of the products are in the dtype of `x`, or float8 codes; scales of whole rows and
    arrays multiply the sums. Sums are float32; a GPU may shorten float32 operands to TF32, and let
    accumulators of float8 products keep fewer bits (the fast accumulation of cuBLASLt), unless
    `jax.default_matmul_precision` forbids it, "highest" for example. The two scales of float8 codes
    are first multiplied by each other there, in float32. `dx` is rounded to the dtype of `x` before
    it is rotated back; `dw` stays float32 to the end, but for the path "hopper", which rotates
    float32 back as two bfloat16 terms, to 2**-17 of each entry.
    Kept for the backward pass: the quantized operands, in the dtype of `x` or as float8 codes, with
    their scales, and the masks, one byte an entry. Kernels keep float8, or what the backward
    products take, and masks of one bit; `x` and `w` themselves only where they are not quantized,
    or where backward quantizes the original. Of a `QuantizedWeight` the codes that it holds anyway.

    Within `jax.shard_map` each device quantizes what it has: scales of a tensor and blocks along
    the tokens are its own, and so are random numbers if its index is folded into the key. The
    gradient of weights that are the same on all is summed over the devices, under its default
    `check_vma`.

    Args:
      x: `(*batch, k)`, bfloat16, float16 or float32. `*batch` is flattened to tokens: a format
        with one scale a tensor has one for all of them.
      w: `(n, k)`, any floating dtype; or the same quantized in advance, whose gradient then comes
        without mask and rotation back, see `QuantizedWeight`.
      recipe: What to quantize to; static under `jit`.
      key: Randomness of stochastic rounding and random signs. Needed if `recipe.needs_key`,
        unused otherwise; new for every step and layer.
      implementation: "dequantize", "fp8", "hopper", "hopper_bf16" or "blackwell"; taken for all
        three products or refused. The last only by name: block-scaled products, which have never
        run on such a GPU. None: chosen for each product, and `explain` tells which and why: "fp8"
        for float8 formats with one scale a tensor; on a Hopper GPU with JAX 0.11 "hopper" for 4-bit
        formats that float8 holds, and `dx` of an unquantized gradient that is rotated back, and
        "hopper_bf16" for NVFP4, unless the shape is small or ragged, or arrays lie on a mesh over
        which `jit` may partition, and no `partition` is given; "dequantize" for the rest. The
        device is that of `jax.default_device`, or the first: where arrays are cannot be known while
        tracing. Functions of arrays that are committed to the CPU of a machine with a GPU must be
        traced under the former.
      partition: Of the tokens, where `jit` partitions over a mesh, on which w is the same on all
        devices: then kernels run on the part of each device, with scales and random numbers of the
        whole. y and dx are those of one device, bit by bit where the product is exact; dw is summed
        over the tokens of each device, then over the devices. None: not known.

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
    return _quantized_dots(x, {"": w}, recipe, key, implementation, partition=partition)[""]


def quantized_dots(
    x: Shaped[ArrayLike, "..."],
    weights: Mapping[str, Shaped[ArrayLike, "..."] | QuantizedWeight],
    recipe: DotRecipe,
    *,
    key: PRNGKeyArray | None = None,
    implementation: str | None = None,
    partition: Partition | None = None,
    saved_as: tuple[str, str] | None = None,
) -> dict[str, Float[Array, "..."]]:
    """`quantized_dot` of one x with several weights, such as those of query, key and value.

    The operands that are made of x, and what is kept of it for the backward pass, are made once and
    shared, its randomness among them; all else is drawn for each weight. The gradient of x is the
    sum over the weights.

    Args:
      x: As for `quantized_dot`.
      weights: `(n, k)` each, n may differ. Names are those of the scopes in which the products run.
      recipe: Of all products.
      key: One for all.
      implementation: As for `quantized_dot`.
      partition: As for `quantized_dot`.
      saved_as: Names for policies of `jax.checkpoint`, of what is made of x and kept for the
        backward pass, mask included, and of the results; what is made of weights is named
        "weights". Arguments kept as they are get none: name them before. None: no names.

    Returns:
      A result for each name.

    Raises:
      ValueError: As `quantized_dot`, or if there are no weights.
      NotImplementedError: As `quantized_dot`.
    """
    if not weights:
        raise ValueError("quantized_dots: weights must hold one matrix at least, got none.")
    return _quantized_dots(
        x, weights, recipe, key, implementation, partition=partition, saved_as=saved_as
    )


def dots_of_codes(
    x: Shaped[Array, "..."],
    codes: Mapping[str, QTensor],
    recipe: DotRecipe,
    implementation: str | None,
    *,
    dtype: DTypeLike,
    x_global_scale: Float[Array, ""] | None = None,
) -> dict[str, Float[Array, "..."]]:
    """`quantized_dots` of weights that are nothing but codes, computed in and rounded to `dtype`.

    Not differentiable with a global scale.

    Args:
      x: `(*batch, k)`, quantized as it comes: what is computed to be quantized stays float32.
      codes: `(n, k)` each, in the basis of the recipe's rotation, which multiplies x alone.
      recipe: That quantizes both operands.
      implementation: As for `quantized_dot`.
      dtype: Of the operands that are not float8, and of the results.
      x_global_scale: Under which x is quantized, see `quantize`; None: from the abs-max of x.

    Raises:
      ValueError: As `quantized_dot`.
      NotImplementedError: As `quantized_dot`.
    """
    # Masters are asked for their shape alone; under `jit` they are never made.
    weights = {name: QuantizedWeight(jnp.zeros(q.shape, dtype), q) for name, q in codes.items()}
    if x_global_scale is None:
        return _quantized_dots(x, weights, recipe, None, implementation, dtype, compute_dtype=dtype)
    x, ws, call = _prepared(x, weights, recipe, None, implementation, dtype, compute_dtype=dtype)
    x_q, ys = operand_under_scale(x, x_global_scale, call), {}
    for name, w in ws.items():
        with scope(name):
            w_q, _ = operand_of_quantized(w, split_keys(None), call)
            y = run_product("y", x_q, w_q, call, call.out_dtype)
        ys[name] = y.reshape(*x.shape[:-1], y.shape[-1])
    return {name: ys[name] for name in weights}


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
    y = _quantized_dots(x, {"": w}, recipe, key, implementation, out_dtype)[""]
    return y.reshape(free)


def _quantized_dots(
    x,
    weights,
    recipe,
    key,
    implementation,
    out_dtype=None,
    *,
    compute_dtype=None,
    partition=None,
    saved_as=None,
) -> dict[str, Array]:
    x, ws, call = _prepared(
        x,
        weights,
        recipe,
        key,
        implementation,
        out_dtype,
        compute_dtype=compute_dtype,
        partition=partition,
    )
    is_by_kernel = any(call.target("y", spec) is not None for spec in (recipe.y_x, recipe.y_w))
    # Interpreted kernels have effects, which checkpoints do not take.
    dots = _dots_by_kernel if is_by_kernel and not is_interpreting() else _dots
    ys = dots(x, ws, key if recipe.needs_key else None, call, saved_as)
    return {name: ys[name] for name in weights}


def _prepared(
    x, weights, recipe, key, implementation, out_dtype, *, compute_dtype=None, partition=None
) -> tuple[Array, dict[str, Any], Call]:
    """Arguments that were checked, weights in the order of a pytree's leaves, and the call."""
    x = jnp.asarray(x)
    ws = {name: _as_weight(weights[name]) for name in sorted(weights)}
    for w in ws.values():
        _check_call(x, w, recipe, key, implementation)
    x, ws = vary_alike((x, ws), key if recipe.needs_key else ())
    # One path for all, since they share the operands made of x: that of the worst n to tile.
    n = max((_master(w).shape[0] for w in ws.values()), key=dispatch.padding)
    tokens = math.prod(x.shape[:-1])
    obstacle = dispatch.partition_obstacle((x, ws), partition, tokens)
    call = Call(
        recipe,
        implementation,
        x_dtype=jnp.dtype(compute_dtype or x.dtype),
        out_dtype=jnp.dtype(out_dtype or x.dtype),
        shape=(tokens, n, x.shape[-1]),
        weights=tuple((_master(w).dtype, isinstance(w, QuantizedWeight)) for w in ws.values()),
        places=tuple(getattr(w, "places", None) for w in ws.values()),
        partition=partition if obstacle is None else None,
        partition_obstacle=obstacle,
    )
    return x, ws, call


def _dots_primal(x, ws, key, call: Call, saved_as):
    return _forward(x, ws, key, call, saved_as, keeps=False)[0]


def _dots_fwd(x, ws, key, call: Call, saved_as):
    return _forward(x, ws, key, call, saved_as, keeps=True)


def _forward(x, ws, key, call: Call, saved_as, *, keeps: bool):
    """The results, and what backward needs if it `keeps` that."""
    of_x_name, y_name = saved_as or (None, None)
    of_w_name = "weights" if saved_as else None
    x_q, of_x = forward_operand(x, "x", split_keys(key), call, keeps=keeps)
    x_q, of_x = _named((x_q, of_x), of_x_name, x)
    ys, of_ws = {}, {}
    for index, (name, w) in enumerate(ws.items()):
        keys = split_keys(key, index)
        with scope(name):
            if isinstance(w, QuantizedWeight):
                w_q, of_ws[name] = operand_of_quantized(w, keys, call)
            else:
                operand, residual = forward_operand(w, "w", keys, call, keeps=keeps)
                w_q, of_ws[name] = _named((operand, residual), of_w_name, w)
            y = run_product("y", x_q, w_q, call, call.out_dtype)
        ys[name] = _named(y.reshape(*x.shape[:-1], y.shape[-1]), y_name, None)
    return ys, (of_x, of_ws, key)


def _named(tree, name: str | None, argument):
    """`tree` with its arrays named, the same where they are the same, but for the `argument`.

    Float8 numbers are named as the bytes that they are: `jax.checkpoint` rounds what it keeps by
    `lax.reduce_precision` to the bits of its dtype, which makes infinity, and so NaN, of an e4m3
    number of 256 or more.
    """
    if name is None:
        return tree
    named = {id(argument): argument}
    leaves, treedef = jax.tree.flatten(tree)
    for leaf in leaves:
        if id(leaf) not in named:
            is_float8 = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize == 1
            kept = jax.lax.bitcast_convert_type(leaf, jnp.uint8) if is_float8 else leaf
            kept = checkpoint_name(kept, name)
            if is_float8:
                kept = jax.lax.bitcast_convert_type(kept, leaf.dtype)
            named[id(leaf)] = kept
    return treedef.unflatten([named[id(leaf)] for leaf in leaves])


def _dots_bwd(call: Call, saved_as, residuals, gs):
    del saved_as
    of_x, of_ws, key = residuals
    for_dx, for_dw = {}, {}
    for index, (name, g) in enumerate(gs.items()):
        keys = split_keys(key, index)
        *batch, n = g.shape
        g = g.astype(call.x_dtype).reshape(-1, n)
        check_contraction("dx", n, call.recipe)
        check_contraction("dw", g.shape[0], call.recipe)
        with scope(name):
            of_dx, for_dw[name] = gradient_operands(g, keys, call)
            for_dx[name] = of_dx, backward_operand(of_ws[name].saved, "dx", keys, call)
    x_keys = split_keys(key)
    dx = masked_gradient("dx", for_dx, of_x.mask, x_keys, call, call.x_dtype)
    dx = dx.astype(call.x_dtype).reshape(*batch, dx.shape[-1])
    x_q = backward_operand(of_x.saved, "dw", x_keys, call)
    dw_dtype = jnp.promote_types(call.x_dtype, jnp.float32)
    dws = {}
    for (name, g_q), (w_dtype, is_quantized), places in zip(
        for_dw.items(), call.weights, call.places, strict=True
    ):
        if is_quantized:  # the estimator waits for the mean over micro-batches
            with scope(name):
                dw = run_product("dw", g_q, x_q, call, dw_dtype).astype(w_dtype)
            dws[name] = QuantizedWeight(dw, None, places)
        else:
            pair = {name: (g_q, x_q)}
            dw = masked_gradient("dw", pair, of_ws[name].mask, x_keys, call, dw_dtype)
            dws[name] = dw.astype(w_dtype)
    return dx, dws, None


_dots = jax.custom_vjp(_dots_primal, nondiff_argnums=(3, 4))
_dots.defvjp(_dots_fwd, _dots_bwd)
# A kernel makes operands of both passes in one call, which is not taken apart where jax.checkpoint
# drops those of the backward pass: then the primal is to run. Second derivatives, which this
# excludes, kernels do not have.
_dots_by_kernel = jax.custom_vjp(_dots_primal, nondiff_argnums=(3, 4))
_dots_by_kernel.defvjp(_dots_fwd, _dots_bwd, optimize_remat=True)


def _as_weight(w):
    return w if isinstance(w, QuantizedWeight) else jnp.asarray(w)


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
    check_contraction("y", w.shape[1], recipe)


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

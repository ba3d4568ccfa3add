"""Operands of the three products: rotated, quantized, and kept for the backward pass.

Either in `jax.numpy`, one function a step, or by the kernel that does all of them in one pass, for
both products that take an array: the path of the product that the operand is for says which, and
for float8 codes the device. Both give the same values of finite arrays, but for the rotation back
of float32 gradients, see `scaled_matmul`.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit_jax.numerics import QTensor, QuantSpec, quantize
from lowbit_jax.numerics.estimators import factored_and_mask, gradient_mask, mask_bound
from lowbit_jax.numerics.quantize import Factored, factor, quantize_factored
from lowbit_jax.numerics.scales import E4M3_RULES
from lowbit_jax.ops import dispatch
from lowbit_jax.ops.call import Call, ProductKeys
from lowbit_jax.ops.dot_recipe import DotRecipe, Product
from lowbit_jax.ops.products import Operand
from lowbit_jax.ops.quantized_weight import QuantizedWeight
from pallas_kernels.compat import is_interpreting
from pallas_kernels.folded import WORD, fold, unpack_mask
from pallas_kernels.partition import Partition
from pallas_kernels.rotate_quantize import Keys, Target, requantize_obstacle, rotate_quantize

OperandName = Literal["x", "w"]
AnyOperand = Operand | QTensor  # codes where the path of the product takes them
# The backward product that takes a forward operand: the gradient of the other one.
_BACKWARD: dict[OperandName, Product] = {"x": "dw", "w": "dx"}


def scope(name: str):
    """A `jax.named_scope`, or none without a name."""
    return jax.named_scope(name) if name else contextlib.nullcontext()


class Finished(NamedTuple):
    """An operand of a backward product that the forward pass has made already."""

    operand: Operand


class Residual(NamedTuple):
    """Of one forward operand, for the backward pass.

    Attributes:
      saved: What the other operand's gradient is multiplied by, as rows.
      mask: Of the gradient: bool `(rows, k)`, or packed words from the kernel; None for all.
    """

    saved: Operand | QTensor | QuantizedWeight | Finished
    mask: Any


def forward_operand(
    z: Array, name: OperandName, keys: dict[Product, ProductKeys], call: Call, *, keeps: bool
) -> tuple[AnyOperand, Residual]:
    """`Q(z R)` as rows and what backward needs of it; `z` itself where there is nothing to do.

    Unless it `keeps` that, the residual is not complete.
    """
    recipe = call.recipe
    spec = recipe.y_x if name == "x" else recipe.y_w
    rotation_key, key = _keys_of(keys["y"], first=name == "x")
    if spec is None:
        q = _unquantized(z, call, rotation_key)
        return _rows(q), Residual(q, None)
    target = call.target("y", spec)
    if target is not None:
        return _by_kernel(z, name, target, keys, call, keeps=keeps)
    rotation = recipe.rotation_of("y")
    rows = z.reshape(-1, z.shape[-1])
    if rotation is not None:
        rows = rotation.apply(rows, key=rotation_key)
    how = (spec, recipe.estimator, recipe.clip_scale)
    if call.takes_codes("y"):
        q, mask = quantize(rows, spec, key=_key_for(spec, key)), gradient_mask(rows, *how)
    else:
        factored, mask = factored_and_mask(rows, *how, key=_key_for(spec, key))
        q = as_operand(factored, spec, call.x_dtype)
    saved = _unquantized(z, call, rotation_key) if _keeps_original(name, recipe) else q
    return q, Residual(saved, mask)


def operand_of_quantized(
    w: QuantizedWeight, keys: dict[Product, ProductKeys], call: Call
) -> tuple[AnyOperand, Residual]:
    """The operand that `forward_operand` would have made of the weights, and codes to keep."""
    q = w.moved()
    if not call.takes_codes("y"):
        q = (
            Operand(*fold(q))
            if call.uses_kernel("y")
            else as_operand(factor(q), q.spec, call.x_dtype)
        )
    saved = dataclasses.replace(w, master=None)
    if _keeps_original("w", call.recipe):
        saved = _unquantized(w.master, call, keys["y"].rotation)
    return q, Residual(saved, None)


def operand_under_scale(x: Array, global_scale: Array, call: Call) -> AnyOperand:
    """`Q(x R)` as rows, under a global scale that is given: of the E4M3 rules, without gradient."""
    recipe = call.recipe
    rotation, spec = recipe.rotation_of("y"), recipe.y_x
    assert spec is not None  # whose global scale it is
    rows = x.reshape(-1, x.shape[-1])
    if rotation is not None:
        rows = rotation.apply(rows)
    if call.takes_codes("y"):
        return quantize(rows, spec, global_scale=global_scale)
    factored, _ = quantize_factored(rows, spec, global_scale=global_scale)
    return as_operand(factored, spec, call.x_dtype)


def as_operand(factored: Factored, spec: QuantSpec, compute_dtype: np.dtype) -> Operand:
    """The operand of a product: values in the compute dtype or in float8, scales in float32."""
    values, scale = factored
    is_float8 = dispatch.has_float8_codes(spec)
    if scale is not None and scale.ndim:
        scale = scale.reshape(-1 if spec.block_size is None else ())
    return Operand(values.astype(spec.format.storage if is_float8 else compute_dtype), scale)


def gradient_operands(
    g: Float[Array, "tokens n"], keys: dict[Product, ProductKeys], call: Call
) -> tuple[AnyOperand, AnyOperand]:
    """`g` as the first operand of `dx` and, transposed, of `dw`."""
    recipe = call.recipe
    rows, columns = call.target("dx", recipe.dx_g), call.target("dw", recipe.dw_g)
    of_dx = of_dw = None
    if rows is not None or columns is not None:
        row_keys, column_keys = (_keys_of(keys[p], first=True) for p in ("dx", "dw"))
        of_dx, of_dw, _ = _quantize_by_kernel(
            g, rows, columns, call.partition, row_keys=row_keys, column_keys=column_keys
        )
    if of_dx is None:
        of_dx = _rotate_and_quantize(g, "dx", recipe.dx_g, keys["dx"].first, keys, call)
    if of_dw is None:
        of_dw = _rotate_and_quantize(g.T, "dw", recipe.dw_g, keys["dw"].first, keys, call)
    return of_dx, of_dw


def backward_operand(
    saved: Operand | QTensor | QuantizedWeight | Finished,
    product: Product,
    keys: dict[Product, ProductKeys],
    call: Call,
) -> AnyOperand:
    """What the forward pass left, transposed and quantized again as the recipe says."""
    if isinstance(saved, Finished):
        return saved.operand
    recipe = call.recipe
    spec = recipe.dx_w if product == "dx" else recipe.dw_x
    if isinstance(saved, QuantizedWeight):
        saved = saved.moved()
    if isinstance(saved, QTensor):  # as the in-layer quantizer would have left it
        saved = as_operand(factor(saved), saved.spec, call.x_dtype)
    saved = _rows(saved)
    if spec is None and recipe.rotation_of(product) is None:
        return _transposed(saved, call)
    scale = None
    is_scaled = saved.scale is not None and not saved.scale.ndim
    if (
        is_scaled
        and spec is not None
        and spec.scale in E4M3_RULES
        and not call.takes_codes(product)
    ):
        # The scale of the result follows that of the array, which need not be multiplied out.
        saved, scale = Operand(saved.values.astype(call.x_dtype), None), saved.scale
    target = call.target(product, spec)
    if target is None:
        z = _dense(saved).T if scale is None else saved.values.T.astype(jnp.float32)
        again = _rotate_and_quantize(z, product, spec, keys[product].second, keys, call)
    else:
        _, again, _ = _quantize_by_kernel(
            _dense(saved),
            None,
            target,
            _partition_of(product, call),
            column_keys=_keys_of(keys[product], first=False),
        )
    assert again is not None
    if scale is None:
        return again
    assert isinstance(again, Operand)  # as no codes are taken
    assert again.scale is not None  # as the rules make them
    return again._replace(scale=again.scale * scale)


def masked_gradient(
    product: Product,
    pairs: Mapping[str, tuple[AnyOperand, AnyOperand]],
    mask: Any,
    keys: dict[Product, ProductKeys],
    call: Call,
    out_dtype,
) -> Float[Array, "p q"]:
    """`(sum of a b^T over the pairs * mask) R^T` with R the rotation of the forward product.

    The products run in scopes of the pairs' names.
    """
    rotation = call.recipe.rotation_of("y")
    is_packed = mask is not None and mask.dtype == jnp.uint32

    def total(**epilogue):
        terms = []
        for name, (a, b) in pairs.items():
            with scope(name):
                terms.append(run_product(product, a, b, call, out_dtype, **epilogue))
        if len(terms) == 1:
            return terms[0]
        sum_dtype = jnp.promote_types(out_dtype, jnp.float32)
        return functools.reduce(jnp.add, [t.astype(sum_dtype) for t in terms]).astype(out_dtype)

    is_covered = rotation is None or call.inverse_hadamard is not None
    if call.uses_kernel(product) and is_covered and (mask is None or is_packed):
        return total(mask=mask, inverse_hadamard=call.inverse_hadamard)
    z = total()
    if mask is not None:
        z = jnp.where(unpack_mask(mask) if is_packed else mask, z, 0)
    return z if rotation is None else rotation.inverse(z, key=keys["y"].rotation)


def run_product(
    product: Product, a: AnyOperand, b: AnyOperand, call: Call, out_dtype, **epilogue
) -> Float[Array, "p q"]:
    """`a b^T` by the path of the product."""
    specs = call.recipe.formats_of(product)
    return dispatch.run(
        product,
        call.plan(product),
        a,
        b,
        specs,
        call.x_dtype,
        out_dtype,
        partition=call.partition,
        partition_obstacle=call.partition_obstacle,
        **epilogue,
    )


def _by_kernel(
    z: Array,
    name: OperandName,
    target: Target,
    keys: dict[Product, ProductKeys],
    call: Call,
    *,
    keeps: bool,
) -> tuple[Operand, Residual]:
    """One pass for the operand of y, the mask, and the operand of the backward product."""
    recipe, product = call.recipe, _BACKWARD[name]
    bound = mask_bound(target.spec, recipe.estimator, recipe.clip_scale) if keeps else None
    if bound is not None and z.shape[-1] % WORD:
        raise NotImplementedError(
            f"quantized_dot: the kernel packs masks of {WORD} columns, got k={z.shape[-1]}; pad it,"
            " or use implementation='dequantize'."
        )
    if z.dtype not in (jnp.bfloat16, jnp.float32):
        z = z.astype(jnp.float32)
    again = recipe.dw_x if name == "x" else recipe.dx_w
    of_columns = None
    if keeps and again is None:
        # A product over the rows takes the same codes, if all of them share one scale.
        is_kept = target.rotation is None and recipe.formats_of(product)[1] == target.spec
        if is_kept and dispatch.has_float8_codes(target.spec):
            of_columns = call.target(product, target.spec)
    elif keeps and recipe.requantize:
        of_columns = call.target(product, again)
        if of_columns is not None and requantize_obstacle(target, of_columns) is not None:
            of_columns = None  # made in the backward pass
    q, columns, mask = _quantize_by_kernel(
        z.reshape(-1, z.shape[-1]),
        target,
        of_columns,
        _partition_of(product, call),
        requantize=of_columns is not None and again is not None,
        mask_bound=bound,
        row_keys=_keys_of(keys["y"], first=name == "x"),
        column_keys=_keys_of(keys[product], first=False),
    )
    assert q is not None
    if columns is not None:
        saved = Finished(columns)
    elif _keeps_original(name, recipe):
        saved = _unquantized(z, call, keys["y"].rotation)
    else:
        saved = q
    return q, Residual(saved, mask)


def _partition_of(product: Product, call: Call) -> Partition | None:
    """How rows of the forward operand lie that a backward product takes: weights are uncut."""
    if call.partition is None:
        return None
    return call.partition if product == "dw" else call.partition.uncut


def _quantize_by_kernel(
    x: Array, rows: Target | None, columns: Target | None, partition: Partition | None, **options
):
    """`rotate_quantize`: operands of two products, None where not asked for, and a packed mask."""
    made = rotate_quantize(
        x, rows, columns, partition=partition, interpret=is_interpreting(), **options
    )
    of_rows, of_columns = (
        None if side is None else Operand(*side) for side in (made.rows, made.columns)
    )
    return of_rows, of_columns, made.mask


def _keeps_original(name: OperandName, recipe: DotRecipe) -> bool:
    again = recipe.dw_x if name == "x" else recipe.dx_w
    return not recipe.requantize and again is not None


def _unquantized(z, call: Call, key_rotation) -> Operand:
    """`z R` as rows; `z` as it is where there is no rotation.

    An untouched argument is neither cast nor reshaped: kept for the backward pass as it is, it is
    shared by all products that take it, and `w` by the parameters.
    """
    rotation = call.recipe.rotation_of("y")
    if rotation is None:
        return Operand(z, None)
    z = rotation.apply(z.reshape(-1, z.shape[-1]), key=key_rotation)
    return Operand(z.astype(call.x_dtype), None)


def _rotate_and_quantize(
    z, product: Product, spec: QuantSpec | None, key, keys: dict[Product, ProductKeys], call: Call
) -> AnyOperand:
    """`Q(z R')` with R' the rotation of a backward product along its contraction axis."""
    rotation = call.recipe.rotation_of(product)
    if rotation is not None:
        z = rotation.apply(z, key=keys[product].rotation)
    if spec is None:
        return Operand(z.astype(call.x_dtype), None)
    if call.takes_codes(product):
        return quantize(z, spec, key=_key_for(spec, key))
    factored, _ = quantize_factored(z, spec, key=_key_for(spec, key))
    return as_operand(factored, spec, call.x_dtype)


def _dense(operand: Operand) -> Float[Array, "rows c"]:
    """The array that an operand stands for, float32 if it was scaled."""
    values, scale = operand
    if scale is None:
        return values
    return values.astype(jnp.float32) * (scale[:, None] if scale.ndim else scale)


def _rows(operand: Operand) -> Operand:
    """The operand with its leading axes made one."""
    return operand._replace(values=operand.values.reshape(-1, operand.values.shape[-1]))


def _transposed(operand: Operand, call: Call) -> Operand:
    """The operand for a product over its rows, which can no longer have scales of their own."""
    if operand.scale is not None and operand.scale.ndim:
        return Operand(_dense(operand).astype(call.x_dtype).T, None)
    return operand._replace(values=operand.values.T)


def _keys_of(keys: ProductKeys, *, first: bool) -> Keys:
    return Keys(keys.rotation, keys.first if first else keys.second)


def _key_for(spec: QuantSpec, key):
    return key if spec.needs_key else None

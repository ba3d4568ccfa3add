"""The product of inputs and a weight of codes, and which implementation computes it."""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from lowbit_jax.numerics.quantize import factor
from lowbit_jax.ops import dispatch
from lowbit_jax.ops.coded_weight import CodedWeight
from lowbit_jax.ops.dispatch import Plan
from lowbit_jax.ops.dot_recipe import DotRecipe
from lowbit_jax.ops.operands import as_operand, scope
from lowbit_jax.ops.products import Operand, dequantized
from lowbit_jax.ops.quantized_dot import dots_of_codes
from pallas_kernels import compat
from pallas_kernels.mixed_matmul import PackedWeight, choose_config, mixed_matmul
from pallas_kernels.mixed_matmul.layout import scheme_of
from pallas_kernels.mixed_matmul.tuning import MAX_ROWS, config_obstacle

# Rows of x up to which `mixed_matmul` was measured on an H100 and took less time than XLA's
# bfloat16 product: 1 and 16, docs/kernels.md.
MEASURED_ROWS = 16
_DTYPES = ("bfloat16", "float32")


def coded_dot(
    x: Shaped[Array, "..."], w: CodedWeight, *, implementation: str | None = None
) -> Float[Array, "..."]:
    """`y = Q(T x) C^T`: inputs brought into the basis of the codes, rounded if the weight says so.

    The transform is computed in float32 from `x` as it comes. Without a format of activations its
    result is rounded to the dtype of `x`; with one it is quantized first. Codes are decoded where
    they are multiplied: there is no second copy of the weights but that of the product at hand.
    Decoded numbers are in the dtype of `x`: exact in bfloat16 for formats with E8M0 or E4M3 scales,
    rounded for float32 scales of blocks. Scales of rows and arrays multiply the float32 sums.

    Args:
      x: `(*batch, k)`, bfloat16 or float32.
      w: `(n, k)`.
      implementation: "mixed_matmul": our kernel for packed 4-bit weights and rows of bfloat16 that
        are not quantized, 64 at a time, on a Hopper GPU. "dequantize": decoded once, then a dense
        product. With quantized activations any name that `quantized_dot` knows. A name never falls
        back. None: with quantized activations as `quantized_dot` chooses; else "mixed_matmul" up
        to the 16 rows for which it was measured, and "dequantize" for the rest; `explain` says why.

    Returns:
      `(*batch, n)` in the dtype of `x`.

    Raises:
      ValueError: If shapes or dtypes do not fit, or no implementation has that name.
      NotImplementedError: If the implementation asked for does not cover the product, or somebody
        differentiates it.
    """
    return coded_dots(x, {"": w}, implementation=implementation)[""]


def coded_dots(
    x: Shaped[Array, "..."],
    weights: Mapping[str, CodedWeight],
    *,
    implementation: str | None = None,
) -> dict[str, Float[Array, "..."]]:
    """`coded_dot` of one x with several weights; what several make of x alike is made once.

    Args:
      x: As for `coded_dot`.
      weights: By the names of the scopes in which the products run.
      implementation: As for `coded_dot`, of all.

    Returns:
      A result for each name.

    Raises:
      ValueError: As `coded_dot`.
      NotImplementedError: As `coded_dot`.
    """
    dispatch.check_implementation(implementation)
    for w in weights.values():
        if x.dtype.name not in _DTYPES:
            raise ValueError(
                f"coded_dot: x must be {' or '.join(_DTYPES)}, got {x.dtype}; cast it first."
            )
        if len(w.shape) != 2 or x.ndim == 0 or x.shape[-1] != w.shape[1]:
            raise ValueError(
                f"coded_dot: x must be (*batch, k) and the weight (n, k), got {x.shape} and"
                f" {w.shape}; stacked weights are cut by jax.lax.scan or indexing."
            )
    return _coded_dots(implementation, x, dict(weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _coded_dots(implementation, x, weights):
    # A loop that runs a model many times must not keep decoded weights beside the codes: the
    # barrier ties them to the inputs of this very product. (JAX 0.10 drops it on CPU, and there an
    # unrolled model in a loop holds its matrices in float once more.)
    x, weights = jax.lax.optimization_barrier((x, weights))
    groups: dict[tuple[DotRecipe, str | None], dict[str, CodedWeight]] = {}
    found = {}
    for name, w in weights.items():
        if w.activations is None:
            with scope(name):
                found[name] = _weight_only(x, w, implementation)
        else:
            # A transform or a global scale of its own makes inputs of its own.
            recipe = DotRecipe(y_x=w.activations, y_w=w.spec, rotation=w.rotation)
            own = None if w.transform is None and w.input_global_scale is None else name
            groups.setdefault((recipe, own), {})[name] = w
    for (recipe, _), alike in groups.items():
        first = next(iter(alike.values()))  # and only one, if anything of it is its own
        inputs = x if first.transform is None else first.apply(x)
        codes = {name: w.codes() for name, w in alike.items()}
        found |= dots_of_codes(
            inputs,
            codes,
            recipe,
            implementation,
            dtype=x.dtype,
            x_global_scale=first.input_global_scale,
        )
    return found


def _no_gradient(implementation, x, weights):
    del implementation, x, weights
    raise NotImplementedError(
        "coded_dot: weights of codes are for inference and have no gradient; train with float"
        " weights and a recipe, or differentiate CodedWeight.dequantized()."
    )


_coded_dots.defvjp(_no_gradient, _no_gradient)


def plan(
    w: CodedWeight,
    shape: tuple[int, int, int],
    dtype: np.dtype,
    implementation: str | None,
    capability: tuple[int, int] | None,
    *,
    partition_obstacle: str | None = None,
) -> Plan:
    """The path of a product whose activations are not quantized.

    Args:
      w: The weight.
      shape: Rows of x, n and k.
      dtype: Of x.
      implementation: As for `coded_dot`.
      capability: Of the CUDA device; None if there is none.
      partition_obstacle: From `dispatch.partition_obstacle`.

    Raises:
      NotImplementedError: If the path asked for does not cover the product.
    """
    chunk = min(shape[0], MAX_ROWS), *shape[1:]
    obstacle = _kernel_obstacle(w, chunk, dtype) or compat.hopper_obstacle(capability)
    if implementation == "dequantize":
        return Plan("dequantize", "asked for by name")
    if implementation == "mixed_matmul" and obstacle is None:
        return Plan("mixed_matmul", "asked for by name")
    if implementation is not None:
        if implementation != "mixed_matmul":
            obstacle = "activations are not quantized"
        raise NotImplementedError(
            f"coded_dot: implementation={implementation!r} does not cover {shape[0]} rows of"
            f" {dtype} by {w.spec}: {obstacle}; use implementation=None or 'dequantize'."
        )
    obstacle = obstacle or partition_obstacle
    if obstacle is None and shape[0] > MEASURED_ROWS and not compat.is_interpreting():
        obstacle = f"{shape[0]} rows, measured up to {MEASURED_ROWS}"
    if obstacle is None:
        return Plan("mixed_matmul", "formats, rows and device allow it")
    return Plan("dequantize", f"not mixed_matmul: {obstacle}")


def _kernel_obstacle(w: CodedWeight, shape: tuple[int, int, int], dtype: np.dtype) -> str | None:
    """Why `mixed_matmul` does not compute a product, whatever the device."""
    m, n, k = shape
    if dtype != jnp.bfloat16:
        return f"x must be bfloat16, got {dtype}"
    try:
        scheme = scheme_of(w.spec, k)
    except NotImplementedError as error:
        return str(error).removeprefix("mixed_matmul: ")
    if not w.is_packed:
        return "codes are not in the order of the kernel, see pack_weights"
    if not m:
        return "x has no rows"
    sums_group = scheme.group if scheme.scales == "float32" else None
    return config_obstacle(choose_config(m, n, k, sums_group=sums_group), m, n, k)


def _weight_only(x, w: CodedWeight, implementation: str | None) -> Array:
    """`T x` by the codes, without rounding but to the dtype of x."""
    rows = w.apply(x).astype(x.dtype).reshape(-1, x.shape[-1])
    n, k = w.shape
    shape = math.prod(x.shape[:-1]), n, k
    obstacle = dispatch.partition_obstacle((x, w), None, shape[0])
    chosen = plan(
        w, shape, x.dtype, implementation, dispatch.cuda_capability(), partition_obstacle=obstacle
    )
    with dispatch.product_scope("y", (None, w.spec), chosen):
        if chosen.path == "mixed_matmul":
            y = _by_kernel(rows, w.quantized)
        else:
            b = as_operand(factor(w.codes()), w.spec, x.dtype)
            y = dequantized(Operand(rows, None), b, x.dtype, x.dtype)
    return y.reshape(*x.shape[:-1], n)


def _by_kernel(rows: Array, w: PackedWeight) -> Array:
    """`mixed_matmul` of any number of rows, as many at a time as it takes."""
    m, k = rows.shape
    multiply = functools.partial(
        mixed_matmul, w=w, out_dtype=rows.dtype, interpret=compat.is_interpreting()
    )
    if m <= MAX_ROWS:
        return multiply(rows)
    padded = jnp.pad(rows, [(0, -m % MAX_ROWS), (0, 0)])
    y = jax.lax.map(multiply, padded.reshape(-1, MAX_ROWS, k))
    return y.reshape(len(padded), -1)[:m]

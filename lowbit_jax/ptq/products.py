"""By which implementation a model multiplies by its codes while it is evaluated."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowbit_jax.models import Llama
from lowbit_jax.ops.coded_weight import CodedWeight, pack_weights
from lowbit_jax.ops.report import explain


def through_kernel(model: Llama, params: Any) -> tuple[Llama, Any]:
    """Model and parameters for which all products are those of `mixed_matmul`, of any rows.

    The numbers are then those of a server that never decodes a matrix. Decoding is faster for many
    rows, so that nothing chooses this by itself there; see `coded_dot`.

    Args:
      model: Computing in bfloat16.
      params: Its parameters with a `CodedWeight` for every matrix, of inputs that are not
        quantized.

    Raises:
      NotImplementedError: If the kernel does not cover a format, a shape or this device.
      ValueError: If there are no codes.
    """
    packed = pack_weights(params)
    chosen = Llama(dataclasses.replace(model.config, implementation="mixed_matmul"))
    jax.eval_shape(_logits(chosen), packed, _tokens(1, 1))  # which refuses what is not covered
    return chosen, packed


def kernel_obstacle(model: Llama, params: Any) -> str | None:
    """Why `through_kernel` does not take them, or None; nothing is computed."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, CodedWeight))
    coded = [leaf for leaf in leaves if isinstance(leaf, CodedWeight)]
    if not coded:
        return "no weights of codes"
    if any(w.activations is not None for w in coded):
        return "inputs are quantized"
    try:
        jax.eval_shape(lambda params: through_kernel(model, params)[1], params)
    except NotImplementedError as error:
        return str(error)
    return None


def describe_products(model: Llama, params: Any, window: int, batch_size: int) -> str:
    """The implementations of the quantized products and why, a line; empty if there are none."""
    rows = explain(_logits(model), params, _tokens(batch_size, window)).rows
    said = (f"{row.path} ({row.reason})" for row in rows if {row.a_format, row.b_format} != {"-"})
    return "; ".join(dict.fromkeys(said))


def _logits(model: Llama) -> Callable[[Any, Array], Any]:
    return lambda params, tokens: model.apply({"params": params}, tokens)


def _tokens(batch_size: int, window: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch_size, window), jnp.int32)

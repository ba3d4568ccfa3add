"""What a block keeps for its backward pass, in bytes, read off its traced program."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from lowbit_jax.models.layers import rotary_angles
from lowbit_jax.models.linear import resolve_recipes
from lowbit_jax.models.llama import QUANTIZABLE_PATHS, Block, LlamaConfig
from lowbit_jax.models.recompute import recomputing
from lowbit_jax.ops.attention import SAVED_AS as ATTENTION
from lowbit_jax.ops.quantized_weight import QuantizedWeight, quantize_weight

UNNAMED = "unnamed"


def kept_bytes(
    config: LlamaConfig, batch_size: int, seq_len: int, quantize_once: bool = False
) -> dict[str, int]:
    """Bytes that one block keeps between forward and backward, by the name of the activation.

    Exactly what `jax.vjp` keeps under `config.recompute`, traced and not run: operands in the
    format in which the paths chosen here keep them, masks and scales included. Parameters are not
    counted, the input of the block is, as "resid". What has no name in `models.recompute` is under
    "unnamed": where nothing is recomputed, the scores of attention by XLA.

    Args:
      config: Of the model; its `attention` and `implementation`, and the device, choose the paths.
      batch_size: Sequences.
      seq_len: Tokens of each.
      quantize_once: Whether weights come as codes, of which operands made of weights are read.

    Returns:
      Name to bytes, of names that keep any.
    """
    block = recomputing(Block, config.recompute, is_unrolled=False)(config)
    needs_key = any(recipe.needs_key for _, recipe in config.recipe_rules)
    key = jax.random.key(0) if needs_key else None
    x = jax.ShapeDtypeStruct((batch_size, seq_len, config.d_model), config.dtype)
    rotary = jax.eval_shape(lambda: rotary_angles(seq_len, config.head_dim, config.rope_theta))
    variables = jax.eval_shape(block.init, jax.random.key(0), x, key, rotary)
    params = nn.meta.unbox(variables)["params"]
    codes = jax.eval_shape(lambda: _codes(config, params) if quantize_once else {})

    def residuals(x, params, codes, rotary):
        def apply(x, params):
            weights = traverse_util.flatten_dict(params, sep="/")
            weights |= {path: QuantizedWeight(weights[path], q) for path, q in codes.items()}
            variables = {"params": traverse_util.unflatten_dict(weights, sep="/")}
            return block.apply(variables, x, key, rotary)[0]

        return jax.tree.leaves(jax.vjp(apply, x, params)[1])

    jaxpr = jax.make_jaxpr(residuals)(x, params, codes, rotary).jaxpr
    found: dict[str, int] = {}
    for variable in {id(v): v for v in jaxpr.outvars}.values():
        name = "resid" if variable is jaxpr.invars[0] else _name_of(variable, jaxpr)
        if name is not None:
            aval: Any = variable.aval
            size = math.prod(aval.shape) * aval.dtype.itemsize
            found[name] = found.get(name, 0) + size
    return found


def _codes(config: LlamaConfig, params: Any) -> dict[str, Any]:
    """The weights that the recipes quantize, by path; zeros, for their shapes."""
    resolved = resolve_recipes(config.recipe_rules, QUANTIZABLE_PATHS)
    recipes = {path.removeprefix("layers/"): recipe for path, (_, recipe) in resolved.items()}
    weights: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    return {
        path: quantize_weight(jnp.zeros(weights[path].shape), recipe, key=jax.random.key(0))
        for path, recipe in recipes.items()
        if recipe.y_w is not None
    }


def _name_of(variable: Any, jaxpr: Any) -> str | None:
    """The name of what a program computes; None for its arguments and constants."""
    for equation in jaxpr.eqns:
        if variable not in equation.outvars:
            continue
        primitive = equation.primitive.name
        if primitive == "name":
            return equation.params["name"]
        # Checkpoints put the first after what they keep; the others move what has a name.
        if primitive in (
            "reduce_precision", "bitcast_convert_type", "reshape", "transpose", "squeeze",
        ):  # fmt: skip
            return _name_of(equation.invars[0], jaxpr)
        if primitive == "dot_product_attention_fwd_wrapper":
            return ATTENTION
        if primitive == "remat_opt":
            inner = equation.params["fwd_jaxpr"]
            inner = getattr(inner, "jaxpr", inner)
            return _name_of(inner.outvars[equation.outvars.index(variable)], inner) or UNNAMED
        return UNNAMED
    return None

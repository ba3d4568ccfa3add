"""Language models in flax Linen."""

from lowbit_jax.models.linear import QuantizedLinear, resolve_recipes
from lowbit_jax.models.llama import (
    Llama,
    LlamaConfig,
    RecipeTable,
    llama_rules,
    logical_axes,
    recipe_table,
)
from lowbit_jax.models.sizes import (
    LLAMA_SIZES,
    QWEN_SIZES,
    count_params,
    flops_by_part,
    flops_per_token,
    llama_config,
)

__all__ = [
    "LLAMA_SIZES",
    "QWEN_SIZES",
    "Llama",
    "LlamaConfig",
    "QuantizedLinear",
    "RecipeTable",
    "count_params",
    "flops_by_part",
    "flops_per_token",
    "llama_config",
    "llama_rules",
    "logical_axes",
    "recipe_table",
    "resolve_recipes",
]

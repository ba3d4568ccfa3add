"""Compressing a trained model: solvers of one layer, from its weights and its inputs' Hessian."""

from lowbit_jax.ptq.entropy_coded import EntropyCoded, hptq, huffman_bits
from lowbit_jax.ptq.gptq import column_order, error_bound, factorize, gptq, nearest_plane
from lowbit_jax.ptq.grids import find_grid, round_on_grid
from lowbit_jax.ptq.hessian import (
    Hessian,
    add_inputs,
    damped,
    empty_hessian,
    layer_error,
    merge,
)
from lowbit_jax.ptq.info import Info, check_info
from lowbit_jax.ptq.microscaled import default_rotation, mr_gptq, rotate_hessian
from lowbit_jax.ptq.rtn import rtn

__all__ = [
    "EntropyCoded",
    "Hessian",
    "Info",
    "add_inputs",
    "check_info",
    "column_order",
    "damped",
    "default_rotation",
    "empty_hessian",
    "error_bound",
    "factorize",
    "find_grid",
    "gptq",
    "hptq",
    "huffman_bits",
    "layer_error",
    "merge",
    "mr_gptq",
    "nearest_plane",
    "rotate_hessian",
    "round_on_grid",
    "rtn",
]

"""Rotates, quantizes and folds the operands of a product, along both axes in one pass."""

from pallas_kernels.rotate_quantize.op import obstacle, rotate_quantize
from pallas_kernels.rotate_quantize.reference import (
    Keys,
    RotatedQuantized,
    Target,
    requantize_obstacle,
    rotate_quantize_reference,
)
from pallas_kernels.rotate_quantize.tuning import Config, choose_config

__all__ = [
    "Config",
    "Keys",
    "RotatedQuantized",
    "Target",
    "choose_config",
    "obstacle",
    "requantize_obstacle",
    "rotate_quantize",
    "rotate_quantize_reference",
]

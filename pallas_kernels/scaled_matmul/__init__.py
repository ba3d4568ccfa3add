"""Products of FP8 or bfloat16 operands with row scales, promoted to float32 sums on the way."""

from pallas_kernels.scaled_matmul.op import scaled_matmul
from pallas_kernels.scaled_matmul.reference import scaled_matmul_reference
from pallas_kernels.scaled_matmul.tuning import Config, choose_config

__all__ = ["Config", "choose_config", "scaled_matmul", "scaled_matmul_reference"]

"""Ready specs. `PRESETS` maps their names to them; `dataclasses.replace` changes a part.

Relative squared error on Gaussian data, `sum (error**2) / sum (x**2)`:

INT4 .01377, INT8 .000042; QUEST_INT1 to 8 .36338 .11885 .03744 .01154 .003495 .001040 3.04e-4
8.78e-5; MXFP4 .01322, MXFP6 .000805, MXFP8 .000862; QUEST_MXFP4 .01269; NVFP4 .00905,
NVFP4_FOUR_OVER_SIX .00756; FP8_E4M3 .000700. For training: MXFP8_CEIL .000704; QUEST_MXFP4_FLOOR
.02701, MXFP4_FITTED .01386, MXFP4_FITTED_STOCHASTIC .02819; NVFP4_16X16 .01244,
NVFP4_16X16_FOUR_OVER_SIX .01243, NVFP4_STOCHASTIC .02355, NVFP4_EDEN .00932, NVFP4_EDEN_128 .00974.

INT means three things in the literature. `INT4` has 15 levels -7..7 with a zero, `QUEST_INT4` 16
mid-rise levels without one. The third convention, codes -8..7 with scale a/7.5, is that of some
checkpoints and not a preset.
"""

import dataclasses

from lowbit_jax.numerics.formats import E2M1, E2M3, E4M3, E5M2, integer, midrise
from lowbit_jax.numerics.spec import QuantSpec

# Integers with a zero, abs-max on the outermost level.
INT2 = QuantSpec(integer(2), 128)
INT3 = QuantSpec(integer(3), 128)
INT4 = QuantSpec(integer(4), 128)
INT8 = QuantSpec(integer(8), 128)

# Panferov et al., QuEST: Stable Training of LLMs with 1-Bit Weights and Activations,
# arXiv:2502.05003. A scale a row; meant for rows that a Hadamard transform made Gaussian.
QUEST_INT1 = QuantSpec(midrise(1), None, "rms")
QUEST_INT2 = QuantSpec(midrise(2), None, "rms")
QUEST_INT3 = QuantSpec(midrise(3), None, "rms")
QUEST_INT4 = QuantSpec(midrise(4), None, "rms")
QUEST_INT5 = QuantSpec(midrise(5), None, "rms")
QUEST_INT6 = QuantSpec(midrise(6), None, "rms")
QUEST_INT7 = QuantSpec(midrise(7), None, "rms")
QUEST_INT8 = QuantSpec(midrise(8), None, "rms")

# Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433; a scale a row or a tensor.
FP8_E4M3 = QuantSpec(E4M3, None)
FP8_E5M2 = QuantSpec(E5M2, None)
FP8_E4M3_TENSOR = QuantSpec(E4M3, "tensor")
FP8_E5M2_TENSOR = QuantSpec(E5M2, "tensor")

# Rouhani et al., OCP Microscaling Formats (MX) Specification v1.0; arXiv:2310.10537.
MXFP4 = QuantSpec(E2M1, 32, "absmax_floor")
MXFP6 = QuantSpec(E2M3, 32, "absmax_floor")
MXFP8 = QuantSpec(E4M3, 32, "absmax_floor")

# Mishra et al., Recipes for Pre-training LLMs with MXFP8, arXiv:2506.08027: scales rounded up.
MXFP8_CEIL = QuantSpec(E4M3, 32, "absmax_ceil")

# Castro et al., Quartet: Native FP4 Training Can Be Optimal for Large Language Models,
# arXiv:2505.14669. Meant for data after a Hadamard transform in blocks of 32.
# Forward: the scale is rounded to the nearest power of two, which fits the errors in the paper; its
# code rounds down, as `_FLOOR` does.
QUEST_MXFP4 = QuantSpec(E2M1, 32, "rms_nearest")
QUEST_MXFP4_FLOOR = QuantSpec(E2M1, 32, "std_floor")
# Backward: fitted to the range, so that nothing clips; to nearest, to nearest with the length of
# the projection on the input restored on average (its code's constant), or stochastically.
MXFP4_FITTED = QuantSpec(E2M1, 32, "absmax_floor43")
MXFP4_FITTED_ALIGNED = QuantSpec(E2M1, 32, "absmax_floor43", gain=1.009276)
MXFP4_FITTED_STOCHASTIC = QuantSpec(E2M1, 32, "absmax_floor43", "stochastic")

# NVIDIA's NVFP4 (as in Egiazarian et al., arXiv:2509.23202, section 2); with square blocks, equal
# for a weight and its transpose (NVIDIA, Pretraining Large Language Models with NVFP4,
# arXiv:2509.25149).
NVFP4 = QuantSpec(E2M1, 16, "absmax_e4m3")
NVFP4_16X16 = QuantSpec(E2M1, 16, "absmax_e4m3", block_rows=16)

# Panferov et al., Quartet II, arXiv:2601.22813: the choice of four over six, and unbiased gradients
# by stochastic rounding or MS-EDEN. 17/16 makes room for E4M3's rounding of the scale; .93 of that
# is the least error under MS-EDEN. Its CUDA kernels correct blocks of 16, its emulation of 128.
NVFP4_FOUR_OVER_SIX = QuantSpec(E2M1, 16, "absmax_e4m3_four_over_six")
NVFP4_16X16_FOUR_OVER_SIX = QuantSpec(E2M1, 16, "absmax_e4m3_four_over_six", block_rows=16)
NVFP4_STOCHASTIC = QuantSpec(E2M1, 16, "absmax_e4m3", "stochastic", margin=17 / 16)
NVFP4_EDEN = QuantSpec(E2M1, 16, "absmax_e4m3", "eden", margin=0.93 * 17 / 16)
NVFP4_EDEN_128 = dataclasses.replace(NVFP4_EDEN, correction_block=128)

PRESETS: dict[str, QuantSpec] = {
    name: value for name, value in list(globals().items()) if isinstance(value, QuantSpec)
}

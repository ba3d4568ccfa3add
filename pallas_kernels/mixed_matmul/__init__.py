"""Few rows of bfloat16 activations times 4-bit weights, decoded on their way to the tensor cores.

With few rows the weights' bytes are what takes time: .53 a weight for MXFP4 (4.25 bits), .56 for
NVFP4, .53 for INT4 with a float32 scale a 128, where bfloat16 has 2. At 3.0 TB/s and 1.75 GHz each
of 132 multiprocessors receives 23 to 24 weights a clock. It issues 128 instructions of one thread
in that time, 64 of them integer ones: 5.5 instructions a weight are the budget, 2.8 integer ones.

Instructions a weight in the loop over chunks, counted in the machine code for sm_90a (x of 16 rows,
chunks of 256 columns, of 128 for groups of 32; "integer": LOP3, SHF, PRMT, which share one pipe;
"decode" by the arithmetic of `decode.py`, the rest are addresses, descriptors, loads and the
products themselves):

=================  ======  =======  ======  =========
format             decode  integer  loop    registers
=================  ======  =======  ======  =========
MXFP4              2.13    1.16     2.97    88
NVFP4              2.38    1.54     3.52    93
INT4, groups 128   1.38    .91      2.84    96
INT4, groups 32    1.38    .95      3.80    90
mid-rise, a row    1.50    .91      2.71    70
=================  ======  =======  ======  =========

A scale a group that is applied to sums costs `m / group` multiply-adds a weight on top: little
for groups of 128, as much as the decoding for groups of 32 and 64 rows (5.3 in all there).
"""

from pallas_kernels.mixed_matmul.layout import PackedWeight, prepack, unpack
from pallas_kernels.mixed_matmul.op import mixed_matmul
from pallas_kernels.mixed_matmul.reference import mixed_matmul_reference
from pallas_kernels.mixed_matmul.tuning import Config, choose_config

__all__ = [
    "Config",
    "PackedWeight",
    "choose_config",
    "mixed_matmul",
    "mixed_matmul_reference",
    "prepack",
    "unpack",
]

import jax
import pytest

from pallas_kernels.aot import lowering_cases, parse_ptxas
from pallas_kernels.compat import abstract_hopper, mosaic_obstacle, shared_memory_bytes

PTXAS = """
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\
 due to insufficient register resources for the wgmma pipeline in the function 'lowbit_b_kernel'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'lowbit_a_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for lowbit_a_mosaic_gpu_kernel
    24 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
ptxas info    : Function properties for lowbit_b_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
"""


def test_a_report_of_ptxas_is_read_kernel_by_kernel():
    assert parse_ptxas(PTXAS) == [("a", 168, 20, 24, False), ("b_kernel", 40, 0, 0, True)]
    assert parse_ptxas("ptxas info    : 0 bytes gmem") == []


@pytest.mark.skipif(mosaic_obstacle() is not None, reason=str(mosaic_obstacle()))
def test_shared_memory_is_read_from_a_lowered_module():
    _, fn, args = next(lowering_cases("scaled_matmul"))  # 192 x 128, four stages
    with abstract_hopper():
        lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",))
    (size,) = shared_memory_bytes(lowered)
    # Operands, output and scales.
    buffers = 4 * (192 + 128) * 128 + 192 * 2 * 128 + (192 + 128) * 4
    # Bound: what follows are 10 barriers of 8 bytes, aligned to a kilobyte at most.
    assert buffers + 80 <= size <= buffers + 1024

"""Kernels compiled to machine code for an H100 on a machine that has no GPU.

It needs the plugin wheels of JAX for CUDA and NVIDIA's compiler, but neither driver nor device:
`pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm`. What comes out is
what only ptxas knows: the registers a thread, and whether they sufficed.
"""

import contextlib
import dataclasses
import importlib
import os
import pkgutil
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import pallas_kernels
from pallas_kernels.compat import abstract_hopper, shared_memory_bytes

# The limits of one H100 SXM as XLA states them for a target (GpuTargetConfigProto).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

_REPORT = (
    r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores.*\n"
    r".*Used (\d+) registers"
)
# ptxas says so where it could not keep products of matrices in flight.
_SERIALIZED = "wgmma.mma_async instructions are serialized"

Case = tuple[str, Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """What ptxas says of one kernel.

    Attributes:
      case: Name of the case it was compiled for.
      kernel: Its name in profiles.
      registers: A thread, before warpgroups exchange registers.
      spill_bytes: Of registers stored to memory, a thread.
      stack_bytes: Of memory addressed by a thread.
      is_serialized: Whether ptxas waits for each product of matrices.
      shared_memory_bytes: A block; of several kernels of one case, matched by their order.
    """

    case: str
    kernel: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    is_serialized: bool
    shared_memory_bytes: int


def ahead_of_time_environment() -> dict[str, str]:
    """Environment variables that must be set before JAX starts its backends."""
    return {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # there is no driver to check
        "JAX_PLATFORMS": "",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
    }


def compile_for_hopper(case: Case) -> list[CompiledKernel]:
    """Compiles the kernels of one case for an H100.

    Args:
      case: Name, function and the shapes of its arguments.

    Returns:
      One entry for each Mosaic kernel.

    Raises:
      RuntimeError: If ptxas reported no kernel, as happens where `ahead_of_time_environment` came
        too late, or where this process has compiled the same kernel before.
    """
    name, fn, args = case
    device = topologies.get_topology_desc(
        topology_name="h100", platform="cuda", target_config=H100, topology="1x1x1"
    ).devices[0]
    sharding = SingleDeviceSharding(device)
    args = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tuple(args)
    )
    with abstract_hopper():
        lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",))
    with _captured_output() as output:
        lowered.compile()
    reports = parse_ptxas("".join(output))
    if not reports:
        raise RuntimeError(
            f"compile_for_hopper: ptxas reported no kernel for {name}; set"
            f" {ahead_of_time_environment()} before JAX starts, and compile a case once."
            f" It said: {''.join(output)[-2000:]}"
        )
    sizes = shared_memory_bytes(lowered)
    return [
        CompiledKernel(name, *report, size) for report, size in zip(reports, sizes, strict=True)
    ]


def parse_ptxas(log: str) -> list[tuple[str, int, int, int, bool]]:
    """Name, registers, spilled bytes, stack bytes and serialization of each kernel in a report."""
    reports = []
    for name, stack, spilled, registers in re.findall(_REPORT, log):
        is_serialized = any(_SERIALIZED in line and name in line for line in log.splitlines())
        kernel = name.removeprefix("lowbit_").removesuffix("_mosaic_gpu_kernel")
        reports.append((kernel, int(registers), int(spilled), int(stack), is_serialized))
    return reports


def lowering_cases(op: str | None = None) -> Iterator[Case]:
    """The cases that the packages of kernels name in their `tuning.lowering_cases`.

    Args:
      op: Name of one package, or None for all.
    """
    for module in pkgutil.iter_modules(pallas_kernels.__path__):
        if module.ispkg and op in (None, module.name):
            tuning = importlib.import_module(f"pallas_kernels.{module.name}.tuning")
            for name, fn, args in tuning.lowering_cases():
                yield f"{module.name}: {name}", fn, args


@contextlib.contextmanager
def _captured_output() -> Iterator[list[str]]:
    """Collects what the process, ptxas included, writes to its output; filled on leaving.

    What was written when an error is on its way becomes a note of the error.
    """
    captured: list[str] = []
    with tempfile.TemporaryFile() as file:
        saved = [(fd, os.dup(fd)) for fd in (1, 2)]
        try:
            for fd, _ in saved:
                os.dup2(file.fileno(), fd)
            yield captured
        except Exception as error:
            error.add_note(_read(file)[-2000:])
            raise
        finally:
            for fd, copy in saved:
                os.dup2(copy, fd)
                os.close(copy)
        captured.append(_read(file))


def _read(file):
    file.seek(0)
    return file.read().decode(errors="replace")

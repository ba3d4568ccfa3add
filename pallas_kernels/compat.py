"""Mosaic GPU as the kernels use it: the only file that sees differences between JAX versions."""

import contextlib
import contextvars
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_OLDEST = (0, 11)
# The multiprocessors of an H100 or H200 with NVLink; the abstract device of the tests has fewer.
_HOPPER_SMS = 132

_is_interpreting = contextvars.ContextVar("is_interpreting", default=False)

# None where the lowering lacks what the kernels need; nothing below is called then.
plgpu: Any = None
if jax.__version_info__[:2] >= _OLDEST:
    plgpu = importlib.import_module("jax.experimental.pallas.mosaic_gpu")


def mosaic_obstacle() -> str | None:
    """Why no kernel can be built in this environment, or None if kernels can."""
    if plgpu is None:
        return f"Mosaic GPU kernels need JAX 0.11, this is {jax.__version__}"
    return None


def is_interpreting() -> bool:
    """Whether kernels are to be run on the CPU, within `interpreter`."""
    return _is_interpreting.get()


def cuda_capability() -> tuple[int, int] | None:
    """Compute capability of the device that `jit` compiles for; None if it is no CUDA GPU.

    That of `jax.default_device`, or else the first. Where arrays are that were committed to another
    one cannot be known while their program is traced.
    """
    device = getattr(jax.config, "jax_default_device", None)
    if not device or isinstance(device, str):  # the name of a platform
        device = (jax.devices(device) if device else jax.devices())[0]
    capability = str(getattr(device, "compute_capability", ""))
    match = re.fullmatch(r"(\d+)\.(\d+)", capability)  # not so where it is no GPU of NVIDIA's
    return (int(match[1]), int(match[2])) if match else None


def hopper_obstacle(capability: tuple[int, int] | None) -> str | None:
    """Why kernels for Hopper cannot run on a device of this compute capability, or None."""
    if is_interpreting():
        return mosaic_obstacle()
    if capability is None:
        return "no CUDA device"
    if capability[0] != 9:
        return f"made for compute capability 9.0, this device has {capability[0]}.{capability[1]}"
    return mosaic_obstacle()


def num_sms() -> int:
    """Multiprocessors of the device that is compiled for; of the abstract one where it is set."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.num_cores:
        return device.num_cores
    return getattr(jax.devices()[0], "core_count", _HOPPER_SMS)


def swizzled(shape: tuple[int, ...], dtype, row_elements: int | None = None):
    """Shared memory tiled and swizzled as the bulk copies and wgmma want it.

    Args:
      shape: Leading axes are buffers, the last two a matrix.
      dtype: Of the elements.
      row_elements: Elements of a row that one swizzle covers at most; None: the whole row.
    """
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle((row_elements or shape[-1]) * bits)
    tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def load(ref, layout):
    """`ref[...]` in a register layout; from global memory too, where loads need not be vectors."""
    return plgpu.load(ref, layout=layout, optimized=False)


def launch(
    body: Callable[..., None],
    *,
    name: str,
    out_type: Any,
    scratch_types: Sequence[Any],
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    num_threads: int,
    interpret: bool,
    **options,
) -> Callable[..., Any]:
    """`plgpu.kernel` with warpgroup semantics; the axis of the warpgroups is named "wg".

    Args:
      body: Takes references to inputs, outputs and scratch, in this order.
      name: Of the kernel in profiles.
      out_type: Pytree of `jax.ShapeDtypeStruct`.
      scratch_types: Shared memory, barriers and accumulators.
      grid: Blocks along each axis.
      grid_names: As many.
      num_threads: Warpgroups a block.
      interpret: Run on the CPU, looking for races: within `pallas_kernels.testing.interpreter`.
      **options: For `plgpu.kernel`, `cluster` for example.
    """
    if interpret:
        options["interpret"] = plgpu.InterpretGPUParams(detect_races=True)
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=list(scratch_types),
        grid=grid,
        grid_names=grid_names,
        num_threads=num_threads,
        thread_name="wg",
        kernel_name=f"lowbit_{name}",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **options,
    )
    return lambda *operands: vary_alike(kernel(*operands), operands)


def vary_alike(tree: Any, like: Any = ()) -> Any:
    """`tree` with each array varying over all mesh axes over which one of `tree` or `like` does.

    Within `jax.shard_map`, which tells apart what is the same on all devices; elsewhere `tree`
    itself. Gradients of what was the same are summed over those axes.
    """
    axes = [jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves((tree, like))]
    union = frozenset().union(*axes)

    def vary(leaf):
        missing = tuple(union - jax.typeof(leaf).mat.varying)
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, tree)


@contextlib.contextmanager
def abstract_hopper(num_cores: int = _HOPPER_SMS) -> Iterator[None]:
    """Traces and lowers for an H100, whatever device there is."""
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=num_cores
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


@contextlib.contextmanager
def interpreter(num_cores: int = 2) -> Iterator[None]:
    """Lets what chooses kernels by device choose those for Hopper, to run on the CPU."""
    token = _is_interpreting.set(True)
    try:
        with abstract_hopper(num_cores):
            yield
    finally:
        _is_interpreting.reset(token)


def lower_for_hopper(fn: Callable[..., Any], *args: Any) -> str:
    """The module of `jax.jit(fn)` lowered for CUDA; args of `ShapeDtypeStruct`s. Needs no GPU."""
    with abstract_hopper():
        lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",))
    return lowered.as_text()


def kernel_names(module: str) -> list[str]:
    """Names of our kernels in a lowered module, without what Mosaic appends."""
    names = re.findall(r"lowbit_(?!jax)\w+", module)
    return sorted({re.sub(r"(_\d+)?(_mosaic_gpu\w*)?$", "", name) for name in names})


def races_found() -> bool:
    """Whether the interpreter has seen a race since its state was made."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    return bool(interpret_pallas_call.get_races().races_found)


def shared_memory_bytes(lowered: jax.stages.Lowered) -> list[int]:
    """Shared memory a block of each Mosaic kernel in a lowered module, in the module's order."""
    from jax._src.interpreters import mlir
    from jax._src.lib import mosaic_gpu_dialect  # pyright: ignore[reportPrivateImportUsage]
    from jaxlib.mlir import ir

    kernels = []

    def visit(op):
        is_call = op.name == "stablehlo.custom_call"
        if is_call and "mosaic_gpu" in str(op.attributes["call_target_name"]):
            module = op.attributes["mhlo.backend_config"]["module"]
            kernels.append(ir.StringAttr(module).value_bytes)
        return ir.WalkResult.ADVANCE

    module = lowered.compiler_ir()
    assert module is not None
    module.operation.walk(visit)
    context = mlir.make_ir_context()
    context.allow_unregistered_dialects = True
    mosaic_gpu_dialect.register_dialect(context)
    sizes = []
    for kernel in kernels:
        with context:
            text = str(ir.Module.parse(kernel))
        # The last operand of the launch is the size.
        (operands,) = re.findall(r"gpu\.launch\"?\(([^)]*)\)", text)
        name = operands.split(", ")[-1]
        (size,) = re.findall(rf"{name} = \"[\w.]*constant\"\(\) \{{value = (\d+) :", text)
        sizes.append(int(size))
    return sizes

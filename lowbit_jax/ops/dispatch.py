"""Which implementation computes a product, and why.

An implementation is a row of `_PATHS`, from `products`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lowbit_jax.numerics import E4M3, E5M2, QTensor, QuantSpec
from lowbit_jax.numerics.spec import E4M3_RULES
from lowbit_jax.ops import blackwell, products
from lowbit_jax.ops.dot_recipe import Product
from lowbit_jax.ops.products import Operand
from lowbit_jax.rotations import Hadamard, Rotation
from pallas_kernels import compat, rotate_quantize
from pallas_kernels.compat import cuda_capability
from pallas_kernels.folded import WORD, foldable
from pallas_kernels.partition import Partition
from pallas_kernels.rotate_quantize import Target
from pallas_kernels.rotate_quantize.op import PART_ROWS

SCOPE = "lowbit"  # first word of the name of the scope round each product; `explain` looks for it
_SEPARATOR = "|"

_TILE = 64  # what kernels pad to, at the least
_MOST_PADDING = 0.1


class Plan(NamedTuple):
    """The path that a product takes, and the reason for it, for people to read."""

    path: str
    reason: str


def has_float8_codes(spec: QuantSpec | None) -> bool:
    """Whether operands of this format are kept as float8 codes and one float32 scale."""
    return spec is not None and spec.format in (E4M3, E5M2) and spec.block_size == "tensor"


def choose(
    product: Product,
    a: QuantSpec | None,
    b: QuantSpec | None,
    implementation: str | None,
    capability: tuple[int, int] | None,
    *,
    rotation: Rotation | None = None,
    is_kept: bool = False,
    dtypes: Sequence[DTypeLike] = (jnp.bfloat16,),
    shape: tuple[int, int, int] | None = None,
    partition_obstacle: str | None = None,
) -> Plan:
    """Chooses the path of the product `a b^T`.

    Args:
      product: Which of the three it is, for messages.
      a: Format of the first operand as it enters the product, None if it is not quantized.
      b: Format of the second operand.
      implementation: Name of a path, which is then taken or refused; None: the first path that
        covers the formats and is fast on the device.
      capability: Of the CUDA device; None if there is none.
      rotation: Of both operands; None for none.
      is_kept: Whether the second operand is what the forward product used, as it is.
      dtypes: Of what is not quantized, and of the result.
      shape: Tokens of a device, n and k, the last of which masks run along; None: large and even.
      partition_obstacle: From `partition_obstacle`.

    Raises:
      ValueError: If no path has that name.
      NotImplementedError: If the path asked for does not cover the formats.
    """
    if implementation is not None:
        check_implementation(implementation)
        path = _PATHS[implementation]
        obstacle = path.formats_obstacle(a, b, rotation, is_kept, dtypes)
        obstacle = obstacle or path.device_limit(capability)
        if obstacle:
            raise NotImplementedError(
                f"quantized_dot: implementation={implementation!r} does not cover the product"
                f" {product!r} of {describe(a)} and {describe(b)}: {obstacle}; use"
                " implementation=None or 'dequantize'."
            )
        return Plan(implementation, "asked for by name")
    if a is None and b is None:
        return Plan("dequantize", "operands not quantized: a plain product")
    obstacles = []
    for name, path in _PATHS.items():
        obstacle = path.formats_obstacle(a, b, rotation, is_kept, dtypes)
        obstacle = obstacle or path.device_limit(capability)
        obstacle = obstacle or path.doubt(capability, shape, partition_obstacle)
        if not obstacle:
            reason = "; ".join(obstacles) or "formats and device allow it"
            if name == "fp8":
                of_operands = [
                    quantizer_obstacle(
                        spec, rotation, capability, dtypes[0], shape, partition_obstacle
                    )
                    for spec in (a, b)
                    if spec is not None
                ]
                why_xla = next(filter(None, of_operands), None)
                by = "rotate_quantize" if why_xla is None else f"XLA: {why_xla}"
                reason = f"{reason}; operands by {by}"
            return Plan(name, reason)
        obstacles.append(f"not {name}: {obstacle}")
    raise AssertionError("the last path covers everything")


def quantizer_obstacle(
    spec: QuantSpec,
    rotation: Rotation | None,
    capability: tuple[int, int] | None,
    dtype: DTypeLike,
    shape: tuple[int, int, int] | None,
    partition_obstacle: str | None = None,
) -> str | None:
    """Why `rotate_quantize` is not to make operands for the path "fp8", or None if it is.

    What XLA makes in its place has the same bits, but takes a pass for each layout; and of an array
    with a NaN or an infinity it makes NaNs alone, where the kernel spoils some rows and columns.

    Args:
      spec: Format of the operand.
      rotation: Of the product.
      capability: Of the CUDA device; None if there is none.
      dtype: Of `x`.
      shape: Tokens of a device, n and k; None: large and even.
      partition_obstacle: From `partition_obstacle`.
    """
    return (
        _operand_obstacle(spec, rotation, (dtype,))
        or compat.hopper_obstacle(capability)
        or _kernel_doubt(capability, shape, partition_obstacle)
    )


def partition_obstacle(arrays: Any, partition: Partition | None, tokens: int) -> str | None:
    """Why kernels do not run on the devices over which these arrays are spread, or None if they do.

    Types of arrays tell their mesh, and so does `jax.set_mesh`; not, though, that `in_shardings` of
    `jax.jit` will put arrays on one that lie on none: then each device gets the whole of them.

    Args:
      arrays: What a product takes, as traced.
      partition: How its tokens are cut, if that is known.
      tokens: All of them.
    """
    if partition is not None:
        if partition.count == 1 or tokens % (partition.count * PART_ROWS) == 0:
            return None
        return (
            f"{tokens} tokens on {partition.count} devices are no multiple of {PART_ROWS} for each"
        )
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(arrays)]
    for mesh in (*meshes, jax.sharding.get_abstract_mesh()):
        kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
        count = math.prod(size for size, kind in kinds if kind != jax.sharding.AxisType.Manual)
        if count > 1:
            return (
                f"jit may partition products over {count} devices, but no kernels; say how the"
                " tokens are cut (partition=...), or use jax.shard_map"
            )
    return None


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError unless it is None or the name of a path."""
    if implementation is not None and implementation not in _PATHS:
        raise ValueError(
            f"quantized_dot: implementation must be None or one of {', '.join(_PATHS)}, got"
            f" {implementation!r}."
        )


def describe(spec: QuantSpec | None) -> str:
    """The format in a few characters, "-" for none."""
    return "-" if spec is None else str(spec)


def run(
    product: Product,
    plan: Plan,
    a: Operand | QTensor,
    b: Operand | QTensor,
    specs: tuple[QuantSpec | None, QuantSpec | None],
    compute_dtype: DTypeLike,
    out_dtype: DTypeLike,
    *,
    partition: Partition | None = None,
    partition_obstacle: str | None = None,
    **epilogue,
) -> Float[Array, "p q"]:
    """`a b^T`: sums in float32, then rounded to `out_dtype`. The path "blackwell" takes `QTensor`s.

    Runs under a `jax.named_scope` that carries what `explain` reports. The path "hopper" takes
    `mask` and `inverse_hadamard` for `epilogue`, see `scaled_matmul`. With a `partition` the paths
    of kernels and of cuBLAS run on the part of each device, the others as the compiler cuts them;
    with a `partition_obstacle` all of them.
    """
    path = _PATHS[plan.path]
    run_path: Callable[..., Array] = path.run
    dtypes = jnp.dtype(compute_dtype), jnp.dtype(out_dtype)
    if plan.path == "fp8":
        is_cut = partition_obstacle is not None
        epilogue["by_cublas"] = _no_float8_unit(cuda_capability()) is None and not is_cut
    if partition is not None and path.is_for_parts:
        run_path = functools.partial(products.on_parts, path.run, partition)
        epilogue["sums_tokens"] = product == "dw"
    with product_scope(product, specs, plan):
        return cast(Any, run_path)(a, b, *dtypes, **epilogue)


def product_scope(
    product: Product, specs: tuple[QuantSpec | None, QuantSpec | None], plan: Plan
) -> AbstractContextManager[Any]:
    """The `jax.named_scope` round a product, whose name carries what `explain` reports."""
    return jax.named_scope(_SEPARATOR.join((f"{SCOPE} {product}", *map(describe, specs), *plan)))


class ScopeFields(NamedTuple):
    """What `run` wrote into the name of its scope."""

    product: str
    a: str
    b: str
    path: str
    reason: str


def parse_scope(name: str) -> ScopeFields | None:
    """Reads the name of a scope that `run` opened; None for any other."""
    head, *rest = name.split(_SEPARATOR)
    if not head.startswith(f"{SCOPE} ") or len(rest) != 4:
        return None
    return ScopeFields(head.removeprefix(f"{SCOPE} "), *rest)


def _hopper_formats(
    a: QuantSpec | None,
    b: QuantSpec | None,
    rotation: Rotation | None,
    is_kept: bool,
    dtypes: Sequence[DTypeLike],
) -> str | None:
    if a is None or b is None:
        return "both operands must be quantized"
    if is_kept:
        return "scales of the forward product run along the sum of this one"
    for spec in (a, b):
        if spec.block_size == "tensor":
            return f"{spec} has one scale a tensor"
        obstacle = foldable(spec) or _operand_obstacle(spec, rotation, dtypes)
        if obstacle:
            return obstacle
    return None


def nvfp4_obstacle(
    spec: QuantSpec, rotation: Rotation | None, dtypes: Sequence[DTypeLike]
) -> str | None:
    """Why `rotate_quantize` does not make an NVFP4 operand of this spec in bfloat16, or None."""
    if spec.scale not in E4M3_RULES:
        return f"{spec} has no e4m3 scales"
    return _operand_obstacle(spec, rotation, dtypes)


def _nvfp4_formats(
    a: QuantSpec | None,
    b: QuantSpec | None,
    rotation: Rotation | None,
    is_kept: bool,
    dtypes: Sequence[DTypeLike],
) -> str | None:
    """One operand for the kernel is enough; XLA makes what it does not cover."""
    made = [spec for spec in (a, None if is_kept else b) if spec is not None]
    obstacles = [nvfp4_obstacle(spec, rotation, dtypes) for spec in made]
    if not obstacles:
        return "no operand is quantized for it"
    return None if None in obstacles else obstacles[0]


def _operand_obstacle(
    spec: QuantSpec, rotation: Rotation | None, dtypes: Sequence[DTypeLike]
) -> str | None:
    """Why `rotate_quantize` does not make an operand of this format, whatever the device."""
    if not (rotation is None or isinstance(rotation, Hadamard)):
        return f"rotations are Hadamard transforms, got {rotation}"
    for dtype in dtypes:
        if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
            return f"arrays must be bfloat16 or float32, got {jnp.dtype(dtype)}"
    return rotate_quantize.obstacle(Target(spec, rotation))


def _float8_formats(a: QuantSpec | None, b: QuantSpec | None, *_) -> str | None:
    if a is None or b is None or not (has_float8_codes(a) and has_float8_codes(b)):
        return "both operands must be e4m3 or e5m2 with one scale a tensor"
    if a.format == b.format == E5M2:
        return "cuBLAS multiplies e5m2 by e4m3 only"
    return None


def _kernel_doubt(
    capability: tuple[int, int] | None,
    shape: tuple[int, int, int] | None,
    partition_obstacle: str | None,
) -> str | None:
    """Where kernels could run, but are not the first choice.

    On an H100, at 16384 tokens and sides of 2048 to 14336, Quartet's layers took less time through
    them than bfloat16 ones, and NVFP4's less than on the path "dequantize"; docs/kernels.md has the
    times.
    """
    del capability
    if partition_obstacle is not None:
        return partition_obstacle
    if compat.is_interpreting() or shape is None:
        return None
    if 0 in shape:
        return f"nothing to compute for (tokens, n, k) = {shape}"
    growth = math.prod(1 + padding(size) for size in shape) - 1
    if growth > _MOST_PADDING:
        return f"(tokens, n, k) = {shape} grows by {growth:.0%} in tiles of {_TILE}"
    if shape[2] % WORD:
        return f"masks are packed in words of {WORD} columns, got k={shape[2]}"
    return None


def padding(size: int) -> float:
    """By which part of it an axis grows where kernels pad it; 0 for an empty one."""
    return -(-size // _TILE) * _TILE / size - 1 if size else 0.0


def _float8_doubt(capability: tuple[int, int] | None, *_) -> str | None:
    return _no_float8_unit(capability)


def _no_float8_unit(capability: tuple[int, int] | None) -> str | None:
    if capability is None:
        return "no CUDA device"
    if capability < (8, 9):
        return f"FP8 needs compute capability 8.9, this device has {'.'.join(map(str, capability))}"
    return None


@dataclasses.dataclass(frozen=True)
class _Path:
    """One implementation; an obstacle is None, or the reason why not."""

    formats_obstacle: Callable[..., str | None]  # of what `choose` is told
    device_limit: Callable[[tuple[int, int] | None], str | None]  # where it cannot run
    doubt: Callable[..., str | None]  # of device, shape, mesh: where it is not the first choice
    run: Callable[..., Array]
    is_for_parts: bool = False  # whether it takes the part of a device, as the compiler cannot cut


def _nothing(*_) -> None:
    return None


def _only_for_codes(*_) -> str:
    return "it takes packed codes, see ops.coded_weight, and no quantized activations"


# By preference; what follows "dequantize", which covers everything, is taken by name only.
_PATHS: dict[str, _Path] = {
    "fp8": _Path(_float8_formats, _nothing, _float8_doubt, products.float8, True),
    "hopper": _Path(
        _hopper_formats, compat.hopper_obstacle, _kernel_doubt, products.by_kernel, True
    ),
    "hopper_bf16": _Path(
        _nvfp4_formats, compat.hopper_obstacle, _kernel_doubt, products.dequantized
    ),
    "dequantize": _Path(_nothing, _nothing, _nothing, products.dequantized),
    # Has not run on such a GPU.
    "blackwell": _Path(
        blackwell.formats_obstacle, blackwell.device_limit, _nothing, blackwell.block_scaled
    ),
    # Of a `CodedWeight`: `coded_dot` runs it.
    "mixed_matmul": _Path(_only_for_codes, _nothing, _nothing, products.dequantized),
}

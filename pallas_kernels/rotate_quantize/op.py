"""`rotate_quantize`: the operands of quantized products, in one or two passes over a matrix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from lowbit_jax.numerics import QuantSpec, quantize
from lowbit_jax.numerics.floats import SMALLEST_NORMAL
from lowbit_jax.numerics.random_bits import random_bits, row_seeds
from lowbit_jax.numerics.scales import block_scales
from lowbit_jax.numerics.spec import (
    E4M3_RULES,
    GAUSSIAN_ALPHA,
    GLOBAL_SCALE_RULES,
    POWER_OF_TWO_RULES,
    RMS_RULES,
)
from lowbit_jax.rotations.hadamard import Hadamard, hadamard_matrix
from pallas_kernels.folded import Folded, foldable
from pallas_kernels.partition import Partition, map_parts
from pallas_kernels.rotate_quantize.chunk import Side
from pallas_kernels.rotate_quantize.kernel import quantize_tiles
from pallas_kernels.rotate_quantize.nvfp4 import BLOCK
from pallas_kernels.rotate_quantize.reference import (
    NO_KEYS,
    Keys,
    RotatedQuantized,
    Target,
    finite_absmax,
    nvfp4_scale,
    requantize_obstacle,
    tensor_scale,
)
from pallas_kernels.rotate_quantize.registers import CHUNK, GROUP
from pallas_kernels.rotate_quantize.tuning import Config, choose_config
from pallas_kernels.rotate_quantize.units import find_units

_MAX_BLOCK = 128  # of a transform
PART_ROWS = 128  # each device has a multiple of them: whole tiles, and all that is rotated together
# The axis of x's rows in what a pass takes and gives; what is not listed has none.
_ROW_AXES = {
    **dict.fromkeys(("signs_columns", "seeds_rows", "draws_columns", "first_columns"), 0),
    **dict.fromkeys(("draws_rows", "values_columns", "statistic_rows", "mask"), 1),
    **dict.fromkeys(("values_rows", "statistic_columns"), 0),
}


def rotate_quantize(
    x: Float[Array, "..."],
    rows: Target | None,
    columns: Target | None,
    *,
    requantize: bool = False,
    mask_bound: float | None = None,
    row_keys: Keys = NO_KEYS,
    column_keys: Keys = NO_KEYS,
    reference: Float32[Array, ""] | None = None,
    partition: Partition | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> RotatedQuantized:
    """`fold(quantize(rotation.apply(x), spec))` of x and of its transpose.

    What `rotate_quantize_reference` computes. The same bits, where sums of the rotation are exact
    in float32. The scales of rows by the rule "rms" come from a float32 sum of squares and may
    differ in their last bits, those by "rms_nearest" by a factor of 2 where the sum lies within
    `2**-18` of a boundary between two powers of two; those by "std_floor" likewise, and where the
    largest entry of a block is M times its deviation, within `2**-18 + M**2 * 2**-25`. By these
    rules the mask may differ, too, in blocks `2**76` below the bound, whose squares underflow.
    Stochastic rounding takes the other neighbour at most once in `2**20` entries: of those below
    their block's scale it takes 22 bits of the distance to the lower level, and the factors of the
    transform and of "absmax_floor43" are one product, which rounds once.

    Of NVFP4 the factor of MS-EDEN comes from float32 sums of 16 products, which err by `2**-20`: of
    its scales, which are multiples of up to 15 steps, at most 1 in `2**15` takes the other
    neighbour. Numbers are divided by the scales of their blocks, by a GPU to 2 units of `2**-23`,
    so that it may turn ties.

    One pass reads x and writes both operands. Operands with one scale of all need an upper bound of
    `|x|`, from which it follows; if none is given, XLA finds it, where x is made if it can. A scale
    for each row takes one more pass, which only reads, and so does the one of rotated NVFP4, which
    follows from the largest rotated number. A matrix whose sides are no multiples of the
    tile is padded with zeros, which copies it.

    The one scale of formats with blocks allows for the worst that a transform can do, so that
    nothing saturates: numbers grow by `sqrt(block_size)`. Blocks fold without loss as long as their
    scale lies within 28 binades of the largest scale that this allows; smaller ones are rounded to
    multiples of `2**-29` of that scale, to nearest, which is biased where rounding is random. The
    worst case is far: of normal x, the largest scale of the columns of Quartet's forward pass,
    rotated twice, lies 3 to 4 binades below it. A bound that is too small saturates what exceeds
    it, by up to `2**40`. Beside a side that is rounded at random, numbers `2**80` below the bound
    may count as zeros, in rows with scales of their own, too.

    A NaN or an infinity makes NaN what is rotated together with it, along its row and along its
    column, in spans of 64, or 128 for such a transform; with `requantize` also the columns' spans
    of all that is NaN in its row. A scale of a row becomes NaN. The one of NVFP4 follows from the
    rest: without a rotation from all finite entries, also those beside it.

    Args:
      x: `(m, k)`, bfloat16 or float32.
      rows: What to quantize along k: e2m1 in blocks of 32 with power-of-two scales; mid-rise up to
        4 bits, e4m3 or e5m2 with one scale a row; e4m3 or e5m2 with one scale a tensor and no
        rotation; or NVFP4, e2m1 in blocks of 16 with e4m3 scales, folded into bfloat16, by any
        rounding but MS-EDEN's with larger correction blocks. Stochastic rounding for e2m1 only.
        With Hadamard transforms up to 128.
      columns: Along m.
      requantize: Makes the columns of the dequantized rows instead of x, if both have power-of-two
        scales, see `requantize_obstacle`.
      mask_bound: Makes the mask `|rotated row / scale| <= mask_bound`, as
        `lowbit_jax.numerics.estimators.mask_bound` gives it; None: no mask.
      row_keys: Randomness of the rows, as their target needs it.
      column_keys: Of the columns.
      reference: A finite upper bound of `|x|`, which formats with one scale a tensor take as its
        abs-max; from an earlier step for example. None: the abs-max of the finite entries. Scales
        of rows and those of NVFP4 do not depend on it; other operands are NaN if it is NaN or
        infinite.
      partition: How the rows of x lie on several devices, in a program that `jax.jit` partitions:
        each device makes its part of both operands, the same bits as one device would, but for
        scales of columns by the rule "rms", whose sums are taken in another order. None: one
        device, or a part of x that is quantized by itself, within `jax.shard_map`.
      config: Tile, of which the part of a device holds whole ones; None: from a table.
      interpret: Run on the CPU, within `pallas_kernels.testing.run_interpreted`.

    Returns:
      `RotatedQuantized`.

    Raises:
      ValueError: If x is no matrix, nothing is asked for, a key is missing, an axis is no multiple
        of what is rotated or quantized together, or the part of a device no multiple of 128 rows
        and of the tile's.
      NotImplementedError: If a target is not covered, see `obstacle`.
    """
    _check(x, rows, columns, requantize, mask_bound, row_keys, column_keys)
    parts = 1 if partition is None else partition.count
    if x.shape[0] % (parts * PART_ROWS) and parts > 1:
        raise ValueError(
            f"rotate_quantize: each of {parts} devices must have a multiple of {PART_ROWS} rows,"
            f" got x of shape {x.shape}; pad it or choose another partition."
        )
    targets = {"rows": rows, "columns": columns}
    targets = {name: target for name, target in targets.items() if target is not None}
    keys = {"rows": row_keys, "columns": column_keys}
    if config is None:
        config = choose_config(x.shape[0] // parts, _span(columns), _span(rows), x.dtype.itemsize)
    if parts > 1 and x.shape[0] // parts % config.tile_m:
        raise ValueError(
            f"rotate_quantize: each of {parts} devices must have whole tiles of {config.tile_m}"
            f" rows, got x of shape {x.shape}; choose another config or leave it None."
        )
    m, k = x.shape
    tile = (config.tile_m, config.tile_k)
    padded_m, padded_k = (-(-size // t) * t for size, t in zip(x.shape, tile, strict=True))
    padded = _padded(_padded(x, padded_m, 0), padded_k, 1)
    # Along the axis that is summed over, and across it.
    extents = {"rows": (k, padded_k, m, padded_m), "columns": (m, padded_m, k, padded_k)}
    if reference is None and any(map(_needs_reference, targets.values())):
        reference = finite_absmax(x)
    operands, scales = {}, {}
    if any(target.has_blocks for target in targets.values()):
        assert reference is not None  # as found
        operands["reference"] = reference.reshape(1)
        scales |= find_units(targets, requantize, reference).scales
    for name, target in targets.items():
        along, padded_along, across, padded_across = extents[name]
        operands["rotation_" + name] = _rotation_matrix(target.rotation)
        if target.is_signed:
            # As Hadamard draws them.
            rotation_key = keys[name].rotation
            assert rotation_key is not None  # as checked
            signs = jax.random.rademacher(rotation_key, (along,), x.dtype)
            operands["signs_" + name] = _padded(signs.astype(jnp.float32), padded_along)
        if target.is_random:
            rounding_key = keys[name].rounding
            assert rounding_key is not None  # as checked
            seeds = row_seeds(rounding_key, across)
            operands["seeds_" + name] = _padded(seeds, padded_across)
        if target.spec.rounding == "eden":
            rounding_key = keys[name].rounding
            assert rounding_key is not None  # as checked
            # As `eden_round` draws them: a number for each block.
            draws = random_bits(rounding_key, (across, along // BLOCK, 1))[:, :, 0].T
            draws = _padded(_padded(draws, padded_along // BLOCK), padded_across, 1)
            operands["draws_" + name] = draws
        if target.spec.block_size == "tensor":
            assert reference is not None  # as found
            scales[name] = tensor_scale(target.spec, reference)
        elif target.is_nvfp4 and target.rotation is None:
            scales[name] = nvfp4_scale(target.spec, finite_absmax(x))
        if name in scales and not target.has_blocks:
            operands["scales_" + name] = scales[name].reshape(1)
    column_target = targets.get("columns")
    if parts > 1 and column_target is not None and column_target.is_random:
        operands["first_columns"] = jnp.arange(0, m, m // parts, dtype=jnp.int32)

    def launch(sides, mask_bound=None, **options):
        made = ["values_" + n if side.is_written else "statistic_" + n for n, side in sides.items()]
        made += [] if mask_bound is None else ["mask"]
        axes = {name: _ROW_AXES.get(name) for name in operands}
        if "scales_rows" in operands and operands["scales_rows"].shape != (1,):
            axes["scales_rows"] = 0

        def of_part(x, operands):
            return quantize_tiles(
                x,
                sides.get("rows"),
                sides.get("columns"),
                operands,
                mask_bound=mask_bound,
                tile=tile,
                interpret=interpret,
                **options,
            )

        out_axes = {name: _ROW_AXES[name] for name in made}
        return map_parts(of_part, partition, (0, axes), out_axes)(padded, operands)

    rest = {name: target for name, target in targets.items() if name not in scales}
    if rest:
        sides = {name: Side(target, is_written=False) for name, target in rest.items()}
        found = launch(sides)
        for name, target in rest.items():
            along, _, across, _ = extents[name]
            found_here = found["statistic_" + name]
            if target.is_nvfp4:
                scales[name] = nvfp4_scale(target.spec, finite_absmax(found_here))
                operands["scales_" + name] = scales[name].reshape(1)
                continue
            scale = _row_scales(found_here, target.spec, along)
            operands["scales_" + name] = scale
            unit = 2 if target.spec.format.kind == "midrise" else 1
            scales[name] = scale[:across] * np.float32(1 / unit)
    sides = {name: Side(target) for name, target in targets.items()}
    out = launch(sides, mask_bound, requantize=requantize)
    folded = {}
    for name, target in targets.items():
        along, _, across, _ = extents[name]
        constant = _global_scale(target.spec)
        scale = scales[name] if constant is None else scales[name] * constant
        folded[name] = Folded(out["values_" + name][:across, :along], scale)
    mask = None
    if mask_bound is not None:
        mask = lax.bitcast_convert_type(out["mask"], jnp.uint32)[: k // GROUP, :m]
    return RotatedQuantized(folded.get("rows"), folded.get("columns"), mask)


def obstacle(target: Target) -> str | None:
    """Why there is no kernel for this target, or None if there is."""
    spec, rotation = target.spec, target.rotation
    if rotation is not None and rotation.block_size > _MAX_BLOCK:
        return f"transforms reach {_MAX_BLOCK} entries, got {rotation}"
    name = spec.format.name
    if spec.scale in POWER_OF_TWO_RULES:
        if name != "e2m1" or spec.block_size != GROUP:
            return f"power-of-two scales are those of e2m1 in blocks of {GROUP}, got {spec}"
        if spec.scale in RMS_RULES and spec.rounding != "nearest":
            return f"scales from mean squares are for rounding to nearest, got {spec}"
        return None
    if target.is_nvfp4:
        is_block = (name, spec.block_size, spec.block_rows) == ("e2m1", BLOCK, 1)
        if not is_block or spec.correction_block is not None:
            return f"e4m3 scales are those of single blocks of {BLOCK} of e2m1, got {spec}"
        return None
    if spec.scale not in ("rms", "absmax") or isinstance(spec.block_size, int):
        return f"other formats have one scale a row or a tensor by 'rms' or 'absmax', got {spec}"
    if spec.block_rows != 1 or spec.rounding != "nearest":
        return f"formats with one scale a row or a tensor are rounded to nearest, got {spec}"
    if name not in ("midrise1", "midrise2", "midrise3", "midrise4", "e4m3", "e5m2"):
        return f"formats with one scale a row are mid-rise up to 4 bits and FP8, got {spec}"
    if spec.block_size == "tensor" and (rotation is not None or name not in ("e4m3", "e5m2")):
        return f"one scale a tensor is for FP8 without a rotation, got {target}"
    return None


def _check(x, rows, columns, requantize, mask_bound, row_keys, column_keys) -> None:
    if x.ndim != 2 or x.dtype not in (jnp.bfloat16, jnp.float32) or not x.size:
        raise ValueError(
            "rotate_quantize: x must be a matrix of bfloat16 or float32 with at least one entry,"
            f" got {x.dtype} {x.shape}; reshape and cast it."
        )
    if rows is None and columns is None:
        raise ValueError(
            "rotate_quantize: rows and columns are both None; ask for one operand at least."
        )
    for name, target, keys, size in (
        ("row", rows, row_keys, x.shape[1]),
        ("column", columns, column_keys, x.shape[0]),
    ):
        if target is None:
            continue
        text = obstacle(target)
        if text is not None:
            raise NotImplementedError(f"rotate_quantize: {text}; {_advice(target)}.")
        multiple = max(target.transform, _group_size(target.spec))
        if size % multiple:
            raise ValueError(
                f"rotate_quantize: the axis that {name}s run along must be a multiple of {multiple}"
                f" for {target}, got x of shape {x.shape}; pad it."
            )
        for kind, key, is_needed in (
            ("rotation", keys.rotation, target.is_signed),
            ("rounding", keys.rounding, target.spec.needs_key),
        ):
            if is_needed and key is None:
                raise ValueError(
                    f"rotate_quantize: {target} is random, got {name}_keys.{kind}=None; pass"
                    f" {name}_keys=Keys(...), new every step."
                )
    if mask_bound is not None and (rows is None or x.shape[1] % GROUP):
        raise ValueError(
            f"rotate_quantize: the mask is one of the rows, in words of {GROUP} columns, got"
            f" rows={rows} and x of shape {x.shape}; pass rows, pad x or leave mask_bound at None."
        )
    if mask_bound is not None and rows is not None and rows.is_nvfp4:
        raise NotImplementedError(
            f"rotate_quantize: there is no mask of {rows.spec}; use rotate_quantize_reference."
        )
    if not requantize:
        return
    if rows is None or columns is None:
        raise ValueError(
            f"rotate_quantize: requantize makes columns of the rounded rows, got rows={rows} and"
            f" columns={columns}; pass both."
        )
    text = requantize_obstacle(rows, columns)
    if text is not None:
        raise NotImplementedError(f"rotate_quantize: {text}; use rotate_quantize_reference.")


def _advice(target: Target) -> str:
    text = foldable(target.spec)
    return "use rotate_quantize_reference" if text is None else f"{text}, which is no FP8 matrix"


def _span(target: Target | None) -> int:
    """Entries along its axis that a tile must hold whole."""
    return CHUNK if target is None else max(CHUNK, target.transform)


def _needs_reference(target: Target) -> bool:
    return target.has_blocks or target.spec.block_size == "tensor"


def _group_size(spec: QuantSpec) -> int:
    return spec.block_size if isinstance(spec.block_size, int) else 1


def _padded(array, size: int, axis: int = 0):
    """With zeros up to a size; not touched if it has it."""
    missing = size - array.shape[axis]
    if not missing:
        return array
    return jnp.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)])


def _rotation_matrix(rotation: Hadamard | None):
    """Without signs: bfloat16 `(64, 64)`, or `(64, 128)`, followed by its negative."""
    if rotation is None:
        return jnp.asarray(np.eye(CHUNK), jnp.bfloat16)
    block = hadamard_matrix(min(rotation.block_size, CHUNK))
    count = CHUNK // len(block)
    matrix = np.kron(np.eye(count, dtype=np.int8), block)
    if rotation.block_size > CHUNK:
        matrix = np.concatenate([matrix, -matrix], axis=1)
    return jnp.asarray(matrix, jnp.bfloat16)


@functools.lru_cache
def _global_scale(spec: QuantSpec) -> np.float32 | None:
    """That of what `quantize` stores for the whole array which is a constant; None for none."""
    if spec.scale in E4M3_RULES:
        return None if spec.gain == 1 else np.float32(spec.gain)
    if spec.scale not in GLOBAL_SCALE_RULES:
        return None
    with jax.ensure_compile_time_eval():
        nearest = dataclasses.replace(spec, rounding="nearest")
        return np.float32(quantize(jnp.ones((1, GROUP)), nearest).global_scale)


def _row_scales(statistic, spec: QuantSpec, length: int):
    """The scale of each row from what tiles `(tiles, rows)` found; of rows of this length."""
    if spec.scale == "absmax":
        # That of the parts' maxima.
        return block_scales(statistic.T, spec, -1).scales.reshape(-1)
    mean_square = jnp.sum(statistic, axis=0) * np.float32(1 / length)
    alpha = GAUSSIAN_ALPHA[spec.format.name] / spec.format.max
    scales = jnp.sqrt(mean_square) * np.float32(alpha)
    scales = jnp.where(scales >= SMALLEST_NORMAL, scales, np.float32(0))
    return jnp.where(jnp.isfinite(mean_square), scales, np.float32(np.nan))

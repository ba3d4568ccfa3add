"""`rotate_quantize`: the operands of quantized products, in one or a few passes over a matrix."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from lowbit_jax.numerics import QuantSpec, quantize
from lowbit_jax.numerics.floats import SMALLEST_NORMAL, power_of_two
from lowbit_jax.numerics.random_bits import row_seeds
from lowbit_jax.numerics.scales import block_scales, is_nan_scale
from lowbit_jax.numerics.spec import GAUSSIAN_ALPHA, GLOBAL_SCALE_RULES, POWER_OF_TWO_RULES
from lowbit_jax.rotations.hadamard import Hadamard, hadamard_matrix
from pallas_kernels.folded import Folded, row_scales
from pallas_kernels.rotate_quantize.chunk import CHUNK, GROUP, Side, statistic_of
from pallas_kernels.rotate_quantize.kernel import quantize_tiles
from pallas_kernels.rotate_quantize.reference import NO_KEYS, Keys, RotatedQuantized, Target
from pallas_kernels.rotate_quantize.tuning import Config, choose_config

_MAX_BLOCK = 128  # of a transform


def rotate_quantize(
    x: Float[Array, "..."],
    rows: Target | None,
    columns: Target | None,
    *,
    requantize: bool = False,
    mask_bound: float | None = None,
    row_keys: Keys = NO_KEYS,
    column_keys: Keys = NO_KEYS,
    row_reference: Float32[Array, " m"] | None = None,
    column_reference: Float32[Array, " k"] | None = None,
    emit_references: bool = False,
    config: Config | None = None,
    interpret: bool = False,
) -> RotatedQuantized:
    """`fold(quantize(rotation.apply(x), spec))` of x and of its transpose.

    What `rotate_quantize_reference` computes. The same bits, where sums of the rotation are exact
    in float32. The scales of rows by the rule "rms" come from a float32 sum of squares and may
    differ in their last bits, those by "rms_nearest" and "std_floor" by a factor of 2 where the sum
    lies within `2**-18` of a boundary between two powers of two. Stochastic rounding takes 22 bits
    of the distance to the lower level for entries below their block's scale: at most once in
    `2**22` of those it takes the other level.

    One pass reads x and writes both operands, if the references are given; exact ones need one
    more pass, which only reads. A matrix whose sides are no multiples of the tile is padded with
    zeros, which copies it.

    A NaN or an infinity makes the scales of its row and its column NaN, or some of their values if
    references were given; with `requantize` also those of the columns that were rotated together
    with it, in spans of 64 or 128.

    Args:
      x: `(m, k)`, bfloat16 or float32.
      rows: What to quantize along k: e2m1 in blocks of 32 with power-of-two scales; or mid-rise up
        to 4 bits or e4m3 with one scale a row or a tensor. Stochastic rounding for e2m1 only. With
        Hadamard transforms up to 128.
      columns: Along m.
      requantize: Makes the columns of the dequantized rows, in the dtype of x, instead of x.
      mask_bound: Makes the mask `|rotated row / scale| <= mask_bound`, as
        `lowbit_jax.numerics.estimators.mask_bound` gives it; None: no mask.
      row_keys: Randomness of the rows, as their target needs it.
      column_keys: Of the columns.
      row_reference: float32 `(m,)`, in place of the largest scale of the blocks of each row, a
        power of two then, or of the scale of the row. From an earlier step for example, times 2 or
        4 as headroom: values above it saturate.
      column_reference: float32 `(k,)`, the same for the columns.
      emit_references: Returns the references of this x also where others were given.
      config: Tile; None: from a table.
      interpret: Run on the CPU, within `pallas_kernels.testing.run_interpreted`.

    Returns:
      `RotatedQuantized`.

    Raises:
      ValueError: If x is no matrix, nothing is asked for, a key is missing or an axis is no
        multiple of what is rotated or quantized together.
      NotImplementedError: If a target is not covered, see `obstacle`.
    """
    _check(x, rows, columns, requantize, mask_bound, row_keys, column_keys)
    m, k = x.shape
    span_m, span_k = (
        CHUNK if target is None else max(CHUNK, _block_size(target)) for target in (columns, rows)
    )
    config = config or choose_config(m, span_m, span_k, x.dtype.itemsize)
    tile = (config.tile_m, config.tile_k)
    padded_m, padded_k = (-(-size // t) * t for size, t in zip(x.shape, tile, strict=True))
    padded = jnp.pad(x, ((0, padded_m - m), (0, padded_k - k)))
    extents = {"rows": (k, padded_k, m, padded_m), "columns": (m, padded_m, k, padded_k)}
    targets = {"rows": rows, "columns": columns}
    targets = {name: target for name, target in targets.items() if target is not None}
    keys = {"rows": row_keys, "columns": column_keys}
    given = {"rows": row_reference, "columns": column_reference}
    references: dict[str, Any] = {name: given[name] for name in targets}
    operands = {}
    for name, target in targets.items():
        along, padded_along, across, padded_across = extents[name]
        operands["rotation_" + name] = _rotation_matrix(target.rotation)
        if _is_signed(target):
            rotation_key = keys[name].rotation
            assert rotation_key is not None  # as checked
            # As Hadamard draws them.
            signs = jax.random.rademacher(rotation_key, (along,), x.dtype).astype(jnp.float32)
            operands["signs_" + name] = jnp.pad(signs, (0, padded_along - along), constant_values=1)
        rounding_key = keys[name].rounding
        if target.spec.rounding == "stochastic":
            assert rounding_key is not None  # as checked
            seeds = row_seeds(rounding_key, across)
            operands["seeds_" + name] = jnp.pad(seeds, (0, padded_across - across))

    def launch(written, emitted, mask_bound=None):
        """One pass; only with what it needs."""
        of_rows = requantize and "columns" in (*written, *emitted)
        needed = [name for name in targets if name in (*written, *emitted)]
        if of_rows and "rows" not in needed:
            needed = ["rows", *needed]
        inputs = {}
        for name in needed:
            for kind in ("rotation_", "signs_"):
                if kind + name in operands:
                    inputs[kind + name] = operands[kind + name]
            if "seeds_" + name in operands and (name in written or (name == "rows" and of_rows)):
                inputs["seeds_" + name] = operands["seeds_" + name]
            if name not in written:
                continue
            _, _, across, padded_across = extents[name]
            scales, spec = references[name], targets[name].spec
            if spec.scale in POWER_OF_TWO_RULES:
                scales = row_scales(scales, spec)
            inputs["scales_" + name] = jnp.pad(
                scales, (0, padded_across - across), constant_values=1
            )
        sides = {
            name: Side(
                spec=targets[name].spec,
                block_size=_block_size(targets[name]),
                is_signed=_is_signed(targets[name]),
                is_written=name in written,
                is_emitted=name in emitted,
                is_given=given[name] is not None,
            )
            for name in needed
        }
        out = quantize_tiles(
            padded,
            sides.get("rows"),
            sides.get("columns"),
            inputs,
            requantize=of_rows,
            mask_bound=mask_bound,
            tile=tile,
            interpret=interpret,
        )
        found = {}
        for name in emitted:
            along, _, across, _ = extents[name]
            statistic = out["statistic_" + name][:, :across]
            found[name] = _reference(statistic, targets[name].spec, along)
        return out, found

    missing = [name for name in targets if given[name] is None]
    if missing:
        references |= launch([], missing)[1]
    emitted = [name for name in targets if name not in missing] if emit_references else []
    out, found = launch(list(targets), emitted, mask_bound)
    returned = {name: references[name] for name in missing} | found
    folded = {}
    for name, target in targets.items():
        along, _, across, _ = extents[name]
        scales = row_scales(references[name], target.spec)
        constant = _global_scale(target.spec)
        if constant is not None:
            scales = scales * constant
        folded[name] = Folded(out["values_" + name][:across, :along], scales)
    mask = None
    if mask_bound is not None:
        mask = lax.bitcast_convert_type(out["mask"], jnp.uint32)[: k // GROUP, :m]
    return RotatedQuantized(
        folded.get("rows"),
        folded.get("columns"),
        mask,
        returned.get("rows"),
        returned.get("columns"),
    )


def obstacle(target: Target) -> str | None:
    """Why there is no kernel for this target, or None if there is."""
    spec, rotation = target.spec, target.rotation
    if rotation is not None and rotation.block_size > _MAX_BLOCK:
        return f"transforms reach {_MAX_BLOCK} entries, got {rotation}"
    name = spec.format.name
    if spec.scale in POWER_OF_TWO_RULES:
        if name != "e2m1" or spec.block_size != GROUP:
            return f"power-of-two scales are those of e2m1 in blocks of {GROUP}, got {spec}"
        return None
    if spec.scale not in ("rms", "absmax") or isinstance(spec.block_size, int):
        return f"other formats have one scale a row or a tensor by 'rms' or 'absmax', got {spec}"
    if spec.block_rows != 1 or spec.rounding != "nearest":
        return f"formats with one scale a row are rounded to nearest, got {spec}"
    if name not in ("midrise1", "midrise2", "midrise3", "midrise4", "e4m3"):
        return f"formats with one scale a row are mid-rise up to 4 bits and e4m3, got {spec}"
    return None


def requantize_obstacle(rows: Target) -> str | None:
    """Why rows of this target cannot be quantized again along the other axis, or None."""
    if rows.spec.scale in POWER_OF_TWO_RULES and rows.spec.scale not in GLOBAL_SCALE_RULES:
        return None
    return (
        "only rows that bfloat16 holds, those of power-of-two scales alone, are quantized again,"
        f" got {rows.spec}"
    )


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
            raise NotImplementedError(f"rotate_quantize: {text}; use rotate_quantize_reference.")
        multiple = max(_block_size(target), _group_size(target.spec))
        if size % multiple:
            raise ValueError(
                f"rotate_quantize: the axis that {name}s run along must be a multiple of {multiple}"
                f" for {target}, got x of shape {x.shape}; pad it."
            )
        for kind, key, is_needed in (
            ("rotation", keys.rotation, _is_signed(target)),
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
    if not requantize:
        return
    if rows is None or columns is None:
        raise ValueError(
            f"rotate_quantize: requantize makes columns of the rounded rows, got rows={rows} and"
            f" columns={columns}; pass both."
        )
    text = requantize_obstacle(rows)
    if text is not None:
        raise NotImplementedError(f"rotate_quantize: {text}; use rotate_quantize_reference.")


def _block_size(target: Target) -> int:
    return 1 if target.rotation is None else target.rotation.block_size


def _group_size(spec: QuantSpec) -> int:
    return spec.block_size if isinstance(spec.block_size, int) else 1


def _is_signed(target: Target) -> bool:
    return target.rotation is not None and target.rotation.needs_key


def _rotation_matrix(rotation: Hadamard | None):
    """bfloat16 `(span, span)`, without signs."""
    if rotation is None:
        return jnp.eye(CHUNK, dtype=jnp.bfloat16)
    block = hadamard_matrix(rotation.block_size)
    count = max(1, CHUNK // rotation.block_size)
    return jnp.asarray(np.kron(np.eye(count, dtype=np.int8), block), jnp.bfloat16)


def _global_scale(spec: QuantSpec):
    """What `quantize` stores for the whole array, a constant of these specs; None for none."""
    if spec.scale not in GLOBAL_SCALE_RULES:
        return None
    nearest = dataclasses.replace(spec, rounding="nearest")
    return quantize(jnp.ones((1, GROUP)), nearest).global_scale


def _reference(statistic, spec: QuantSpec, length: int):
    """The reference of each row from what tiles `(tiles, rows)` emitted; of rows of this length."""
    kind = statistic_of(spec)
    if kind == "scale":
        return jnp.max(statistic, axis=0)
    if kind == "absmax":
        # The scale of a row or tensor, and the largest of its blocks, is that of its parts' maxima.
        axis = (-2, -1) if spec.block_size == "tensor" else -1
        scales = block_scales(statistic.T, spec, axis).scales
        if spec.scale in POWER_OF_TWO_RULES:
            exponents = jnp.maximum(scales.astype(jnp.int32) - 127, -126)
            largest = power_of_two(jnp.minimum(exponents, 127))
            scales = jnp.where(is_nan_scale(scales), np.float32(np.nan), largest)
        return jnp.broadcast_to(scales.reshape(-1), statistic.shape[1:])
    mean_square = jnp.sum(statistic, axis=0) * np.float32(1 / length)
    alpha = GAUSSIAN_ALPHA[spec.format.name] / spec.format.max
    scales = jnp.sqrt(mean_square) * np.float32(alpha)
    scales = jnp.where(scales >= SMALLEST_NORMAL, scales, np.float32(0))
    return jnp.where(jnp.isfinite(mean_square), scales, np.float32(np.nan))

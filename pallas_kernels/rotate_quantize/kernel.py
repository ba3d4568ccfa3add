"""One pass over a matrix that rotates it, rounds it and folds it, along both axes.

A block reads a tile of x (m, k) and writes the same tile of two operands: the rows, quantized along
k, and the columns, quantized along m and stored as (k, m), as the tensor cores want FP8. The
rotations are products with matrices of +1 and -1. The one along m takes the tile in shared memory
as a transposed operand, so that nothing is moved to transpose it; without a rotation the matrix is
the identity. Signs of the coordinates are not part of the matrices: the tile in shared memory is
multiplied by those of both axes before it is rotated, so that along the other axis they are signs
of whole rows, which are multiplied by once more where the rows are scaled. A power of two goes with
the signs where numbers are rounded at random, see `units.py`. x in float32 is loaded to registers
and stored as three bfloat16 terms, of which it is the sum. Each side works through the tile in
chunks of 64 x 64, see `chunk.py` and `nvfp4.py`. One warpgroup a block and no pipeline: many small
blocks hid latency better on an H100 than a persistent ring of tiles.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.compat import launch, load, plgpu, swizzled
from pallas_kernels.rotate_quantize.chunk import (
    Side,
    quantize_blocks,
    quantize_rows,
    statistic,
    stored,
)
from pallas_kernels.rotate_quantize.nvfp4 import BLOCK, BLOCKS, quantize_nvfp4
from pallas_kernels.rotate_quantize.registers import (
    CHUNK,
    GROUP,
    along_columns,
    along_rows,
    cut_to_bfloat16,
)
from pallas_kernels.rotate_quantize.units import ROUNDED_POWER, Units, find_units

_SHARED_BYTES = 227 * 1024 - 1024  # of Hopper, less what barriers and alignment take
_TERMS = {jnp.dtype(jnp.bfloat16): 1, jnp.dtype(jnp.float32): 3}  # of bfloat16 in an entry of x


# So that equal launches of a program are lowered once.
@functools.partial(
    jax.jit,
    static_argnames=("rows", "columns", "requantize", "mask_bound", "tile", "interpret"),
)
def quantize_tiles(
    x: jax.Array,
    rows: Side | None,
    columns: Side | None,
    operands: dict[str, jax.Array],
    *,
    requantize: bool = False,
    mask_bound: float | None = None,
    tile: tuple[int, int],
    interpret: bool,
) -> dict[str, jax.Array]:
    """One launch over x `(m, k)`, bfloat16 or float32, m and k multiples of the tile.

    Args:
      x: The matrix.
      rows: What is done along k; None: nothing.
      columns: Along m.
      operands: What the sides need, its names ending in "rows" and "columns": "rotation_*",
        bfloat16 `(64, span)`: the transform of 64 entries and, for one of 128, its negative;
        "signs_*", float32, of each coordinate along the axis, if signed; "seeds_*" of the random
        bits of each row, if it is rounded at random; "draws_*", uint32 `(blocks of a row, rows of
        the operand)`, if scales are; "first_columns", int32 `(1,)`, where x is a part of a larger
        matrix: its first row there, a multiple of 64, by which random bits are drawn; unless blocks
        have power-of-two scales "scales_*", float32: `(rows of the operand,)`, or `(1,)` for one
        scale of all; and "reference", float32 `(1,)`, a bound of `|x|`, if they have.
      requantize: Makes the columns of the rounded rows; x is not used for them.
      mask_bound: Writes the mask `|x / scale| <= mask_bound` of the rotated rows; None: none.
      tile: Of one block.
      interpret: On the CPU.

    Returns:
      By name: "values_rows" `(m, k)`, "values_columns" `(k, m)`, FP8 or bfloat16; "statistic_rows"
      `(k tiles, m)` and "statistic_columns" `(m tiles, k)`, float32, of sides that are not written;
      "mask" int32 `(k / 32, m)`.
    """
    m, k = x.shape
    tile_m, tile_k = tile
    sides = {"rows": rows, "columns": columns}
    sides = {name: side for name, side in sides.items() if side is not None}
    # Rows of the tile of each operand, and columns, along which it is rotated.
    extents = {"rows": (tile_m, tile_k), "columns": (tile_k, tile_m)}
    shapes = {"rows": (m, k), "columns": (k, m)}
    shared_rotation = len({side.target.transform for side in sides.values()}) < len(sides)
    # Two operands of two bytes an entry leave through one buffer, so that two blocks share an SM.
    wide = [side for side in sides.values() if side.is_written and side.target.is_nvfp4]
    takes_turns = len(wide) == 2 and tile_m == tile_k
    # The axes with signs that x is multiplied by; rounded rows are, where they are made.
    signed = {name for name, side in sides.items() if side.is_signed}
    flipped = signed - {"columns"} if requantize else signed
    terms = _TERMS[jnp.dtype(x.dtype)]
    inputs, out = {"x": x}, {}
    targets = {name: side.target for name, side in sides.items() if side.is_written}
    if any(target.has_blocks for target in targets.values()):
        inputs["reference"] = operands["reference"]
    # Its terms, if it has more than one, are made on the way to shared memory.
    shape = tile if terms == 1 else (terms, *tile)
    scratch = {"x": swizzled(shape, jnp.bfloat16, CHUNK)}
    for name, side in sides.items():
        height, width = extents[name]
        if not (name == "columns" and shared_rotation):
            inputs["rotation_" + name] = operands["rotation_" + name]
            shape = operands["rotation_" + name].shape
            scratch["rotation_" + name] = swizzled(shape, jnp.bfloat16, CHUNK)
        if name == "rows" and side.is_signed:
            # Twice, for a vector is loaded in one layout only.
            inputs["turned_rows"] = operands["signs_rows"]
        for kind in ("signs_", "scales_", "seeds_"):
            if (kind, name) == ("signs_", "rows") and (requantize or len(sides) == 1):
                continue
            if kind + name in operands:
                inputs[kind + name] = operands[kind + name]
        if side.is_written:
            if "draws_" + name in operands:
                inputs["draws_" + name] = operands["draws_" + name]
            out["values_" + name] = jax.ShapeDtypeStruct(shapes[name], side.storage)
            if not (name == "columns" and takes_turns):
                # 64 bytes to a swizzle: of 128, a chunk's halves could not be stored one by one.
                scratch["values_" + name] = swizzled((height, width), side.storage, CHUNK)
        else:
            shape = (shapes[name][1] // width, shapes[name][0])
            out["statistic_" + name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if mask_bound is not None:
        out["mask"] = jax.ShapeDtypeStruct((k // GROUP, m), jnp.int32)
    if requantize and sides["rows"].span > CHUNK:
        # Else each chunk takes the place of the one it is from.
        scratch["rounded"] = swizzled(tile, jnp.bfloat16, CHUNK)
    size = sum(math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize for ref in scratch.values())
    if size > _SHARED_BYTES:
        raise NotImplementedError(
            f"rotate_quantize: a block has {_SHARED_BYTES} bytes of shared memory, a tile of {tile}"
            f" in {x.dtype} takes {size}; cast x to bfloat16 or use smaller transforms."
        )
    if "first_columns" in operands:
        inputs["first_columns"] = operands["first_columns"]
    copied = [name for name in scratch if name in inputs and (name != "x" or terms == 1)]
    scratch["barrier"] = plgpu.Barrier(num_arrivals=len(copied))

    def body(*refs):
        given = dict(zip(inputs, refs, strict=False))
        made = dict(zip(out, refs[len(inputs) :], strict=False))
        local = dict(zip(scratch, refs[len(inputs) + len(out) :], strict=True))
        tile_index = {"rows": lax.axis_index("m"), "columns": lax.axis_index("k")}
        first = {name: tile_index[name] * extents[name][0] for name in tile_index}
        across = {"rows": "columns", "columns": "rows"}

        def counted(name, column):
            """Where the column of an operand lies in that of the whole matrix."""
            if name == "columns" and "first_columns" in given:
                return given["first_columns"][0] + column
            return column

        x_tile = given["x"].at[pl.ds(first["rows"], tile_m), pl.ds(first["columns"], tile_k)]
        for name in copied:
            source = x_tile if name == "x" else given[name]
            plgpu.copy_gmem_to_smem(source, local[name], local["barrier"])
        units = Units(None, None, {}, {})
        if "reference" in given:
            # As a vector of equal numbers, for the lowering knows no bits of scalars.
            reference = jnp.full((CHUNK,), given["reference"][0])
            units = find_units(targets, requantize, reference)
        scales, seeds = {}, {}
        for name, side in sides.items():
            height, _ = extents[name]
            if side.target.is_nvfp4:  # loads what it needs for each chunk
                continue
            if "scales_" + name in given:
                ref = given["scales_" + name]
                if ref.shape == (1,):  # one for all chunks
                    scales[name] = [ref[0]] * (height // CHUNK)
                else:
                    scales[name] = _load_chunks(ref, first[name], height)
            if "seeds_" + name in given:
                seeds[name] = _load_chunks(given["seeds_" + name], first[name], height)
        # Of the coordinates along each axis, as rows of the chunks across it.
        signs = {
            axis: _load_chunks(given["signs_" + axis], first[across[axis]], extents[axis][1])
            for axis in signed
            if "signs_" + axis in given
        }
        tile_signs = {"rows": None, "columns": signs["columns"] if "columns" in flipped else None}
        if units.power is not None:
            of_columns = tile_signs["columns"] or [np.float32(1)] * (tile_m // CHUNK)
            tile_signs["columns"] = [units.power * sign for sign in of_columns]
        if "rows" in flipped:
            tile_signs["rows"] = _load_chunks(given["turned_rows"], first["columns"], tile_k, 0)
        if terms == 1:
            plgpu.barrier_wait(local["barrier"])
            parts = [local["x"]]
            if flipped or units.power is not None:
                _store_terms(parts, parts[0], tile, **tile_signs)
        else:
            parts = [local["x"].at[t] for t in range(terms)]
            _store_terms(parts, x_tile, tile, **tile_signs)
            plgpu.barrier_wait(local["barrier"])
        rounded = local.get("rounded", parts[0])
        staged = {"values_columns": local.get("values_rows"), **local}

        def quantize_chunk(name, parts, i, j, found):
            """Stores one chunk, or returns the statistic of its rows with the one found so far."""
            side = sides[name]
            rotation = local["rotation_rows" if shared_rotation else "rotation_" + name]
            y = _rotate(parts, rotation, side, i, j, is_transposed=name == "columns")
            if not side.is_written:
                return statistic(found, y, side)
            here = (pl.ds(i * CHUNK, CHUNK), pl.ds(j * CHUNK, CHUNK))
            column = first[across[name]] + j * CHUNK
            options = {"mask_bound": mask_bound if name == "rows" else None, "sign": None}
            if not requantize and across[name] in flipped:
                options["sign"] = signs[across[name]][i]
            if side.target.has_blocks:
                again = None
                if name == "rows" and requantize:
                    again = jnp.ones((CHUNK,), jnp.float32)
                    if "columns" in signed:
                        again = signs["columns"][i]
                    if targets["columns"].is_random:
                        again = again * ROUNDED_POWER
                seed = seeds[name][i] if name in seeds else None
                chunk = quantize_blocks(
                    y,
                    side,
                    units.inverses[name],
                    seed=seed,
                    column=column if seed is None else counted(name, column),
                    again=again,
                    interpret=interpret,
                    **options,
                )
            else:
                if units.inverse is not None:
                    sign = options["sign"]
                    options["sign"] = units.inverse if sign is None else units.inverse * sign
                chunk = quantize_rows(y, side, scales[name][i], **options)
            for half, word in enumerate(chunk.mask):
                row = pl.ds(first[name] + i * CHUNK, CHUNK)
                made["mask"][lax.div(column, GROUP) + half, row] = word
            if chunk.again is not None:
                plgpu.commit_smem()  # the warpgroup has read what is overwritten
                rounded[here] = chunk.again
            local["values_" + name][here] = stored(chunk.values, side.storage, interpret=interpret)
            return None

        def quantize_nvfp4_chunks(name, parts):
            """Stores all chunks, in a loop: so much code for each would take long to compile."""
            side, shape = sides[name], [size // CHUNK for size in extents[name]]
            rotation = local["rotation_rows" if shared_rotation else "rotation_" + name]

            def step(t, _):
                i, j = lax.div(t, shape[1]), lax.rem(t, shape[1])
                row, column = first[name] + i * CHUNK, first[across[name]] + j * CHUNK
                y = _rotate(parts, rotation, side, i, j, is_transposed=name == "columns")
                sign, seed, draws = units.inverse, None, None
                if across[name] in flipped:
                    (sign,) = _load_chunks(given["signs_" + across[name]], row, CHUNK)
                    sign = sign if units.inverse is None else units.inverse * sign
                if side.target.is_random:
                    (seed,) = _load_chunks(given["seeds_" + name], row, CHUNK)
                if "draws_" + name in given:
                    of_blocks = (
                        given["draws_" + name].at[lax.div(column, BLOCK) + b] for b in range(BLOCKS)
                    )
                    draws = [_load_chunks(ref, row, CHUNK)[0] for ref in of_blocks]
                staged["values_" + name][pl.ds(i * CHUNK, CHUNK), pl.ds(j * CHUNK, CHUNK)] = (
                    quantize_nvfp4(
                        y,
                        side,
                        given["scales_" + name][0],
                        sign=sign,
                        seed=seed,
                        column=column if seed is None else counted(name, column),
                        draws=draws,
                        interpret=interpret,
                    )
                )

            lax.fori_loop(0, math.prod(shape), step, None)

        def quantize_chunks(name, parts):
            height, width = extents[name]
            for i in range(height // CHUNK):
                found = None
                for j in range(width // CHUNK):
                    found = quantize_chunk(name, parts, i, j, found)
                if found is not None:
                    row = pl.ds(first[name] + i * CHUNK, CHUNK)
                    made["statistic_" + name][tile_index[across[name]], row] = found

        def quantize_side(name, parts):
            height, width = extents[name]
            if sides[name] in wide:
                quantize_nvfp4_chunks(name, parts)
            else:
                quantize_chunks(name, parts)
            plgpu.commit_smem()
            if sides[name].is_written:
                here = (pl.ds(first[name], height), pl.ds(first[across[name]], width))
                plgpu.copy_smem_to_gmem(staged["values_" + name], made["values_" + name].at[here])

        if rows is not None:
            quantize_side("rows", parts)
        if takes_turns:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if columns is not None:
            quantize_side("columns", [rounded] if requantize else parts)
        plgpu.wait_smem_to_gmem(0)

    results = launch(
        body,
        name="rotate_quantize",
        out_type=tuple(out.values()),
        scratch_types=list(scratch.values()),
        grid=(m // tile_m, k // tile_k),
        grid_names=("m", "k"),
        num_threads=1,
        interpret=interpret,
    )(*inputs.values())
    return dict(zip(out, results, strict=True))


def _load_chunks(ref, first, length, reduced=1):
    """The entries of a vector in global memory that belong to each chunk of rows, or of columns."""
    layout = plgpu.Layout.WGMMA.reduce(reduced)
    starts = range(0, length, CHUNK)
    return [load(ref.at[pl.ds(first + start, CHUNK)], layout) for start in starts]


def _store_terms(parts, x, tile, rows, columns):
    """Writes the tile times its signs as bfloat16 matrices whose sum it is.

    `rows` are the signs of the coordinates along rows for each chunk of columns, `columns` those
    for each chunk of rows, times a power of two, None for no signs.
    """
    for i in range(tile[0] // CHUNK):
        for j in range(tile[1] // CHUNK):
            here = (pl.ds(i * CHUNK, CHUNK), pl.ds(j * CHUNK, CHUNK))
            rest = load(x.at[here], plgpu.Layout.WGMMA)
            if rows is not None:
                sign = along_columns(rows[j].astype(rest.dtype), rest.shape)
                rest = rest * plgpu.layout_cast(sign, plgpu.Layout.WGMMA)
            if columns is not None:
                sign = along_rows(columns[i].astype(rest.dtype), rest.shape)
                rest = rest * plgpu.layout_cast(sign, plgpu.Layout.WGMMA)
            for part in parts[:-1]:
                # Cut off, not rounded: eight bits of the mantissa a term are all of them.
                term = cut_to_bfloat16(rest)
                part[here] = term.astype(jnp.bfloat16)
                rest = rest - term
            parts[-1][here] = rest.astype(jnp.bfloat16)
    plgpu.commit_smem()


def _rotate(parts, rotation, side, i, j, *, is_transposed):
    """Rows 64 i and columns 64 j on of the tile, or its transpose, rotated and not yet scaled."""
    ways = side.span // CHUNK
    # Of the chunks that this one is made of; known to the compiler where j is.
    first = j - (j % ways if isinstance(j, int) else lax.rem(j, ways))

    def product(sums):
        for way in range(ways):
            column = pl.ds((first + way) * CHUNK, CHUNK)
            row = pl.ds(i * CHUNK, CHUNK)
            # Of the four quarters of Sylvester's matrix of 128 the last is the negative one.
            matrix = rotation.at[:, pl.ds(way * (j - first) * CHUNK, CHUNK)]
            for part in parts:
                a = part.at[column, row].T if is_transposed else part.at[row, column]
                plgpu.wgmma(sums, a, matrix)
        return sums[...]

    return pl.run_scoped(product, plgpu.ACC((CHUNK, CHUNK), jnp.float32))

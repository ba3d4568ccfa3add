"""One pass over a matrix that rotates it, rounds it and folds it into e4m3, along both axes.

A block reads a tile of x (m, k) and writes the same tile of two operands: the rows, quantized along
k, and the columns, quantized along m and stored as (k, m), as the FP8 tensor cores want both. The
rotations are products with matrices of +1 and -1. The one along m takes the tile in shared memory
as a transposed operand, so that nothing is moved to transpose it; without a rotation the matrix is
the identity. Each side works through the tile in chunks of 64 x 64, see `chunk.py`. One warpgroup a
block and no pipeline: many small blocks hid latency better on an H100 than a persistent ring of
tiles.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from lowbit_jax.numerics.formats import E4M3
from pallas_kernels.compat import launch, load, plgpu, swizzled
from pallas_kernels.rotate_quantize.chunk import (
    CHUNK,
    GROUP,
    Side,
    along_rows,
    combine,
    quantize_chunk,
    stored,
)

_SHARED_BYTES = 227 * 1024 - 1024  # of Hopper, less what barriers and alignment take
_TERMS = {jnp.dtype(jnp.bfloat16): 1, jnp.dtype(jnp.float32): 3}  # of bfloat16 in an entry of x


def quantize_tiles(
    x: jax.Array,
    rows: Side | None,
    columns: Side | None,
    operands: dict[str, jax.Array],
    *,
    requantize: bool,
    mask_bound: float | None,
    tile: tuple[int, int],
    interpret: bool,
) -> dict[str, jax.Array]:
    """One launch over x `(m, k)`, bfloat16 or float32, m and k multiples of the tile.

    Args:
      x: The matrix.
      rows: What is done along k; None: nothing.
      columns: Along m.
      operands: What the sides need, its names ending in "rows" and "columns": "rotation_*",
        bfloat16 `(span, span)`, or `(extent of the axis, span)` if signed; where codes are made
        "scales_*", float32, one for each row of the operand: of the folded operand, without its
        global scale, or that of the format if it has one scale a row; "seeds_*" of the random bits
        of each row, if it is rounded at random.
      requantize: Makes the columns of the rounded rows; x is not used for them.
      mask_bound: Writes the mask `|x / scale| <= mask_bound` of the rotated rows; None: none.
      tile: Of one block.
      interpret: On the CPU.

    Returns:
      By name: "values_rows" `(m, k)`, "values_columns" `(k, m)`, both e4m3; "statistic_rows"
      `(k tiles, m)` and "statistic_columns" `(m tiles, k)`, float32; "mask" int32 `(k / 32, m)`.
    """
    m, k = x.shape
    tile_m, tile_k = tile
    sides = {"rows": rows, "columns": columns}
    sides = {name: side for name, side in sides.items() if side is not None}
    # Rows of the tile of each operand, and columns, along which it is rotated.
    extents = {"rows": (tile_m, tile_k), "columns": (tile_k, tile_m)}
    shapes = {"rows": (m, k), "columns": (k, m)}
    shared_rotation = len({side.block_size for side in sides.values()}) < len(sides) and not any(
        side.is_signed for side in sides.values()
    )
    terms = _TERMS[jnp.dtype(x.dtype)]
    inputs, out = {"x": x}, {}
    scratch = {"x": swizzled(tile, x.dtype, 128 // x.dtype.itemsize)}
    if terms > 1:
        scratch["terms"] = swizzled((terms, *tile), jnp.bfloat16, CHUNK)
    for name, side in sides.items():
        height, width = extents[name]
        if not (name == "columns" and shared_rotation):
            inputs["rotation_" + name] = operands["rotation_" + name]
            shape = (width if side.is_signed else side.span, side.span)
            scratch["rotation_" + name] = swizzled(shape, jnp.bfloat16, CHUNK)
        for kind in ("scales_", "seeds_"):
            if kind + name in operands:
                inputs[kind + name] = operands[kind + name]
        if side.is_written:
            out["values_" + name] = jax.ShapeDtypeStruct(shapes[name], E4M3.storage)
            # 64 bytes to a swizzle: of 128, a chunk's halves could not be stored one by one.
            chunks = height * width // CHUNK**2
            scratch["values_" + name] = swizzled((chunks, CHUNK, CHUNK), E4M3.storage)
        if side.is_emitted:
            shape = (shapes[name][1] // width, shapes[name][0])
            out["statistic_" + name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if mask_bound is not None:
        out["mask"] = jax.ShapeDtypeStruct((k // GROUP, m), jnp.int32)
    if (
        requantize and sides["rows"].span > CHUNK
    ):  # else each chunk takes the place of the one it is from
        scratch["rounded"] = swizzled(tile, jnp.bfloat16, CHUNK)
    size = sum(math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize for ref in scratch.values())
    if size > _SHARED_BYTES:
        raise NotImplementedError(
            f"rotate_quantize: a block has {_SHARED_BYTES} bytes of shared memory, a tile of {tile}"
            f" in {x.dtype} takes {size}; cast x to bfloat16 or use smaller transforms."
        )
    copied = [name for name in scratch if name in inputs]
    scratch["barrier"] = plgpu.Barrier(num_arrivals=len(copied))

    def body(*refs):
        given = dict(zip(inputs, refs, strict=False))
        made = dict(zip(out, refs[len(inputs) :], strict=False))
        local = dict(zip(scratch, refs[len(inputs) + len(out) :], strict=True))
        tile_index = {"rows": lax.axis_index("m"), "columns": lax.axis_index("k")}
        first = {name: tile_index[name] * extents[name][0] for name in tile_index}
        across = {"rows": "columns", "columns": "rows"}
        for name in copied:
            source = given[name]
            if name == "x":
                source = source.at[pl.ds(first["rows"], tile_m), pl.ds(first["columns"], tile_k)]
            else:
                axis = name.removeprefix("rotation_")
                if sides[axis].is_signed:
                    source = source.at[pl.ds(first[across[axis]], extents[axis][1])]
            plgpu.copy_gmem_to_smem(source, local[name], local["barrier"])
        vectors = {
            name: _load_chunks(given[name], first[axis], extents[axis][0])
            for axis in sides
            for name in ("scales_" + axis, "seeds_" + axis)
            if name in given
        }
        plgpu.barrier_wait(local["barrier"])
        parts = _split(local, terms, tile)
        rounded = local.get("rounded", parts[0])

        def quantize_side(name, parts):
            side = sides[name]
            rotation = local["rotation_rows" if shared_rotation else "rotation_" + name]
            height, width = extents[name]
            for i in range(height // CHUNK):
                row = pl.ds(first[name] + i * CHUNK, CHUNK)
                scale = vectors["scales_" + name][i] if "scales_" + name in vectors else None
                seed = vectors["seeds_" + name][i] if "seeds_" + name in vectors else None
                found = None
                for j in range(width // CHUNK):
                    column = first[across[name]] + j * CHUNK
                    y = _rotate(parts, rotation, side, i, j, is_transposed=name == "columns")
                    bound = mask_bound if name == "rows" else None
                    chunk = quantize_chunk(y, side, scale, seed, column, bound)
                    if side.is_emitted:
                        found = combine(found, chunk.statistic, side.spec)
                    for half, word in enumerate(chunk.mask):
                        made["mask"][lax.div(column, GROUP) + half, row] = word
                    if name == "rows" and requantize:
                        plgpu.commit_smem()  # the warpgroup has read what is overwritten
                        again = chunk.values * along_rows(scale, (CHUNK, CHUNK))
                        here = (pl.ds(i * CHUNK, CHUNK), pl.ds(j * CHUNK, CHUNK))
                        rounded[here] = again.astype(jnp.bfloat16)
                    if side.is_written:
                        staged = local["values_" + name].at[i * (width // CHUNK) + j]
                        staged[...] = stored(chunk.values, interpret=interpret)
                        plgpu.commit_smem()
                        target = made["values_" + name].at[row, pl.ds(column, CHUNK)]
                        plgpu.copy_smem_to_gmem(staged, target)
                if side.is_emitted:
                    made["statistic_" + name][tile_index[across[name]], row] = found

        if rows is not None:
            quantize_side("rows", parts)
        if requantize:
            plgpu.commit_smem()
            parts = [rounded]
        if columns is not None:
            quantize_side("columns", parts)
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


def _load_chunks(ref, first, length):
    """The entries of a vector in global memory that belong to each chunk of rows."""
    layout = plgpu.Layout.WGMMA.reduce(1)
    starts = range(0, length, CHUNK)
    return [load(ref.at[pl.ds(first + start, CHUNK)], layout) for start in starts]


def _split(local, terms, tile):
    """The tile as bfloat16 matrices in shared memory whose sum it is."""
    if terms == 1:
        return [local["x"]]
    for i in range(0, tile[0], CHUNK):
        for j in range(0, tile[1], CHUNK):
            here = (pl.ds(i, CHUNK), pl.ds(j, CHUNK))
            rest = load(local["x"].at[here], plgpu.Layout.WGMMA)
            for t in range(terms):
                term = rest.astype(jnp.bfloat16)
                local["terms"].at[t][here] = term
                rest = rest - term.astype(jnp.float32)
    plgpu.commit_smem()
    return [local["terms"].at[t] for t in range(terms)]


def _rotate(parts, rotation, side, i, j, *, is_transposed):
    """Rows 64 i and columns 64 j on of the tile, or its transpose, rotated and not yet scaled."""
    ways = side.span // CHUNK
    first = j // ways * ways  # of the chunks that this one is made of

    def product(sums):
        for way in range(ways):
            column = pl.ds((first + way) * CHUNK, CHUNK)
            row = pl.ds(i * CHUNK, CHUNK)
            height = (first + way if side.is_signed else way) * CHUNK
            matrix = rotation.at[pl.ds(height, CHUNK), pl.ds((j - first) * CHUNK, CHUNK)]
            for part in parts:
                a = part.at[column, row].T if is_transposed else part.at[row, column]
                plgpu.wgmma(sums, a, matrix)
        return sums[...]

    return pl.run_scoped(product, plgpu.ACC((CHUNK, CHUNK), jnp.float32))

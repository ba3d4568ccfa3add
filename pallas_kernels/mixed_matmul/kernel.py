"""The kernel of `mixed_matmul` for Hopper: decoded weights from registers, x from shared memory.

A block multiplies `64 * warpgroups` rows of the weights by its part of the columns, of which all of
x fits into shared memory: one copy a chunk, all under way at once. The codes bypass it. Each thread
loads 32 of them at a time from where `prepack` put them, a chunk ahead, and decodes them into the
registers from which wgmma takes its first operand. No warpgroup waits for another one, so nothing
but x needs a barrier, and the warpgroups and blocks of a multiprocessor hide each other's latency.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.compat import launch, load, plgpu, swizzled
from pallas_kernels.mixed_matmul.layout import TILE, Scheme
from pallas_kernels.mixed_matmul.operand import row_layout, tile_operand, word_layout
from pallas_kernels.mixed_matmul.tuning import Config


def matmul_kernel(x, words, scales, zero_points, *, scheme: Scheme, config: Config, interpret):
    """Sums of `x w^T` over parts of the columns; arguments are checked by `mixed_matmul`.

    Args:
      x: `(m, k)` bfloat16.
      words: As in `PackedWeight`, as are the next two.
      scales: Not read, and None, for a scale a row.
      zero_points: Or None.
      scheme: How to decode.
      config: Schedule.
      interpret: Run on the CPU.

    Returns:
      Float32 `(splits, m, n)`: their sum times `row_factors` is the product.
    """
    m, k = x.shape
    n = words.shape[0] * TILE
    rows = pl.cdiv(m, 8) * 8  # of x in shared memory; copies outside of x are clipped
    chunks = k // config.chunk // config.splits
    tiles = config.chunk // TILE
    # Where sums over a group are scaled, a product must not exceed it.
    width = min(scheme.group, TILE) if scheme.scales == "float32" else TILE
    optional = [a for a in (scales, zero_points) if a is not None]

    def body(x_ref, words_ref, *refs):
        group_refs, refs = refs[: len(optional)], refs[len(optional) :]
        out_ref, x_chunks, out_tile, full, *staged = refs
        warpgroup, split = lax.axis_index("wg"), lax.axis_index("split")
        tile_row = lax.axis_index("rows") * config.warpgroups + warpgroup
        row = pl.ds(pl.multiple_of(tile_row * TILE, TILE), TILE)
        first = split * chunks

        @pl.when(warpgroup == 0)
        def _():
            @pl.loop(0, chunks)
            def _(chunk):
                columns = pl.ds((first + chunk) * config.chunk, config.chunk)
                x_part = x_ref.at[pl.ds(0, rows), columns]
                plgpu.copy_gmem_to_smem(x_part, x_chunks.at[chunk], full.at[chunk])

        def fetch_tile(chunk, tile):
            return load(words_ref.at[tile_row, (first + chunk) * tiles + tile], word_layout())

        def fetch_groups(chunk):
            """Scales and zero points of a chunk, lists of one array a row of theirs."""
            count = config.chunk // scheme.scale_columns
            start = (first + chunk) * count
            return [
                [load(ref.at[start + i, row], row_layout()) for i in range(count)]
                for ref in group_refs
            ]

        def multiply(acc, operand, chunk, column):
            """`acc += operand x^T` over the columns of the chunk from `column` on."""
            columns = pl.ds(column, operand.shape[1])
            if interpret:  # which multiplies from shared memory only
                staged[0][warpgroup, :, : operand.shape[1]] = operand
                plgpu.commit_smem()
                operand = staged[0].at[warpgroup, :, : operand.shape[1]]
            plgpu.wgmma(acc, operand, x_chunks.at[chunk, :, columns].T)
            plgpu.wgmma_wait(0)

        def add_chunk(chunk, carry, acc, *, is_last):
            """Multiplies one chunk and, tile by tile, loads the next one.

            The carry is the chunk's words, its groups and the scaled sums, None where an
            accumulator holds the sums as they are.
            """
            tile_words, groups, total = carry
            plgpu.barrier_wait(full.at[chunk])
            next_groups = None if is_last else fetch_groups(chunk + 1)
            next_words = []

            def operand(tile):
                decoded = tile_operand(
                    tile_words[tile], groups, tile * TILE, scheme=scheme, interpret=interpret
                )
                if not is_last:
                    next_words.append(fetch_tile(chunk + 1, tile))
                return decoded

            if scheme.scales != "float32":
                for tile in range(tiles):
                    multiply(acc, operand(tile), chunk, tile * TILE)
                return next_words, next_groups, total

            def sum_over(parts):
                """The product of `(operand, column)` pairs that share their scales."""

                def add_up(acc):
                    for part, column in parts:
                        multiply(acc, part, chunk, column)
                    return acc[...]

                return pl.run_scoped(add_up, plgpu.ACC((TILE, rows), jnp.float32))

            parts = []
            for tile in range(tiles):
                decoded = operand(tile)
                for part in range(TILE // width):
                    column = tile * TILE + part * width
                    parts.append((decoded[:, part * width : (part + 1) * width], column))
                    if (column + width) % scheme.group == 0:
                        scale = groups[0][column // scheme.group]
                        scale = lax.broadcast_in_dim(scale, (TILE, rows), [0])
                        total = total + sum_over(parts) * scale
                        parts = []
            return next_words, next_groups, total

        def product(acc=None):
            total = None
            if acc is None:
                total = plgpu.layout_cast(jnp.zeros((TILE, rows), jnp.float32), plgpu.Layout.WGMMA)
            carry = [fetch_tile(0, tile) for tile in range(tiles)], fetch_groups(0), total

            def step(chunk, carry):
                return add_chunk(chunk, carry, acc, is_last=False)

            if chunks > 1:
                carry = lax.fori_loop(0, chunks - 1, step, carry)
            _, _, total = add_chunk(chunks - 1, carry, acc, is_last=True)
            return total if acc is None else acc[...]

        if scheme.scales == "float32":
            out = product()
        else:
            out = pl.run_scoped(product, plgpu.ACC((TILE, rows), jnp.float32))
        out_tile.at[warpgroup].T[...] = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        out_part = out_ref.at[split, pl.ds(0, rows), row]
        plgpu.copy_smem_to_gmem(out_tile.at[warpgroup], out_part)
        plgpu.wait_smem_to_gmem(0)

    scratch = [
        swizzled((chunks, rows, config.chunk), jnp.bfloat16, width),
        plgpu.SMEM((config.warpgroups, rows, TILE), jnp.float32),
        plgpu.Barrier(num_arrivals=1, num_barriers=chunks),
    ]
    if interpret:
        scratch.append(swizzled((config.warpgroups, TILE, TILE), jnp.bfloat16, width))
    call = launch(
        body,
        name="mixed_matmul",
        out_type=jax.ShapeDtypeStruct((config.splits, m, n), jnp.float32),
        scratch_types=scratch,
        grid=(n // TILE // config.warpgroups, config.splits),
        grid_names=("rows", "split"),
        num_threads=config.warpgroups,
        interpret=interpret,
    )
    return call(x, words, *optional)

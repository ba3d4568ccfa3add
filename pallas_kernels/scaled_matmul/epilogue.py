"""What the kernel of `scaled_matmul` does with a tile of sums: scales, mask, Hadamard, store.

Nothing here waits for global memory: the loading warpgroup has put scales and mask words beside
the operands, and the copies of a tile are awaited when the next tile takes their place. Between
the sums and the result no entry leaves the registers, see `transform`.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.compat import load, plgpu, swizzled
from pallas_kernels.folded import WORD
from pallas_kernels.scaled_matmul.transform import CHUNK, signs, transformed

HADAMARD_BLOCKS = (16, 32, 64, 128)
_ROW_BYTES = 128  # of a swizzled buffer


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What is done with the float32 sums, in this order.

    Attributes:
      out_dtype: `np.dtype` of bfloat16 or float32.
      a_scales: What rows are scaled with: a number for each or one for all; None: nothing.
      b_scales: Likewise columns. One for all is multiplied with the other scales, not the sums.
      has_mask: Whether entries are masked.
      inverse_hadamard: Block size, or None.
    """

    out_dtype: np.dtype
    a_scales: Literal["vector", "scalar"] | None = None
    b_scales: Literal["vector", "scalar"] | None = None
    has_mask: bool = False
    inverse_hadamard: int | None = None

    @property
    def hadamard_side(self) -> int:
        """Rows and columns of the matrix that a piece is multiplied with."""
        return min(max(self.inverse_hadamard or CHUNK, 32), CHUNK)

    @property
    def terms(self) -> int:
        """bfloat16 numbers that stand for one entry while it is transformed."""
        return self.out_dtype.itemsize // 2

    def stored_columns(self, tile_n: int) -> int:
        """Columns of a tile that are written together.

        All, where the buffer then leaves room for four stages of operands; else as few as can be.
        """
        if self.out_dtype.itemsize == 2 and tile_n <= 3 * CHUNK:
            return tile_n
        return max(CHUNK, self.inverse_hadamard or 0)

    def buffers(self, tile_n: int) -> int:
        """Output buffers of a consumer: parts of a tile of bfloat16 take turns."""
        columns = self.stored_columns(tile_n)
        return 1 if columns == tile_n or self.out_dtype.itemsize == 4 else 2

    def input_shapes(self, tile_m: int, tile_n: int) -> dict:
        """Shapes and dtypes of the inputs of which each tile reads others, by name."""
        shapes = {}
        if self.a_scales == "vector":
            shapes["a_scales"] = (tile_m,), jnp.float32
        if self.b_scales == "vector":
            shapes["b_scales"] = (tile_n,), jnp.float32
        if self.has_mask:
            shapes["mask"] = (tile_n // WORD, tile_m), jnp.uint32
        return shapes

    def shared_bytes(self, tile_m: int, tile_n: int) -> int:
        """Shared memory of all consumers, bytes."""
        columns = self.stored_columns(tile_n) * self.buffers(tile_n)
        size = tile_m * columns * self.out_dtype.itemsize
        size += sum(4 * math.prod(shape) for shape, _ in self.input_shapes(tile_m, tile_n).values())
        if self.inverse_hadamard:
            size += len(signs(self.inverse_hadamard)) * 2 * self.hadamard_side**2
        return size


def epilogue_scratch(epilogue: Epilogue, config, interpret: bool) -> dict:
    """Shared memory and barriers by name."""
    rows = config.tile_m // config.consumers
    columns = epilogue.stored_columns(config.tile_n)
    shape = (config.consumers, epilogue.buffers(config.tile_n), rows, columns)
    row_elements = _ROW_BYTES // epilogue.out_dtype.itemsize
    scratch = {"out_buffers": swizzled(shape, epilogue.out_dtype, row_elements)}
    inputs = epilogue.input_shapes(config.tile_m, config.tile_n)
    scratch |= {name: plgpu.SMEM(*shape_dtype) for name, shape_dtype in inputs.items()}
    if inputs:
        scratch["inputs_full"] = plgpu.Barrier(num_arrivals=len(inputs))
        scratch["inputs_empty"] = plgpu.Barrier(num_arrivals=config.consumers)
    if epilogue.inverse_hadamard:
        side = epilogue.hadamard_side
        count = len(signs(epilogue.inverse_hadamard))
        scratch["hadamard"] = swizzled((count, side, side), jnp.bfloat16)
        scratch["hadamard_full"] = plgpu.Barrier()
        if interpret:
            scratch["term"] = swizzled((config.consumers, rows, side), jnp.bfloat16)
    return scratch


def load_inputs(epilogue, config, row, column, inputs, shared):
    """Starts the copies of what the tile at `row` and `column` needs beside its operands.

    Args:
      epilogue: What to do.
      config: Sizes of a tile.
      row: First row of the tile.
      column: Its first column.
      inputs: References in global memory by name.
      shared: References of `epilogue_scratch` by name.
    """
    slices = {
        "a_scales": (pl.ds(row, config.tile_m),),
        "b_scales": (pl.ds(column, config.tile_n),),
        "mask": (
            pl.ds(column // WORD, config.tile_n // WORD),
            pl.ds(row, config.tile_m),
        ),
    }
    for name in epilogue.input_shapes(config.tile_m, config.tile_n):
        source = inputs[name].at[slices[name]]
        plgpu.copy_gmem_to_smem(source, shared[name], shared["inputs_full"])


def leave_inputs(shared):
    """Waits for the inputs of a tile and releases them unread."""
    if "inputs_full" in shared:
        plgpu.barrier_wait(shared["inputs_full"])
        plgpu.barrier_arrive(shared["inputs_empty"])


def scalar_factor(epilogue, inputs):
    """The product of the scales that are one number for all, or None."""
    factor = None
    for name in ("a_scales", "b_scales"):
        if getattr(epilogue, name) == "scalar":
            scale = inputs[name][0]
            factor = scale if factor is None else factor * scale
    return factor


def write_tile(epilogue, total, row, column, factor, out, shared, warpgroup):
    """Scales, masks and transforms the sums of this warpgroup and copies them to `out`.

    Args:
      epilogue: What to do.
      total: `(rows, tile_n)` float32, in the layout of an accumulator.
      row: First row in `out`.
      column: First column in `out`.
      factor: Of all entries, see `scalar_factor`.
      out: `(m, n)` in global memory; what lies outside is not written.
      shared: References of `epilogue_scratch` by name.
      warpgroup: Which of the consumers this is.
    """
    rows, tile_n = total.shape
    has_inputs = "inputs_full" in shared
    if has_inputs:
        plgpu.barrier_wait(shared["inputs_full"])
    finished = _finisher(epilogue, total, factor, shared, pl.ds(warpgroup * rows, rows))

    side = epilogue.hadamard_side
    columns, buffers = epilogue.stored_columns(tile_n), epilogue.buffers(tile_n)
    assert tile_n // columns % buffers == 0  # so that each tile begins with the first buffer
    for index, start in enumerate(range(0, tile_n, columns)):
        pieces = [finished(first, side) for first in range(start, start + columns, side)]
        if epilogue.inverse_hadamard:
            pieces = transformed(epilogue, pieces, shared, warpgroup)
        part = lax.concatenate([piece.astype(epilogue.out_dtype) for piece in pieces], 1)
        # The buffer is free when the copies of the others alone are under way: they take turns
        # across tiles, too.
        plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
        buffer = shared["out_buffers"].at[warpgroup, index % buffers]
        buffer[...] = part
        plgpu.commit_smem()  # the buffer has been written, and the inputs have been read
        if has_inputs and start + columns == tile_n:
            plgpu.barrier_arrive(shared["inputs_empty"])
        plgpu.copy_smem_to_gmem(buffer, out.at[pl.ds(row, rows), pl.ds(column + start, columns)])


def _finisher(epilogue, total, factor, shared, row_slice):
    """A function of first column and width: those columns of the sums, scaled and masked."""
    by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    has_rows, has_columns = epilogue.a_scales == "vector", epilogue.b_scales == "vector"
    if has_rows:
        a_scales = load(shared["a_scales"].at[row_slice], by_row)
        a_scales = a_scales if factor is None else a_scales * factor

    def finished(first, width):
        piece = total[:, first : first + width]
        if has_rows:
            piece = piece * lax.broadcast_in_dim(a_scales, piece.shape, [0])
        if has_columns:
            b_scales = load(shared["b_scales"].at[pl.ds(first, width)], by_column)
            b_scales = b_scales if factor is None else b_scales * factor
            piece = piece * lax.broadcast_in_dim(b_scales, piece.shape, [1])
        if factor is not None and not (has_rows or has_columns):
            piece = piece * factor
        if epilogue.has_mask:
            parts = []
            for start in range(0, width, WORD):
                words = load(shared["mask"].at[(first + start) // WORD, row_slice], by_row)
                parts.append(_masked(piece[:, start : start + WORD], words))
            piece = lax.concatenate(parts, 1)
        return piece

    return finished


def _masked(piece, words):
    """`piece` (rows, 32) where the bit of its column is set in its row's word, else 0."""
    bit = plgpu.broadcasted_iota(jnp.uint32, piece.shape, 1, layout=plgpu.Layout.WGMMA)
    words = lax.broadcast_in_dim(words, piece.shape, [0])
    # A thread's columns differ from its first one, 0, 2, 4 or 6, by constants: it shifts once.
    is_kept = (words >> (bit & 6)) & (jnp.uint32(1) << (bit & 25)) != 0
    # The barrier keeps the compiler from rounding first, which would select 16-bit halves.
    return lax.optimization_barrier(jnp.where(is_kept, piece, 0.0))

"""What the kernel of `scaled_matmul` does with a tile of sums: scales, mask, Hadamard, store.

Nothing here waits for global memory: the loading warpgroup has put scales and mask words beside
the operands, and the copies of a tile are awaited when the next tile takes their place. Between
the sums and the result no entry leaves the registers: the tensor core takes the left operand of a
product with the Hadamard matrix from there.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from lowbit_jax.rotations.hadamard import hadamard_matrix
from pallas_kernels.compat import load, plgpu, swizzled
from pallas_kernels.folded import WORD

# Columns of 128 bytes of bfloat16.
CHUNK = 64
HADAMARD_BLOCKS = (16, 32, 64, 128)
_ROW_BYTES = 128  # of a swizzled buffer


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What is done with the float32 sums, in this order.

    Attributes:
      out_dtype: `np.dtype` of bfloat16 or float32.
      has_a_scales: Whether rows are scaled.
      has_b_scales: Whether columns are scaled.
      has_mask: Whether entries are masked.
      inverse_hadamard: Block size, or None.
    """

    out_dtype: np.dtype
    has_a_scales: bool = False
    has_b_scales: bool = False
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
        """Shapes and dtypes of the inputs that each tile reads, by name."""
        shapes = {}
        if self.has_a_scales:
            shapes["a_scales"] = (tile_m,), jnp.float32
        if self.has_b_scales:
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
            size += len(_signs(self.inverse_hadamard)) * 2 * self.hadamard_side**2
        return size


def _signs(block_size):
    """Of the quarters of Sylvester's matrix: H_128 = [[H_64, H_64], [H_64, -H_64]]."""
    return (1, -1) if block_size > CHUNK else (1,)


def hadamard_operand(epilogue: Epilogue):
    """`(signs, side, side)` bfloat16: blocks of +1 and -1 on the diagonal; for 128 also negated."""
    block_size = epilogue.inverse_hadamard
    assert block_size is not None
    side = epilogue.hadamard_side
    block = hadamard_matrix(min(block_size, side))
    matrix = np.kron(np.eye(side // len(block)), block)
    return jnp.asarray([sign * matrix for sign in _signs(block_size)], jnp.bfloat16)


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
        signs = len(_signs(epilogue.inverse_hadamard))
        scratch["hadamard"] = swizzled((signs, side, side), jnp.bfloat16)
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


def write_tile(epilogue, total, row, column, out, shared, warpgroup):
    """Scales, masks and transforms the sums of this warpgroup and copies them to `out`.

    Args:
      epilogue: What to do.
      total: `(rows, tile_n)` float32, in the layout of an accumulator.
      row: First row in `out`.
      column: First column in `out`.
      out: `(m, n)` in global memory; what lies outside is not written.
      shared: References of `epilogue_scratch` by name.
      warpgroup: Which of the consumers this is.
    """
    rows, tile_n = total.shape
    has_inputs = "inputs_full" in shared
    if has_inputs:
        plgpu.barrier_wait(shared["inputs_full"])
    finished = _finisher(epilogue, total, shared, pl.ds(warpgroup * rows, rows))

    side = epilogue.hadamard_side
    columns, buffers = epilogue.stored_columns(tile_n), epilogue.buffers(tile_n)
    assert tile_n // columns % buffers == 0  # so that each tile begins with the first buffer
    for index, start in enumerate(range(0, tile_n, columns)):
        pieces = [finished(first, side) for first in range(start, start + columns, side)]
        if epilogue.inverse_hadamard:
            pieces = _transformed(epilogue, pieces, shared, warpgroup)
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


def _finisher(epilogue, total, shared, row_slice):
    """A function of first column and width: those columns of the sums, scaled and masked."""
    by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    if epilogue.has_a_scales:
        a_scales = load(shared["a_scales"].at[row_slice], by_row)

    def finished(first, width):
        piece = total[:, first : first + width]
        if epilogue.has_a_scales:
            piece = piece * lax.broadcast_in_dim(a_scales, piece.shape, [0])
        if epilogue.has_b_scales:
            b_scales = load(shared["b_scales"].at[pl.ds(first, width)], by_column)
            piece = piece * lax.broadcast_in_dim(b_scales, piece.shape, [1])
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


def _transformed(epilogue, pieces, shared, warpgroup):
    """`concatenate(pieces) H / sqrt(block)` on the tensor core, from bfloat16 terms."""
    terms = []  # of each piece
    for piece in pieces:
        terms.append([piece.astype(jnp.bfloat16)])
        if epilogue.terms == 2:
            rest = piece - terms[-1][0].astype(jnp.float32)
            terms[-1].append(rest.astype(jnp.bfloat16))

    def multiply(accumulator, term, sign):
        if "term" in shared:  # interpreted, where operands must lie in shared memory
            shared["term"][warpgroup] = term
            plgpu.commit_smem()
            term = shared["term"].at[warpgroup]
        plgpu.wgmma(accumulator, term, shared["hadamard"].at[sign])

    parts = len(_signs(epilogue.inverse_hadamard))  # pieces that make one block

    def run(*accumulators):
        for target, accumulator in enumerate(accumulators):
            for source in range(parts):
                sign = source * (target % parts)
                for term in terms[target - target % parts + source]:
                    multiply(accumulator, term, sign)
        return [accumulator[...] for accumulator in accumulators]

    accumulator = plgpu.ACC(pieces[0].shape, jnp.float32)
    sums = pl.run_scoped(run, *[accumulator] * len(pieces))
    return [s * (1 / math.sqrt(epilogue.inverse_hadamard)) for s in sums]

"""What the kernel of `scaled_matmul` does with a tile of sums: scales, mask, Hadamard, store."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from lowbit_jax.rotations.hadamard import hadamard_matrix
from pallas_kernels.compat import load, plgpu, swizzled

# Columns written at a time: 128 bytes of bfloat16, and K of one product with the Hadamard matrix.
CHUNK = 64
HADAMARD_BLOCKS = (16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What is done with the float32 sums, in this order.

    Attributes:
      out_dtype: `np.dtype` of bfloat16 or float32.
      inverse_hadamard: Block size, or None.
    """

    out_dtype: np.dtype
    inverse_hadamard: int | None = None

    @property
    def slots(self) -> int:
        """Output buffers that one chunk fills: a row of a buffer has 128 bytes."""
        return CHUNK * self.out_dtype.itemsize // 128

    @property
    def group(self) -> int:
        """Chunks that are transformed together."""
        return max(1, (self.inverse_hadamard or 1) // CHUNK)

    @property
    def terms(self) -> int:
        """bfloat16 numbers that stand for one entry while it is transformed."""
        return self.slots

    @property
    def out_slots(self) -> int:
        """Output buffers of a consumer: two chunks of bfloat16 take turns, one of float32 waits."""
        return max(2, self.slots * self.group)

    def shared_bytes(self, tile_m: int) -> int:
        """Shared memory of all consumers, bytes."""
        size = tile_m * self.out_slots * 128
        if self.inverse_hadamard:
            size += self.group * CHUNK * 128
            if self.terms > 1:
                size += tile_m * self.group * self.terms * 128
        return size


def hadamard_operand(block_size: int):
    """`(signs, 64, 64)` bfloat16: blocks of +1 and -1 on the diagonal; for 128 also negated."""
    if block_size <= CHUNK:
        blocks = np.kron(np.eye(CHUNK // block_size), hadamard_matrix(block_size))[None]
    else:  # H_128 = [[H_64, H_64], [H_64, -H_64]]
        blocks = np.stack([hadamard_matrix(CHUNK), -hadamard_matrix(CHUNK)])
    return jnp.asarray(blocks, jnp.bfloat16)


def epilogue_scratch(epilogue: Epilogue, consumers: int, rows: int) -> dict:
    """Shared memory and barriers by name."""
    width = CHUNK // epilogue.slots
    shape = (consumers, epilogue.out_slots, rows, width)
    scratch = {"out_slots": swizzled(shape, epilogue.out_dtype)}
    if epilogue.inverse_hadamard:
        scratch["hadamard"] = swizzled((epilogue.group, CHUNK, CHUNK), jnp.bfloat16)
        scratch["hadamard_full"] = plgpu.Barrier()
        if epilogue.terms > 1:
            shape = (consumers, epilogue.group * epilogue.terms, rows, CHUNK)
            scratch["terms"] = swizzled(shape, jnp.bfloat16)
    return scratch


def write_tile(epilogue, total, row, column, inputs, out, shared, warpgroup):
    """Scales, masks and transforms the sums of this warpgroup and copies them to `out`.

    Args:
      epilogue: What to do.
      total: `(rows, tile_n)` float32, in the layout of an accumulator.
      row: First row in `out`.
      column: First column in `out`.
      inputs: References in global memory by name, None where there is none.
      out: `(m, n)` in global memory; what lies outside is not written.
      shared: References of `epilogue_scratch` by name.
      warpgroup: Which of the consumers this is.
    """
    rows, tile_n = total.shape
    row_slice = pl.ds(row, rows)
    by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    a_scales = None
    if inputs["a_scales"] is not None:
        a_scales = load(inputs["a_scales"].at[row_slice], by_row)

    def finished(chunk):  # scaled and masked
        piece = total[:, chunk * CHUNK : (chunk + 1) * CHUNK]
        if a_scales is not None:
            piece = piece * lax.broadcast_in_dim(a_scales, piece.shape, [0])
        if inputs["b_scales"] is not None:
            columns = pl.ds(column + chunk * CHUNK, CHUNK)
            b_scales = load(inputs["b_scales"].at[columns], by_column)
            piece = piece * lax.broadcast_in_dim(b_scales, piece.shape, [1])
        if inputs["mask"] is not None:
            halves = []
            for half in range(CHUNK // 32):
                word = column // 32 + chunk * (CHUNK // 32) + half
                words = load(inputs["mask"].at[word, row_slice], by_row)
                halves.append(_masked(piece[:, 32 * half : 32 * half + 32], words))
            piece = lax.concatenate(halves, 1)
        return piece

    width = CHUNK // epilogue.slots
    for first in range(0, tile_n // CHUNK, epilogue.group):
        chunks = range(first, first + epilogue.group)
        pieces = [finished(chunk) for chunk in chunks]
        # The slots of this group are free when only the copies of the other slots are under way.
        plgpu.wait_smem_to_gmem(
            epilogue.out_slots - epilogue.slots * epilogue.group, wait_read_only=True
        )
        # Chunk by chunk and, for float32, left and right half.
        used = [
            shared["out_slots"].at[warpgroup, (first * epilogue.slots + i) % epilogue.out_slots]
            for i in range(epilogue.group * epilogue.slots)
        ]
        if epilogue.inverse_hadamard:
            pieces = _transformed(epilogue, pieces, used, shared, warpgroup)
        halves = [
            piece[:, start : start + width] for piece in pieces for start in range(0, CHUNK, width)
        ]
        for slot, half in zip(used, halves, strict=True):
            slot[...] = half.astype(epilogue.out_dtype)
        plgpu.commit_smem()
        for i, slot in enumerate(used):
            columns = pl.ds(column + first * CHUNK + i * width, width)
            plgpu.copy_smem_to_gmem(slot, out.at[row_slice, columns])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _masked(piece, words):
    """`piece` (rows, 32) where the bit of its column is set in its row's word, else 0."""
    bit = plgpu.broadcasted_iota(jnp.uint32, piece.shape, 1, layout=plgpu.Layout.WGMMA)
    words = lax.broadcast_in_dim(words, piece.shape, [0])
    return jnp.where((words >> bit) & 1 == 1, piece, 0.0)


def _transformed(epilogue, pieces, out_slots, shared, warpgroup):
    """`concatenate(pieces) H / sqrt(block)` on the tensor core, from bfloat16 terms.

    For a bfloat16 result the terms lie where the result will.
    """
    terms = []  # of each piece
    for index, piece in enumerate(pieces):
        if epilogue.terms == 1:
            terms.append([out_slots[index]])
            terms[-1][0][...] = piece.astype(jnp.bfloat16)
            continue
        high = piece.astype(jnp.bfloat16)
        low = (piece - high.astype(jnp.float32)).astype(jnp.bfloat16)
        terms.append([shared["terms"].at[warpgroup, 2 * index + i] for i in range(2)])
        terms[-1][0][...] = high
        terms[-1][1][...] = low
    plgpu.commit_smem()

    def product(target):
        def run(accumulator):
            for source, refs in enumerate(terms):
                # The one negative quarter of Sylvester's matrix.
                sign = 1 if source and target else 0
                for ref in refs:
                    plgpu.wgmma(accumulator, ref, shared["hadamard"].at[sign])
            return accumulator[...]

        sums = pl.run_scoped(run, plgpu.ACC(pieces[0].shape, jnp.float32))
        return sums * (1 / math.sqrt(epilogue.inverse_hadamard))

    transformed = [product(target) for target in range(len(pieces))]
    plgpu.commit_smem()  # the terms have been read by all warps
    return transformed

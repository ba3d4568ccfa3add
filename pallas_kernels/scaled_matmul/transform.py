"""The inverse Hadamard transform of a tile in the kernel of `scaled_matmul`.

No entry leaves the registers: the tensor core takes the left operand of a product with the
Hadamard matrix from there.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from lowbit_jax.rotations.hadamard import hadamard_matrix
from pallas_kernels.compat import plgpu

# Columns of 128 bytes of bfloat16.
CHUNK = 64


def signs(block_size):
    """Of the quarters of Sylvester's matrix: H_128 = [[H_64, H_64], [H_64, -H_64]]."""
    return (1, -1) if block_size > CHUNK else (1,)


def hadamard_operand(epilogue):
    """`(signs, side, side)` bfloat16: blocks of +1 and -1 on the diagonal; for 128 also negated."""
    block_size = epilogue.inverse_hadamard
    side = epilogue.hadamard_side
    block = hadamard_matrix(min(block_size, side))
    matrix = np.kron(np.eye(side // len(block)), block)
    return jnp.asarray([sign * matrix for sign in signs(block_size)], jnp.bfloat16)


def transformed(epilogue, pieces, shared, warpgroup):
    """`concatenate(pieces) H / sqrt(block)` on the tensor core, from bfloat16 terms.

    Args:
      epilogue: Size of blocks, and the number of terms.
      pieces: Whole blocks, in pieces of `epilogue.hadamard_side` columns.
      shared: References of `epilogue_scratch` by name.
      warpgroup: Which of the consumers this is.

    Returns:
      As many pieces in float32.
    """
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

    parts = len(signs(epilogue.inverse_hadamard))  # pieces that make one block

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

"""A tile of codes as the bfloat16 operand of a tensor core product.

The bits are made by `decode.py`, in plain 32-bit arithmetic. What is left is to read pairs of them
as bfloat16 numbers, to multiply or subtract two at a time, and to name each register by the row and
column that it is for. Pallas has no operation that does so without moving data between threads:
`_placed` is inlined code of Mosaic, `_simulated` says the same in `jax.numpy` for the interpreter,
which cannot run inlined code.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt32

from lowbit_jax.numerics.formats import E2M1
from lowbit_jax.numerics.formats import decode as decode_format
from pallas_kernels.compat import plgpu
from pallas_kernels.mixed_matmul import decode
from pallas_kernels.mixed_matmul.layout import TILE, TILE_WORDS, Scheme, from_thread_order

# The pair and the step of wgmma along k in each register of a thread's operand: registers 2 i and
# 2 i + 1 hold columns 8 i to 8 i + 7, of the upper and of the lower 8 rows of a warp's 16.
REGISTERS = [(2 * (i % 2) + h, i // 2) for i in range(TILE // 8) for h in range(2)]


def word_layout():
    """Of a tile's words: the four of a thread are one load of 16 bytes."""
    return plgpu.Layout.WG_STRIDED((TILE_WORDS,), vec_size=4)


def row_layout():
    """Of numbers a row: in each thread that holds a part of the row."""
    return plgpu.Layout.WGMMA.reduce(1)


def tile_operand(
    words: UInt32[Array, "512"],
    groups: list[list[Array]],
    column: int,
    *,
    scheme: Scheme,
    interpret: bool,
) -> Float[Array, "64 64"]:
    """Decoded codes of a tile: levels, times what their scheme's `decode` factor says.

    Args:
      words: In `word_layout`.
      groups: Of the chunk that the tile lies in, all `(64,)` in `row_layout`: the scales, and the
        zero points of its groups, uint8, if it has any. For e2m1 each uint32 is four scales.
      column: Of the tile in its chunk.
      scheme: How to decode.
      interpret: For the interpreter.

    Returns:
      bfloat16: e2m1 levels times their scales times `2**E8M0_FACTOR_LOG2` or
      `2**E4M3_FACTOR_LOG2`; integers less their zero point, mid-rise levels twice.
    """
    own = range(column // scheme.group, -(-(column + TILE) // scheme.group))
    if scheme.kind == "e2m1":
        pairs = decode.e2m1_pairs(words)
        scale_pairs = decode.e8m0_pairs if scheme.scales == "e8m0" else decode.e4m3_pairs
        rows = [scale_pairs(groups[0][group // 4], group % 4) for group in own]
    else:
        pairs = decode.integer_pairs(words, step=scheme.step)
        rows = scheme.offset
        if rows is None:
            rows = [decode.zero_point_pairs(groups[1][group]) for group in own]
    return (_simulated if interpret else _placed)(pairs, rows, scheme.kind)


def _placed(pairs, rows, kind):
    """Pairs as bfloat16 numbers, times `rows` (e2m1) or less them (integer), in their registers.

    Args:
      pairs: Four uint32 `(512,)`.
      rows: uint32 pairs `(64,)` for equal parts of the columns, or one number for all.
      kind: "e2m1" or "integer".
    """
    # Here, for older versions of JAX import this file too.
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    layout = plgpu.Layout.WGMMA
    row_arrays = rows if isinstance(rows, list) else []

    @plgpu.inline_mgpu(
        arg_types=([word_layout()] * 4, [row_layout()] * len(row_arrays)),
        return_type=plgpu.ShapeDtypeStruct((TILE, TILE), jnp.bfloat16, layout=layout),
    )
    def place(_, pairs, row_arrays):
        pair_type = ir.VectorType.get((2,), ir.BF16Type.get())
        read = functools.partial(mgpu.utils.bitcast, new_type=pair_type)
        halves = [[read(vector.extract(r, [], [0])) for r in a.registers.flat] for a in row_arrays]
        if not isinstance(rows, list):
            number = ir.FloatAttr.get(ir.BF16Type.get(), rows)
            splat = arith.constant(pair_type, ir.DenseElementsAttr.get_splat(pair_type, number))
            halves = [[splat, splat]]
        operation = arith.mulf if kind == "e2m1" else arith.subf
        registers = []
        for i, (pair, step) in enumerate(REGISTERS):
            value = read(vector.extract(pairs[pair].registers.flat[0], [], [step]))
            part = i * len(halves) // len(REGISTERS)
            registers.append(operation(value, halves[part][i % 2]))
        array = np.empty(len(registers), dtype=object)
        array[:] = registers
        tiled = layout.to_mgpu()
        return mgpu.FragmentedArray(
            _registers=array.reshape(tiled.registers_shape((TILE, TILE))),
            _layout=tiled,
            _is_signed=None,
        )

    return place(pairs, row_arrays)


def _simulated(pairs, rows, kind):
    """What `_placed` computes, without subnormal numbers, which XLA flushes on a CPU."""
    halves = jnp.stack([jnp.stack([p & 0xFFFF, p >> 16], axis=-1) for p in pairs], axis=-2)
    bits = from_thread_order(halves, 1, 1)
    if isinstance(rows, list):
        rows = jnp.stack([_float_of_low_half(r) for r in rows], axis=-1)
        rows = jnp.repeat(rows, TILE // rows.shape[-1], axis=-1)
    if kind == "e2m1":
        codes = (bits >> 12 & 8 | bits >> 6 & 7).astype(jnp.uint8)
        values = decode_format(codes, E2M1) * (rows * np.float32(2.0**-126))
    else:
        values = _float_of_low_half(bits) - rows
    return values.astype(jnp.bfloat16)


def _float_of_low_half(bits):
    return lax.bitcast_convert_type(bits << 16, jnp.float32)

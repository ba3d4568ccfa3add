"""Tiles of `rotate_quantize`, and the launches that the tests lower and compile."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowbit_jax.numerics import (
    FP8_E4M3,
    FP8_E4M3_TENSOR,
    MXFP4,
    MXFP4_FITTED,
    MXFP4_FITTED_STOCHASTIC,
    QUEST_INT4,
    QUEST_MXFP4,
)
from lowbit_jax.rotations.hadamard import Hadamard


@dataclasses.dataclass(frozen=True)
class Config:
    """The tile that one block reads, multiples of 64 and of the sizes of the transforms."""

    tile_m: int = 128
    tile_k: int = 64


def choose_config(m: int, span_m: int, span_k: int, itemsize: int) -> Config:
    """A tile for x with m rows.

    Medians on one H100, x 16384 x 4096 in bfloat16: a copy of as many bytes takes 105 to 124 us,
    both operands with transforms of 32 and references given 123, exact 182. The forward pair of
    Quartet takes 155, exact 220 in tiles of 128 x 64 and 256 in tiles of 64 x 64; its backward pair
    174, exact 229 and 246.

    Args:
      m: Rows.
      span_m: Rows that are rotated together, 64 or 128; 64 where no columns are made.
      span_k: Columns that are rotated together.
      itemsize: Bytes of an entry of x.
    """
    tile_m = 128 if m % 128 == 0 and itemsize == 2 and span_k == 64 else 64
    return Config(max(tile_m, span_m), span_k)


def lowering_cases(
    m: int = 16384, k: int = 4096
) -> list[tuple[str, Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]]:
    """Calls whose kernels differ for x `(m, k)`, each with its name and the shapes it takes.

    Those of vectors are of references.
    """
    # The op takes its tile from this file.
    from pallas_kernels.rotate_quantize.op import rotate_quantize
    from pallas_kernels.rotate_quantize.reference import Keys, Target

    x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    vectors = tuple(jax.ShapeDtypeStruct((n,), jnp.float32) for n in (m, k))
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    plain, random = Hadamard(32), Hadamard(32, randomized=True)
    mxfp4 = Target(MXFP4, plain)
    forward = Target(QUEST_MXFP4, plain), Target(MXFP4_FITTED, random)
    backward = Target(MXFP4_FITTED_STOCHASTIC, random)

    def given(x, row_reference, column_reference, emit_references=False):
        references = {"row_reference": row_reference, "column_reference": column_reference}
        return rotate_quantize(x, mxfp4, mxfp4, emit_references=emit_references, **references)

    def quartet_forward(x, key, row_reference=None, column_reference=None):
        return rotate_quantize(
            x,
            *forward,
            requantize=True,
            mask_bound=6.0,
            column_keys=Keys(key),
            row_reference=row_reference,
            column_reference=column_reference,
            emit_references=True,
        )

    def quartet_backward(x, key, row_reference=None, column_reference=None):
        return rotate_quantize(
            x,
            backward,
            backward,
            row_keys=Keys(key, key),
            column_keys=Keys(key, key),
            row_reference=row_reference,
            column_reference=column_reference,
            emit_references=True,
        )

    def rows_only(x, reference):
        return rotate_quantize(x, mxfp4, None, row_reference=reference)

    def columns_only(x, reference):
        return rotate_quantize(x, None, mxfp4, column_reference=reference)

    def exact(x, rows, columns=None, **options):
        return rotate_quantize(x, rows, columns, **options)

    wide = Target(MXFP4, Hadamard(128))
    quest = Target(QUEST_INT4, Hadamard(128))
    partial = functools.partial
    return [
        ("both", given, (x, *vectors)),
        ("both, emitting", partial(given, emit_references=True), (x, *vectors)),
        ("rows", rows_only, (x, vectors[0])),
        ("columns", columns_only, (x, vectors[1])),
        ("both, exact", partial(exact, rows=mxfp4, columns=mxfp4), (x,)),
        ("Quartet forward", quartet_forward, (x, key, *vectors)),
        ("Quartet forward, exact", quartet_forward, (x, key)),
        ("Quartet forward, float32", quartet_forward, (x.update(dtype=jnp.float32), key)),
        ("Quartet backward", quartet_backward, (x, key, *vectors)),
        ("Quartet backward, exact", quartet_backward, (x, key)),
        ("Hadamard 128", partial(exact, rows=wide, columns=wide), (x,)),
        ("QuEST", partial(exact, rows=quest, mask_bound=8.0), (x,)),
        ("FP8", partial(exact, rows=Target(FP8_E4M3), columns=Target(FP8_E4M3_TENSOR)), (x,)),
    ]

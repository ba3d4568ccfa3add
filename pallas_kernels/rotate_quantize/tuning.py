"""Tiles of `rotate_quantize`, and the launches that the tests lower and compile."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowbit_jax.numerics import (
    FP8_E4M3,
    FP8_E4M3_TENSOR,
    FP8_E5M2_TENSOR,
    MXFP4,
    MXFP4_FITTED,
    MXFP4_FITTED_STOCHASTIC,
    NVFP4,
    NVFP4_EDEN,
    NVFP4_FOUR_OVER_SIX,
    NVFP4_STOCHASTIC,
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

    Tiles of 128 x 64 are the fastest on an H100, for the backward pair of Quartet by 7 %, for its
    forward pair by 16 % over tiles of 64 x 64; float32 fills the shared memory sooner.

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

    Scalars are references; without one they are "exact".
    """
    # The op takes its tile from this file.
    from pallas_kernels.rotate_quantize.op import rotate_quantize
    from pallas_kernels.rotate_quantize.reference import Keys, Target

    x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    in_float32 = x.update(dtype=jnp.float32)
    bound = jax.ShapeDtypeStruct((), jnp.float32)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    plain, random = Hadamard(32), Hadamard(32, randomized=True)
    mxfp4, wide = Target(MXFP4, plain), Target(MXFP4, Hadamard(128))
    quest, fp8 = Target(QUEST_INT4, Hadamard(128)), Target(FP8_E4M3_TENSOR)
    forward = Target(QUEST_MXFP4, plain), Target(MXFP4_FITTED, random)
    backward = Target(MXFP4_FITTED_STOCHASTIC, random)
    gradients = Target(FP8_E5M2_TENSOR)
    four_over_six = Target(NVFP4_FOUR_OVER_SIX)
    eden = Target(NVFP4_EDEN, Hadamard(128, randomized=True))
    stochastic = Target(NVFP4_STOCHASTIC, Hadamard(128, randomized=True))

    def quantized(rows, columns, **options):
        def call(x, reference=None):
            return rotate_quantize(x, rows, columns, reference=reference, **options)

        return call

    def quartet_forward(x, key, reference=None):
        options: dict[str, Any] = {"requantize": True, "mask_bound": 6.0}
        return rotate_quantize(x, *forward, column_keys=Keys(key), reference=reference, **options)

    def quantized_at_random(rows, columns):
        def call(x, key, reference=None):
            keys = Keys(key, key)
            return rotate_quantize(
                x, rows, columns, row_keys=keys, column_keys=keys, reference=reference
            )

        return call

    quartet_backward = quantized_at_random(backward, backward)

    return [
        ("both", quantized(mxfp4, mxfp4), (x, bound)),
        ("both, exact", quantized(mxfp4, mxfp4), (x,)),
        ("rows", quantized(mxfp4, None), (x, bound)),
        ("columns", quantized(None, mxfp4), (x, bound)),
        ("Quartet forward", quartet_forward, (x, key, bound)),
        ("Quartet forward, exact", quartet_forward, (x, key)),
        ("Quartet forward, float32", quartet_forward, (in_float32, key, bound)),
        ("Quartet backward", quartet_backward, (x, key, bound)),
        ("Quartet backward, exact", quartet_backward, (x, key)),
        ("Hadamard 128", quantized(wide, wide), (x, bound)),
        ("QuEST", quantized(quest, None, mask_bound=8.0), (x,)),
        ("FP8", quantized(fp8, fp8), (x, bound)),
        ("FP8 gradients", quantized(gradients, gradients), (x, bound)),
        ("FP8 rows", quantized(Target(FP8_E4M3), Target(FP8_E4M3)), (x,)),
        ("NVFP4, exact", quantized(Target(NVFP4), None), (x,)),
        ("NVFP4 four over six, exact", quantized(four_over_six, None), (x,)),
        ("NVFP4 four over six, float32, exact", quantized(four_over_six, None), (in_float32,)),
        ("NVFP4 stochastic, exact", quantized_at_random(stochastic, stochastic), (x, key)),
        ("Quartet II backward, exact", quantized_at_random(eden, eden), (x, key)),
        ("Quartet II columns, exact", quantized_at_random(None, eden), (x, key)),
    ]

"""Products of block-scaled operands by the units of Blackwell GPUs, through cuDNN.

`jax.nn.scaled_matmul` becomes one call of cuDNN for two pairs of operands: MXFP8, elements e4m3 or
e5m2 (not both e5m2) with E8M0 scales of 32, and NVFP4, elements e2m1 with E4M3 scales of 16. XLA
pads rows to 128 and scales to 4 a row, and lays scales out as cuDNN wants them. MXFP4 has no pair
of its own there. Its levels, and those of MXFP6, are levels of e4m3 too: it is multiplied as MXFP8,
exactly, at the speed of 8 bits.

It is opt-in, by name: it has been lowered for CUDA and compared with the reference on a CPU, where
the same call is a plain product, but has not run on such a GPU.

References:
  NVIDIA, cuDNN: block scale dequantize and matmul.
  Rouhani et al., OCP Microscaling Formats (MX) Specification v1.0.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from lowbit_jax.numerics import E2M1, E2M3, E3M2, E4M3, E5M2, QTensor, QuantSpec
from lowbit_jax.numerics.formats import decode, unpack
from lowbit_jax.numerics.spec import E4M3_RULES, POWER_OF_TWO_RULES
from lowbit_jax.rotations import Rotation
from pallas_kernels.compat import vary_alike

_OLDEST = (10, 0)
_AS_E4M3 = (E2M1, E2M3, E3M2, E4M3)  # whose levels are levels of e4m3
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def formats_obstacle(
    a: QuantSpec | None,
    b: QuantSpec | None,
    rotation: Rotation | None = None,
    is_kept: bool = False,
    dtypes: Sequence[DTypeLike] = (jnp.bfloat16,),
) -> str | None:
    """Why these formats cannot be multiplied as they are, or None if they can.

    Args:
      a: Format of the first operand; None: not quantized.
      b: Of the second.
      rotation: Of both, applied before they are quantized: any.
      is_kept: Whether the second operand is that of the forward product, as it is.
      dtypes: Of what is not quantized, and of the result.
    """
    del rotation
    if a is None or b is None:
        return "both operands must be quantized"
    if is_kept:
        return "scales of the forward product run along the sum of this one"
    if len({_pair(a), _pair(b)}) != 1 or _pair(a) is None:
        return (
            "block-scaled units multiply MX formats (blocks of 32, power-of-two scales) or NVFP4"
            f" (e2m1, blocks of 16, e4m3 scales) by their like, got {a} and {b}"
        )
    if a.format == b.format == E5M2:
        return "block-scaled units multiply e5m2 by e4m3 only"
    for dtype in dtypes:
        if jnp.dtype(dtype) not in _DTYPES:
            return f"results are bfloat16, float16 or float32, got {jnp.dtype(dtype)}"
    return None


def device_limit(capability: tuple[int, int] | None) -> str | None:
    """Why a device of this compute capability has no such units, or None if it has."""
    if capability is None:
        return "no CUDA device"
    if capability < _OLDEST:
        needed, found = (".".join(map(str, version)) for version in (_OLDEST, capability))
        return f"block-scaled units need compute capability {needed}, this device has {found}"
    return None


def block_scaled(
    a: QTensor, b: QTensor, compute_dtype: np.dtype, out_dtype: np.dtype
) -> Float[Array, "p q"]:
    """`a b^T` of matrices as they are stored: sums in float32, then rounded to `out_dtype`.

    Global scales wait for the float32 sums. Not differentiated.

    Args:
      a: `(p, c)`; formats as in `formats_obstacle`.
      b: `(q, c)`.
      compute_dtype: Not used: nothing is dequantized.
      out_dtype: bfloat16, float16 or float32.

    Raises:
      ValueError: If the shapes do not fit together.
      NotImplementedError: If the formats are not covered.
    """
    del compute_dtype
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"block_scaled: operands must be (p, c) and (q, c), got shapes {a.shape} and"
            f" {b.shape}; reshape or transpose them before they are quantized."
        )
    obstacle = formats_obstacle(a.spec, b.spec, dtypes=(out_dtype,))
    if obstacle is not None:
        raise NotImplementedError(f"block_scaled: {obstacle}; dequantize them.")
    factors = [q.global_scale for q in (a, b) if q.global_scale is not None]
    elements, scales = zip(*(_elements_and_scales(q) for q in (a, b)), strict=True)
    y = jax.nn.scaled_matmul(
        *(x[None] for x in (*elements, *scales)),
        preferred_element_type=jnp.float32 if factors else out_dtype,
    )[0]
    y = vary_alike(y, (elements, scales))  # scaled_matmul drops what varies over mesh axes
    for factor in factors:
        y = y * factor
    return y.astype(out_dtype)


def _pair(spec: QuantSpec) -> str | None:
    """Which of the two kinds of operands a format makes."""
    if spec.block_size == 32 and spec.scale in POWER_OF_TWO_RULES:
        return "mx" if spec.format in (*_AS_E4M3, E5M2) else None
    if spec.block_size == 16 and spec.scale in E4M3_RULES:
        return "nvfp4" if spec.format == E2M1 else None
    return None


def _elements_and_scales(q: QTensor) -> tuple[Shaped[Array, "rows c"], Shaped[Array, "rows d"]]:
    """Codes and scales in the dtypes of `jax.nn.scaled_matmul`, the same bits where they can be."""
    scales = jnp.repeat(q.scales, q.spec.block_rows, axis=0)
    if _pair(q.spec) == "nvfp4":
        # The lower four bits of a byte come first in both.
        elements = lax.bitcast_convert_type(q.codes, jnp.float4_e2m1fn).reshape(q.shape)
        return elements, scales
    elements = q.codes
    if q.spec.format.bits < 8:
        levels = decode(unpack(q.codes, q.spec.format.bits), q.spec.format)
        elements = levels.astype(jnp.float8_e4m3fn)
    return elements, lax.bitcast_convert_type(scales, jnp.float8_e8m0fnu)

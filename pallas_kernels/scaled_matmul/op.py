"""`scaled_matmul`: checks, padding and the choice of a schedule around the kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from pallas_kernels.compat import mosaic_obstacle
from pallas_kernels.folded import WORD
from pallas_kernels.scaled_matmul.epilogue import HADAMARD_BLOCKS, Epilogue
from pallas_kernels.scaled_matmul.kernel import matmul_kernel
from pallas_kernels.scaled_matmul.transform import CHUNK, hadamard_operand
from pallas_kernels.scaled_matmul.tuning import STEP_BYTES, Config, choose_config

_E4M3, _E5M2 = np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e5m2)
_BF16, _F32 = np.dtype(jnp.bfloat16), np.dtype(np.float32)
_FP8 = (_E4M3, _E5M2)


def scaled_matmul(
    a: Shaped[Array, "..."],
    b: Shaped[Array, "..."],
    a_scales: Shaped[Array, "..."] | None = None,
    b_scales: Shaped[Array, "..."] | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    mask: Shaped[Array, "..."] | None = None,
    inverse_hadamard: int | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """`out[i, j] = a_scales[i] b_scales[j] sum_k a[i, k] b[j, k]` on the tensor cores of Hopper.

    FP8 tensor cores keep about 14 bits of a sum; every `config.promote` k-steps of 128 it moves
    to a float32 register. Operands whose products need fewer bits then give the exact product, as
    E2M1 codes of normal data do that are folded into FP8 (`pallas_kernels.folded`); where the
    scales of a row's blocks differ by several binades, the lowest bits of the small ones are cut
    off. What follows the sum is done in float32, in this order: times `a_scales`, times `b_scales`,
    zeros where the mask is not set, the block Hadamard transform along n undone, one rounding to
    `out_dtype`. A scale of shape `()` is first multiplied with the scales of the other operand, in
    float32, where these are given: sums meet one multiplication then. A product of scales below
    2**-126 has fewer bits or is 0, one of 2**128 is infinite, and so are results then, also those
    that scaling with one after the other would keep.

    The transform runs on the tensor core: for a bfloat16 result its input is rounded to bfloat16
    once, for a float32 result it is split into two bfloat16 terms, which leaves a relative error
    of 2**-17 of each entry (one that rounds to infinity in bfloat16 makes NaNs of its block then).
    It takes 32 columns at least: blocks of 16 share their NaNs and infinities two by two, as NaNs.

    m and n need not be multiples of a tile: copies outside an array are clipped. Operands whose
    m is no multiple of 8, n of 64 or k of 128 bytes, and masks whose m is no multiple of 4 are
    padded in a pass of their own.

    Args:
      a: `(m, k)`, float8_e4m3fn, float8_e5m2 or bfloat16.
      b: `(n, k)`, likewise; 8-bit dtypes mix.
      a_scales: Float32 `(m,)` or `()`, or None for 1.
      b_scales: Float32 `(n,)` or `()`, or None for 1.
      out_dtype: bfloat16 or float32.
      mask: `(n / 32, m)` uint32, of `pallas_kernels.folded.pack_mask`; None keeps all.
      inverse_hadamard: Block size 16, 32, 64 or 128 of a normalized Hadamard transform along n,
        which is its own inverse; None: no transform.
      config: Schedule; None: `choose_config`.
      interpret: Run on the CPU, within `pallas_kernels.testing.run_interpreted`.

    Returns:
      `(m, n)` in `out_dtype`.

    Raises:
      ValueError: If shapes or dtypes do not fit together.
      NotImplementedError: If they do, but this kernel does not cover them.
    """
    _check(a, b, a_scales, b_scales, mask, inverse_hadamard)
    out_dtype = np.dtype(out_dtype)
    _check_covered(a, b, out_dtype, inverse_hadamard)
    epilogue = Epilogue(
        out_dtype, _kind(a_scales), _kind(b_scales), mask is not None, inverse_hadamard
    )
    config = config or choose_config(a.shape[0], b.shape[0], a.dtype, epilogue)
    if inverse_hadamard is not None and config.tile_n % inverse_hadamard:
        raise NotImplementedError(
            "scaled_matmul: tile_n must be a multiple of inverse_hadamard="
            f"{inverse_hadamard}, got {config}; choose another config."
        )
    return _scaled_matmul(
        a,
        b,
        a_scales,
        b_scales,
        mask,
        epilogue=epilogue,
        config=config,
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=("epilogue", "config", "interpret"))
def _scaled_matmul(a, b, a_scales, b_scales, mask, *, epilogue, config, interpret):
    m, n = a.shape[0], b.shape[0]
    # Copies clip tiles, but swizzled pieces of 8 rows of 128 bytes must be whole.
    step = STEP_BYTES // a.dtype.itemsize
    a, b = _pad(a, 8, step), _pad(b, CHUNK, step)
    a_scales, b_scales = (None if s is None else s.reshape(-1) for s in (a_scales, b_scales))
    if mask is not None:
        mask = _pad(mask, 1, 4)  # rows of 16 bytes, which bulk copies need
    hadamard = None
    if epilogue.inverse_hadamard:
        hadamard = hadamard_operand(epilogue)
    out = matmul_kernel(
        a,
        b,
        a_scales,
        b_scales,
        mask,
        hadamard,
        epilogue=epilogue,
        config=config,
        interpret=interpret,
    )
    return out[:m, :n]


def _kind(scales):
    if scales is None:
        return None
    return "vector" if scales.ndim else "scalar"


def _pad(x, *units):
    """`x` with zeros behind each axis up to a multiple of its unit."""
    widths = [(0, -size % unit) for size, unit in zip(x.shape, units, strict=True)]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def _check(a, b, a_scales, b_scales, mask, inverse_hadamard):
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            "scaled_matmul: a must be (m, k) and b (n, k), got shapes"
            f" {a.shape} and {b.shape}; transpose or reshape them."
        )
    m, n = a.shape[0], b.shape[0]
    for name, scales, rows in (("a_scales", a_scales, m), ("b_scales", b_scales, n)):
        if scales is not None and (scales.dtype != _F32 or scales.shape not in ((), (rows,))):
            raise ValueError(
                f"scaled_matmul: {name} must be float32 of shape ({rows},) or (),"
                f" got {scales.dtype} of shape {scales.shape}."
            )
    if mask is not None and (n % WORD or mask.dtype != np.uint32 or mask.shape != (n // WORD, m)):
        raise ValueError(
            f"scaled_matmul: mask must be uint32 of shape (n / {WORD}, m) for n={n}, m={m},"
            f" got {mask.dtype} of shape {mask.shape}; pack it with pack_mask."
        )
    if inverse_hadamard is not None and n % inverse_hadamard:
        raise ValueError(
            "scaled_matmul: n must be a multiple of inverse_hadamard="
            f"{inverse_hadamard}, got n={n}."
        )


def _check_covered(a, b, out_dtype, inverse_hadamard):
    obstacle = mosaic_obstacle()
    if obstacle is not None:
        raise NotImplementedError(f"scaled_matmul: {obstacle}; use scaled_matmul_reference.")
    are_fp8 = a.dtype in _FP8 and b.dtype in _FP8
    if not are_fp8 and not a.dtype == b.dtype == _BF16:
        raise NotImplementedError(
            "scaled_matmul: operands must be float8_e4m3fn or float8_e5m2, or both bfloat16,"
            f" got {a.dtype} and {b.dtype}; cast them."
        )
    if 0 in a.shape or 0 in b.shape:
        raise NotImplementedError(
            f"scaled_matmul: arrays must not be empty, got shapes {a.shape} and {b.shape}."
        )
    if out_dtype not in (_BF16, _F32):
        raise NotImplementedError(
            f"scaled_matmul: out_dtype must be bfloat16 or float32, got {out_dtype}."
        )
    if inverse_hadamard is not None and inverse_hadamard not in HADAMARD_BLOCKS:
        raise NotImplementedError(
            f"scaled_matmul: inverse_hadamard must be one of {HADAMARD_BLOCKS},"
            f" got {inverse_hadamard}."
        )

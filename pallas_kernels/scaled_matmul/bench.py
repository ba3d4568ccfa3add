"""Times the entries of `CONFIGS` beside XLA's products; needs an H100.

Run: python -m pallas_kernels.scaled_matmul.bench --pattern 4096x4096
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax import lax

from pallas_kernels.folded import pack_mask
from pallas_kernels.scaled_matmul.op import scaled_matmul
from pallas_kernels.scaled_matmul.tuning import CONFIGS
from pallas_kernels.testing import time_device

# m, n, k: layers of 4096 and 2048 wide models, an MLP of 14336, and the 30M model.
SHAPES = (
    (16384, 4096, 4096),
    (16384, 2048, 2048),
    (16384, 14336, 4096),
    (16384, 4096, 14336),
    (16384, 640, 640),
    (16384, 1792, 640),
    (16384, 640, 1792),
)
# Dense products of an H100 SXM by NVIDIA's data sheet, operations a second, by bytes an element.
_PEAK = {1: 1979e12, 2: 989e12}


@dataclasses.dataclass(frozen=True)
class Case:
    """One function at one shape."""

    name: str
    shape: tuple[int, int, int]
    dtype: Any
    fn: Callable[..., jax.Array]  # of a, b, a_scales, b_scales, mask


def _xla(a, b, a_scales, b_scales, mask):
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)


def _xla_scaled(a, b, a_scales, b_scales, mask):
    out = lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return (out * a_scales[:, None] * b_scales).astype(jnp.bfloat16)


def _kernel(a, b, a_scales, b_scales, mask, *, config, with_epilogue):
    if not with_epilogue:
        return scaled_matmul(a, b, a_scales, b_scales, config=config)
    return scaled_matmul(a, b, a_scales, b_scales, mask=mask, inverse_hadamard=32, config=config)


def cases() -> Iterator[Case]:
    """XLA in bfloat16 and FP8, then every entry with scales, and with mask and Hadamard 32."""
    for shape in SHAPES:
        label = "x".join(map(str, shape))
        yield Case(f"{label} XLA bf16", shape, jnp.bfloat16, _xla)
        yield Case(f"{label} XLA fp8", shape, jnp.float8_e4m3fn, _xla)
        yield Case(f"{label} XLA fp8, scales", shape, jnp.float8_e4m3fn, _xla_scaled)
        for name, config in (("chosen", None), *CONFIGS.items()):
            dtype = jnp.bfloat16 if name.startswith("bf16") else jnp.float8_e4m3fn
            for with_epilogue in (False, True):
                fn = functools.partial(_kernel, config=config, with_epilogue=with_epilogue)
                what = f"{name}, mask, Hadamard" if with_epilogue else f"{name}, scales"
                yield Case(f"{label} {what}", shape, dtype, fn)


def arguments(case: Case) -> tuple[jax.Array, ...]:
    """Normal operands, scales that are powers of two, and a mask of seven entries in ten."""
    m, n, k = case.shape
    keys = jax.random.split(jax.random.key(0), 5)
    a = jax.random.normal(keys[0], (m, k), jnp.bfloat16).astype(case.dtype)
    b = jax.random.normal(keys[1], (n, k), jnp.bfloat16).astype(case.dtype)
    a_scales = jnp.exp2(jax.random.randint(keys[2], (m,), -3, 4).astype(jnp.float32))
    b_scales = jnp.exp2(jax.random.randint(keys[3], (n,), -3, 4).astype(jnp.float32))
    return a, b, a_scales, b_scales, pack_mask(jax.random.bernoulli(keys[4], 0.7, (m, n)))


def main(pattern: str = "", repeats: int = 20) -> int:
    """Prints medians with minimum and maximum, TFLOP/s and the share of the data sheet's peak.

    Args:
      pattern: Only cases whose name contains it.
      repeats: Measurements, each of ten queued calls.
    """
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for case in cases():
        if pattern not in case.name:
            continue
        m, n, k = case.shape
        timing = time_device(jax.jit(case.fn), *arguments(case), repeats=repeats)
        rate = 2 * m * n * k / timing.median_s
        share = rate / _PEAK[jnp.dtype(case.dtype).itemsize]
        print(f"{case.name:60} {timing!s:36} {rate / 1e12:7.0f} {share:6.1%}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))

"""What makes a tensor and what quantizes it: how much could their fusion save?"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from lowbit_jax.models.layers import rms_norm, swiglu
from lowbit_jax.numerics import MXFP4
from lowbit_jax.rotations.hadamard import Hadamard
from pallas_kernels.measure import Case, Comparison, jitted, kernel_obstacle
from pallas_kernels.rotate_quantize import Target, rotate_quantize

QUANTIZER = "quantizer"


def norm(m: int, k: int) -> Comparison:
    """RMSNorm of x `(m, k)`, bfloat16, before `rotate_quantize`."""

    def inputs(key: PRNGKeyArray) -> tuple[Any, ...]:
        return jax.random.normal(key, (m, k), jnp.bfloat16), jnp.ones((k,), jnp.float32)

    return _comparison(f"RMSNorm {m}x{k}", functools.partial(rms_norm, eps=1e-5), inputs)


def gated(m: int, k: int) -> Comparison:
    """SwiGLU of gate and up `(m, k)`, bfloat16, before `rotate_quantize`."""

    def inputs(key: PRNGKeyArray) -> tuple[Any, ...]:
        gate, up = jax.random.normal(key, (2, m, k), jnp.bfloat16)
        return gate, up

    return _comparison(f"SwiGLU {m}x{k}", swiglu, inputs)


def _comparison(
    work: str, produce: Callable[..., jax.Array], inputs: Callable[[PRNGKeyArray], tuple[Any, ...]]
) -> Comparison:
    """The producer, the quantizer with a bound given, and both with a bound of the producer.

    A kernel that did both would read what the producer reads and write what the quantizer writes.
    It takes no less than the quantizer alone, so it saves at most the difference of the last two.
    """
    target = Target(MXFP4, Hadamard(32))

    def quantize(first, second):
        del second
        return rotate_quantize(first, target, target, reference=jnp.float32(8))

    def both(first, second):
        y = produce(first, second)
        bound = jnp.max(jnp.abs(y)).astype(jnp.float32)
        return rotate_quantize(y, target, target, reference=bound)

    def case(name, fn, obstacle=lambda: None):
        return Case(name, jitted(fn, lambda arrays: arrays), obstacle)

    cases = (
        case("producer", produce),
        case(QUANTIZER, quantize, kernel_obstacle),
        case("producer, quantizer", both, kernel_obstacle),
    )
    return Comparison("producer", work, inputs, cases, (QUANTIZER,))

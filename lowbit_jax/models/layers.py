"""The elementwise pieces of a Llama block, each one pass over bfloat16 with float32 inside.

All three have their own derivative rules, for one reason: what automatic differentiation would
keep for the backward pass are float32 intermediates, twice the bytes of the activations
themselves, and between two iterations of a scan the compiler cannot undo it. Here backward keeps
the inputs and recomputes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from lowbit_jax.models.rope_scaling import RopeScaling, scale_frequencies


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(
    x: Float[Array, "*batch d"], scale: Float[Array, "d"], eps: float
) -> Float[Array, "*batch d"]:
    """`x / sqrt(mean(x^2) + eps) * scale` along the last axis.

    Statistics and arithmetic are float32; the result is rounded once, to `x.dtype`. `eps` is
    static. The factor `1 / sqrt(...)`, kept for the backward pass, is named "rstd" for policies of
    `jax.checkpoint`.

    References:
      Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
    """
    return _rms_norm_fwd(x, scale, eps)[0]


def _rms_norm_fwd(x, scale, eps):
    x32 = x.astype(jnp.float32)
    inverse_rms = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    inverse_rms = checkpoint_name(inverse_rms, "rstd")
    y = (x32 * inverse_rms * scale.astype(jnp.float32)).astype(x.dtype)
    return y, (x, inverse_rms, scale)


def _rms_norm_bwd(eps, residuals, g):
    del eps
    # With n = x * inverse_rms and gs = g * scale: dx = inverse_rms * (gs - n * mean(gs * n)).
    x, inverse_rms, scale = residuals
    normalized = x.astype(jnp.float32) * inverse_rms
    g32 = g.astype(jnp.float32)
    scaled = g32 * scale.astype(jnp.float32)
    dx = inverse_rms * (scaled - normalized * jnp.mean(scaled * normalized, -1, keepdims=True))
    dscale = jnp.sum(g32 * normalized, axis=tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


@jax.custom_vjp
def swiglu(
    gate: Float[Array, "*batch f"], up: Float[Array, "*batch f"]
) -> Float[Array, "*batch f"]:
    """`silu(gate) * up`, computed in float32 and rounded once, to the dtype of the inputs.

    References:
      Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202, eq. 6.
    """
    return _swiglu_fwd(gate, up)[0]


def _swiglu_fwd(gate, up):
    y = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return y.astype(gate.dtype), (gate, up)


def _swiglu_bwd(residuals, g):
    gate, up = residuals
    gate32, g32 = gate.astype(jnp.float32), g.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate32)
    # silu'(z) = sigmoid(z) * (1 + z * (1 - sigmoid(z)))
    dgate = g32 * up.astype(jnp.float32) * sigmoid * (1 + gate32 * (1 - sigmoid))
    return dgate.astype(gate.dtype), (g32 * gate32 * sigmoid).astype(up.dtype)


swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def rotary_angles(
    length: int, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Array, Array]:
    """Cosine and sine of `position * theta^(-2 i / head_dim)`.

    Args:
      length: Number of positions `t`, from 0.
      head_dim: Even width of a head.
      theta: Base of the geometric sequence of frequencies.
      scaling: What changes the frequencies, see `models.rope_scaling`.

    Returns:
      Two float32 arrays `(t, head_dim // 2)`; angles are float32 too, since bfloat16 cannot tell
      position 257 from 258.
    """
    frequency = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    frequency = scale_frequencies(frequency, scaling)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency
    # The barrier makes the tables once a step; else they may be fused, cosines and all, into every
    # pass that reads them.
    return lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))


@jax.custom_vjp
def rotate_positions(
    x: Float[Array, "*batch t h d"], cos: Float[Array, "t half"], sin: Float[Array, "t half"]
) -> Float[Array, "*batch t h d"]:
    """Rotary embedding: turns each pair `(x[i], x[i + d/2])` by its position's angle `i`.

    The half-split pairing of the Hugging Face checkpoints, not the interleaved one of the paper;
    the two differ by a permutation of the rows of the query and key matrices. Computed in float32,
    rounded once. The angles receive no gradient.

    References:
      Su et al., RoFormer, arXiv:2104.09864, eq. 34.
    """
    return _turn(x, cos, sin)


def _turn(x, cos, sin):
    # Seen as (..., 2, d/2), the partner of a pair is a flip of the axis of length two: an index
    # map, which fuses where slices and a concatenation would make passes of their own.
    halves = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2).astype(jnp.float32)
    cos, sin = cos[:, None, None, :], sin[:, None, None, :]
    signed = jnp.concatenate([-sin, sin], axis=-2)
    return (halves * cos + halves[..., ::-1, :] * signed).reshape(x.shape).astype(x.dtype)


def _rotate_positions_fwd(x, cos, sin):
    return _turn(x, cos, sin), (cos, sin)


def _rotate_positions_bwd(residuals, g):
    cos, sin = residuals
    return _turn(g, cos, -sin), None, None


rotate_positions.defvjp(_rotate_positions_fwd, _rotate_positions_bwd)


def logical_init(init: Callable[..., Array], axes: tuple[str, ...]) -> Callable[..., Any]:
    """`init`, boxing the parameter with the names of its axes; a module reads it unboxed."""
    return nn.with_logical_partitioning(init, axes)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned float32 `scale` `(d,)`, ones at first."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Shape and dtype of `x`."""
        init = logical_init(nn.initializers.ones_init(), ("norm",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        return rms_norm(x, scale, self.eps)

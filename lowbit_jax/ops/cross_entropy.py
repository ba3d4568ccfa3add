"""Cross-entropy of a linear head, without ever holding all the logits.

A head of vocabulary `v` over `m` tokens makes `m * v` logits, the largest array of a training step
(2 GiB in float32 at 16,384 tokens and 32,768 words). The loss is a scalar, so its cotangent is one
number, and the gradients can be computed while the logits of a chunk are at hand: forward returns
the loss and keeps `d loss / d hidden` and `d loss / d weight`, backward multiplies them by that
number.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.compat import vary_alike

# Logits of one chunk, in float32, when the caller leaves the number of chunks open. Each chunk
# costs one more pass over the float32 weight gradient, so fewer and larger is faster.
DEFAULT_CHUNK_BYTES = 2**30


def default_chunks(tokens: int, vocab_size: int) -> int:
    """The least divisor of `tokens` that leaves `DEFAULT_CHUNK_BYTES` of logits a chunk at most."""
    wanted = -(-tokens * vocab_size * 4 // DEFAULT_CHUNK_BYTES)
    return next((n for n in range(max(wanted, 1), tokens) if tokens % n == 0), tokens)


def linear_cross_entropy(
    hidden: Float[Array, "..."],
    weight: Float[Array, "..."],
    targets: Int[Array, "..."],
    *,
    chunks: int | None = None,
) -> Float[Array, ""]:
    """Mean over tokens of `logsumexp(hidden @ weight.T) - (hidden @ weight.T)[target]`, in nats.

    Products take operands of `hidden.dtype` and accumulate in float32; the logits, their
    logsumexp and the softmax are float32; the gradient of the logits is rounded to `hidden.dtype`
    before the two backward products. No forward-mode derivative.

    Within `jax.shard_map` the mean is that of a device's tokens, and the gradient of a weight that
    is the same on all is summed over the devices, under its default `check_vma`.

    Chunk `i` holds the tokens `i, i + chunks, i + 2 * chunks, ...`: a batch sharded over its tokens
    stays sharded inside every chunk.

    Args:
      hidden: `(m, d)`, bfloat16 or float32.
      weight: `(v, d)`; cast to `hidden.dtype` for the products, its gradient has its own dtype.
      targets: `(m,)` integers in `[0, v)`. One out of range gives NaN or a wrong loss.
      chunks: Divisor of `m`; at most `m / chunks * v` logits exist at a time. `None`: see
        `default_chunks`.

    Returns:
      Float32 scalar.

    Raises:
      ValueError: If the shapes disagree or `chunks` does not divide `m`.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "linear_cross_entropy: hidden (m, d) and weight (v, d) must be matrices of one width,"
            f" got {hidden.shape} and {weight.shape}; flatten batch and time, keep weights (v, d)."
        )
    m = hidden.shape[0]
    if targets.shape != (m,):
        raise ValueError(
            f"linear_cross_entropy: needs one target a token, ({m},), got {targets.shape};"
            " flatten targets as you flatten hidden."
        )
    if chunks is None:
        chunks = default_chunks(m, weight.shape[0])
    if chunks < 1 or m % chunks:
        raise ValueError(
            f"linear_cross_entropy: chunks must divide the number of tokens, got {chunks} for {m};"
            " choose a divisor or leave it None."
        )
    return _mean_loss(chunks, *vary_alike((hidden, weight, targets)))


def _matmul(
    a: Array, b: Array, contract: tuple[int, int], dtype: DTypeLike = jnp.float32
) -> Float[Array, "..."]:
    """Product over axis `contract[0]` of `a` and `contract[1]` of `b`, rounded once, to `dtype`.

    Accumulated in float32 whatever `dtype` is. Asking for bfloat16 here, not casting afterwards,
    lets the GPU's product write it; a cast could become a pass of its own.
    """
    # Without HIGHEST a GPU would round float32 operands to TF32.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=dtype,
    )


def _chunk_losses(hidden, weight, targets):
    """Per-token losses `(m,)`, logits `(m, v)` and their logsumexp `(m, 1)`; all float32."""
    logits = _matmul(hidden, weight, (1, 1))
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    return (lse - picked)[:, 0], logits, lse


def _split(x: Array, chunks: int) -> Array:
    """`(m, ...)` to `(chunks, m // chunks, ...)`, interleaved."""
    return jnp.moveaxis(x.reshape(-1, chunks, *x.shape[1:]), 1, 0)


def _merge(x: Array) -> Array:
    """Inverse of `_split`."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mean_loss(chunks, hidden, weight, targets):
    """The loss alone, for evaluation: no gradient is computed."""
    cast = weight.astype(hidden.dtype)

    def body(total, chunk):
        losses, _, _ = _chunk_losses(chunk[0], cast, chunk[1])
        return total + losses.sum(), None

    chunked = (_split(hidden, chunks), _split(targets, chunks))
    total, _ = lax.scan(body, vary_alike(jnp.zeros((), jnp.float32), hidden), chunked)
    return total / targets.size


def _mean_loss_fwd(chunks, hidden, weight, targets):
    """The loss, and both gradients as residuals."""
    cast = weight.astype(hidden.dtype)
    scale = 1 / targets.size

    def body(carry, chunk):
        total, weight_gradient = carry
        h, target = chunk
        losses, logits, lse = _chunk_losses(h, cast, target)
        # An iota, not a scatter: it fuses into the pass that reads the logits.
        hit = lax.broadcasted_iota(target.dtype, logits.shape, 1) == target[:, None]
        g = (jnp.exp(logits - lse) - hit) * scale
        g = g.astype(h.dtype)
        weight_gradient += _matmul(g, h, (0, 0))
        return (total + losses.sum(), weight_gradient), _matmul(g, cast, (1, 0), h.dtype)

    init = (jnp.zeros((), jnp.float32), jnp.zeros(weight.shape, jnp.float32))
    init = vary_alike(init, hidden)
    chunked = (_split(hidden, chunks), _split(targets, chunks))
    (total, weight_gradient), hidden_gradient = lax.scan(body, init, chunked)
    # Together, or the compiler keeps the float32 sum until the backward pass has come to its end.
    residuals = (_merge(hidden_gradient), weight_gradient.astype(weight.dtype))
    return total * scale, lax.optimization_barrier(residuals)


def _mean_loss_bwd(chunks, residuals, cotangent):
    del chunks
    # Under `jax.grad` the cotangent is the constant 1 and XLA drops these products.
    hidden_gradient, weight_gradient = residuals
    return (
        (hidden_gradient * cotangent).astype(hidden_gradient.dtype),
        (weight_gradient * cotangent).astype(weight_gradient.dtype),
        None,
    )


_mean_loss.defvjp(_mean_loss_fwd, _mean_loss_bwd)

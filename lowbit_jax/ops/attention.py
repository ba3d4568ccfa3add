"""Causal self-attention: cuDNN's fused kernel where it runs, XLA's softmax elsewhere."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.compat import cuda_capability

AttentionImplementation = Literal["cudnn", "xla"]
SAVED_AS = "att"  # the result's name for policies of `jax.checkpoint`


def attention(
    q: Float[Array, "..."],
    k: Float[Array, "..."],
    v: Float[Array, "..."],
    *,
    implementation: str | None = None,
) -> Float[Array, "b t h d"]:
    """`softmax(q k^T / sqrt(d) + causal mask) v` for each head; position `i` sees `0 .. i`.

    With fewer key than query heads, query head `j` reads key head `j // (h // hk)` (grouped-query
    attention). Softmax and score accumulation are float32, the probabilities are rounded to the
    dtype of `v` before the second product. The layout is cuDNN's own: nothing is transposed.

    For policies of `jax.checkpoint` the result of "xla" has the name `SAVED_AS`. That of "cudnn" is
    kept by the primitive that makes it, together with the statistics that its backward kernel
    needs; a name would keep it twice.

    Args:
      q: `(b, t, h, d)`.
      k: `(b, t, hk, d)`, `hk` a divisor of `h`; the dtype of `q`.
      v: `(b, t, hk, d)`; the dtype of `q`.
      implementation: `"cudnn"` (never holds the `t * t` scores; bfloat16 or float16 on an NVIDIA
        GPU), `"xla"` (anywhere; holds them), or `None`: the first that supports the call.

    Returns:
      `(b, t, h, d)`, the dtype of `q`.

    Raises:
      ValueError: If shapes or dtypes disagree, or no implementation has that name.
      NotImplementedError: If `"cudnn"` is asked for by name where it cannot run.

    References:
      Ainslie et al., GQA, arXiv:2305.13245.
      Dao, FlashAttention-2, arXiv:2307.08691.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            "attention: needs q (b, t, h, d) and equal k, v (b, t, hk, d),"
            f" got {q.shape}, {k.shape}, {v.shape}; split the heads off the last axis first."
        )
    (b, t, h, d), hk = q.shape, k.shape[2]
    if k.shape != (b, t, hk, d) or h % hk:
        raise ValueError(
            "attention: k and v must match q in batch, time and head width, and their heads must"
            f" divide q's, got {q.shape} and {k.shape}; causal self-attention takes one sequence."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"attention: q, k and v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype};"
            " cast them to the compute dtype."
        )
    chosen, reason = choose_implementation(q.dtype, d, implementation)
    if implementation is not None and chosen != implementation:
        raise NotImplementedError(
            f"attention: implementation 'cudnn' cannot run here: {reason}; use 'xla' or None."
        )
    # XLA would round float32 operands to TF32 on a GPU unless told not to.
    precision = "highest" if q.dtype == jnp.float32 else None
    with jax.default_matmul_precision(precision):
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=chosen)
    return checkpoint_name(y, SAVED_AS) if chosen == "xla" else y


def choose_implementation(
    dtype: DTypeLike, head_dim: int, implementation: str | None = None
) -> tuple[AttentionImplementation, str]:
    """The implementation that this process's default device gives `attention`, and why.

    Args:
      dtype: Of the operands.
      head_dim: Width of a head.
      implementation: As in `attention`. For `"cudnn"` where it cannot run the answer is `"xla"`
        with the reason; `attention` refuses such a call.

    Returns:
      Name and reason.

    Raises:
      ValueError: If no implementation has that name.
    """
    if implementation not in ("cudnn", "xla", None):
        raise ValueError(
            f"attention: implementation must be 'cudnn', 'xla' or None, got {implementation!r};"
            " None picks the fastest that supports the call."
        )
    if implementation == "xla":
        return "xla", "asked for by name"
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return "xla", f"cuDNN takes bfloat16 and float16, not {jnp.dtype(dtype)}"
    capability = cuda_capability()
    if capability is None:
        return "xla", "the default device is no NVIDIA GPU"
    if capability < (8, 0):
        return "xla", "cuDNN needs compute capability 8.0, this GPU has {}.{}".format(*capability)
    # The limits of jax's own check: 256 from Hopper on, 128 before.
    widest = 256 if capability >= (9, 0) else 128
    if head_dim > widest or head_dim % 8:
        return "xla", f"cuDNN takes head widths up to {widest}, multiples of 8, not {head_dim}"
    return "cudnn", "NVIDIA GPU and a shape that cuDNN takes"

"""Which activations of a block backward computes anew instead of keeping, by name.

A block gives its activations names (`jax.ad_checkpoint.checkpoint_name`), and `jax.checkpoint`
keeps those that a policy lists; what has no name is computed anew from what has: elementwise
passes, and the scores of attention by XLA. What each flag drops, and what backward pays for it:

    swiglu   the input of down_proj              an elementwise pass
    norm     the inputs of q, k, v, gate and up  two elementwise passes
    ffn      gate and up, and swiglu             the products of gate and up
    qkv      query, key and value                the products of q, k and v
    att      the output of attention, and qkv    attention, and the products of q, k and v
    block    all but the input of the block      the forward pass
    unnamed  what has no name                    what that takes: weights gathered once more

Results are the same bits in float32; in bfloat16 the compiler rounds elsewhere, as it does with
another number of layers in an iteration of the loop.

Names are of bfloat16 arrays or, where a recipe quantizes, of the operand that a product kept.

References:
  Schultheis and Alistarh, LLMQ: Efficient Lower-Precision LLM Training for Consumer GPUs,
  arXiv:2512.15306. There every flag drops the same tensors.
  Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174.
"""

import dataclasses
from typing import Any

from flax import linen as nn

from lowbit_jax.ops.attention import SAVED_AS as ATTENTION

# Activations of a block in their order: its input, that normalized ("ln1"), what attention takes
# and gives, the residual stream after it, that normalized, gate and up, and their combination.
ACTIVATIONS = ("resid", "ln1", "qkv", ATTENTION, "att_out", "ln2", "mlp_up", "swiglu")
# Beside them the statistics of the norms, and operands that products make of weights.
NAMES = (*ACTIVATIONS, "rstd", "weights")
# What a matrix product keeps of its input, and what it gives, as `ops.quantized_dots` takes them.
SAVED_AS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("ln1", "qkv")),
    "o_proj": (ATTENTION, "att_out"),
    **dict.fromkeys(("gate_proj", "up_proj"), ("ln2", "mlp_up")),
    "down_proj": ("swiglu", "resid"),
}
FLAGS: dict[str, tuple[str, ...]] = {
    "swiglu": ("swiglu",),
    "norm": ("ln1", "ln2"),
    "ffn": ("mlp_up", "swiglu"),
    "qkv": ("qkv",),
    "att": ("qkv", ATTENTION),
    "block": NAMES,
    "unnamed": (),
}
NONE = "none"


def dropped_names(recompute: str) -> frozenset[str]:
    """The names that backward computes anew.

    Args:
      recompute: "none", or keys of `FLAGS` joined by "+", as in "swiglu+norm".

    Raises:
      ValueError: If there is no such flag.
    """
    flags = () if recompute == NONE else tuple(recompute.split("+"))
    unknown = [flag for flag in flags if flag not in FLAGS]
    if unknown:
        raise ValueError(
            f"recompute: must be {NONE!r} or flags of {', '.join(FLAGS)} joined by '+', got"
            f" {recompute!r}, whose {unknown[0]!r} is none of them."
        )
    return frozenset(name for flag in flags for name in FLAGS[flag])


@dataclasses.dataclass(frozen=True)
class KeepNames:
    """A policy of `jax.checkpoint`: keeps what has one of `names`; plain data, so it compares."""

    names: frozenset[str]

    def __call__(self, primitive: Any, *_, **params: Any) -> bool:
        """Whether the results of an operation are kept."""
        if primitive.name == "name":
            return params["name"] in self.names
        # cuDNN's forward kernel, whose statistics backward needs and nobody else can name.
        if primitive.name == "dot_product_attention_fwd_wrapper":
            return ATTENTION in self.names
        # The forward pass of products by our kernels, whole: kept only if nothing of it is dropped.
        if primitive.name == "remat_opt":
            names = [
                equation.params["name"]
                for equation in params["fwd_jaxpr"].eqns
                if equation.primitive.name == "name"
            ]
            return bool(names) and self.names.issuperset(names)
        return False


def recomputing(block: type[nn.Module], recompute: str, *, is_unrolled: bool) -> type[nn.Module]:
    """`block` under `jax.checkpoint` with the policy of the flags; itself for "none".

    Args:
      block: A module whose activations are named.
      recompute: See `dropped_names`.
      is_unrolled: Whether blocks follow one another without a loop around each. In a loop the
        compiler cannot merge the recomputation with the original; unrolled it would, so there a
        barrier has to keep them apart.

    Raises:
      ValueError: As `dropped_names`.
    """
    dropped = dropped_names(recompute)
    if recompute == NONE:
        return block
    policy = KeepNames(frozenset(NAMES) - dropped)
    return nn.remat(block, prevent_cse=is_unrolled, policy=policy)

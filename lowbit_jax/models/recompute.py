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
    weights  operands made of weights            casts of weights, their quantization
    unnamed  what has no name                    what that takes: weights gathered once more, or
                                                 fetched from the host's memory

Results are the same bits in float32; in bfloat16 the compiler rounds elsewhere, as it does with
another number of layers in an iteration of the loop.

Names are of bfloat16 arrays or, where a recipe quantizes, of the operand that a product kept.

References:
  Schultheis and Alistarh, LLMQ: Efficient Lower-Precision LLM Training for Consumer GPUs,
  arXiv:2512.15306. There every flag drops the same tensors.
  Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
from flax import linen as nn

from lowbit_jax.models.host_memory import HOST
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
    "weights": ("weights",),
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
    flags = parse_flags("recompute", recompute, FLAGS)
    return frozenset(name for flag in flags for name in FLAGS[flag])


def parse_flags(who: str, text: str, known: Collection[str]) -> tuple[str, ...]:
    """The flags of a text, "none" or names joined by "+"; `who` complains of another name."""
    flags = () if text == NONE else tuple(text.split("+"))
    unknown = [flag for flag in flags if flag not in known]
    if unknown:
        raise ValueError(
            f"{who}: must be {NONE!r} or flags of {', '.join(known)} joined by '+', got {text!r},"
            f" whose {unknown[0]!r} is none of them."
        )
    return flags


@dataclasses.dataclass(frozen=True)
class KeepNames:
    """A policy of `jax.checkpoint`: keeps what has one of `names`; plain data, so it compares.

    Attributes:
      names: Of what stays on the device.
      offloaded: Of what waits for the backward pass in the host's memory.
    """

    names: frozenset[str]
    offloaded: frozenset[str] = frozenset()

    def __call__(self, primitive: Any, *operands: Any, **params: Any) -> Any:
        """Whether the results of an operation are kept, and where."""
        if primitive.name == "name":
            if params["name"] in self.offloaded:
                return _offload(self.offloaded)(primitive, *operands, **params)
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
            return bool(names) and (self.names | self.offloaded).issuperset(names)
        return False


def _offload(names: frozenset[str]) -> Callable[..., Any]:
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=sorted(names),
        offload_src="device",
        offload_dst=HOST,
    )


def recomputing(
    block: type[nn.Module],
    recompute: str,
    *,
    is_unrolled: bool,
    offload_residuals: bool = False,
) -> type[nn.Module]:
    """`block` under `jax.checkpoint` with the policy of the flags; itself if there is none.

    Args:
      block: A module whose activations are named.
      recompute: See `dropped_names`.
      is_unrolled: Whether blocks follow one another without a loop around each. In a loop the
        compiler cannot merge the recomputation with the original; unrolled it would, so there a
        barrier has to keep them apart.
      offload_residuals: Whether the input of the block, "resid", is kept in the host's memory;
        with recompute "none" what has no name is then computed anew.

    Raises:
      ValueError: As `dropped_names`.
    """
    dropped = dropped_names(recompute)
    if recompute == NONE and not offload_residuals:
        return block
    offloaded = frozenset({"resid"} if offload_residuals else ())
    policy = KeepNames(frozenset(NAMES) - dropped - offloaded, offloaded)
    return nn.remat(block, prevent_cse=is_unrolled, policy=policy)

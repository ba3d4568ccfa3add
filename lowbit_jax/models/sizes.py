"""Standard Llama shapes, and what a shape costs: parameters and floating-point operations."""

from typing import Any

from lowbit_jax.models.llama import LlamaConfig

# 30m to 800m are the sizes of Panferov et al., QuEST, arXiv:2502.05003, with heads of width 128;
# 1b is the shape of Llama-3.2-1B (Grattafiori et al., The Llama 3 Herd of Models,
# arXiv:2407.21783), whose checkpoint also ties its embeddings, has 128,256 tokens, a rope_theta of
# 5e5 and scaled frequencies. Names count the parameters outside embedding and head.
LLAMA_SIZES: dict[str, dict[str, int]] = {
    "30m": {"n_layers": 6, "d_model": 640, "n_heads": 5, "n_kv_heads": 5, "d_ff": 1792},
    "50m": {"n_layers": 7, "d_model": 768, "n_heads": 6, "n_kv_heads": 6, "d_ff": 2048},
    "100m": {"n_layers": 8, "d_model": 1024, "n_heads": 8, "n_kv_heads": 8, "d_ff": 2816},
    "200m": {"n_layers": 10, "d_model": 1280, "n_heads": 10, "n_kv_heads": 10, "d_ff": 3584},
    "430m": {"n_layers": 13, "d_model": 1664, "n_heads": 13, "n_kv_heads": 13, "d_ff": 4608},
    "800m": {"n_layers": 16, "d_model": 2048, "n_heads": 16, "n_kv_heads": 16, "d_ff": 5632},
    "1b": {"n_layers": 16, "d_model": 2048, "n_heads": 32, "n_kv_heads": 8, "d_ff": 8192},
}

# Qwen team, Qwen2.5 Technical Report, arXiv:2412.15115, table 1, and the published checkpoints.
_QWEN: dict[str, Any] = {"n_kv_heads": 2, "vocab_size": 151_936, "tie_embeddings": True}
_QWEN |= {"rope_theta": 1e6, "norm_eps": 1e-6, "qkv_bias": True}
_QWEN_LARGE = _QWEN | {"vocab_size": 152_064, "tie_embeddings": False}
QWEN_SIZES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _QWEN | {"n_layers": 24, "d_model": 896, "n_heads": 14, "d_ff": 4864},
    "qwen2.5-1.5b": _QWEN | {"n_layers": 28, "d_model": 1536, "n_heads": 12, "d_ff": 8960},
    "qwen2.5-3b": _QWEN | {"n_layers": 36, "d_model": 2048, "n_heads": 16, "d_ff": 11008},
    "qwen2.5-7b": _QWEN_LARGE
    | {"n_layers": 28, "d_model": 3584, "n_heads": 28, "n_kv_heads": 4, "d_ff": 18944},
    "qwen2.5-14b": _QWEN_LARGE
    | {"n_layers": 48, "d_model": 5120, "n_heads": 40, "n_kv_heads": 8, "d_ff": 13824},
    "qwen2.5-32b": _QWEN_LARGE
    | {"n_layers": 64, "d_model": 5120, "n_heads": 40, "n_kv_heads": 8, "d_ff": 27648},
}


def llama_config(size: str, vocab_size: int | None = None, **overrides) -> LlamaConfig:
    """The `LlamaConfig` of a name in `LLAMA_SIZES` or `QWEN_SIZES`.

    Args:
      size: A name, as in `"30m"` or `"qwen2.5-0.5b"`.
      vocab_size: Rows of embedding and head; None: 32,000, or what the shape says.
      **overrides: Any other field of `LlamaConfig`.

    Raises:
      ValueError: If there is no such size.
    """
    shapes: dict[str, dict[str, Any]] = {**LLAMA_SIZES, **QWEN_SIZES}
    if size not in shapes:
        raise ValueError(
            f"llama_config: size must be one of {', '.join(shapes)}, got {size!r};"
            " build a LlamaConfig for other shapes."
        )
    fields: dict[str, Any] = {"vocab_size": 32_000, **shapes[size], **overrides}
    if vocab_size is not None:
        fields["vocab_size"] = vocab_size
    return LlamaConfig(**fields)


def count_params(config: LlamaConfig) -> dict[str, int]:
    """Parameters of the whole model and of its parts.

    Returns:
      `"total"`; `"non_embedding"`, which leaves out embedding and head alone; `"matrices"`, those
      of the seven matrices over all layers; `"vectors"`, norms and biases, the final norm
      included; `"tables"`, embedding and, if it is another one, head.
    """
    matrices = _block_matrices(config)
    qkv = (config.n_heads + 2 * config.kv_heads) * config.head_dim if config.qkv_bias else 0
    qk_norms = 2 * config.head_dim if config.qk_norm else 0
    vectors = (2 * config.n_layers + 1) * config.d_model + config.n_layers * (qkv + qk_norms)
    tables = (1 if config.tie_embeddings else 2) * config.vocab_size * config.d_model
    return {
        "total": matrices + vectors + tables,
        "non_embedding": matrices + vectors,
        "matrices": matrices,
        "vectors": vectors,
        "tables": tables,
    }


def flops_per_token(config: LlamaConfig, seq_len: int) -> int:
    """Floating-point operations of forward and backward, for one token of a sequence of `seq_len`.

    `6 * n + 6 * n_layers * n_heads * head_dim * seq_len`. A multiplication and an addition are two
    operations, and backward costs twice forward: 6 for each of the `n` parameters that multiply,
    blocks and head (the embedding is a look-up). The second term is attention, two products of
    `n_heads * head_dim * seq_len` forward, of which only the causal half counts. Norms, softmax,
    quantizers, the optimizer and recomputation count nothing, so that the quotient with a
    device's peak is the model FLOP utilization (MFU).

    References:
      Chowdhery et al., PaLM, arXiv:2204.02311, appendix B: the definition of MFU, with all of the
      attention counted, twice ours.
    """
    return sum(flops_by_part(config, seq_len).values())


def flops_by_part(config: LlamaConfig, seq_len: int) -> dict[str, int]:
    """The terms of `flops_per_token`: `"blocks"`, the seven matrices; `"head"`; `"attention"`."""
    return {
        "blocks": 6 * _block_matrices(config),
        "head": 6 * config.vocab_size * config.d_model,
        "attention": 6 * config.n_layers * config.n_heads * config.head_dim * seq_len,
    }


def _block_matrices(config: LlamaConfig) -> int:
    """Parameters of the seven matrices, over all layers."""
    q_and_o = 2 * config.d_model * config.n_heads * config.head_dim
    k_and_v = 2 * config.d_model * config.kv_heads * config.head_dim
    return config.n_layers * (q_and_o + k_and_v + 3 * config.d_model * config.mlp_width)

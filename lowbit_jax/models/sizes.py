"""Standard Llama shapes, and what a shape costs: parameters and floating-point operations."""

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


def llama_config(size: str, vocab_size: int = 32000, **overrides) -> LlamaConfig:
    """The `LlamaConfig` of `LLAMA_SIZES[size]`.

    Args:
      size: A name, as in `"30m"`.
      vocab_size: Rows of embedding and head.
      **overrides: Any other field of `LlamaConfig`.

    Raises:
      ValueError: If there is no such size.
    """
    if size not in LLAMA_SIZES:
        raise ValueError(
            f"llama_config: size must be one of {', '.join(LLAMA_SIZES)}, got {size!r};"
            " build a LlamaConfig for other shapes."
        )
    return LlamaConfig(**{"vocab_size": vocab_size, **LLAMA_SIZES[size], **overrides})


def count_params(config: LlamaConfig) -> dict[str, int]:
    """Parameters: `"total"`, and `"non_embedding"`, which leaves out embedding and head alone."""
    norms = (2 * config.n_layers + 1) * config.d_model
    non_embedding = _block_matrices(config) + norms
    tables = 1 if config.tie_embeddings else 2
    total = non_embedding + tables * config.vocab_size * config.d_model
    return {"total": total, "non_embedding": non_embedding}


def flops_per_token(config: LlamaConfig, seq_len: int) -> int:
    """Floating-point operations of forward and backward, for one token of a sequence of `seq_len`.

    `6 * n + 6 * n_layers * d_model * seq_len`. A multiplication and an addition are two
    operations, and backward costs twice forward: 6 for each of the `n` parameters that multiply,
    blocks and head (the embedding is a look-up). The second term is attention, two products of
    `d_model * seq_len` forward, of which only the causal half counts. Norms, softmax,
    quantizers, the optimizer and recomputation count nothing, so that the quotient with a
    device's peak is the model FLOP utilization (MFU).

    References:
      Chowdhery et al., PaLM, arXiv:2204.02311, appendix B: the definition of MFU, with all of the
      attention counted, twice ours.
    """
    matrices = _block_matrices(config) + config.vocab_size * config.d_model
    return 6 * matrices + 6 * config.n_layers * config.d_model * seq_len


def _block_matrices(config: LlamaConfig) -> int:
    """Parameters of the seven matrices, over all layers."""
    q_and_o = 2 * config.d_model**2
    k_and_v = 2 * config.d_model * config.kv_heads * config.head_dim
    return config.n_layers * (q_and_o + k_and_v + 3 * config.d_model * config.mlp_width)

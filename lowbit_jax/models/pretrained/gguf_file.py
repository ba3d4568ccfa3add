"""GGUF files, in: every type of weights that the package gguf dequantizes, and their tokenizer.

References:
  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: the layout and its keys.
"""

import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lowbit_jax.models.llama import Llama, LlamaConfig
from lowbit_jax.models.pretrained.assemble import Pretrained, TensorSource, assemble
from lowbit_jax.models.pretrained.sentencepiece_file import sentencepiece_bpe
from lowbit_jax.models.rope_scaling import (
    LinearRopeScaling,
    Llama3RopeScaling,
    RopeScaling,
    scale_frequencies,
)

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_ROPE_FACTORS = "rope_freqs.weight"
# How text is cut before the merges, by `tokenizer.ggml.pre`: regular expressions of the models'
# own tokenizers.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+"
    r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    "llama-bpe": _PATTERN.format(digits=r"\p{N}{1,3}"),
    "qwen2": _PATTERN.format(digits=r"\p{N}"),
}


def load_gguf(
    path: pathlib.Path, *, dtype: str, param_dtype: str, on_host: bool, overrides: dict[str, Any]
) -> Pretrained:
    """See `load_pretrained`. Weights are those that the file stands for, dequantized.

    Raises:
      ValueError: If it is no GGUF file of a known architecture, or as in `load_pretrained`.
    """
    gguf, reader = _open(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = _field(reader, path, "general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"load_pretrained: the architecture must be one of {', '.join(_ARCHITECTURES)}, got"
            f" {architecture!r} in {path}; other models need code of their own."
        )
    config = LlamaConfig(**(_read_config(reader, path, architecture, tensors) | overrides),
                         dtype=dtype)  # fmt: skip
    names = _gguf_names(config)
    # The rows of Llama's queries and keys lie in the order of interleaved pairs.
    turned = (
        {"attn_q": config.n_heads, "attn_k": config.kv_heads} if architecture == "llama" else {}
    )

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"load_pretrained: {name} of {path} has the type {tensor.tensor_type.name}, which"
                " the package gguf does not dequantize; use a file of another type."
            ) from error
        array = array.reshape(_shape(tensor))
        part = name.split(".")[2] if name.startswith("blk.") else ""
        return _to_halves(array, turned[part]) if part in turned else array

    if _ROPE_FACTORS in tensors:
        _check_rope_factors(config, read(_ROPE_FACTORS), path)
    shapes = {name: _shape(tensor) for name, tensor in tensors.items()}
    model = Llama(config)
    params = assemble(
        model,
        names,
        TensorSource(path, shapes, read),
        ignored=lambda name: name == _ROPE_FACTORS,
        param_dtype=param_dtype,
        on_host=on_host,
    )
    keys = {
        "max_position_embeddings": f"{architecture}.context_length",
        "bos_token_id": "tokenizer.ggml.bos_token_id",
        "eos_token_id": "tokenizer.ggml.eos_token_id",
        "pad_token_id": "tokenizer.ggml.padding_token_id",
    }
    metadata = {
        name: reader.fields[key].contents() for name, key in keys.items() if key in reader.fields
    }
    return Pretrained(model, params, None, metadata)


def gguf_tokenizer(path: str | os.PathLike) -> tokenizers.Tokenizer:
    """The BPE tokenizer inside a GGUF file; it adds no tokens of its own to a text.

    Byte-level, or that of SentencePiece, which the format calls "llama".

    Raises:
      ValueError: If the file has none, or one of another kind.
    """
    path = pathlib.Path(path)
    _, reader = _open(path)
    kind = _field(reader, path, "tokenizer.ggml.model")
    if kind == "llama":
        pieces, scores, types = (
            _field(reader, path, f"tokenizer.ggml.{name}")
            for name in ("tokens", "scores", "token_type")
        )
        adds_space = _field(reader, path, "tokenizer.ggml.add_space_prefix", True)
        return sentencepiece_bpe(pieces, scores, types, adds_space=adds_space)
    cut = _field(reader, path, "tokenizer.ggml.pre")
    byte_level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut == "smollm")
    if cut == "smollm":
        first: Any = pre_tokenizers.Digits(individual_digits=True)
    elif cut in _PATTERNS:
        first = pre_tokenizers.Split(tokenizers.Regex(_PATTERNS[cut]), "isolated")
    if kind != "gpt2" or cut not in ("smollm", *_PATTERNS):
        raise ValueError(
            "gguf_tokenizer: the tokenizer must be SentencePiece's BPE ('llama'), or a byte-level"
            f" one ('gpt2') that cuts text as one of smollm, {', '.join(_PATTERNS)}, got {kind!r}"
            f" and {cut!r} in {path}; use the"
            " tokenizer.json of the original model."
        )
    tokens = _field(reader, path, "tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in _field(reader, path, "tokenizer.ggml.merges")]
    # Llama 3 takes a whole piece that is a token as it is, whatever the merges say.
    bpe = models.BPE(
        {token: i for i, token in enumerate(tokens)}, merges, ignore_merges=cut == "llama-bpe"
    )
    tokenizer = tokenizers.Tokenizer(bpe)
    pre: Any = pre_tokenizers.Sequence([first, byte_level])
    tokenizer.pre_tokenizer = pre
    decoder: Any = decoders.ByteLevel()
    tokenizer.decoder = decoder
    types = _field(reader, path, "tokenizer.ggml.token_type")
    control, user_defined = 3, 4  # of the enumeration of token types of the format
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == control]
    tokenizer.add_special_tokens(special)
    plain = [token for token, kind in zip(tokens, types, strict=True) if kind == user_defined]
    tokenizer.add_tokens(plain)
    return tokenizer


def _open(path: pathlib.Path) -> tuple[Any, Any]:
    """The package, and a reader of the file."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"load_pretrained: {path} needs the package gguf; pip install 'lowbit-jax[gguf]'."
        ) from error
    try:
        return gguf, gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(
            f"load_pretrained: {path} must be a directory or a GGUF file, got one that is damaged"
            f" or another ({error}); fetch it again."
        ) from error


def _read_config(
    reader: Any, path: pathlib.Path, architecture: str, tensors: dict[str, Any]
) -> dict[str, Any]:
    """Fields of `LlamaConfig` from the keys of the file."""

    def get(key: str, default: Any = None) -> Any:
        return _field(reader, path, f"{architecture}.{key}", default)

    d_model, n_heads = get("embedding_length"), get("attention.head_count")
    d_head = get("attention.key_length", d_model // n_heads)
    is_plain = d_head * n_heads == d_model
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, d_head) != d_head:
            raise ValueError(
                f"load_pretrained: {architecture}.{key} must be the width of a head, {d_head}, got"
                f" {get(key)} in {path}; Llama computes no other."
            )
    theta = _shortest(get("rope.freq_base", 1e4))
    scaling: RopeScaling | None = None
    # A factor without a type is linear, and had another name before; 0 and 1 stretch nothing.
    kind = get("rope.scaling.type", "linear")
    factor = _shortest(get("rope.scaling.factor", get("rope.scale_linear", 0.0)))
    if kind == "linear" and factor not in (0.0, 1.0):
        scaling = LinearRopeScaling(factor)
    elif kind not in ("linear", "none"):
        raise ValueError(
            f"load_pretrained: {architecture}.rope.scaling.type must be 'none' or 'linear', got"
            f" {kind!r} in {path}; models that were stretched otherwise are not computed."
        )
    if _ROPE_FACTORS in tensors:
        # The file holds the divisors alone. Those of the lowest frequencies are the factor; the
        # other numbers are those of all Llama 3 models, and are held against the divisors below.
        factors = np.asarray(tensors[_ROPE_FACTORS].data).view(np.float32)
        scaling = Llama3RopeScaling(factor=float(factors.max()))
    return {
        "vocab_size": _shape(tensors["token_embd.weight"])[0]
        if "token_embd.weight" in tensors
        else get("vocab_size"),
        "d_model": d_model,
        "n_layers": get("block_count"),
        "n_heads": n_heads,
        "n_kv_heads": get("attention.head_count_kv", n_heads),
        "d_ff": get("feed_forward_length"),
        "d_head": None if is_plain else d_head,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": _shortest(get("attention.layer_norm_rms_epsilon")),
        "tie_embeddings": "output.weight" not in tensors,
        "qkv_bias": architecture == "qwen2",
        "qk_norm": architecture == "qwen3",
        "attention_window": get("attention.sliding_window", 0) or None,
    }


def _gguf_names(config: LlamaConfig) -> dict[str, str]:
    """Path of each parameter to its name in the file, `{}` in place of the layer."""
    projections = {
        **{f"attention/{n}_proj": f"attn_{n}" for n in "qkv"},
        "attention/o_proj": "attn_output",
        **{f"mlp/{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")},
    }
    return {
        "embedding/weight": "token_embd.weight",
        "layers/attention_norm/scale": "blk.{}.attn_norm.weight",
        "layers/mlp_norm/scale": "blk.{}.ffn_norm.weight",
        **{
            f"layers/{ours}/weight": f"blk.{{}}.{name}.weight" for ours, name in projections.items()
        },
        **{f"layers/attention/{n}_proj/bias": f"blk.{{}}.attn_{n}.bias" for n in "qkv"},
        **{f"layers/attention/{n}_norm/scale": f"blk.{{}}.attn_{n}_norm.weight" for n in "qk"},
        "final_norm/scale": "output_norm.weight",
        "head/weight": "output.weight",
    }


def _to_halves(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """From interleaved pairs `(2i, 2i + 1)` to pairs `(i, i + d_head / 2)`, head by head."""
    pairs = rows.reshape(n_heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _check_rope_factors(config: LlamaConfig, factors: np.ndarray, path: pathlib.Path) -> None:
    """The divisors of the file must be those that the scaling of the model computes."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    frequency = np.float32(config.rope_theta) ** -exponents
    scaled = scale_frequencies(jnp.asarray(frequency), config.rope_scaling)
    expected = frequency / np.asarray(scaled)
    # float32 in another order of operations, on either side; another rule is off by percents.
    if expected.shape != factors.shape or not np.allclose(expected, factors, rtol=1e-4):
        raise ValueError(
            f"load_pretrained: {_ROPE_FACTORS} of {path} must be the divisors of Llama 3's rope"
            f" scaling with {config.rope_scaling}, got others; pass rope_scaling= of the original"
            " config.json."
        )


def _field(reader: Any, path: pathlib.Path, key: str, *default: Any) -> Any:
    """The value of a key; without one and without a default that is not None, an error."""
    if key in reader.fields:
        return reader.fields[key].contents()
    if default and default[0] is not None:
        return default[0]
    raise ValueError(f"load_pretrained: {path} lacks the key {key!r}; convert the model anew.")


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _shortest(value: float) -> float:
    """The shortest decimal that is the float32 `value`: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))

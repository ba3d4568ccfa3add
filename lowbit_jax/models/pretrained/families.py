"""The families of published models that `Llama` computes, and their config.json.

They share one block. Qwen2 adds biases to queries, keys and values, Qwen3 norms of queries and
keys, Mistral a window of attention; Llama 3.1 stretches the rotary frequencies. SmolLM2 is a Llama.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lowbit_jax.models.llama import LlamaConfig
from lowbit_jax.models.rope_scaling import LinearRopeScaling, Llama3RopeScaling, RopeScaling

# What a config.json says and a LlamaConfig has no field for; `Pretrained.metadata` carries it.
METADATA_KEYS = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Family:
    """What config.json leaves out: values that the family's own code would fill in."""

    architecture: str
    n_kv_heads: int | None = None
    d_head: int | None = None
    window: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", n_kv_heads=8, window=4096),
    "qwen2": Family("Qwen2ForCausalLM", n_kv_heads=32, qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", n_kv_heads=32, d_head=128, qk_norm=True),
}


def config_from_json(record: Mapping[str, Any], **fields: Any) -> LlamaConfig:
    """The `LlamaConfig` of a config.json.

    Args:
      record: The parsed file, of any version of transformers up to 5.
      **fields: Fields of `LlamaConfig` that config.json does not know, or that replace its own.

    Raises:
      ValueError: If the architecture is another one, the weights are quantized, or the model needs
        what `Llama` does not compute.
    """
    model_type = record.get("model_type")
    family = FAMILIES.get(str(model_type))
    architectures = record.get("architectures") or []
    if family is None or architectures not in ([], [family.architecture]):
        known = ", ".join(f"{name} ({family.architecture})" for name, family in FAMILIES.items())
        raise ValueError(
            f"config_from_json: the architecture must be one of {known}, got model_type"
            f" {model_type!r} and architectures {architectures}; other models need code of"
            " their own."
        )
    _check_types(record)
    if record.get("quantization_config") is not None:
        method = record["quantization_config"].get("quant_method")
        raise ValueError(
            f"config_from_json: weights must be floating-point, got a quantization_config of"
            f" {method!r}; load the checkpoint that it was made from."
        )
    _refuse("hidden_act", record.get("hidden_act", "silu"), "silu")
    for name in ("attention_bias", "mlp_bias"):
        _refuse(name, record.get(name, False), False)

    missing = [key for key in _SHAPE_KEYS if key not in record]
    if missing:
        raise ValueError(
            f"config_from_json: config.json must have {', '.join(_SHAPE_KEYS)}, got none of"
            f" {', '.join(missing)}; copy config.json from the original model once more."
        )
    shape = {field: record[key] for key, field in _SHAPE_KEYS.items()}
    d_head = record.get("head_dim", family.d_head)
    # A width that the others give is no override: the config of a plain shape stays plain.
    is_plain = d_head is None or d_head * shape["n_heads"] == shape["d_model"]
    theta, scaling = _read_rope(record)
    return LlamaConfig(
        **{
            **shape,
            "n_kv_heads": record.get("num_key_value_heads", family.n_kv_heads),
            "d_head": None if is_plain else d_head,
            "rope_theta": theta,
            "rope_scaling": scaling,
            "norm_eps": _positive("rms_norm_eps", record.get("rms_norm_eps", 1e-6)),
            "tie_embeddings": record.get("tie_word_embeddings", False),
            "qkv_bias": family.qkv_bias,
            "qk_norm": family.qk_norm,
            "attention_window": _read_window(record, family),
            **fields,
        }
    )


def config_to_json(
    config: LlamaConfig, metadata: Mapping[str, Any] | None = None, dtype: str = "float32"
) -> dict[str, Any]:
    """A config.json that transformers and vLLM read; `config_from_json` gives `config` again.

    Fields that say how to compute, such as recipes, have no place in it.

    Args:
      config: Of a model of one of the families.
      metadata: Values for `METADATA_KEYS`; `max_position_embeddings` is 2048 without it, tokens
        are None.
      dtype: Of the weights in the files.

    Raises:
      ValueError: If no family has such a model, or `metadata` has other keys.
    """
    metadata = dict(metadata or {})
    if unknown := sorted(metadata.keys() - set(METADATA_KEYS)):
        raise ValueError(
            f"config_to_json: metadata may have {', '.join(METADATA_KEYS)}, got {unknown};"
            " add other keys to the written config.json."
        )
    if config.qkv_bias and config.qk_norm:
        raise ValueError(
            "config_to_json: no family has both qkv_bias and qk_norm, got both; Qwen2 has the"
            " first, Qwen3 the second."
        )
    window = config.attention_window
    name = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    if name == "llama" and window is not None:
        name = "mistral"
    record: dict[str, Any] = {
        "architectures": [FAMILIES[name].architecture],
        "model_type": name,
        **{key: getattr(config, field) for key, field in _SHAPE_KEYS.items()},
        "intermediate_size": config.mlp_width,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **_write_rope(config),
        "attention_dropout": 0.0,
        "max_position_embeddings": 2048,
        **dict.fromkeys(METADATA_KEYS[1:]),
        **metadata,
        "torch_dtype": dtype,
    }
    if name in ("llama", "qwen3"):
        record["attention_bias"] = False
    if name == "llama":
        record["mlp_bias"] = False
    else:
        record["sliding_window"] = window
    if name.startswith("qwen"):
        windowed = 0 if window is not None else config.n_layers
        record |= {"use_sliding_window": window is not None, "max_window_layers": windowed}
    return record


def huggingface_names(config: LlamaConfig) -> dict[str, str]:
    """Path of each parameter to its name in a checkpoint, `{}` in place of the layer."""
    attention, mlp = "model.layers.{}.self_attn", "model.layers.{}.mlp"
    return {
        "embedding/weight": "model.embed_tokens.weight",
        "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
        **{f"layers/attention/{n}_proj/weight": f"{attention}.{n}_proj.weight" for n in "qkvo"},
        **{
            f"layers/attention/{n}_proj/bias": f"{attention}.{n}_proj.bias"
            for n in ("qkv" if config.qkv_bias else "")
        },
        **{
            f"layers/attention/{n}_norm/scale": f"{attention}.{n}_norm.weight"
            for n in ("qk" if config.qk_norm else "")
        },
        "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
        **{f"layers/mlp/{n}_proj/weight": f"{mlp}.{n}_proj.weight" for n in ("gate", "up", "down")},
        "final_norm/scale": "model.norm.weight",
        **({} if config.tie_embeddings else {"head/weight": "lm_head.weight"}),
    }


_SHAPE_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
}
_INTEGER_KEYS = ("num_key_value_heads", "head_dim", "sliding_window", "max_window_layers")
_OBJECT_KEYS = ("rope_scaling", "rope_parameters", "quantization_config")


def _refuse(name: str, got: Any, wanted: Any) -> None:
    if got != wanted:
        raise ValueError(
            f"config_from_json: {name} must be {wanted!r}, got {got!r}, which Llama does not"
            " compute; no released model of these families has it."
        )


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _damaged(name, "a positive number", value)
    return float(value)


def _read_window(record: Mapping[str, Any], family: Family) -> int | None:
    """The window of attention: Mistral's if it is not null, Qwen's if it is switched on.

    Of Qwen it is that of the layers from `max_window_layers` on, or those that `layer_types` names.
    """
    window = record.get("sliding_window", family.window)
    if family.window is not None or window is None:
        return window
    if not record.get("use_sliding_window", False):
        return None
    layers = range(record["num_hidden_layers"])
    kinds = {layer >= record.get("max_window_layers", 28) for layer in layers}
    if record.get("layer_types") is not None:
        kinds = {kind == "sliding_attention" for kind in record["layer_types"]}
    if len(kinds) > 1:
        raise ValueError(
            "config_from_json: all layers must have the window of attention or none, got"
            f" sliding_window={window} for some (max_window_layers, layer_types); no released"
            " model of these families mixes them."
        )
    return window if True in kinds else None


def _check_types(record: Mapping[str, Any]) -> None:
    """What config.json holds is of the type that is read; what is null is not there."""
    kinds = (
        (_OBJECT_KEYS, Mapping, "an object"),
        ((*_SHAPE_KEYS, *_INTEGER_KEYS), int, "an integer"),
    )
    for keys, kind, said in kinds:
        for key in keys:
            value = record.get(key)
            is_wrong = not isinstance(value, kind) or isinstance(value, bool)
            if is_wrong and (value is not None or (key in record and key in _SHAPE_KEYS)):
                raise _damaged(key, said, value)


def _damaged(what: str, said: str, value: Any) -> ValueError:
    return ValueError(
        f"config_from_json: {what} must be {said}, got {value!r}; copy config.json from the"
        " original model once more."
    )


def _read_rope(record: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling: `rope_parameters` of transformers 5, or the two keys of those before."""
    found = record.get("rope_parameters") or {}
    found = {**(record.get("rope_scaling") or {}), **found}
    theta = _positive("rope_theta", found.get("rope_theta", record.get("rope_theta", 1e4)))
    for part in (found, record):
        _refuse("partial_rotary_factor", part.get("partial_rotary_factor", 1.0), 1.0)
    rope_type = found.get("rope_type", found.get("type", "default"))

    def number(key: str) -> float:
        return _positive(f"{key} of the rope scaling", found[key])

    try:
        if rope_type == "default":
            return theta, None
        if rope_type == "linear":
            return theta, LinearRopeScaling(number("factor"))
        if rope_type == "llama3":
            length = found.get("original_max_position_embeddings")
            length = record["max_position_embeddings"] if length is None else length
            low, high = number("low_freq_factor"), number("high_freq_factor")
            length = int(_positive("original_max_position_embeddings", length))
            return theta, Llama3RopeScaling(number("factor"), low, high, length)
    except KeyError as error:
        raise ValueError(
            f"config_from_json: rope scaling of type {rope_type!r} must have {error}, got {found};"
            " copy config.json from the original model once more."
        ) from error
    raise ValueError(
        "config_from_json: the type of rope scaling must be 'default', 'linear' or 'llama3', got"
        f" {rope_type!r}; models that were stretched otherwise are not computed."
    )


def _write_rope(config: LlamaConfig) -> dict[str, Any]:
    """Both forms: transformers 5 reads the last key, others the first two."""
    scaling = config.rope_scaling
    if scaling is None:
        written = None
    elif isinstance(scaling, LinearRopeScaling):
        written = {"rope_type": "linear", "factor": scaling.factor}
    else:
        written = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    parameters = {"rope_type": "default", **(written or {}), "rope_theta": config.rope_theta}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": written,
        "rope_parameters": parameters,
    }

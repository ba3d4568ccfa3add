import dataclasses
import math

import pytest

from lowbit_jax.models import Llama, LlamaConfig, count_params
from lowbit_jax.models.pretrained.assemble import parameter_shapes
from lowbit_jax.models.pretrained.families import config_from_json, config_to_json
from lowbit_jax.models.rope_scaling import LinearRopeScaling, Llama3RopeScaling

# The fields that matter of the config.json files published with the models.
LLAMA2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
LLAMA32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_published_configurations_give_their_shapes():
    assert config_from_json(LLAMA2_7B) == LlamaConfig(32000, 4096, 32, 32, 32, 11008)
    assert config_from_json(LLAMA32_1B) == LlamaConfig(
        128256, 2048, 16, 32, 8, 8192, rope_theta=5e5, rope_scaling=Llama3RopeScaling(32.0),
        tie_embeddings=True,
    )  # fmt: skip
    assert config_from_json(MISTRAL_7B) == LlamaConfig(
        32000, 4096, 32, 32, 8, 14336, attention_window=4096
    )
    assert config_from_json(QWEN3_06B) == LlamaConfig(
        151936, 1024, 28, 16, 8, 3072, d_head=128, rope_theta=1e6, norm_eps=1e-6,
        tie_embeddings=True, qk_norm=True,
    )  # fmt: skip


SHAPE = {"vocab_size": 32, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24}
VARIANTS = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "wide heads": {"d_head": 12},
    "linear": {"rope_scaling": LinearRopeScaling(4.0)},
    "llama3": {"rope_scaling": Llama3RopeScaling(16.0, 1.0, 8.0, 64), "rope_theta": 5e5},
    "window": {"attention_window": 8},
    "qwen2": {"qkv_bias": True},
    "qwen2 window": {"qkv_bias": True, "attention_window": 8},
    "qwen3": {"qk_norm": True, "d_head": 16, "norm_eps": 1e-6},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_written_configuration_is_read_as_it_was(name):
    config = LlamaConfig(**SHAPE, **VARIANTS[name])
    assert config_from_json(config_to_json(config)) == config


def test_metadata_is_written_and_recipes_are_overrides():
    config = LlamaConfig(**SHAPE)
    record = config_to_json(config, {"eos_token_id": 2, "max_position_embeddings": 77})
    assert (record["eos_token_id"], record["bos_token_id"]) == (2, None)
    assert record["max_position_embeddings"] == 77
    assert config_from_json(record, dtype="float32").dtype == "float32"
    with pytest.raises(ValueError, match="metadata may have"):
        config_to_json(config, {"eos": 2})


def test_what_a_family_leaves_out_is_what_its_code_fills_in():
    def without(record, *keys):
        return {key: value for key, value in record.items() if key not in keys}

    assert config_from_json(without(MISTRAL_7B, "num_key_value_heads", "sliding_window")) == (
        config_from_json(MISTRAL_7B)
    )
    assert config_from_json({**MISTRAL_7B, "sliding_window": None}).attention_window is None
    assert config_from_json(without(QWEN3_06B, "head_dim")).head_dim == 128
    assert config_from_json(without(LLAMA32_1B, "num_key_value_heads")).kv_heads == 32
    # A window that is given but not switched on is none.
    assert config_from_json({**QWEN3_06B, "sliding_window": 99}).attention_window is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3", "architectures": None}, "architecture must be one of"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architecture must be one of"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"attention_bias": True}, "attention_bias must be False"),
        ({"mlp_bias": True}, "mlp_bias must be False"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "got 'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "must have 'factor'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be"),
        ({"hidden_size": "4096"}, "hidden_size must be an integer, got '4096'"),
        ({"num_attention_heads": None}, "num_attention_heads must be an integer, got None"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads must be an integer, got '2'"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, got 'linear'"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": "x"}},
            "factor of the rope scaling must be a positive number, got 'x'",
        ),
        ({"quantization_config": "nvfp4"}, "quantization_config must be an object, got 'nvfp4'"),
        ({"rope_theta": None}, "rope_theta must be a positive number, got None"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a positive number"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_json({**LLAMA2_7B, **change})


def test_a_configuration_without_its_shape_is_refused():
    record = {key: value for key, value in LLAMA2_7B.items() if key != "hidden_size"}
    with pytest.raises(ValueError, match="got none of hidden_size"):
        config_from_json(record)


def test_no_family_has_both_biases_and_norms():
    config = LlamaConfig(**SHAPE, qkv_bias=True, qk_norm=True)
    with pytest.raises(ValueError, match="no family has both"):
        config_to_json(config)


def test_linear_scaling_in_its_oldest_form():
    record = {**LLAMA2_7B, "rope_scaling": {"type": "linear", "factor": 2}}
    expected = dataclasses.replace(config_from_json(LLAMA2_7B), rope_scaling=LinearRopeScaling(2.0))
    assert config_from_json(record) == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_has_as_many_parameters_as_are_counted(name):
    config = LlamaConfig(**SHAPE, **VARIANTS[name])
    shapes = parameter_shapes(Llama(config))
    assert count_params(config)["total"] == sum(math.prod(shape) for shape in shapes.values())


def test_impossible_widths_and_windows_are_refused():
    for field in ("d_head", "attention_window"):
        with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
            LlamaConfig(**SHAPE, **{field: 0})
    with pytest.raises(ValueError, match="must be even, got 5"):
        LlamaConfig(**SHAPE, d_head=5)
    with pytest.raises(ValueError, match="or set d_head"):
        LlamaConfig(32, 15, 1, 2)
    assert LlamaConfig(32, 15, 1, 2, d_head=8).head_dim == 8


def test_windows_of_some_layers_are_refused_and_of_none_are_none():
    on = {**QWEN3_06B, "use_sliding_window": True, "sliding_window": 99}
    layers = on["num_hidden_layers"]
    for first, expected in ((0, 99), (layers, None)):
        assert config_from_json({**on, "max_window_layers": first}).attention_window == expected
    types = ["full_attention"] * layers
    record = {**on, "max_window_layers": 0, "layer_types": types}
    assert config_from_json(record).attention_window is None
    for mixed in (
        {"max_window_layers": 3},
        {"layer_types": ["sliding_attention", *types[1:]]},
    ):
        with pytest.raises(ValueError, match="all layers must have the window of attention"):
            config_from_json({**on, **mixed})

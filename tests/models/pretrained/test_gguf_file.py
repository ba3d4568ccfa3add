"""GGUF files written by the package gguf, with rows turned as llama.cpp's converter turns them."""

import jax
import numpy as np
import pytest
from flax import traverse_util
from tokenizers import pre_tokenizers

from lowbit_jax.models import Llama, LlamaConfig
from lowbit_jax.models.pretrained import gguf_tokenizer, load_pretrained
from lowbit_jax.models.pretrained.assemble import parameter_shapes
from lowbit_jax.models.rope_scaling import LinearRopeScaling, Llama3RopeScaling

gguf = pytest.importorskip("gguf")

SHAPE = {"vocab_size": 60, "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96}
VARIANTS = {
    "llama": {},
    "llama, tied, linear": {"tie_embeddings": True, "rope_scaling": LinearRopeScaling(4.0)},
    "llama 3": {"rope_scaling": Llama3RopeScaling(32.0), "rope_theta": 5e5},
    "qwen2": {"qkv_bias": True, "norm_eps": 1e-6},
    "qwen3": {"qk_norm": True, "d_head": 24, "tie_embeddings": True},
}
LAYER_NAMES = {
    "attention_norm/scale": "attn_norm.weight",
    "mlp_norm/scale": "ffn_norm.weight",
    "attention/o_proj/weight": "attn_output.weight",
    **{f"mlp/{n}_proj/weight": f"ffn_{n}.weight" for n in ("gate", "up", "down")},
    **{f"attention/{n}_proj/weight": f"attn_{n}.weight" for n in "qkv"},
    **{f"attention/{n}_proj/bias": f"attn_{n}.bias" for n in "qkv"},
    **{f"attention/{n}_norm/scale": f"attn_{n}_norm.weight" for n in "qk"},
}
OTHER_NAMES = {
    "embedding/weight": "token_embd.weight",
    "final_norm/scale": "output_norm.weight",
    "head/weight": "output.weight",
}


def permuted(weights, n_heads):
    """As `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py writes it."""
    shape = weights.shape
    return (
        weights.reshape(n_heads, 2, shape[0] // n_heads // 2, *shape[1:])
        .swapaxes(1, 2)
        .reshape(shape)
    )


def llama3_divisors(config):
    """As `generate_extra_tensors` of llama.cpp's converter, in its words, for Llama 3.2."""
    dim, scaling = config.head_dim, config.rope_scaling
    freqs = 1.0 / (config.rope_theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim))
    low = scaling.original_length / scaling.low_frequency_factor
    high = scaling.original_length / scaling.high_frequency_factor
    factors = []
    for freq in freqs:
        wavelength = 2 * np.pi / freq
        if wavelength < high:
            factors.append(1)
        elif wavelength > low:
            factors.append(scaling.factor)
        else:
            smooth = scaling.original_length / wavelength - scaling.low_frequency_factor
            smooth /= scaling.high_frequency_factor - scaling.low_frequency_factor
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.asarray(factors, np.float32)


def write_gguf(path, config, params, kinds=None, change=None, keys=None):
    """Writes a model; `kinds` gives tensors a quantized type by name, `change` the tensors."""
    architecture = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(128)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.d_head is not None:
        writer.add_key_length(config.d_head)
        writer.add_value_length(config.d_head)
    tensors = {}
    if isinstance(config.rope_scaling, LinearRopeScaling):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    elif config.rope_scaling is not None:
        tensors["rope_freqs.weight"] = llama3_divisors(config)
    for key, value in (keys or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    for name, leaf in traverse_util.flatten_dict(params, sep="/").items():
        if not name.startswith("layers/"):
            tensors[OTHER_NAMES[name]] = leaf
            continue
        turned = {"attention/q_proj": config.n_heads, "attention/k_proj": config.kv_heads}
        part = name.removeprefix("layers/")
        heads = turned.get(part.rsplit("/", 1)[0]) if architecture == "llama" else None
        for layer, weights in enumerate(leaf):
            weights = weights if heads is None else permuted(weights, heads)
            tensors[f"blk.{layer}.{LAYER_NAMES[part]}"] = np.ascontiguousarray(weights)
    stored = {}
    for name, array in (change(tensors) if change else tensors).items():
        kind = (kinds or {}).get(name.split(".", 2)[-1])
        if kind is None:
            stored[name] = array
            writer.add_tensor(name, array)
        else:
            packed = gguf.quantize(array, kind)
            stored[name] = gguf.dequantize(packed, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def random_model(**fields):
    model = Llama(LlamaConfig(**{**SHAPE, "dtype": "float32", **fields}))
    rng = np.random.default_rng(0)
    flat = {
        path: rng.standard_normal(shape, np.float32) / 5 + path.endswith("scale")
        for path, shape in parameter_shapes(model).items()
    }
    return model, traverse_util.unflatten_dict(flat, sep="/")


@pytest.fixture(scope="module", params=VARIANTS)
def case(request, tmp_path_factory):
    model, params = random_model(**VARIANTS[request.param])
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, model.config, params)
    return model, params, path


def test_configuration_and_weights_come_back(case):
    model, params, path = case
    found = load_pretrained(path, "float32")
    assert found.model == model
    assert found.metadata == {"max_position_embeddings": 128}
    jax.tree.map(np.testing.assert_array_equal, found.params, params)  # exact: a permutation


def test_logits_are_those_that_transformers_makes_of_the_file(case):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers reads no GGUF files without it")
    model, _, path = case
    if model.config.rope_scaling is not None or model.config.d_head is not None:
        pytest.skip("transformers reads neither scaled frequencies nor widths of heads from GGUF")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    tokens = np.random.default_rng(1).integers(0, 60, (2, 20))
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(tokens)).logits.numpy()
    found = load_pretrained(path, "float32")
    logits = np.asarray(jax.jit(found.model.apply)({"params": found.params}, tokens))
    # Bound, in norm and to first order, as for directories: 96 is the longest sum.
    bound = 2 * ((6 * 2 + 1) * 96 + 20 * 2) * 2.0**-24
    assert np.linalg.norm(logits - expected) <= bound * np.linalg.norm(expected)
    assert expected.std() > 0.5


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_tensors_are_what_they_stand_for(tmp_path, kind):
    model, params = random_model(n_layers=1)
    kind = gguf.GGMLQuantizationType[kind]
    kinds = dict.fromkeys(("attn_q.weight", "ffn_down.weight"), kind)
    stored = write_gguf(tmp_path / "m.gguf", model.config, params, kinds)
    found = load_pretrained(tmp_path / "m.gguf").params["layers"]
    down = np.asarray(found["mlp"]["down_proj"]["weight"][0])
    np.testing.assert_array_equal(down, stored["blk.0.ffn_down.weight"])
    assert (down != params["layers"]["mlp"]["down_proj"]["weight"][0]).any()
    q = np.asarray(found["attention"]["q_proj"]["weight"][0])
    np.testing.assert_array_equal(permuted(q, 4), stored["blk.0.attn_q.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: x for n, x in t.items() if n != "blk.1.ffn_up.weight"}, "lacks blk.1.ffn"),
        (lambda t: t | {"blk.0.attn_q.bias": np.ones(64, np.float32)}, "has blk.0.attn_q.bias"),
        (lambda t: t | {"output_norm.weight": np.full(64, np.nan, np.float32)}, "output_norm"),
        (lambda t: t | {"blk.0.ffn_up.weight": np.ones((95, 64), np.float32)}, "blk.0.ffn_up"),
        (lambda t: t | {"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)}, "divisors"),
    ],
    ids=["missing", "extra", "NaN", "mis-shaped", "another stretch"],
)  # fmt: skip
def test_wrong_tensors_are_named(tmp_path, change, message):
    model, params = random_model()
    write_gguf(tmp_path / "m.gguf", model.config, params, change=change)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / "m.gguf")


def test_other_files_are_refused(tmp_path, case):
    _, _, path = case
    (tmp_path / "no.gguf").write_bytes(b"what is this")
    with pytest.raises(ValueError, match="damaged or another"):
        load_pretrained(tmp_path / "no.gguf")
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="damaged or another"):
        load_pretrained(tmp_path / "cut.gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="must be one of llama, qwen2, qwen3, got 'mamba'"):
        load_pretrained(tmp_path / "other.gguf")
    with pytest.raises(ValueError, match="lacks the key 'tokenizer"):
        gguf_tokenizer(path)


def test_frequencies_that_were_stretched_otherwise_are_refused(tmp_path):
    model, params = random_model(n_layers=1)
    keys = {"llama.rope.scaling.type": "yarn"}
    write_gguf(tmp_path / "m.gguf", model.config, params, keys=keys)
    with pytest.raises(ValueError, match="got 'yarn'"):
        load_pretrained(tmp_path / "m.gguf")


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
@pytest.mark.parametrize("factor", [0.0, 1.0, 4.0])
def test_a_factor_without_a_type_is_linear(tmp_path, key, factor):
    model, params = random_model(n_layers=1)
    write_gguf(tmp_path / "m.gguf", model.config, params, keys={f"llama.{key}": factor})
    expected = LinearRopeScaling(4.0) if factor == 4 else None
    assert load_pretrained(tmp_path / "m.gguf").model.config.rope_scaling == expected


def write_tokenizer(path, cut):
    """A vocabulary of bytes, three merges and a control token."""
    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "hel", "Ġh", "<name>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * (len(tokens) - 2), 4])
    writer.add_token_merges(["h e", "he l", "Ġ h"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return tokens


@pytest.mark.parametrize("cut", ["smollm", "llama-bpe", "qwen2"])
def test_the_tokenizer_of_a_file_cuts_merges_and_decodes(tmp_path, cut):
    tokens = write_tokenizer(tmp_path / "t.gguf", cut)
    tokenizer = gguf_tokenizer(tmp_path / "t.gguf")
    text = "help h\u00e9 12345 <name>'s  \n\n\t?!<|end|>"
    ids = tokenizer.encode(text).ids
    assert [tokens[i] for i in ids[:3]] == ["hel", "p", "Ġh"]
    assert tokens[ids[-1]] == "<|end|>"
    assert "<name>" in [tokens[i] for i in ids]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a 1234")]
    # Digits one by one, or by threes.
    digits = ["123", "4"] if cut == "llama-bpe" else ["1", "2", "3", "4"]
    assert pieces == ["a", "Ġ", *digits]


@pytest.mark.parametrize("adds_space", [True, False, None])
def test_the_tokenizer_of_a_llama_2_file_merges_by_scores(tmp_path, adds_space):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    kinds = [2, 3, 3, *[6] * 256]
    words = {"ab": -0.0, "bc": -1.0, "abc": -2.0, "\u2581a": -3.0}
    words |= dict.fromkeys(["\u2581", "a", "b", "c"], -9.0)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *words])
    writer.add_token_scores([*[0.0] * 259, *words.values()])
    writer.add_token_types([*kinds, *[1] * len(words)])
    if adds_space is not None:
        writer.add_add_space_prefix(adds_space)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = gguf_tokenizer(tmp_path / "t.gguf")
    found = tokenizer.encode("abc a\u00e9")
    first = [] if adds_space is False else ["\u2581"]
    assert found.tokens == [*first, "abc", "\u2581a", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(found.ids) == "abc a\u00e9"


def test_other_tokenizers_are_refused(tmp_path):
    write_tokenizer(tmp_path / "t.gguf", "deepseek-llm")
    with pytest.raises(ValueError, match="got 'gpt2' and 'deepseek-llm'"):
        gguf_tokenizer(tmp_path / "t.gguf")

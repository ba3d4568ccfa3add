"""The model against two others: float64 NumPy written from the papers, and Hugging Face's."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from lowbit_jax.models import Llama, LlamaConfig

SHAPE = {"vocab_size": 60, "d_model": 64, "n_layers": 3, "n_heads": 4, "d_ff": 96}
VARIANTS = {
    "multi-head, untied": {"n_kv_heads": 4, "tie_embeddings": False},
    "grouped-query, tied": {"n_kv_heads": 2, "tie_embeddings": True, "rope_theta": 5e5},
}


def numpy_llama(params, tokens, *, n_heads, n_kv_heads, theta=1e4, eps=1e-5):
    """Logits `(b, t, v)` for the parameter tree of `lowbit_jax.models.Llama`, unquantized."""

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale

    def leaf(path, i=None):
        node = params
        for name in path.split("/"):
            node = node[name]
        node = np.asarray(node, np.float64)
        return node if i is None else node[i]

    x = leaf("embedding/weight")[tokens]
    b, t, d = x.shape
    width = d // n_heads
    angles = np.arange(t)[:, None] * theta ** (-np.arange(0, width, 2) / width)

    def heads(y, count):
        return y.reshape(b, t, count, width).transpose(0, 2, 1, 3)

    def rotate(y):
        pairs = (y[..., : width // 2] + 1j * y[..., width // 2 :]) * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag], -1)

    for i in range(leaf("layers/attention_norm/scale").shape[0]):
        h = norm(x, leaf("layers/attention_norm/scale", i))
        q, k, v = (h @ leaf(f"layers/attention/{n}_proj/weight", i).T for n in "qkv")
        q, k, v = rotate(heads(q, n_heads)), rotate(heads(k, n_kv_heads)), heads(v, n_kv_heads)
        k, v = (np.repeat(z, n_heads // n_kv_heads, axis=1) for z in (k, v))
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(width)
        scores = np.where(np.tril(np.ones((t, t), bool)), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        y = (p / p.sum(-1, keepdims=True)) @ v
        y = y.transpose(0, 2, 1, 3).reshape(b, t, d)
        x = x + y @ leaf("layers/attention/o_proj/weight", i).T
        h = norm(x, leaf("layers/mlp_norm/scale", i))
        gate, up = (h @ leaf(f"layers/mlp/{n}_proj/weight", i).T for n in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ leaf("layers/mlp/down_proj/weight", i).T
    head = leaf("head/weight" if "head" in params else "embedding/weight")
    return norm(x, leaf("final_norm/scale")) @ head.T


def to_hugging_face(params):
    """The same parameters as a flat dictionary with the names of `LlamaForCausalLM`."""
    out = {
        "model.embed_tokens.weight": params["embedding"]["weight"],
        "model.norm.weight": params["final_norm"]["scale"],
    }
    # A tied head is the embedding under a second name.
    out["lm_head.weight"] = params.get("head", params["embedding"])["weight"]
    layers = params["layers"]
    for i in range(len(layers["attention_norm"]["scale"])):
        prefix = f"model.layers.{i}"
        out[f"{prefix}.input_layernorm.weight"] = layers["attention_norm"]["scale"][i]
        out[f"{prefix}.post_attention_layernorm.weight"] = layers["mlp_norm"]["scale"][i]
        for module, name in (("attention", "self_attn"), ("mlp", "mlp")):
            for projection, leaf in layers[module].items():
                out[f"{prefix}.{name}.{projection}.weight"] = leaf["weight"][i]
    return {name: np.asarray(leaf) for name, leaf in out.items()}


@pytest.fixture(scope="module", params=VARIANTS)
def case(request):
    """Config, parameters, tokens, our float32 logits and the float64 ones."""
    variant = VARIANTS[request.param]
    config = LlamaConfig(**SHAPE, **variant, norm_eps=1e-3, dtype="float32")
    model = Llama(config)
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, config.vocab_size)
    boxed = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    # Weights larger than the initial ones, so that attention is far from uniform and each block
    # counts as much as the embedding; scales of norms round 1.
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda x: np.float32(0.15 * rng.standard_normal(x.shape)),
        nn.meta.unbox(boxed),
    )
    for norm in ("attention_norm", "mlp_norm"):
        params["layers"][norm]["scale"] += 1
    params["final_norm"]["scale"] += 1
    logits = jax.jit(model.apply)({"params": params}, tokens)
    exact = numpy_llama(
        params,
        np.asarray(tokens),
        n_heads=config.n_heads,
        n_kv_heads=config.kv_heads,
        theta=config.rope_theta,
        eps=config.norm_eps,
    )
    return config, params, tokens, np.asarray(logits, np.float64), exact


def relative_error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def test_logits_equal_float64_numpy(case):
    config, _, _, logits, exact = case
    # Bound, in norm and to first order: a product over k <= 96 terms is off by at most k u,
    # u = 2^-24, and a path from token to logit passes six products a layer and the head.
    assert relative_error(logits, exact) <= (6 * config.n_layers + 1) * 96 * 2.0**-24
    assert logits.std() > 1  # far from the uniform guess, which any model could match


def test_logits_equal_hugging_face(case):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, params, tokens, logits, exact = case
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rope_theta=config.rope_theta,
            tie_word_embeddings=config.tie_embeddings,
            max_position_embeddings=64,
        )
    )
    state = {name: torch.from_numpy(w.copy()) for name, w in to_hugging_face(params).items()}
    theirs.load_state_dict(state, strict=True)
    with torch.no_grad():
        their_logits = theirs.eval()(torch.from_numpy(np.asarray(tokens, np.int64))).logits
    their_logits = their_logits.double().numpy()
    # Statistical: two float32 programs that add in different orders. Each is off from float64 by
    # rounding errors of one distribution, over 1440 logits, so that ours cannot be far above
    # theirs; the factor of 4 leaves room for longer sums in one of them.
    their_error = relative_error(their_logits, exact)
    assert their_error <= (6 * config.n_layers + 1) * 96 * 2.0**-24
    assert relative_error(logits, exact) <= 4 * their_error
    assert relative_error(logits, their_logits) <= 5 * their_error

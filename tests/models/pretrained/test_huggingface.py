"""Directories in and out: against transformers, bit by bit against themselves, and damaged ones."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import traverse_util

from lowbit_jax.models import Llama, LlamaConfig
from lowbit_jax.models.pretrained import load_pretrained, save_pretrained
from lowbit_jax.models.pretrained.assemble import parameter_shapes
from lowbit_jax.models.pretrained.safetensors_file import (
    TensorEntry,
    open_safetensors,
    write_safetensors,
)
from lowbit_jax.models.rope_scaling import LinearRopeScaling, Llama3RopeScaling

SHAPE = {"vocab_size": 60, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}
LENGTH = 40
FAMILIES = {
    "llama 2": {"n_kv_heads": 4},
    # Half of the frequencies on the ramp or below it, so that the scaling matters.
    "llama 3": {"rope_scaling": Llama3RopeScaling(8.0, 1.0, 4.0, 64), "rope_theta": 5e5},
    "linear": {"rope_scaling": LinearRopeScaling(4.0)},
    "mistral": {"attention_window": LENGTH, "d_head": 6},
    "qwen2": {"qkv_bias": True, "norm_eps": 1e-6, "rope_theta": 1e6},
    "qwen3": {"qk_norm": True, "d_head": 16, "tie_embeddings": True, "norm_eps": 1e-6},
    "smollm2": {"n_heads": 3, "n_kv_heads": 1, "d_model": 24, "tie_embeddings": True},
}


def random_model(**fields):
    """A model and its parameters, on the host: wide enough that every part of it matters."""
    model = Llama(LlamaConfig(**{**SHAPE, "dtype": "float32", **fields}))
    rng = np.random.default_rng(0)
    flat = {}
    for path, shape in parameter_shapes(model).items():
        noise = rng.standard_normal(shape, np.float32)
        flat[path] = 1 + noise / 4 if path.endswith("scale") else noise / 5
    return model, traverse_util.unflatten_dict(flat, sep="/")


def assert_same_params(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, e)  # exact: no arithmetic between


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """A family's model, its parameters, and the directory that they were saved to."""
    model, params = random_model(**FAMILIES[request.param])
    path = tmp_path_factory.mktemp("family") / "model"
    save_pretrained(path, model, params, metadata={"max_position_embeddings": 64})
    return model, params, path


def test_what_is_saved_is_loaded(case):
    model, params, path = case
    found = load_pretrained(path, "float32")
    assert found.model == model
    assert_same_params(found.params, params)
    assert isinstance(jax.tree.leaves(found.params)[0], jax.Array)
    assert found.metadata["max_position_embeddings"] == 64
    assert found.tokenizer_path is None


def test_logits_and_weights_are_those_of_transformers(case, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, params, path = case
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report  # nothing missing, nothing too much
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, LENGTH))
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(tokens)).logits.numpy()
    logits = np.asarray(jax.jit(model.apply)({"params": params}, tokens))
    # Bound, in norm and to first order, of the distance of either from exact arithmetic: a product
    # over k <= 64 terms is off by at most k u, u = 2^-24, and a path from token to logit passes six
    # products a layer and the head; an angle below 40 is off by 40 u.
    bound = 2 * ((6 * model.config.n_layers + 1) * 64 + 40 * model.config.n_layers) * 2.0**-24
    assert np.linalg.norm(logits - expected) <= bound * np.linalg.norm(expected)
    assert expected.std() > 0.5  # far from the uniform guess

    # What they write, in their own words, is the same model again.
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    found = load_pretrained(tmp_path / "theirs", "float32")
    assert found.model == model
    assert_same_params(found.params, params)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Llama saved in several shards, in bfloat16."""
    model, params = random_model()
    path = tmp_path_factory.mktemp("shards") / "model"
    save_pretrained(path, model, params, dtype="bfloat16", max_shard_bytes=10_000)
    return model, params, path


def test_shards_cover_the_model_and_keep_to_their_size(saved):
    _, params, path = saved
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = sorted(path.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    sizes = [sum(e.nbytes for e in open_safetensors(file).entries.values()) for file in files]
    assert max(sizes) <= 10_000
    assert sum(sizes) == index["metadata"]["total_size"]
    assert sum(sizes) == 2 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert json.loads((path / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_files_are_held_exactly_in_either_dtype(saved, param_dtype):
    _, params, path = saved
    found = load_pretrained(path, param_dtype=param_dtype, on_host=True, rope_theta=7.0)
    assert found.model.config.rope_theta == 7.0
    assert found.model.config.dtype == "bfloat16"
    assert {type(leaf) for leaf in jax.tree.leaves(found.params)} == {np.ndarray}
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(param_dtype), params)
    assert_same_params(found.params, rounded)


def test_the_tokenizer_goes_with_the_model(tmp_path):
    model, params = random_model(n_layers=1)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    save_pretrained(tmp_path / "one", model, params, tokenizer=tokenizer)
    (tmp_path / "one" / "tokenizer_config.json").write_text("{}")
    first = load_pretrained(tmp_path / "one").tokenizer_path
    assert first == tmp_path / "one" / "tokenizer.json"
    # From a file, or from a directory: all files of a tokenizer, and no others.
    for given in (first, first.parent):
        save_pretrained(tmp_path / "two", model, params, tokenizer=given)
        names = {file.name for file in (tmp_path / "two").iterdir()}
        assert names - {"config.json", "model.safetensors"} == {first.name, "tokenizer_config.json"}
        assert (tmp_path / "two" / first.name).read_text() == tokenizer.to_str()
        shutil.rmtree(tmp_path / "two")
    with pytest.raises(ValueError, match="tokenizer must be"):
        save_pretrained(tmp_path / "two", model, params, tokenizer=tmp_path)


def rewrite(path, change):
    """Changes the tensors, name to array, of a directory of one file."""
    file = open_safetensors(path / "model.safetensors")
    arrays = change({name: np.array(file.read(name)) for name in file.entries})
    entries = {name: TensorEntry(array.dtype, array.shape) for name, array in arrays.items()}
    write_safetensors(path / "model.safetensors", entries, arrays.__getitem__)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {n: x for n, x in a.items() if n != UP}, f"lacks {UP}"),
        (lambda a: a | {"model.layers.2.mlp.up_proj.weight": a[UP]}, "has model.layers.2.mlp"),
        (lambda a: a | {UP: a[UP].T.copy()}, rf"{UP} must be \(48, 32\) .* got \(32, 48\)"),
        (lambda a: a | {UP: np.where(a[UP] == a[UP].max(), np.inf, a[UP])}, f"infinity.* in {UP}"),
        (lambda a: a | {UP: np.full_like(a[UP], np.nan)}, f"NaN.* in {UP}"),
        (lambda a: a | {UP: a[UP].astype(np.int8)}, f"got int8 in {UP}"),
        (lambda a: a | {UP: a[UP].astype(jnp.float8_e4m3fn)}, f"got float8_e4m3fn in {UP}"),
        (lambda a: a | {"lm_head.weight": a["model.norm.weight"]}, "ties the head"),
    ],
    ids=["missing", "extra", "mis-shaped", "infinite", "NaN", "integers", "FP8", "tied and not"],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    model, params = random_model(tie_embeddings=True)
    save_pretrained(tmp_path / "model", model, params)
    rewrite(tmp_path / "model", change)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / "model")


def test_what_old_or_tied_checkpoints_hold_twice_is_passed_over(tmp_path):
    model, params = random_model(tie_embeddings=True)
    save_pretrained(tmp_path / "model", model, params)
    inv_freq = np.ones(4, np.float32)
    rewrite(
        tmp_path / "model",
        lambda a: (
            a
            | {"lm_head.weight": a["model.embed_tokens.weight"]}
            | {"model.layers.0.self_attn.rotary_emb.inv_freq": inv_freq}
        ),
    )
    assert_same_params(load_pretrained(tmp_path / "model").params, params)


def test_values_beyond_the_wanted_dtype_are_refused(tmp_path):
    model, params = random_model(n_layers=1)
    params["final_norm"]["scale"][0] = 3.4e38
    save_pretrained(tmp_path / "model", model, params)
    with pytest.raises(ValueError, match=r"more than bfloat16 holds in model\.norm\.weight"):
        load_pretrained(tmp_path / "model", param_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"more than float16 holds in model\.norm\.weight"):
        save_pretrained(tmp_path / "half", model, params, dtype="float16")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_damaged_directories_are_refused(saved, tmp_path):
    _, _, path = saved

    def damaged(name):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(path, tmp_path / "copy")
        return tmp_path / "copy" / name

    index = "model.safetensors.index.json"
    first, shard = sorted(file.name for file in path.glob("*.safetensors"))[:2]
    damaged(shard).unlink()
    with pytest.raises(ValueError, match=f"names {shard}, which is not there"):
        load_pretrained(tmp_path / "copy")
    file = damaged(shard)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=f"{shard} is damaged"):
        load_pretrained(tmp_path / "copy")
    damaged(index).unlink()
    with pytest.raises(ValueError, match=r"or a single \.safetensors file"):
        load_pretrained(tmp_path / "copy")
    shutil.copy(path / shard, damaged(first))
    with pytest.raises(ValueError, match="promises"):
        load_pretrained(tmp_path / "copy")
    file = damaged(index)
    record = json.loads(file.read_text())
    record["weight_map"].pop("model.norm.weight")
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="must list every tensor"):
        load_pretrained(tmp_path / "copy")
    damaged(index).write_text('{"weight_map": []}')
    with pytest.raises(ValueError, match=r"weight_map which file holds each tensor, got \[\]"):
        load_pretrained(tmp_path / "copy")
    damaged("config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_pretrained(tmp_path / "copy")
    damaged("config.json").unlink()
    with pytest.raises(ValueError, match=r"a Hugging Face directory or a \.gguf file"):
        load_pretrained(tmp_path / "copy")


def test_a_directory_that_is_there_is_not_overwritten(saved, tmp_path):
    model, params, path = saved
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(ValueError, match="must not exist yet"):
        save_pretrained(path, model, params)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    (tmp_path / "empty").mkdir()
    save_pretrained(tmp_path / "empty", model, params)
    assert_same_params(load_pretrained(tmp_path / "empty").params, params)


def test_an_interrupted_write_leaves_no_directory(tmp_path, monkeypatch):
    model, params = random_model(n_layers=1)
    fsync = os.fsync
    left = 0

    def interrupt(descriptor):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", interrupt)
    for limit in range(1, 100):  # at every point where the disk confirms something
        left = limit
        try:
            save_pretrained(tmp_path / "model", model, params, max_shard_bytes=20_000)
        except KeyboardInterrupt:
            # The last confirmation follows the renaming.
            complete = (tmp_path / "model").exists()
            assert {file.name for file in tmp_path.iterdir()} <= {"model"}
            if complete:
                assert_same_params(load_pretrained(tmp_path / "model").params, params)
                shutil.rmtree(tmp_path / "model")
        else:
            break
    assert 5 < limit < 99
    assert complete


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    model, params = random_model(n_layers=1)
    leftover = tmp_path / ".model.writing"
    leftover.mkdir()
    (leftover / "model-00001-of-00009.safetensors").write_bytes(b"part")
    save_pretrained(tmp_path / "model", model, params)
    names = sorted(file.name for file in (tmp_path / "model").iterdir())
    assert names == ["config.json", "model.safetensors"]
    assert not leftover.exists()


def test_parameters_of_another_model_are_refused(tmp_path):
    model, params = random_model()
    path = tmp_path / "model"
    with pytest.raises(ValueError, match="too few or too many of head/weight"):
        save_pretrained(path, model, {k: v for k, v in params.items() if k != "head"})
    with pytest.raises(ValueError, match=r"final_norm/scale must be a float array \(32,\)"):
        save_pretrained(path, model, params | {"final_norm": {"scale": np.ones(5, np.float32)}})
    with pytest.raises(ValueError, match=r"final_norm/scale must be a float array.*int32"):
        save_pretrained(path, model, params | {"final_norm": {"scale": np.ones(32, np.int32)}})
    bad = np.full(32, np.nan, np.float32)
    with pytest.raises(ValueError, match=r"every weight must be finite.*model\.norm\.weight"):
        save_pretrained(path, model, params | {"final_norm": {"scale": bad}})
    with pytest.raises(ValueError, match="dtype must be one of"):
        save_pretrained(path, model, params, dtype="int8")
    save_pretrained(path, model, params)
    with pytest.raises(ValueError, match="param_dtype must be"):
        load_pretrained(path, param_dtype="float16")


def test_sequences_beyond_the_window_are_refused():
    model, params = random_model(attention_window=4)

    def trace(length):
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        return jax.eval_shape(model.apply, {"params": params}, tokens)

    assert trace(4).shape == (1, 4, 60)
    with pytest.raises(ValueError, match="attention_window = 4 tokens, got 5"):
        trace(5)


def test_weights_in_another_layout_beside_model_safetensors_are_not_read(saved, tmp_path):
    _, _, path = saved
    shutil.copytree(path, tmp_path / "copy")
    (tmp_path / "copy" / "consolidated.safetensors").write_bytes(b"another layout")
    assert_same_params(load_pretrained(tmp_path / "copy").params, load_pretrained(path).params)

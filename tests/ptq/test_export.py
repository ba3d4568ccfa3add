"""Directories of codes: back through our reader and, where it is installed, compressed-tensors."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lowbit_jax import FP8_E4M3, INT2, INT3, INT4, INT8, MXFP4, NVFP4, QUEST_INT4
from lowbit_jax.models import Llama, LlamaConfig
from lowbit_jax.models.llama import QUANTIZABLE_PATHS
from lowbit_jax.models.pretrained import load_pretrained, open_safetensors
from lowbit_jax.models.pretrained.assemble import parameter_shapes
from lowbit_jax.numerics import QuantSpec, dequantize_matrices, quantize_matrices, unsigned
from lowbit_jax.numerics.presets import FP8_E4M3_TENSOR
from lowbit_jax.ops.coded_weight import CodedWeight
from lowbit_jax.ptq.export import bits_on_disk, save_quantized, shares_global_scales
from lowbit_jax.ptq.layouts import specs_of
from lowbit_jax.ptq.quantized_directory import (
    describe_directory,
    is_quantized_directory,
    load_quantized,
)
from lowbit_jax.rotations import Hadamard
from lowbit_jax.rotations.wush import BlockTransform


@jax.jit
def values(coded):
    """The numbers that the codes of each matrix stand for."""
    return {path: dequantize_matrices(weight.quantized) for path, weight in coded.items()}


MODEL = Llama(
    LlamaConfig(
        vocab_size=40, d_model=64, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=96, dtype="float32"
    )
)
# Spec, and bits a parameter of which scales and what is stored once a matrix are part: matrices
# have 28,672 parameters a layer in seven.
SERVED = {
    "nvfp4": (NVFP4, 4 + 8 / 16),
    "mxfp4": (MXFP4, 4 + 8 / 32),
    "mxfp4 ct175": (dataclasses.replace(MXFP4, scale="absmax_ct175"), 4 + 8 / 32),
    "int4 g32": (dataclasses.replace(INT4, block_size=32), 4 + 32 / 32),
    "int3 g32": (dataclasses.replace(INT3, block_size=32), 3 + 32 / 32),
    "int2 row": (dataclasses.replace(INT2, block_size=None), None),
    "int8 row": (dataclasses.replace(INT8, block_size=None), None),
    "fp8 row": (FP8_E4M3, None),
    "fp8 tensor": (FP8_E4M3_TENSOR, None),
}
OURS = {
    "quest": (QUEST_INT4, None),
    "floor43": (dataclasses.replace(MXFP4, scale="absmax_floor43"), 4 + 8 / 32),
    "uint3 minmax": (QuantSpec(unsigned(3), 32, "minmax"), 3 + 40 / 32),
}
CASES = SERVED | OURS


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    flat = {
        path: rng.standard_normal(shape, np.float32) / 8 + path.endswith("scale")
        for path, shape in parameter_shapes(MODEL).items()
    }
    flat["layers/mlp/up_proj/weight"][0, 3] = 0  # groups of zeros
    return traverse_util.unflatten_dict(flat, sep="/")


def coded_by(spec, params, **fields):
    """The parameters with codes in place of matrices."""
    flat = traverse_util.flatten_dict(params, sep="/")
    solve = jax.jit(lambda matrices: {k: quantize_matrices(w, spec) for k, w in matrices.items()})
    codes = solve({path: flat[path] for path in QUANTIZABLE_PATHS})
    coded = {path: CodedWeight(q, **fields) for path, q in codes.items()}
    return traverse_util.unflatten_dict(flat | coded, sep="/")


def matrices(params):
    flat = traverse_util.flatten_dict(params, sep="/")
    return {path: flat[path] for path in QUANTIZABLE_PATHS}


def note_of(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)  # exact: the same bits


@pytest.fixture(scope="module", params=CASES)
def case(request, params, tmp_path_factory):
    """Name, coded parameters, the directory and what was said of it."""
    coded = coded_by(CASES[request.param][0], params)
    path = tmp_path_factory.mktemp("quantized") / "model"
    saved = save_quantized(path, MODEL, coded, metadata={"eos_token_id": 1})
    return request.param, coded, path, saved


def test_codes_come_back_bit_by_bit(case, params):
    name, coded, path, _ = case
    assert is_quantized_directory(path)
    found = load_quantized(path, "float32", on_host=True)
    assert found.model == MODEL
    assert found.metadata["eos_token_id"] == 1
    flat = traverse_util.flatten_dict(found.params, sep="/")
    for key, expected in traverse_util.flatten_dict(params, sep="/").items():
        if key not in QUANTIZABLE_PATHS:
            rounded = expected.astype(jnp.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(flat[key], rounded)  # exact: stored in bfloat16
    for key, expected in matrices(coded).items():
        if name == "nvfp4":
            scale = flat[key].quantized.global_scale
            # Bound: the files hold its reciprocal, of which the reciprocal is taken again: twice
            # half a unit of 2^-23.
            np.testing.assert_allclose(scale, expected.quantized.global_scale, rtol=2.0**-23)
            q = dataclasses.replace(expected.quantized, global_scale=scale)
            expected = dataclasses.replace(expected, quantized=q)
        assert_same(flat[key], expected)
    floats = matrices(load_quantized(path, "float32", dequantizes=True).params)
    assert_same(floats, jax.device_get(values({key: flat[key] for key in floats})))


def test_what_others_wrote_is_read_without_our_note(case, tmp_path):
    name, _, path, _ = case
    if name in OURS:
        return
    record = json.loads((path / "config.json").read_text())
    del record["quantization_config"]["lowbit_jax"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
    with_note, without = (
        values(matrices(load_quantized(p, on_host=True).params)) for p in (path, tmp_path)
    )
    assert_same(without, with_note)


def test_the_bits_on_disk_are_those_that_were_claimed(case):
    name, coded, path, saved = case
    spec, claim = CASES[name]
    bits = saved.bits_per_param
    assert (saved.layout == "lowbit_jax", saved.obstacle is not None) == (name in OURS,) * 2
    assert bits == bits_on_disk(path)
    assert f"{bits:.3f} bits a weight on disk" in describe_directory(path)
    tensors = [weight.quantized for weight in matrices(coded).values()]
    count = sum(int(np.prod(q.shape)) for q in tensors)
    # Beside codes and scales there are at most a shape and a global scale a matrix: 20 bytes.
    # Two bits in rows of 96 fill whole words, so that nothing is padded.
    held = 8 * sum(q.nbytes for q in tensors) / count
    extra = 8 * 20 * MODEL.config.n_layers * len(tensors) / count
    assert held <= bits + 1e-9 <= held + extra + 1e-9
    if claim is not None:
        assert claim <= bits + 1e-9 <= claim + extra + 1e-9
        assert spec.bits_per_param(64) == claim


def test_the_package_decompresses_to_the_same_weights(case):
    package = pytest.importorskip("compressed_tensors")
    torch = pytest.importorskip("torch")
    from compressed_tensors.compressors import BaseCompressor

    name, _, path, _ = case
    if name in OURS:
        return
    record = note_of(path)
    config = package.quantization.QuantizationConfig.model_validate(record)
    compressor = BaseCompressor.get_value_from_registry(record["format"])
    ours = load_quantized(path, on_host=True, dequantizes=True).params["layers"]
    state = pytest.importorskip("safetensors.torch").load_file(path / "model.safetensors")
    for layer in range(2):
        for name, part in (("self_attn.q_proj", "attention"), ("mlp.down_proj", "mlp")):
            prefix = f"model.layers.{layer}.{name}."
            module = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            theirs = compressor.decompress(module, config.config_groups["group_0"])["weight"]
            expected = ours[part][name.split(".")[1]]["weight"][layer]
            expected = torch.tensor(expected).to(theirs.dtype)
            assert torch.equal(theirs, expected)  # exact, in the dtype that they decompress to


def test_rotated_codes_are_rotated_by_the_package_too(params, tmp_path):
    path, hadamard = tmp_path / "m", Hadamard(32)
    coded = coded_by(MXFP4, params, rotation=hadamard)
    save_quantized(path, MODEL, coded, dtype=None)
    assert "transform_config" in describe_directory(path)
    found = load_quantized(path, "float32", on_host=True)
    for key, weight in matrices(found.params).items():
        assert_same(weight, matrices(coded)[key])
    tokens = np.arange(24)[None] % 40
    logits = jax.jit(MODEL.apply)({"params": found.params}, tokens)

    pytest.importorskip("compressed_tensors")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from compressed_tensors.transform import TransformConfig, apply_transform_config

    how = transformers.CompressedTensorsConfig(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=how
    )
    # The version that this was written with does not look at the transforms of a directory.
    transform = TransformConfig.model_validate(note_of(path)["transform_config"])
    apply_transform_config(theirs, transform)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    # Bound: float32 sums of up to 96 terms in 14 products that feed each other; without the
    # transform the error is above 1.
    assert error < 14 * 96 * 2.0**-24


def test_a_transform_of_each_block_is_kept_in_our_layout(params, tmp_path):
    coded, rng = coded_by(MXFP4, params, activations=MXFP4), np.random.default_rng(1)
    flat = traverse_util.flatten_dict(coded, sep="/")
    for key, weight in matrices(coded).items():
        count = weight.shape[-1] // 32
        transform = BlockTransform(rng.standard_normal((2, count, 32, 32), np.float32))
        flat[key] = dataclasses.replace(weight, transform=transform)
    coded = traverse_util.unflatten_dict(flat, sep="/")
    saved = save_quantized(tmp_path / "m", MODEL, coded)
    assert saved.layout == "lowbit_jax"
    assert "transform of its own" in saved.obstacle
    for key, weight in matrices(load_quantized(tmp_path / "m", on_host=True).params).items():
        assert_same(weight, flat[key])


def test_the_global_scale_of_inputs_is_written_and_read(params, tmp_path):
    flat = traverse_util.flatten_dict(coded_by(NVFP4, params, activations=NVFP4), sep="/")
    for i, path in enumerate(QUANTIZABLE_PATHS):
        scale = np.asarray([2.0**-i, 1.0], np.float32)
        flat[path] = dataclasses.replace(flat[path], input_global_scale=scale)
    coded = traverse_util.unflatten_dict(flat, sep="/")
    saved = save_quantized(tmp_path / "m", MODEL, coded)
    assert (saved.layout, saved.obstacle) == ("nvfp4-pack-quantized", None)
    inputs = note_of(tmp_path / "m")["config_groups"]["group_0"]["input_activations"]
    assert (inputs["dynamic"], inputs["strategy"], inputs["group_size"]) == (
        "local", "tensor_group", 16,
    )  # fmt: skip
    file = open_safetensors(tmp_path / "m" / "model.safetensors")
    for i, path in enumerate(QUANTIZABLE_PATHS):
        module = path.split("/")[1].replace("attention", "self_attn") + "." + path.split("/")[2]
        for layer, divisor in enumerate((2.0**i, 1.0)):
            name = f"model.layers.{layer}.{module}.input_global_scale"
            assert file.read(name).tolist() == [divisor]
    assert "have global scales of their own" in describe_directory(tmp_path / "m")
    found = matrices(load_quantized(tmp_path / "m", on_host=True).params)
    for path, weight in found.items():
        assert weight.activations == NVFP4
        np.testing.assert_array_equal(weight.input_global_scale, flat[path].input_global_scale)


def test_fused_matrices_share_the_scale_of_inputs_too(params):
    flat = traverse_util.flatten_dict(coded_by(NVFP4, params, activations=NVFP4), sep="/")

    def with_scales(of_inputs):
        for path in QUANTIZABLE_PATHS:
            q = dataclasses.replace(flat[path].quantized, global_scale=np.ones(2, np.float32))
            scale = np.full(2, of_inputs(path), np.float32)
            flat[path] = dataclasses.replace(flat[path], quantized=q, input_global_scale=scale)
        return traverse_util.unflatten_dict(flat, sep="/")

    assert shares_global_scales(with_scales(lambda path: 0.5))
    assert not shares_global_scales(with_scales(lambda path: 1 + ("k_proj" in path)))


def test_inputs_that_were_not_calibrated_are_in_our_layout(params, tmp_path):
    coded = coded_by(NVFP4, params, activations=NVFP4)
    assert not shares_global_scales(coded)
    saved = save_quantized(tmp_path / "n", MODEL, coded)
    assert saved.layout == "lowbit_jax"
    assert "from a calibration" in saved.obstacle
    for weight in matrices(load_quantized(tmp_path / "n").params).values():
        assert (weight.activations, weight.input_global_scale) == (NVFP4, None)
    # Weights that no server reads beside such inputs: ours, with the scale.
    coded = coded_by(MXFP4, params, activations=NVFP4, input_global_scale=np.float32([0.25, 4]))
    saved = save_quantized(tmp_path / "o", MODEL, coded)
    assert saved.layout == "lowbit_jax"
    for path, weight in matrices(load_quantized(tmp_path / "o", on_host=True).params).items():
        assert_same(weight, matrices(coded)[path])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "pack-quantized", "input_activations": {"num_bits": 8}}, "input_activations"),
        ({"format": "float-quantized", "weights": {"strategy": "block"}}, "weights"),
        ({"format": None}, "format None"),
    ],
)
def test_what_another_writer_means_otherwise_is_refused(changed, message):
    weights = {"num_bits": 8, "strategy": "channel", "symmetric": True}
    weights |= changed.pop("weights", {})
    with pytest.raises(ValueError, match=message):
        specs_of({"weights": weights, "input_activations": None, **changed})


def test_what_is_no_model_of_codes_is_refused(params, tmp_path):
    path, coded = tmp_path / "m", coded_by(MXFP4, params)
    flat = traverse_util.flatten_dict(coded, sep="/")
    first = QUANTIZABLE_PATHS[0]

    def saving(changed):
        save_quantized(path, MODEL, traverse_util.unflatten_dict(flat | changed, sep="/"))

    with pytest.raises(ValueError, match=f"must be a CodedWeight, got a ndarray at {first}"):
        saving({first: params["layers"]["attention"]["q_proj"]["weight"]})
    with pytest.raises(ValueError, match="must have one spec"):
        saving({first: matrices(coded_by(FP8_E4M3, params))[first]})
    q = flat[first].quantized
    bad = dataclasses.replace(q, scales=q.scales.at[1, 0, 0].set(255))
    with pytest.raises(ValueError, match=r"finite.*in model\.layers\.1\.self_attn\.q_proj"):
        saving({first: CodedWeight(bad)})
    assert not list(tmp_path.iterdir())


def test_each_loader_names_the_other(params, tmp_path):
    path = tmp_path / "m"
    save_quantized(path, MODEL, coded_by(MXFP4, params))
    with pytest.raises(ValueError, match="quantization_config of 'compressed-tensors'"):
        load_pretrained(path)
    record = json.loads((path / "config.json").read_text())
    record["quantization_config"]["lowbit_jax"]["rotation"] = {"hadamard": 32}
    (path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="contradicts itself"):
        load_quantized(path)
    record["quantization_config"]["lowbit_jax"]["spec"]["format"] = "e9m9"
    (path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="one of the formats e2m1"):
        load_quantized(path)
    (path / "config.json").write_text(json.dumps(record | {"quantization_config": "nvfp4"}))
    with pytest.raises(ValueError, match="must be an object, got 'nvfp4'"):
        load_quantized(path)
    record.pop("quantization_config")
    (path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="load_pretrained reads"):
        load_quantized(path)
    assert not is_quantized_directory(path)

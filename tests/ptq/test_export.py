"""Packed directories: back through our reader and, where it is installed, compressed-tensors."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lowbit_jax import FP8_E4M3, INT2, INT3, INT4, INT8, MXFP4, NVFP4, QUEST_INT4, quantize
from lowbit_jax.models import Llama, LlamaConfig
from lowbit_jax.models.llama import QUANTIZABLE_PATHS
from lowbit_jax.models.pretrained import load_pretrained, open_safetensors
from lowbit_jax.models.pretrained.assemble import parameter_shapes
from lowbit_jax.numerics import dequantize
from lowbit_jax.numerics.presets import FP8_E4M3_TENSOR
from lowbit_jax.ptq.export import bits_on_disk, load_quantized, save_quantized

MODEL = Llama(
    LlamaConfig(
        vocab_size=40, d_model=64, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=96, dtype="float32"
    )
)
# Spec, and bits a parameter of which scales and what is stored once a matrix are part: matrices
# have 28,672 parameters a layer in seven.
CASES = {
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


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    flat = {
        path: rng.standard_normal(shape, np.float32) / 8 + path.endswith("scale")
        for path, shape in parameter_shapes(MODEL).items()
    }
    flat["layers/mlp/up_proj/weight"][0, 3] = 0  # groups of zeros
    return traverse_util.unflatten_dict(flat, sep="/")


def quantized_by(spec, params):
    flat = traverse_util.flatten_dict(params, sep="/")
    solve = jax.jit(lambda w: quantize(w, spec))
    return {path: [solve(w) for w in flat[path]] for path in QUANTIZABLE_PATHS}


@pytest.fixture(scope="module", params=CASES)
def case(request, params, tmp_path_factory):
    """Spec, claimed bits, QTensors, the directory and the bits that were reported."""
    spec, claim = CASES[request.param]
    quantized = quantized_by(spec, params)
    path = tmp_path_factory.mktemp("quantized") / "model"
    bits = save_quantized(path, MODEL, params, quantized, metadata={"eos_token_id": 1})
    return spec, claim, quantized, path, bits


def test_weights_come_back_bit_by_bit(case, params):
    spec, _, quantized, path, _ = case
    found = load_quantized(path, "float32")
    assert found.model == MODEL
    assert found.metadata["eos_token_id"] == 1
    flat = traverse_util.flatten_dict(found.params, sep="/")
    for name, expected in traverse_util.flatten_dict(params, sep="/").items():
        if name not in quantized:
            rounded = expected.astype(jnp.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(flat[name], rounded)  # exact: stored in bfloat16
            continue
        weights = np.stack([dequantize(q) for q in quantized[name]])
        if spec.scale.startswith("absmax_e4m3"):
            # Bound: the files hold the reciprocal of the global scale, whose reciprocal is taken
            # again, and the product of scales is rounded: three times 2^-24, each way.
            np.testing.assert_allclose(flat[name], weights, rtol=6 * 2.0**-24)
        else:
            np.testing.assert_array_equal(flat[name], weights)  # exact: the same bits


def test_the_bits_on_disk_are_those_that_were_claimed(case):
    spec, claim, quantized, path, bits = case
    assert bits == bits_on_disk(path)
    assert bits < 4 + spec.format.bits
    tensors = [q for layers in quantized.values() for q in layers]
    count = sum(int(np.prod(q.shape)) for q in tensors)
    # Beside codes and scales there is at most a shape, or a global scale, a matrix: 16 bytes.
    # Two bits in rows of 96 fill whole words, so that nothing is padded.
    held = 8 * sum(q.nbytes for q in tensors) / count
    assert held <= bits + 1e-9 <= held + 8 * 16 * len(tensors) / count + 1e-9
    if claim is not None:
        assert claim <= bits <= claim + 8 * 16 * len(tensors) / count


def test_the_package_decompresses_to_the_same_weights(case):
    package = pytest.importorskip("compressed_tensors")
    torch = pytest.importorskip("torch")
    from compressed_tensors.compressors import BaseCompressor

    _, _, _, path, _ = case
    record = json.loads((path / "config.json").read_text())["quantization_config"]
    config = package.quantization.QuantizationConfig.model_validate(record)
    compressor = BaseCompressor.get_value_from_registry(record["format"])
    ours = load_quantized(path, "float32", on_host=True).params["layers"]
    state = safetensors_by_torch(path / "model.safetensors")
    for layer in range(2):
        for name, part in (("self_attn.q_proj", "attention"), ("mlp.down_proj", "mlp")):
            prefix = f"model.layers.{layer}.{name}."
            module = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            theirs = compressor.decompress(module, config.config_groups["group_0"])["weight"]
            expected = ours[part][name.split(".")[1]]["weight"][layer]
            expected = torch.from_numpy(expected).to(theirs.dtype)
            assert torch.equal(theirs, expected)  # exact, in the dtype that they decompress to


def safetensors_by_torch(path):
    return pytest.importorskip("safetensors.torch").load_file(path)


def test_inputs_of_nvfp4_share_a_scale_where_servers_fuse(params, tmp_path):
    quantized = quantized_by(NVFP4, params)
    scales = {path: [2.0**-i, 1.0] for i, path in enumerate(QUANTIZABLE_PATHS)}
    save_quantized(
        tmp_path / "m", MODEL, params, quantized, quantize_inputs=True, input_global_scales=scales
    )
    record = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    inputs = record["config_groups"]["group_0"]["input_activations"]
    assert (inputs["dynamic"], inputs["strategy"], inputs["group_size"]) == (
        "local", "tensor_group", 16,
    )  # fmt: skip
    file = open_safetensors(tmp_path / "m" / "model.safetensors")

    def written(module):
        return file.read(f"model.layers.0.{module}.input_global_scale").tolist()

    # Divisors: the smallest, of the largest magnitude, of those that are fused.
    assert [written(f"self_attn.{n}_proj") for n in "qkvo"] == [[1.0], [1.0], [1.0], [8.0]]
    assert [written(f"mlp.{n}_proj") for n in ("gate", "up", "down")] == [[16.0], [16.0], [64.0]]
    load_quantized(tmp_path / "m")
    with pytest.raises(ValueError, match="input_global_scales belong to quantized inputs"):
        save_quantized(tmp_path / "n", MODEL, params, quantized, quantize_inputs=True)


def test_what_has_no_layout_is_refused(params, tmp_path):
    path = tmp_path / "m"
    for spec in (
        QUEST_INT4,
        dataclasses.replace(MXFP4, scale="absmax_floor43"),
        dataclasses.replace(MXFP4, block_size=16),
        dataclasses.replace(INT4, block_size=32, scale="absmax", margin=1.0, block_rows=2),
    ):
        with pytest.raises(ValueError, match="a spec must be"):
            save_quantized(path, MODEL, params, quantized_by(spec, params))
    quantized = quantized_by(MXFP4, params)
    few = {name: layers[:1] for name, layers in quantized.items()}
    with pytest.raises(ValueError, match="needs 2 QTensors"):
        save_quantized(path, MODEL, params, few)
    first = QUANTIZABLE_PATHS[0]
    mixed = quantized | {first: quantized_by(FP8_E4M3, params)[first]}
    with pytest.raises(ValueError, match="must have one spec"):
        save_quantized(path, MODEL, params, mixed)
    bad = dataclasses.replace(
        quantized[first][0], scales=quantized[first][0].scales.at[0, 0].set(255)
    )
    with pytest.raises(ValueError, match=r"finite.*in model\.layers\.0\.self_attn\.q_proj"):
        save_quantized(path, MODEL, params, quantized | {first: [bad, quantized[first][1]]})
    assert not list(tmp_path.iterdir())


def test_each_loader_names_the_other(params, tmp_path):
    save_quantized(tmp_path / "m", MODEL, params, quantized_by(MXFP4, params))
    with pytest.raises(ValueError, match="quantization_config of 'compressed-tensors'"):
        load_pretrained(tmp_path / "m")
    record = json.loads((tmp_path / "m" / "config.json").read_text())
    record.pop("quantization_config")
    (tmp_path / "m" / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="load_pretrained reads"):
        load_quantized(tmp_path / "m")

"""Quantized directories as the package compressed-tensors lays them out: vLLM serves them.

Each matrix of a block becomes a few tensors; embedding, head, norms and biases stay as they are.

    nvfp4-pack-quantized  weight_packed U8 (n, k/2), weight_scale F8_E4M3 (n, k/16),
                          weight_global_scale F32 (1,): w = level * weight_scale / it
    mxfp4-pack-quantized  weight_packed U8 (n, k/2), weight_scale U8 (n, k/32): 2^(it - 127)
    pack-quantized        weight_packed I32 (n, ceil(k * bits / 32)), integers + 2^(bits - 1), low
                          bits first; weight_scale F32 (n, groups), weight_shape I64 (2,)
    float-quantized       weight F8_E4M3 (n, k), weight_scale F32 (n, 1) or (1,)

References:
  https://github.com/vllm-project/compressed-tensors: the layouts, checked with version 0.20.
"""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowbit_jax.models import Llama
from lowbit_jax.models.llama import QUANTIZABLE_PATHS
from lowbit_jax.models.pretrained import Pretrained, TensorEntry, config_from_json, config_to_json
from lowbit_jax.models.pretrained.assemble import TensorSource, assemble
from lowbit_jax.models.pretrained.families import METADATA_KEYS, huggingface_names
from lowbit_jax.models.pretrained.huggingface import (
    named_tensors,
    open_weights,
    read_json,
    write_directory,
)
from lowbit_jax.models.pretrained.safetensors_file import SafetensorsFile
from lowbit_jax.numerics import QTensor, QuantSpec, dequantize
from lowbit_jax.numerics.formats import E2M1, E4M3, integer, pack, unpack

_E8M0_RULES = ("absmax_floor", "absmax_ceil", "absmax_ct175", "rms_nearest", "std_floor")
_PARTS = ("weight_packed", "weight_scale", "weight_global_scale", "weight_shape", "weight")


def save_quantized(
    path: str | os.PathLike,
    model: Llama,
    params: Mapping[str, Any],
    quantized: Mapping[str, Sequence[QTensor]],
    *,
    input_global_scales: Mapping[str, Sequence[float]] | None = None,
    quantize_inputs: bool = False,
    tokenizer: Any = None,
    metadata: Mapping[str, Any] | None = None,
    dtype: str | None = "bfloat16",
) -> float:
    """Writes a directory of packed codes; whole or not at all, see `save_pretrained`.

    Args:
      path: The directory; must not exist, or be empty.
      model: Of the parameters.
      params: Its parameters, of which those that are not quantized are written.
      quantized: Of each of the seven matrices, by its path, a `QTensor` `(n, k)` a layer, all of
        one spec.
      input_global_scales: Of NVFP4 with quantized inputs: of each matrix and layer the largest
        magnitude of its inputs divided by 448 * 6. Those of matrices that servers fuse (query, key
        and value; gate and up) are written as the largest of them.
      quantize_inputs: Whether servers quantize inputs, too: to the format of the weights, NVFP4,
        MXFP4 or FP8 (a scale a token), as they come.
      tokenizer: See `save_pretrained`.
      metadata: See `save_pretrained`.
      dtype: Of what is not quantized.

    Returns:
      Bits that a quantized parameter takes on disk, scales included.

    Raises:
      ValueError: If the layout has no place for the spec, matrices are missing or of several specs,
        or as `save_pretrained`.
    """
    n_layers = model.config.n_layers
    if set(quantized) != set(QUANTIZABLE_PATHS) or {n_layers} != {
        len(layers) for layers in quantized.values()
    }:
        raise ValueError(
            f"save_quantized: needs {n_layers} QTensors, one a layer, for each of"
            f" {', '.join(QUANTIZABLE_PATHS)}, got"
            f" { {name: len(layers) for name, layers in quantized.items()} }; quantize all of them."
        )
    specs = {q.spec for layers in quantized.values() for q in layers}
    if len(specs) > 1:
        raise ValueError(f"save_quantized: all matrices must have one spec, got {specs}.")
    scheme = _scheme(spec := specs.pop(), quantize_inputs)
    needs_input_scales = quantize_inputs and scheme["format"] == "nvfp4-pack-quantized"
    if needs_input_scales != (input_global_scales is not None):
        raise ValueError(
            "save_quantized: input_global_scales belong to quantized inputs in NVFP4, got"
            f" quantize_inputs={quantize_inputs}, {spec.format} and"
            f" {'no' if input_global_scales is None else 'some'} scales; calibrate them."
        )

    entries, read = named_tensors(model, params, dtype, skipped=QUANTIZABLE_PATHS)
    names = huggingface_names(model.config)
    arrays: dict[str, np.ndarray] = {}
    for layer_path, layers in quantized.items():
        for layer, q in enumerate(layers):
            module = names[layer_path].format(layer).removesuffix(".weight")
            if not jnp.isfinite(dequantize(q)).all():
                raise ValueError(
                    f"save_quantized: every weight must be finite, got a NaN or an infinity in"
                    f" {module}; nothing was written."
                )
            arrays |= {f"{module}.{part}": a for part, a in _to_parts(q, scheme).items()}
            if input_global_scales is not None:
                largest = max(input_global_scales[p][layer] for p in _fused_with(layer_path))
                arrays[f"{module}.input_global_scale"] = np.asarray([1 / largest], np.float32)
    packed = {name: TensorEntry(array.dtype, array.shape) for name, array in arrays.items()}
    record = config_to_json(model.config, metadata, dtype or "float32")
    record["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": scheme["format"],
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
    write_directory(
        path,
        record,
        entries | packed,
        lambda name: arrays[name] if name in arrays else read(name),
        tokenizer=tokenizer,
    )
    return bits_on_disk(path)


def bits_on_disk(path: str | os.PathLike) -> float:
    """Bits a parameter of the quantized matrices of a directory: all tensors of their modules."""
    files = open_weights(pathlib.Path(path))
    total, count = 0, 0
    for name, file in files.items():
        module, _, part = name.rpartition(".")
        if f"{module}.weight_scale" in files:
            total += 8 * file.entries[name].nbytes
            if part in ("weight_packed", "weight"):
                count += math.prod(_matrix_shape(files, module))
    if not count:
        raise ValueError(f"bits_on_disk: {path} must hold quantized matrices, got none.")
    return total / count


def load_quantized(
    path: str | os.PathLike,
    dtype: str = "bfloat16",
    *,
    param_dtype: str = "float32",
    on_host: bool = False,
    **overrides: Any,
) -> Pretrained:
    """Loads a directory that `save_quantized` wrote, its weights dequantized.

    Args: as `load_pretrained`. Inputs are quantized by recipes, `recipe_rules=`.

    Raises:
      ValueError: As `load_pretrained`, or if the layout is another one.
    """
    path = pathlib.Path(path)
    record = read_json(path / "config.json")
    found = record.pop("quantization_config", None) or {}
    groups = found.get("config_groups", {})
    if found.get("quant_method") != "compressed-tensors" or set(groups) != {"group_0"}:
        raise ValueError(
            f"load_quantized: {path} must be quantized by compressed-tensors in one group, got"
            f" {found.get('quant_method')!r} and groups {sorted(groups)}; load_pretrained reads"
            " weights that are not quantized."
        )
    scheme = {"format": found["format"], **groups["group_0"]}
    config = config_from_json(record, dtype=dtype, **overrides)
    files = open_weights(path)
    modules = [n.removesuffix(".weight_scale") for n in files if n.endswith(".weight_scale")]
    shapes = {
        name: file.entries[name].shape
        for name, file in files.items()
        if name.rpartition(".")[0] not in modules
        or name.rpartition(".")[2] not in (*_PARTS, "input_global_scale")
    }
    shapes |= {f"{module}.weight": _matrix_shape(files, module) for module in modules}
    spec = _spec(scheme)

    def load(name: str) -> np.ndarray:
        module = name.removesuffix(".weight")
        if module not in modules:
            return files[name].read(name)
        parts = {
            part: np.asarray(files[full].read(full))
            for part in _PARTS
            if (full := f"{module}.{part}") in files
        }
        return np.asarray(dequantize(_from_parts(parts, spec)))

    model = Llama(config)
    source = TensorSource(path, shapes, load)
    params = assemble(
        model, huggingface_names(config), source, param_dtype=param_dtype, on_host=on_host
    )
    tokenizer = path / "tokenizer.json"
    metadata = {key: record[key] for key in METADATA_KEYS if key in record}
    return Pretrained(model, params, tokenizer if tokenizer.exists() else None, metadata)


def _scheme(spec: QuantSpec, quantize_inputs: bool) -> dict[str, Any]:
    """The group of `quantization_config` that says what `spec` says, with its format."""
    weights: dict[str, Any] = {"num_bits": spec.format.bits, "symmetric": True, "dynamic": False}
    inputs: dict[str, Any] | None = None
    is_group = isinstance(spec.block_size, int)
    is_plain = spec.margin == 1 and spec.gain == 1 and spec.block_rows == 1
    if spec.format == E2M1 and spec.block_size == 16 and spec.scale.startswith("absmax_e4m3"):
        name, strategy, is_plain = "nvfp4-pack-quantized", "tensor_group", spec.block_rows == 1
        inputs = {"num_bits": 4, "strategy": strategy, "dynamic": "local", "group_size": 16}
    elif spec.format == E2M1 and spec.block_size == 32 and spec.scale in _E8M0_RULES:
        name, strategy = "mxfp4-pack-quantized", "group"
        inputs = {"num_bits": 4, "strategy": strategy, "dynamic": True, "group_size": 32}
    elif spec.format == E4M3 and not is_group and spec.scale == "absmax":
        name, strategy = "float-quantized", "tensor" if spec.block_size else "channel"
        inputs = {"num_bits": 8, "strategy": "token", "dynamic": True}
    elif spec.format.kind == "integer" and spec.scale == "absmax" and spec.block_size != "tensor":
        name, strategy = "pack-quantized", "group" if is_group else "channel"
        is_plain = spec.block_rows == 1
    else:
        name, strategy, is_plain = "", "", False
    if not is_plain or (quantize_inputs and inputs is None):
        raise ValueError(
            "save_quantized: a spec must be NVFP4, MXFP4 with a scale of its own (absmax_floor,"
            " absmax_ceil or absmax_ct175), symmetric integers with abs-max scales, or E4M3 with a"
            " scale a row or tensor; inputs are quantized with floats only; got"
            f" {spec} with quantize_inputs={quantize_inputs}; write the dequantized weights with"
            " save_pretrained."
        )
    weights["type"] = "int" if spec.format.kind == "integer" else "float"
    weights["strategy"] = strategy
    weights["group_size"] = spec.block_size if is_group else None
    if inputs is not None:
        inputs |= {"type": "float", "symmetric": True}
    return {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if quantize_inputs else None,
        "output_activations": None,
        "format": name,
    }


def _spec(scheme: Mapping[str, Any]) -> QuantSpec:
    """A spec by which `dequantize` reads what `scheme` describes."""
    weights = scheme["weights"]
    block = weights.get("group_size")
    if not weights.get("symmetric", True):
        raise ValueError("load_quantized: weights must be symmetric, got zero points.")
    match scheme["format"]:
        case "nvfp4-pack-quantized":
            return QuantSpec(E2M1, 16, "absmax_e4m3")
        case "mxfp4-pack-quantized":
            return QuantSpec(E2M1, 32, "absmax_floor")
        case "float-quantized":
            return QuantSpec(E4M3, "tensor" if weights["strategy"] == "tensor" else None)
        case "pack-quantized":
            # The range that includes -2^(bits - 1), which holds that of any symmetric integer.
            return QuantSpec(integer(weights["num_bits"], is_full_range=True), block)
    raise ValueError(
        f"load_quantized: format {scheme['format']!r} is not one of nvfp4-pack-quantized,"
        " mxfp4-pack-quantized, float-quantized and pack-quantized."
    )


def _to_parts(q: QTensor, scheme: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of one module."""
    codes, scales = np.asarray(q.codes), np.asarray(q.scales)
    if q.zero_points is not None or codes.ndim != 2:
        raise ValueError(
            f"save_quantized: each QTensor must be a matrix without zero points, got {q.shape}."
        )
    match scheme["format"]:
        case "nvfp4-pack-quantized":
            divisor = 1 / np.asarray(q.global_scale, np.float32)
            return {
                "weight_packed": codes,
                "weight_scale": scales,
                "weight_global_scale": divisor.reshape(1),
            }
        case "mxfp4-pack-quantized":
            return {"weight_packed": codes, "weight_scale": scales}
        case "float-quantized":
            per_row = scheme["weights"]["strategy"] == "channel"
            return {"weight": codes, "weight_scale": scales.reshape((-1, 1) if per_row else 1)}
    bits = q.spec.format.bits
    signed = codes.view(np.uint8) if bits == 8 else np.asarray(unpack(q.codes, bits))
    offset = (signed ^ np.uint8(1 << (bits - 1))).astype(np.uint8)  # + 2^(bits - 1)
    shifts = np.arange(bits, dtype=np.uint8)
    stream = (offset[..., None] >> shifts & 1).reshape(len(offset), -1)
    stream = np.pad(stream, [(0, 0), (0, -stream.shape[1] % 32)])
    words = np.packbits(stream, axis=-1, bitorder="little").view("<i4")
    return {
        "weight_packed": words,
        "weight_scale": scales.astype(np.float32),
        "weight_shape": np.asarray(q.shape, np.int64),
    }


def _from_parts(parts: Mapping[str, np.ndarray], spec: QuantSpec) -> QTensor:
    """The inverse of `_to_parts`."""
    scales, global_scale = parts["weight_scale"], parts.get("weight_global_scale")
    codes = parts["weight"] if "weight" in parts else parts["weight_packed"]
    if spec.block_size == "tensor":
        scales = scales.reshape(1, 1)
    if spec.format.kind == "integer":
        bits, (n, k) = spec.format.bits, parts["weight_shape"].tolist()
        stream = np.unpackbits(codes.view(np.uint8), axis=-1, bitorder="little")
        bits_of = stream[:, : k * bits].reshape(n, k, bits).astype(np.uint8)
        offset = (bits_of << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)
        signed = offset ^ np.uint8(1 << (bits - 1))
        codes = signed.view(np.int8) if bits == 8 else np.asarray(pack(jnp.asarray(signed), bits))
        scales = scales.astype(np.float32)
    if global_scale is not None:
        global_scale = jnp.asarray(1 / global_scale.reshape(()).astype(np.float32))
    return QTensor(jnp.asarray(codes), jnp.asarray(scales), global_scale, spec)


def _matrix_shape(files: Mapping[str, SafetensorsFile], module: str) -> tuple[int, ...]:
    """Shape of the matrix of a module."""
    if (name := f"{module}.weight_shape") in files:
        return tuple(files[name].read(name).tolist())
    if (name := f"{module}.weight") in files:
        return files[name].entries[name].shape
    n, half = files[name := f"{module}.weight_packed"].entries[name].shape
    return (n, 2 * half)


def _fused_with(path: str) -> tuple[str, ...]:
    """The matrices that servers multiply by as one with that at `path`."""
    for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        folder, name, _ = path.rsplit("/", 2)
        if name in names:
            return tuple(f"{folder}/{one}/weight" for one in names)
    return (path,)

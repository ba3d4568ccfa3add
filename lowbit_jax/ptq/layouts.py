"""How a `QTensor` lies in a checkpoint: layouts of the package compressed-tensors, and our own.

compressed-tensors, which vLLM serves; `w ~ level * scale`:

    nvfp4-pack-quantized  weight_packed U8 (n, k/2), weight_scale F8_E4M3 (n, k/16),
                          weight_global_scale F32 (1,): w = level * weight_scale / it
    mxfp4-pack-quantized  weight_packed U8 (n, k/2), weight_scale U8 (n, k/32): 2^(it - 127)
    pack-quantized        weight_packed I32 (n, ceil(k * bits / 32)), integers + 2^(bits - 1), low
                          bits first; weight_scale F32 (n, groups), weight_shape I64 (2,)
    float-quantized       weight F8_E4M3 (n, k), weight_scale F32 (n, 1) or (1,)

Ours holds every `QTensor`, and the transform of WUSH: weight_codes, weight_scales,
weight_multiplier (its global scale), weight_zero_points, weight_transform, as they are.

References:
  https://github.com/vllm-project/compressed-tensors: the layouts, checked with version 0.20.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lowbit_jax.numerics import QTensor, QuantSpec
from lowbit_jax.numerics.formats import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    Format,
    integer,
    midrise,
    unsigned,
)
from lowbit_jax.rotations import Hadamard

OURS = "lowbit_jax"  # quant_method of our layout, and key of what we note beside another one
PARTS = ("weight_packed", "weight_scale", "weight_global_scale", "weight_shape", "weight")
OUR_PARTS = {
    "weight_codes": "codes",
    "weight_scales": "scales",
    "weight_multiplier": "global_scale",
    "weight_zero_points": "zero_points",
}
TRANSFORM = "weight_transform"
INPUT_SCALE = "input_global_scale"  # in either layout F32 (1,), one over that of `CodedWeight`

_E8M0_RULES = ("absmax_floor", "absmax_ceil", "absmax_ct175", "rms_nearest", "std_floor")
_FORMATS = {
    format.name: format
    for format in (
        *(E2M1, E2M3, E3M2, E4M3, E5M2),
        *(integer(b, is_full_range=full) for b in range(2, 9) for full in (False, True)),
        *(f(b) for f in (midrise, unsigned) for b in range(1, 9)),
    )
}


def scheme_of(spec: QuantSpec, activations: QuantSpec | None = None) -> dict[str, Any]:
    """The group of a `quantization_config` that says what the specs say, with its format.

    Servers quantize inputs by rules of their own: NVFP4 under one global scale for all tokens,
    MXFP4 by `absmax_ct175`, FP8 with a scale a token, whatever rule `activations` names.

    Raises:
      ValueError: If no layout of compressed-tensors has a place for them.
    """
    weights: dict[str, Any] = {"num_bits": spec.format.bits, "symmetric": True, "dynamic": False}
    inputs: dict[str, Any] | None = None
    is_group = isinstance(spec.block_size, int)
    is_plain = spec.margin == 1 and spec.gain == 1 and spec.block_rows == 1
    if _is_nvfp4(spec):
        name, strategy, is_plain = "nvfp4-pack-quantized", "tensor_group", spec.block_rows == 1
        if activations is not None and _is_nvfp4(activations):
            inputs = {"num_bits": 4, "strategy": strategy, "dynamic": "local", "group_size": 16}
    elif _is_mxfp4(spec):
        name, strategy = "mxfp4-pack-quantized", "group"
        if activations is not None and _is_mxfp4(activations):
            inputs = {"num_bits": 4, "strategy": strategy, "dynamic": True, "group_size": 32}
    elif spec.format == E4M3 and not is_group and spec.scale == "absmax":
        name, strategy = "float-quantized", "tensor" if spec.block_size else "channel"
        if activations is not None and activations.format == E4M3 and not activations.block_size:
            inputs = {"num_bits": 8, "strategy": "token", "dynamic": True}
    elif spec.format.kind == "integer" and spec.scale == "absmax" and spec.block_size != "tensor":
        name, strategy = "pack-quantized", "group" if is_group else "channel"
        is_plain = spec.block_rows == 1
    else:
        name, strategy, is_plain = "", "", False
    if not is_plain or (activations is not None and inputs is None):
        raise ValueError(
            f"compressed-tensors has no place for {spec} with inputs"
            f" {activations or 'not quantized'}; it holds NVFP4, MXFP4 with a scale of its own"
            " (absmax_floor, absmax_ceil or absmax_ct175), symmetric integers with abs-max scales,"
            " and E4M3 with a scale a row or tensor; inputs in the format of the weights, floats"
            " only."
        )
    weights["type"] = "int" if spec.format.kind == "integer" else "float"
    weights["strategy"] = strategy
    weights["group_size"] = spec.block_size if is_group else None
    if inputs is not None:
        inputs |= {"type": "float", "symmetric": True}
    return {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": name,
    }


def specs_of(scheme: Mapping[str, Any]) -> tuple[QuantSpec, QuantSpec | None]:
    """Specs by which `dequantize` reads what `scheme` describes, and inputs are quantized.

    Raises:
      ValueError: If it is of another format or has zero points.
    """
    weights, inputs = scheme["weights"], scheme.get("input_activations")
    block = weights.get("group_size")
    if not weights.get("symmetric", True):
        raise ValueError("load_quantized: weights must be symmetric, got zero points.")
    match scheme["format"]:
        case "nvfp4-pack-quantized":
            spec, activations = (QuantSpec(E2M1, 16, "absmax_e4m3"),) * 2
        case "mxfp4-pack-quantized":
            spec = QuantSpec(E2M1, 32, "absmax_floor")
            activations = QuantSpec(E2M1, 32, "absmax_ct175")
        case "float-quantized":
            spec = QuantSpec(E4M3, "tensor" if weights["strategy"] == "tensor" else None)
            activations = QuantSpec(E4M3, None)
        case "pack-quantized":
            # The range that includes -2^(bits - 1), which holds that of any symmetric integer.
            spec = QuantSpec(integer(weights["num_bits"], is_full_range=True), block)
            activations = None
        case other:
            raise ValueError(
                f"load_quantized: format {other!r} is not one of nvfp4-pack-quantized,"
                " mxfp4-pack-quantized, float-quantized and pack-quantized."
            )
    activations = None if inputs is None else activations
    expected = scheme_of(spec, activations)
    for key, names in (
        ("weights", ("num_bits", "strategy")),
        ("input_activations", ("num_bits", "strategy", "type")),
    ):
        said, held = (
            {name: (record or {}).get(name) for name in names}
            for record in (scheme.get(key), expected[key])
        )
        if said != held:
            raise ValueError(
                f"load_quantized: {scheme['format']} is read with {key} of {held}, got {said};"
                " other strategies and formats are not read."
            )
    return spec, activations


def spec_to_json(spec: QuantSpec | None) -> dict[str, Any] | None:
    """Plain data for JSON."""
    if spec is None:
        return None
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return {**fields, "format": spec.format.name}


def spec_from_json(record: Mapping[str, Any] | None) -> QuantSpec | None:
    """The inverse of `spec_to_json`.

    Raises:
      ValueError: If there is no such format, field or rule.
    """
    if record is None:
        return None
    format: Format | None = _FORMATS.get(str(record.get("format")))
    names = {field.name for field in dataclasses.fields(QuantSpec)}
    if format is None or not record.keys() <= names:
        raise ValueError(
            f"load_quantized: a spec has the fields {', '.join(sorted(names))} and one of the"
            f" formats {', '.join(_FORMATS)}, got {dict(record)}; it was written by another version"
            " of lowbit_jax."
        )
    return QuantSpec(**{**record, "format": format})


def rotation_to_config(rotation: Hadamard | None) -> dict[str, Any] | None:
    """The `transform_config` of compressed-tensors by which servers rotate inputs.

    The weights are rotated already, so that only what is left to do while the model runs is named.
    """
    if rotation is None:
        return None
    online = {"targets": ["Linear"], "location": "input", "inverse": False, "ignore": ["lm_head"]}
    scheme = {"type": "hadamard", "apply": [online], "randomize": False, "requires_grad": False}
    return {"config_groups": {"rotation": {**scheme, "head_dim": rotation.block_size}}}


def rotation_from_config(config: Mapping[str, Any] | None) -> Hadamard | None:
    """The inverse of `rotation_to_config`; transforms of weights, which are done, do not matter.

    Raises:
      ValueError: If inputs are to be transformed in another way.
    """
    schemes = list(((config or {}).get("config_groups") or {}).values())
    online = [
        (scheme, apply)
        for scheme in schemes
        for apply in scheme["apply"]
        if apply["location"] not in ("weight_input", "weight_output")
    ]
    if not online:
        return None
    scheme, apply = online[0]
    is_ours = (
        len(online) == 1
        and (scheme["type"], apply["location"]) == ("hadamard", "input")
        and apply["targets"] == ["Linear"]
        and scheme.get("head_dim")
        and not scheme.get("randomize")
    )
    if not is_ours:
        raise ValueError(
            "load_quantized: transforms must be one Hadamard transform of the inputs of all linear"
            f" layers, in blocks of head_dim, got {config}."
        )
    return Hadamard(scheme["head_dim"])


def to_parts(q: QTensor, scheme: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of one module, by the end of their names.

    Raises:
      ValueError: If it is no matrix or has zero points.
    """
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
    stream = codes.view(np.uint8) ^ _offset(codes.shape[1], q.spec.format.bits)
    words = np.pad(stream, [(0, 0), (0, -stream.shape[1] % 4)]).view("<i4")
    return {
        "weight_packed": words,
        "weight_scale": scales.astype(np.float32),
        "weight_shape": np.asarray(q.shape, np.int64),
    }


def from_parts(parts: Mapping[str, np.ndarray], spec: QuantSpec) -> QTensor:
    """The inverse of `to_parts`; NumPy arrays."""
    scales, global_scale = parts["weight_scale"], parts.get("weight_global_scale")
    codes = parts["weight"] if "weight" in parts else parts["weight_packed"]
    if spec.block_size == "tensor":
        scales = scales.reshape(1, 1)
    if spec.format.kind == "integer":
        bits, k = spec.format.bits, int(parts["weight_shape"][1])
        if k * bits % 8:
            raise ValueError(
                f"load_quantized: rows must fill whole bytes, got {k} codes of {bits} bits."
            )
        stream = np.ascontiguousarray(codes).view(np.uint8)[:, : k * bits // 8]
        codes = (stream ^ _offset(k * bits // 8, bits)).view(spec.format.storage)
    if spec.scale == "absmax":  # other writers keep them in 16 bits
        scales = scales.astype(np.float32)
    if global_scale is not None:
        global_scale = np.asarray(1 / global_scale.reshape(()).astype(np.float32))
    return QTensor(np.asarray(codes), np.asarray(scales), global_scale, spec)


def _offset(n_bytes: int, bits: int) -> np.ndarray:
    """What turns two's complement codes, packed in bytes, into codes + 2^(bits - 1), and back."""
    high = np.packbits(np.arange(8 * bits) % bits == bits - 1, bitorder="little")
    return np.resize(high, n_bytes)


def _is_nvfp4(spec: QuantSpec) -> bool:
    return spec.format == E2M1 and spec.block_size == 16 and spec.scale.startswith("absmax_e4m3")


def _is_mxfp4(spec: QuantSpec) -> bool:
    return spec.format == E2M1 and spec.block_size == 32 and spec.scale in _E8M0_RULES

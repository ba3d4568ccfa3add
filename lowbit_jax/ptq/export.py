"""Models of codes as directories: of the package compressed-tensors, which vLLM serves, or our own.

Each matrix of a block becomes a few tensors, see `layouts`; embedding, head, norms and biases stay
floats, of `dtype`. What compressed-tensors has a place for is written in its layout: blocks of a
Hadamard transform of inputs are named in its `transform_config`. The rest (mid-rise grids, the
transforms of WUSH, zero points, inputs of other formats than the weights, inputs in NVFP4 that were
not calibrated) gets a `quant_method` of our own, which other readers refuse. Either way
`quantization_config` has a key "lowbit_jax" with the exact specs, by which `load_quantized` gives
back the very `CodedWeight`s.
"""

import dataclasses
import functools
import itertools
import math
import os
import pathlib
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from lowbit_jax.models import Llama
from lowbit_jax.models.llama import QUANTIZABLE_PATHS
from lowbit_jax.models.pretrained import SafetensorsFile, TensorEntry, config_to_json
from lowbit_jax.models.pretrained.families import huggingface_names
from lowbit_jax.models.pretrained.huggingface import named_tensors, open_weights, write_directory
from lowbit_jax.numerics import QTensor
from lowbit_jax.numerics.spec import E4M3_RULES
from lowbit_jax.ops.coded_weight import CodedWeight, has_global_scale
from lowbit_jax.ptq.layouts import (
    INPUT_SCALE,
    OUR_PARTS,
    OURS,
    PARTS,
    TRANSFORM,
    rotation_to_config,
    scheme_of,
    spec_to_json,
    to_parts,
)
from lowbit_jax.rotations import Hadamard

_NAN_E8M0 = 0xFF
_NOT_CALIBRATED = (
    "servers take the global scale of inputs in NVFP4 from a calibration, and there was none"
)


class Saved(NamedTuple):
    """What was written.

    Attributes:
      layout: The format of compressed-tensors, or "lowbit_jax" for our own.
      obstacle: Why it is our own; None if it is not.
      bits_per_param: That a parameter of the matrices takes on disk, scales included.
    """

    layout: str
    obstacle: str | None
    bits_per_param: float


def save_quantized(
    path: str | os.PathLike,
    model: Llama,
    params: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    metadata: Mapping[str, Any] | None = None,
    dtype: str | None = "bfloat16",
) -> Saved:
    """Writes a directory of codes; whole or not at all, see `save_pretrained`.

    Args:
      path: The directory; must not exist, or be empty.
      model: Of the parameters.
      params: With a `CodedWeight`, stacked over layers, in place of each of the seven matrices; all
        of one spec, rotation and format of inputs. Servers take the global scale of inputs in NVFP4
        from the file: without `input_global_scale` such a directory is in our own layout.
      tokenizer: See `save_pretrained`.
      metadata: See `save_pretrained`.
      dtype: Of what is not quantized.

    Raises:
      ValueError: If a matrix is no `CodedWeight`, they are of several kinds, weights are not
        finite, or as `save_pretrained`.
    """
    flat: dict[str, Any] = traverse_util.flatten_dict(dict(params), sep="/")
    coded, rotation = _common({name: flat.get(name) for name in QUANTIZABLE_PATHS})
    first = coded[QUANTIZABLE_PATHS[0]]
    spec, activations = first.spec, first.activations
    scheme, obstacle = _scheme(first)
    if scheme and has_global_scale(activations) and first.input_global_scale is None:
        scheme, obstacle = None, _NOT_CALIBRATED

    entries, read = named_tensors(model, params, dtype, skipped=QUANTIZABLE_PATHS)
    entries, places, names = dict(entries), {}, huggingface_names(model.config)
    for name in QUANTIZABLE_PATHS:
        parts = _parts(_layer(coded[name], 0), scheme)  # those of other layers have their shapes
        kinds = {part: TensorEntry(array.dtype, array.shape) for part, array in parts.items()}
        for layer, (part, entry) in itertools.product(range(model.config.n_layers), kinds.items()):
            tensor = f"{names[name].format(layer).removesuffix('.weight')}.{part}"
            entries[tensor], places[tensor] = entry, (name, layer, part)

    @functools.lru_cache(maxsize=1)  # a matrix's codes and scales, as wide, are written in a row
    def parts_of(name: str, layer: int) -> dict[str, np.ndarray]:
        one = _layer(coded[name], layer)
        if not is_finite(one.quantized):
            raise ValueError(
                "save_quantized: every weight must be finite, got a NaN or an infinity in"
                f" {names[name].format(layer)}; nothing was written."
            )
        return _parts(one, scheme)

    def make(tensor: str) -> np.ndarray:
        if tensor not in places:
            return read(tensor)
        name, layer, part = places[tensor]
        return parts_of(name, layer)[part]

    record = config_to_json(model.config, metadata, dtype or "float32")
    ours = {
        "spec": spec_to_json(spec),
        "activations": spec_to_json(activations),
        "rotation": None if rotation is None else {"hadamard": rotation.block_size},
        "shares_global_scales": shares_global_scales(params),
        **({} if obstacle is None else {"obstacle": obstacle}),
    }
    record["quantization_config"] = {"quant_method": OURS, OURS: ours}
    if scheme is not None:
        record["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": scheme["format"],
            "config_groups": {"group_0": scheme},
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            **({} if rotation is None else {"transform_config": rotation_to_config(rotation)}),
            OURS: ours,
        }
    write_directory(path, record, entries, make, tokenizer=tokenizer)
    layout = OURS if scheme is None else scheme["format"]
    return Saved(layout, obstacle, bits_on_disk(path))


def bits_on_disk(path: str | os.PathLike) -> float:
    """Bits a parameter of the quantized matrices of a directory: all tensors that make them up."""
    files = open_weights(pathlib.Path(path))
    total, count = 0, 0
    for module, parts in quantized_modules(files).items():
        for part in parts:
            total += 8 * files[f"{module}.{part}"].entries[f"{module}.{part}"].nbytes
        count += math.prod(matrix_shape(files, module))
    if not count:
        raise ValueError(f"bits_on_disk: {path} must hold quantized matrices, got none.")
    return total / count


def quantized_modules(files: Mapping[str, SafetensorsFile]) -> dict[str, list[str]]:
    """The tensors of each quantized module of a directory, by the ends of their names."""
    known = {*PARTS, *OUR_PARTS, TRANSFORM, INPUT_SCALE}
    modules: dict[str, list[str]] = {}
    for name in files:
        module, _, part = name.rpartition(".")
        if part in known and not {f"{module}.weight_scale", f"{module}.weight_codes"}.isdisjoint(
            files
        ):
            modules.setdefault(module, []).append(part)
    return modules


def matrix_shape(files: Mapping[str, SafetensorsFile], module: str) -> tuple[int, ...]:
    """Shape `(n, k)` of the matrix of a module."""
    if (name := f"{module}.weight_shape") in files:
        return tuple(files[name].read(name).tolist())
    if (name := f"{module}.weight") in files:
        return files[name].entries[name].shape
    n, half = files[name := f"{module}.weight_packed"].entries[name].shape
    return (n, 2 * half)


def fused_with(path: str) -> tuple[str, ...]:
    """The matrices that servers multiply by as one with that at `path`."""
    folder, name, _ = path.rsplit("/", 2)
    for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        if name in names:
            return tuple(f"{folder}/{one}/weight" for one in names)
    return (path,)


def shares_global_scales(params: Mapping[str, Any]) -> bool:
    """Whether matrices that servers fuse have one global scale in each layer, or none has any."""
    flat: dict[str, Any] = traverse_util.flatten_dict(dict(params), sep="/")
    for path in QUANTIZABLE_PATHS:
        coded = flat[path]
        if coded.spec.scale not in E4M3_RULES:
            continue
        for part in ("quantized.global_scale", "input_global_scale"):
            scales = [np.asarray(attrgetter(part)(flat[p])) for p in fused_with(path)]
            if any(not np.array_equal(scales[0], other) for other in scales):
                return False
    return True


def _common(coded: Mapping[str, Any]) -> tuple[dict[str, CodedWeight], Hadamard | None]:
    """The matrices with their codes as `QTensor`s, and their rotation, if all are of one kind."""
    wrong = [path for path, weight in coded.items() if not isinstance(weight, CodedWeight)]
    if wrong:
        raise ValueError(
            "save_quantized: each of the seven matrices must be a CodedWeight, got a"
            f" {type(coded[wrong[0]]).__name__} at {wrong[0]}; quantize all of them, or write float"
            " weights with save_pretrained."
        )
    kinds = {
        (
            str(w.spec),
            w.spec,
            w.rotation,
            w.activations,
            w.transform is not None,
            w.input_global_scale is not None,
        )
        for w in coded.values()
    }
    if len(kinds) > 1:
        found = sorted({f"{kind[0]}, {kind[2]}, inputs {kind[3]}" for kind in kinds})
        raise ValueError(
            "save_quantized: all matrices must have one spec, rotation and format of inputs, got"
            f" {'; '.join(found)}."
        )
    rotation = kinds.pop()[2]
    if rotation is not None and not isinstance(rotation, Hadamard):
        raise ValueError(f"save_quantized: rotations must be Hadamard transforms, got {rotation}.")
    return {name: _unpacked(weight) for name, weight in coded.items()}, rotation


def _scheme(coded: CodedWeight) -> tuple[dict[str, Any] | None, str | None]:
    """That of compressed-tensors, or why there is none."""
    if coded.transform is not None:
        return None, "compressed-tensors has no transform of its own for each block of each matrix"
    if coded.spec.scale == "minmax":
        return None, "zero points are not written in the layouts of compressed-tensors"
    try:
        return scheme_of(coded.spec, coded.activations), None
    except ValueError as error:
        return None, str(error).split(";")[0]


def _layer(coded: CodedWeight, layer: int) -> CodedWeight:
    return jax.tree.map(lambda x: x[layer], coded)


def _unpacked(coded: CodedWeight) -> CodedWeight:
    return dataclasses.replace(coded, quantized=coded.codes()) if coded.is_packed else coded


def _parts(coded: CodedWeight, scheme: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
    """The tensors of a matrix, by the ends of their names."""
    q: QTensor = coded.quantized
    of_inputs = {}
    if coded.input_global_scale is not None:
        divisor = 1 / np.asarray(coded.input_global_scale, np.float32)
        of_inputs[INPUT_SCALE] = divisor.reshape(1)
    if scheme is not None:
        return {**to_parts(q, scheme), **of_inputs}
    parts = {part: getattr(q, field) for part, field in OUR_PARTS.items()}
    if coded.transform is not None:
        parts[TRANSFORM] = coded.transform.matrices
    found = {part: np.asarray(array) for part, array in parts.items() if array is not None}
    return {**found, **of_inputs, "weight_shape": np.asarray(q.shape, np.int64)}


def is_finite(q: QTensor) -> bool:
    """Whether scales, and codes of 8-bit floats, are finite: those of the others always are."""
    parts = [q.scales, q.global_scale]
    if q.spec.format.kind == "float" and q.spec.format.bits == 8:
        parts.append(q.codes)
    for part in (np.asarray(part) for part in parts if part is not None):
        values = part != _NAN_E8M0 if part.dtype == np.uint8 else np.isfinite(part.astype(float))
        if not values.all():
            return False
    return True

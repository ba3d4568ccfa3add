"""Directories of codes back into models, each matrix as a `CodedWeight`."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lowbit_jax.models import Llama
from lowbit_jax.models.llama import QUANTIZABLE_PATHS
from lowbit_jax.models.pretrained import Pretrained, SafetensorsFile, config_from_json
from lowbit_jax.models.pretrained.assemble import TensorSource, assemble
from lowbit_jax.models.pretrained.families import METADATA_KEYS, huggingface_names
from lowbit_jax.models.pretrained.huggingface import (
    find_tokenizer,
    is_needless,
    open_weights,
    read_json,
)
from lowbit_jax.numerics import QTensor, QuantSpec
from lowbit_jax.ops.coded_weight import CodedWeight, has_global_scale
from lowbit_jax.ptq.export import bits_on_disk, is_finite, matrix_shape, quantized_modules
from lowbit_jax.ptq.layouts import (
    INPUT_SCALE,
    OUR_PARTS,
    OURS,
    PARTS,
    TRANSFORM,
    from_parts,
    rotation_from_config,
    scheme_of,
    spec_from_json,
    specs_of,
)
from lowbit_jax.rotations import Hadamard
from lowbit_jax.rotations.wush import BlockTransform

_dequantized = jax.jit(CodedWeight.dequantized)


def is_quantized_directory(path: str | os.PathLike) -> bool:
    """Whether `path` is a directory whose config.json has a `quantization_config`.

    Raises:
      ValueError: If it is a directory without a config.json that can be read.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        return False
    return read_json(path / "config.json").get("quantization_config") is not None


def describe_directory(path: str | os.PathLike) -> str:
    """Bits on disk, layout, and what readers have to know; a line or two.

    Raises:
      ValueError: If it is no directory of codes.
    """
    path = pathlib.Path(path)
    found = read_json(path / "config.json").get("quantization_config") or {}
    kind = _read_kind(path, found)
    bits = f"{bits_on_disk(path):.3f} bits a weight on disk"
    if kind.is_ours:
        return f"{bits}, in a layout that lowbit_jax alone reads: {found[OURS].get('obstacle')}"
    lines = [f"{bits}, {found['format']} of compressed-tensors"]
    if kind.rotation is not None:
        lines.append(
            f"only for readers that follow transform_config: inputs go through {kind.rotation}"
        )
    if not found.get(OURS, {}).get("shares_global_scales", True):
        lines.append(
            "matrices that servers fuse have global scales of their own: vLLM would take one of"
            " them for all"
        )
    if kind.activations is not None:
        lines.append("servers quantize inputs to the format of the weights, by rules of their own")
    return "\n".join(lines)


def load_quantized(
    path: str | os.PathLike,
    dtype: str = "bfloat16",
    *,
    param_dtype: str = "float32",
    on_host: bool = False,
    dequantizes: bool = False,
    **overrides: Any,
) -> Pretrained:
    """Loads a directory that `save_quantized` wrote, or another one in these layouts.

    What is written by others is read with the inputs that it names: NVFP4, MXFP4 (`absmax_ct175`)
    or FP8; inputs in NVFP4 under the global scale of the file, if there is one.

    Args:
      path: The directory.
      dtype: See `load_pretrained`.
      param_dtype: Of what is not quantized, and of weights that are dequantized.
      on_host: See `load_pretrained`.
      dequantizes: Give float weights in the original basis in place of each `CodedWeight`; inputs
        are not quantized then.
      **overrides: See `load_pretrained`.

    Returns:
      As `load_pretrained`; each matrix is a `CodedWeight`, stacked over layers.

    Raises:
      ValueError: As `load_pretrained`, or if the layout is another one.
    """
    path = pathlib.Path(path)
    record = read_json(path / "config.json")
    kind = _read_kind(path, record.pop("quantization_config", None) or {})
    config = config_from_json(record, dtype=dtype, **overrides)
    files = open_weights(path)
    modules = quantized_modules(files)
    held = {f"{module}.{part}" for module, parts in modules.items() for part in parts}
    shapes = {name: file.entries[name].shape for name, file in files.items() if name not in held}
    shapes |= {f"{module}.weight": matrix_shape(files, module) for module in modules}

    def weight_of(name: str) -> CodedWeight:
        weight = kind.weight(files, name.removesuffix(".weight"))
        if not is_finite(weight.quantized):
            raise ValueError(
                f"load_quantized: every weight must be finite, got a NaN or an infinity in {name}"
                f" of {path}; fetch the file again."
            )
        return weight

    def read(name: str) -> np.ndarray:
        if name.removesuffix(".weight") not in modules:
            return files[name].read(name)
        return np.asarray(_dequantized(weight_of(name)))

    def stack(parameter: str, tensors: list[str]) -> CodedWeight | None:
        if dequantizes or parameter not in QUANTIZABLE_PATHS:
            return None
        return jax.tree.map(lambda *parts: np.stack(parts), *map(weight_of, tensors))

    model = Llama(config)
    params = assemble(
        model,
        huggingface_names(config),
        TensorSource(path, shapes, read),
        ignored=functools.partial(is_needless, config),
        param_dtype=param_dtype,
        on_host=on_host,
        stack=stack,
    )
    metadata = {key: record[key] for key in METADATA_KEYS if key in record}
    return Pretrained(model, params, find_tokenizer(path), metadata)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What a `quantization_config` says of all matrices."""

    spec: QuantSpec
    activations: QuantSpec | None
    rotation: Hadamard | None
    is_ours: bool

    def weight(self, files: Mapping[str, SafetensorsFile], module: str) -> CodedWeight:
        """The matrix of a module; arrays of NumPy."""

        def part(name: str) -> np.ndarray | None:
            full = f"{module}.{name}"
            return np.asarray(files[full].read(full)) if full in files else None

        scale = None
        if has_global_scale(self.activations) and (divisor := part(INPUT_SCALE)) is not None:
            scale = np.asarray(1 / divisor.reshape(()).astype(np.float32))
        if not self.is_ours:
            parts = {name: array for name in PARTS if (array := part(name)) is not None}
            if not {"weight_packed", "weight"} & parts.keys() or "weight_scale" not in parts:
                raise ValueError(
                    f"load_quantized: {module} must be quantized, got the tensors"
                    f" {sorted(parts)}; matrices that were left as they are cannot be mixed in."
                )
            q = from_parts(parts, self.spec)
            return CodedWeight(q, None, self.rotation, self.activations, scale)
        fields = {field: part(name) for name, field in OUR_PARTS.items()}
        transform = part(TRANSFORM)
        return CodedWeight(
            QTensor(spec=self.spec, **fields),
            None if transform is None else BlockTransform(transform),
            self.rotation,
            self.activations,
            scale,
        )


def _read_kind(path: pathlib.Path, found: Any) -> _Kind:
    """That of the `quantization_config` of a directory."""
    if not isinstance(found, Mapping):
        raise ValueError(
            f"load_quantized: quantization_config of {path} must be an object, got {found!r}; fetch"
            " config.json again."
        )
    ours, method = found.get(OURS), found.get("quant_method")
    groups = found.get("config_groups", {})
    if (method != OURS or ours is None) and (
        method != "compressed-tensors" or set(groups) != {"group_0"}
    ):
        raise ValueError(
            f"load_quantized: {path} must be quantized by lowbit_jax, or by compressed-tensors in"
            f" one group, got {method!r} and groups {sorted(groups)}; load_pretrained reads weights"
            " that are not quantized."
        )
    spec = activations = rotation = None
    if ours is not None:
        spec = spec_from_json(ours.get("spec"))
        activations = spec_from_json(ours.get("activations"))
        size = (ours.get("rotation") or {}).get("hadamard")
        rotation = None if size is None else Hadamard(size)
        if spec is None:
            raise ValueError(f"load_quantized: config.json of {path} has no spec of its weights.")
    if method == OURS:
        assert spec is not None
        return _Kind(spec, activations, rotation, True)
    scheme = {**groups["group_0"]}
    scheme["format"] = scheme.get("format") or found.get("format")
    for_servers = rotation_from_config(found.get("transform_config"))
    if spec is None:
        return _Kind(*specs_of(scheme), for_servers, False)
    expected = scheme_of(spec, activations)
    if rotation != for_servers or any(
        expected[key] != scheme.get(key) for key in ("format", "weights", "input_activations")
    ):
        raise ValueError(
            f"load_quantized: config.json of {path} contradicts itself, {spec} with inputs"
            f" {activations} and rotation {rotation} beside {scheme} and {for_servers}; write the"
            " directory once more, or remove its key 'lowbit_jax'."
        )
    return _Kind(spec, activations, rotation, False)

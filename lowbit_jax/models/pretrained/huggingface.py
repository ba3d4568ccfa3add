"""Directories as Hugging Face lays them out: config.json, safetensors in shards, a tokenizer."""

import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from lowbit_jax.files import sync, writing_name
from lowbit_jax.models.llama import Llama, LlamaConfig
from lowbit_jax.models.pretrained.assemble import (
    Pretrained,
    TensorSource,
    assemble,
    parameter_shapes,
    tensors_of,
)
from lowbit_jax.models.pretrained.families import (
    METADATA_KEYS,
    config_from_json,
    config_to_json,
    huggingface_names,
)
from lowbit_jax.models.pretrained.gguf_file import load_gguf
from lowbit_jax.models.pretrained.safetensors_file import (
    SafetensorsFile,
    TensorEntry,
    open_safetensors,
    write_safetensors,
)

_INDEX = "model.safetensors.index.json"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_FLOATS = ("float64", "float32", "float16", "bfloat16")


def load_pretrained(
    path: str | os.PathLike,
    dtype: str = "bfloat16",
    *,
    param_dtype: str = "float32",
    on_host: bool = False,
    **overrides: Any,
) -> Pretrained:
    """Loads a Hugging Face directory, or a GGUF file, of one of the families of `Llama`.

    Files are mapped, and one parameter (of all layers) at a time is put together and moved to the
    default device: memory holds the model once, and that parameter.

    Args:
      path: Directory with config.json and safetensors, one file or shards with their index; or a
        `.gguf` file, for which the package gguf must be installed.
      dtype: Of the computation, `LlamaConfig.dtype`.
      param_dtype: Of the parameters, `"float32"` or `"bfloat16"`. Float32 holds every value of a
        checkpoint of 16 bits exactly.
      on_host: Leave the parameters as NumPy arrays, for a model that is larger than the device.
      **overrides: Fields of `LlamaConfig`, such as `recipe_rules`.

    Raises:
      ValueError: If files or tensors are missing, damaged, not wanted, of another shape or dtype,
        or not finite; or the architecture is another one.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return load_gguf(
            path, dtype=dtype, param_dtype=param_dtype, on_host=on_host, overrides=overrides
        )
    record = read_json(path / "config.json")
    config = config_from_json(record, dtype=dtype, **overrides)
    files = open_weights(path)
    for name, file in files.items():
        entry = file.entries[name]
        if str(entry.dtype) not in _FLOATS:
            raise ValueError(
                f"load_pretrained: tensors must be {', '.join(_FLOATS)}, got {entry.dtype} in"
                f" {name} of {file.path}: a quantized checkpoint; load the one that it was made"
                " from."
            )

    def read(name: str) -> np.ndarray:
        return files[name].read(name)

    is_twice = config.tie_embeddings and _HEAD in files and _EMBEDDING in files
    if is_twice and not np.array_equal(read(_HEAD), read(_EMBEDDING)):
        raise ValueError(
            f"load_pretrained: config.json of {path} ties the head to the embedding, got"
            f" another {_HEAD}; pass tie_embeddings=False to keep both."
        )
    shapes = {name: file.entries[name].shape for name, file in files.items()}
    model = Llama(config)
    params = assemble(
        model,
        huggingface_names(config),
        TensorSource(path, shapes, read),
        ignored=functools.partial(is_needless, config),
        param_dtype=param_dtype,
        on_host=on_host,
    )
    metadata = {key: record[key] for key in METADATA_KEYS if key in record}
    return Pretrained(model, params, find_tokenizer(path), metadata)


def find_tokenizer(path: pathlib.Path) -> pathlib.Path | None:
    """The tokenizer.json of a directory, or else its tokenizer.model; None if it has neither."""
    found = (path / name for name in _TOKENIZER_FILES[:2])
    return next((file for file in found if file.exists()), None)


def is_needless(config: LlamaConfig, name: str) -> bool:
    """Whether a tensor may be there and is not needed.

    Old checkpoints hold the rotary frequencies, which the configuration gives; some hold a tied
    head twice.
    """
    return name.endswith("rotary_emb.inv_freq") or (name == _HEAD and config.tie_embeddings)


def save_pretrained(
    path: str | os.PathLike,
    model: Llama,
    params: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    metadata: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory that transformers, vLLM and `load_pretrained` load.

    It is written under another name and renamed at the end: a directory of this name is complete.

    Args:
      path: The directory; must not exist, or be empty.
      model: Its recipes are not written: a config.json has no place for them.
      params: Arrays, with or without the boxes of `model.init`.
      tokenizer: A `tokenizers.Tokenizer`; or one of the files of a tokenizer or their directory,
        of which all files of a tokenizer are copied; or None.
      metadata: Of `Pretrained`: the longest sequence and the numbers of special tokens.
      dtype: `"float32"`, `"bfloat16"` or `"float16"`; None: as each parameter is.
      max_shard_bytes: Size above which the weights are cut into several files.

    Raises:
      ValueError: If the directory is there, or parameters are missing, not wanted, of another
        shape, quantized, or not finite. Nothing is left of the directory then, nor after any other
        error.
    """
    entries, read = named_tensors(model, params, dtype)
    found = {str(entry.dtype) for entry in entries.values()}
    widest = max(found, key=_FLOATS[::-1].index)
    record = config_to_json(model.config, metadata, widest)
    write_directory(
        path, record, entries, read, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes
    )


def write_directory(
    path: str | os.PathLike,
    record: Mapping[str, Any],
    entries: Mapping[str, TensorEntry],
    read: Callable[[str], np.ndarray],
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory, whole or not at all; `save_pretrained` says how.

    Args:
      path: The directory; must not exist, or be empty.
      record: Of config.json.
      entries: Dtype and shape of each tensor, by the name that it gets.
      read: Gives each tensor when its turn comes.
      tokenizer: See `save_pretrained`.
      max_shard_bytes: See `save_pretrained`.

    Raises:
      ValueError: As `save_pretrained`.
    """
    path = pathlib.Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"save_pretrained: {path} must not exist yet, or be an empty directory; remove it or"
            " choose another."
        )
    copies = _tokenizer_files(tokenizer)
    ordered = dict(sorted(entries.items(), key=lambda item: _layer_of(item[0])))

    temporary = writing_name(path)
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        temporary.mkdir(parents=True)
        _write_json(temporary / "config.json", record)
        for file in copies:
            shutil.copyfile(file, temporary / file.name)
        if hasattr(tokenizer, "to_str"):
            (temporary / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        _write_shards(temporary, ordered, read, max_shard_bytes)
        for file in (*temporary.iterdir(), temporary):
            sync(file)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def named_tensors(
    model: Llama,
    params: Mapping[str, Any],
    dtype: str | None = None,
    *,
    skipped: Collection[str] = (),
) -> tuple[dict[str, TensorEntry], Callable[[str], np.ndarray]]:
    """Entries of the tensors of `params` by the names of Hugging Face, and what reads one.

    Args:
      model: Of the parameters.
      params: See `save_pretrained`.
      dtype: See `save_pretrained`.
      skipped: Paths of parameters that are left out, and not looked at.

    Raises:
      ValueError: As `save_pretrained`, from the second function if a value is not finite.
    """
    if dtype not in (*_FLOATS[1:], None):
        raise ValueError(
            f"save_pretrained: dtype must be one of {', '.join(_FLOATS[1:])} or None, got"
            f" {dtype!r}; quantized weights have an export of their own."
        )
    shapes, names = parameter_shapes(model), huggingface_names(model.config)
    unboxed: Any = nn.meta.unbox(dict(params))
    flat: dict[str, Any] = traverse_util.flatten_dict(unboxed, sep="/")
    if flat.keys() != shapes.keys():
        raise ValueError(
            "save_pretrained: params must be those of the model, got too few or too many of"
            f" {', '.join(sorted(flat.keys() ^ shapes.keys())[:3])}; pass what model.init gives."
        )
    entries, places = {}, {}
    for path, shape in shapes.items():
        if path in skipped:
            continue
        leaf = flat[path]
        if getattr(leaf, "shape", None) != shape or str(getattr(leaf, "dtype", "")) not in _FLOATS:
            raise ValueError(
                f"save_pretrained: {path} must be a float array {shape}, got a"
                f" {type(leaf).__name__} {getattr(leaf, 'shape', '')}"
                f" {getattr(leaf, 'dtype', '')}; dequantize it first."
            )
        tensors = tensors_of(path, names[path], shape)
        for index, (name, one) in enumerate(tensors.items()):
            entries[name] = TensorEntry(np.dtype(jnp.dtype(dtype or leaf.dtype)), one)
            places[name] = (path, index if path.startswith("layers/") else None)

    def read(name: str) -> np.ndarray:
        path, layer = places[name]
        leaf = flat[path] if layer is None else flat[path][layer]
        with np.errstate(over="ignore"):  # reported below
            array = np.asarray(leaf).astype(entries[name].dtype, copy=False)
        if not np.isfinite(array).all():
            raise ValueError(
                f"save_pretrained: every weight must be finite, got a NaN, an infinity or more than"
                f" {entries[name].dtype} holds in {name}; nothing was written."
            )
        return array

    return entries, read


def _layer_of(name: str) -> int:
    """The layer of a tensor; -1 for the embedding, which comes first, and a last one for others."""
    parts = name.split(".")
    if parts[1] == "layers":
        return int(parts[2])
    return -1 if name == _EMBEDDING else 1 << 30


def _write_shards(
    folder: pathlib.Path,
    entries: Mapping[str, TensorEntry],
    read: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    shards: list[dict[str, TensorEntry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry.nbytes
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], read, {"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, read, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(entry.nbytes for entry in entries.values())
    _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def open_weights(path: pathlib.Path) -> dict[str, SafetensorsFile]:
    """The file of each tensor of a directory: of the index, or model.safetensors, or the only one.

    Raises:
      ValueError: If a file is missing or damaged, or index and files differ.
    """
    if not (path / _INDEX).exists():
        # Some directories hold the weights once more, in a layout of their maker's.
        named = path / "model.safetensors"
        found = [named] if named.is_file() else sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise ValueError(
                f"load_pretrained: {path} must hold {_INDEX} or a single .safetensors file, got"
                f" {[file.name for file in found]}; fetch the index, or convert weights of another"
                " format (pytorch_model.bin) to safetensors."
            )
        file = open_safetensors(found[0])
        return dict.fromkeys(file.entries, file)
    weight_map = read_json(path / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"load_pretrained: {_INDEX} of {path} must say in weight_map which file holds each"
            f" tensor, got {weight_map!r}; fetch it again."
        )
    files = {}
    for name in sorted(set(weight_map.values())):
        if not (path / name).is_file():
            raise ValueError(
                f"load_pretrained: {_INDEX} of {path} names {name}, which is not there; fetch it."
            )
        files[name] = open_safetensors(path / name)
    for tensor, name in weight_map.items():
        if tensor not in files[name].entries:
            raise ValueError(
                f"load_pretrained: {_INDEX} of {path} promises {tensor} in {name}, got a file"
                " without it; index and shards are of two models, fetch both again."
            )
    unlisted = [t for f in files.values() for t in f.entries if t not in weight_map]
    if unlisted:
        raise ValueError(
            f"load_pretrained: {_INDEX} of {path} must list every tensor, got shards that hold"
            f" {unlisted[0]} beside it; index and shards are of two models, fetch both again."
        )
    return {tensor: files[name] for tensor, name in weight_map.items()}


def _tokenizer_files(tokenizer: Any) -> list[pathlib.Path]:
    """What to copy for the argument `tokenizer` of `save_pretrained`."""
    if tokenizer is None or hasattr(tokenizer, "to_str"):
        return []
    given = pathlib.Path(tokenizer)
    folder = given if given.is_dir() else given.parent
    found = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not found or not (given.is_dir() or given in found):
        raise ValueError(
            "save_pretrained: tokenizer must be a tokenizers.Tokenizer, or one of the files"
            f" {', '.join(_TOKENIZER_FILES[:2])}, ... or their directory, got {given};"
            " pass None to write none."
        )
    return found


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file of a directory.

    Raises:
      ValueError: If there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"load_pretrained: {path.parent} must be a directory of a model with {path.name}, got"
            " none; give a Hugging Face directory or a .gguf file."
        ) from error
    except ValueError as error:
        raise ValueError(f"load_pretrained: {path} is not JSON ({error}); fetch it.") from error
    if not isinstance(found, dict):
        raise ValueError(f"load_pretrained: {path} must be a JSON object; fetch it again.")
    return found


def _write_json(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

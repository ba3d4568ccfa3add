"""Safetensors files, every dtype of the format included: eight bytes, a JSON header, the data.

The package's NumPy interface knows neither FP8 nor bfloat16 and reads whole files. Here a tensor is
a view of the mapped file, in the dtypes of `ml_dtypes`, and one tensor at a time is written.

References:
  https://github.com/huggingface/safetensors#format: the layout.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from lowbit_jax.files import write_atomically

_DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
_NAMES = {str(dtype): name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the package, whose readers refuse more


class TensorEntry(NamedTuple):
    """Dtype, shape and first byte, from the beginning of the file, of a tensor."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class SafetensorsFile:
    """An opened file: the entries of its header, and `read` for the data."""

    path: pathlib.Path
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    _data: np.ndarray

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the mapped file: nothing is read before it is used."""
        if name not in self.entries:
            raise ValueError(
                f"SafetensorsFile: {self.path} holds no tensor {name!r}; it holds"
                f" {', '.join(list(self.entries)[:5])}, ..."
            )
        dtype, shape, start = entry = self.entries[name]
        return self._data[start : start + entry.nbytes].view(dtype).reshape(shape)


def open_safetensors(path: str | os.PathLike) -> SafetensorsFile:
    """Maps a file into memory and checks its header.

    Raises:
      ValueError: If the file is no safetensors file, is cut off, or its header contradicts itself.
    """
    path = pathlib.Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise _damaged(path, f"its header would take {length} of {size} bytes")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = dict(header.pop("__metadata__", {}))
        entries = {name: _parse_entry(record, 8 + length) for name, record in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"its header is not readable: {error!r}") from error
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            raise _damaged(path, f"tensor {name!r} begins at byte {entry.start}, not at {end}")
        end = entry.start + entry.nbytes
    if end != size:
        raise _damaged(path, f"it has {size} bytes instead of {end}")
    return SafetensorsFile(path, entries, metadata, np.memmap(path, np.uint8, mode="r"))


def _parse_entry(record: dict[str, Any], origin: int) -> TensorEntry:
    begin, end = record["data_offsets"]
    if record["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {record['dtype']!r} is not one of {', '.join(_DTYPES)}")
    entry = TensorEntry(_DTYPES[record["dtype"]], tuple(record["shape"]), origin + begin)
    if end - begin != entry.nbytes or min(entry.shape, default=0) < 0:
        raise ValueError(f"{record} takes {entry.nbytes} bytes")
    return entry


def _damaged(path: pathlib.Path, what: str) -> ValueError:
    return ValueError(
        f"open_safetensors: {path} is damaged or no safetensors file: {what}; fetch it again."
    )


def write_safetensors(
    path: str | os.PathLike,
    entries: Mapping[str, TensorEntry],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file under another name and renames it once the disk has confirmed it.

    Args:
      path: The file; one that is there is replaced.
      entries: Dtype and shape of each tensor; `start` is ignored.
      read: Gives each tensor when its turn comes, widest dtypes first, so that all are aligned.
      metadata: Strings for the header. Readers of PyTorch models want `{"format": "pt"}`.

    Raises:
      ValueError: If a dtype has no name in the format, or `read` gives another array than
        announced; no file is left then, nor after any other error.
    """
    path = pathlib.Path(path)
    ordered = sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, entry in ordered:
        if str(entry.dtype) not in _NAMES:
            raise ValueError(
                f"write_safetensors: {name} has dtype {entry.dtype}, which the format does not"
                f" know; cast or pack it to one of {', '.join(_NAMES)}."
            )
        end = offset + entry.nbytes
        dtype, shape = _NAMES[str(entry.dtype)], list(entry.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in ordered:
            array = np.asarray(read(name), order="C")
            if array.dtype != entry.dtype or array.shape != entry.shape:
                raise ValueError(
                    f"write_safetensors: {name} was announced as {entry.dtype} {entry.shape},"
                    f" got {array.dtype} {array.shape}; announce what is written."
                )
            file.write(array.reshape(-1).view(np.uint8).data)

    write_atomically(path, write)

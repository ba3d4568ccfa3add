"""One file of tokens: a header of 4 KiB that says what they are, then the tokens.

    bytes 0-7     magic
    8-11          length of the JSON, little-endian uint32
    12-15         CRC-32 of the JSON
    16-           the JSON: `ShardHeader`
    4096-         `count` tokens of `dtype`, little-endian

A shard is written under the name `*.partial`, and renamed when it is whole and on the disk.
"""

import dataclasses
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt

MAGIC = b"lowbtok\n"
VERSION = 1
HEADER_BYTES = 4096
PARTIAL = ".partial"
_PREFIX = struct.Struct("<8sII")


@dataclasses.dataclass(frozen=True)
class ShardHeader:
    """What a shard says of itself; the manifest of the dataset repeats it."""

    version: int
    split: str
    index: int
    tokenizer: str
    fingerprint: str  # of the tokenizer
    vocab_size: int
    dtype: str  # "uint8", "uint16", "uint32"
    count: int  # tokens
    text_bytes: int  # of the text they stand for
    checksum: int  # CRC-32 of the tokens' bytes


class ShardWriter:
    """Appends tokens to `path`; the file appears under that name when it is closed.

    State: the open file, the running count and checksum.
    """

    def __init__(self, path: Path, **said: Any):
        """`said`: the fields of `ShardHeader` but version, count, text_bytes and checksum."""
        self.path, self.said = path, said
        self.count = self.text_bytes = self.checksum = 0
        self._file = path.with_name(path.name + PARTIAL).open("wb")
        self._file.write(bytes(HEADER_BYTES))  # no magic yet: half a shard is no shard

    def append(self, tokens: UInt[np.ndarray, " t"], text_bytes: int) -> None:
        """Writes tokens of the shard's dtype that stand for `text_bytes` bytes of text."""
        assert tokens.dtype == self.said["dtype"], (tokens.dtype, self.said)
        data = tokens.astype(tokens.dtype.newbyteorder("<"), copy=False).tobytes()
        self._file.write(data)
        self.checksum = zlib.crc32(data, self.checksum)
        self.count += len(tokens)
        self.text_bytes += text_bytes

    def close(self) -> ShardHeader:
        """Writes the header, forces all to the disk, gives the file its name."""
        header = ShardHeader(
            version=VERSION,
            count=self.count,
            text_bytes=self.text_bytes,
            checksum=self.checksum,
            **self.said,
        )
        text = json.dumps(dataclasses.asdict(header)).encode()
        assert len(text) <= HEADER_BYTES - _PREFIX.size
        with self._file as file:
            file.seek(0)
            file.write(_PREFIX.pack(MAGIC, len(text), zlib.crc32(text)) + text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self.path)
        return header

    def abandon(self) -> None:
        """Closes the unfinished file and leaves it under its `.partial` name."""
        self._file.close()


def read_header(path: Path) -> ShardHeader:
    """Reads and checks the header of a shard, and the size of the file against it.

    Raises:
      ValueError: If the file is no shard, of another version, damaged, or cut off.
    """
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    if len(head) < HEADER_BYTES or not head.startswith(MAGIC):
        raise ValueError(
            f"read_header: {path} ({size} bytes) is no token shard: a shard begins with {MAGIC!r},"
            f" got {head[:8]!r}. Remove it, or prepare the data again."
        )
    _, length, checksum = _PREFIX.unpack_from(head)
    text = head[_PREFIX.size : _PREFIX.size + length]
    if zlib.crc32(text) != checksum:
        raise ValueError(
            f"read_header: {path} has a damaged header (checksum {zlib.crc32(text):08x} instead of"
            f" {checksum:08x}). Copy or prepare the data again."
        )
    fields = json.loads(text)
    if fields.get("version") != VERSION:
        raise ValueError(
            f"read_header: {path} has format version {fields.get('version')}, this program reads"
            f" {VERSION}. Prepare the data again with it."
        )
    header = ShardHeader(**fields)
    expected = HEADER_BYTES + header.count * np.dtype(header.dtype).itemsize
    if size != expected:
        raise ValueError(
            f"read_header: {path} must have {expected} bytes ({header.count} tokens of"
            f" {header.dtype}), got {size}: it is {'cut off' if size < expected else 'too long'}."
            " Copy or prepare the data again."
        )
    return header


def map_shard(path: Path, header: ShardHeader) -> UInt[np.ndarray, " t"]:
    """The tokens of a shard, memory-mapped: pages are read when they are touched."""
    dtype = np.dtype(header.dtype).newbyteorder("<")
    if header.count == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=HEADER_BYTES, shape=(header.count,))


def verify_shard(path: Path, header: ShardHeader) -> None:
    """Reads all tokens and compares checksum and range, in bounded memory.

    Raises:
      ValueError: If they are not what was written, or lie outside the vocabulary.
    """
    tokens, checksum = map_shard(path, header), 0
    for start in range(0, len(tokens), 2**22):
        chunk = tokens[start : start + 2**22]
        checksum = zlib.crc32(chunk.tobytes(), checksum)
        if chunk.max() >= header.vocab_size:
            raise ValueError(
                f"verify_shard: {path}: tokens must be below vocab_size={header.vocab_size}, got"
                f" {chunk.max()} after token {start}. Prepare the data again."
            )
    if checksum != header.checksum:
        raise ValueError(
            f"verify_shard: {path}: the tokens' checksum is {checksum:08x} instead of"
            f" {header.checksum:08x}: they changed after they were written. Copy or prepare the"
            " data again."
        )

"""One file of tokens: a header of 4 KiB that says what they are, then the tokens.

    bytes 0-7     magic
    8-11          length of the JSON, little-endian uint32
    12-15         CRC-32 of the JSON
    16-           the JSON: `ShardHeader`
    4096-         `count` tokens of `dtype`, little-endian

A shard is written under the name `*.partial`, and renamed when it is whole and on the disk.
"""

import contextlib
import dataclasses
import json
import os
import struct
import zlib
from collections.abc import Iterator
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
        """Writes tokens of the shard's dtype that stand for `text_bytes` bytes of text.

        Raises:
          OSError: If the disk does not take them; `close` does so too.
        """
        assert tokens.dtype == self.said["dtype"], (tokens.dtype, self.said)
        data = tokens.astype(tokens.dtype.newbyteorder("<"), copy=False).tobytes()
        with naming_the_file(self.path):
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
        with naming_the_file(self.path):
            with self._file as file:
                file.seek(0)
                file.write(_PREFIX.pack(MAGIC, len(text), zlib.crc32(text)) + text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, self.path)
        return header

    def abandon(self) -> None:
        """Closes the unfinished file and leaves it under its `.partial` name."""
        with contextlib.suppress(OSError):  # what a full disk did not take, it does not take now
            self._file.close()


@contextlib.contextmanager
def naming_the_file(path: Path) -> Iterator[None]:
    """An `OSError` within says which file it was; a full disk does not by itself."""
    try:
        yield
    except OSError as error:
        said = f"cannot write: {error.strerror}; make room and prepare the data again"
        raise OSError(error.errno, said, str(path)) from error


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


class ShardTokens:
    """The tokens of a shard as a sequence; a slice is read from the file when it is taken.

    Not mapped into memory: where a file was cut off, or its disk fails, the kernel ends a process
    that touches such a page, without a word, and a read can say so. The file stays open: a dataset
    that is prepared anew meanwhile leaves its reader the old one.
    """

    def __init__(self, path: Path, header: ShardHeader):
        """`header`: what `read_header` gave for `path`."""
        self.path, self._count = path, header.count
        self._dtype = np.dtype(header.dtype).newbyteorder("<")
        self._file = path.open("rb", buffering=0)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int | slice):
        if not isinstance(index, slice):
            i = range(len(self))[index]
            return self[i : i + 1][0]
        start, stop, step = index.indices(self._count)
        assert step == 1, step  # `TokenArray` refuses others
        wanted = max(stop - start, 0) * self._dtype.itemsize
        place = HEADER_BYTES + start * self._dtype.itemsize
        data = os.pread(self._file.fileno(), wanted, place)
        while len(data) < wanted:  # the kernel reads at most 2 GiB at a time
            more = os.pread(self._file.fileno(), wanted - len(data), place + len(data))
            if not more:
                raise OSError(
                    f"ShardTokens: {self.path} must hold {self._count} tokens, got an end of file"
                    f" before token {stop}: it was cut off while it was in use. Copy or prepare the"
                    " data again."
                )
            data += more
        return np.frombuffer(data, self._dtype)


def verify_shard(path: Path, header: ShardHeader) -> None:
    """Reads all tokens and compares checksum and range, in bounded memory.

    Raises:
      ValueError: If they are not what was written, or lie outside the vocabulary.
    """
    tokens, checksum = ShardTokens(path, header), 0
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

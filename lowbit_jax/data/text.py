"""Text files of several kinds as one stream of bounded pieces; no file is ever held whole.

A directory stands for its files below it, in sorted order. By suffix, before an optional `.gz`,
`.xz` or `.zst`:

    .jsonl .ndjson   one JSON object a line; its key `text` is a document
    .parquet         one row a document; its column `text`
    anything else    one document; in a directory only `.txt`, `.text`, `.md` and `.rst`
"""

import gzip
import importlib.resources
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

PIECE_BYTES = 2**15  # see split.py for what hangs on it
_CHUNK_BYTES = 2**20
_COMPRESSIONS = (".gz", ".xz", ".zst")
_JSON_LINES = (".jsonl", ".ndjson")
_FOUND_IN_DIRECTORIES = (".txt", ".text", ".md", ".rst", *_JSON_LINES, ".parquet")


class Piece(NamedTuple):
    """A document, or a part of a long one; the parts follow each other in the stream."""

    text: bytes  # UTF-8 unless the source is not
    ends_document: bool


def find_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files that `read_documents` would read, in its order.

    Raises:
      FileNotFoundError: If a path does not exist.
      ValueError: If a directory holds no file of a known kind, or no path was given.
    """
    if not paths:
        raise ValueError("find_files: needs at least one file or directory, got none.")
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"find_files: no such file or directory: {path}")
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if p.is_file() and _is_listed(p, path)]
            if not found:
                raise ValueError(
                    f"find_files: {path} holds no file that ends in"
                    f" {', '.join(_FOUND_IN_DIRECTORIES)} (or these with"
                    f" {', '.join(_COMPRESSIONS)}); name the files themselves to read them as text."
                )
            files += found
        else:
            files.append(path)
    return files


def read_documents(
    paths: Sequence[str | Path],
    *,
    text_key: str = "text",
    piece_bytes: int = PIECE_BYTES,
    on_read: Callable[[int], None] | None = None,
) -> Iterator[Piece]:
    """Streams the documents of files and directories as pieces of at most `piece_bytes`.

    Memory is bounded by a few MiB, or by the longest JSON line or the largest parquet batch
    (256 rows), whatever the size of the files.

    Args:
      paths: Files and directories; the module's docstring says which kinds.
      text_key: Key of a JSON line and column of a parquet file that holds the text.
      piece_bytes: Longer documents are cut, see `cut_document`.
      on_read: Called with the number of file bytes (compressed, where they are) just consumed.

    Yields:
      Pieces, empty documents left out.

    Raises:
      FileNotFoundError: If a path does not exist.
      ValueError: If a file is damaged or truncated, a record has no text, or a package is missing.
    """
    report = on_read or (lambda count: None)
    for path in find_files(paths):
        kind = _suffixes(path)[0]
        if kind == ".parquet":
            documents = _read_parquet(path, text_key, report)
        elif kind in _JSON_LINES:
            documents = _read_json_lines(path, text_key, report)
        else:
            documents = iter([_read_chunks(path, report)])
        for chunks in documents:
            yield from cut_document(chunks, piece_bytes)


def cut_document(chunks: Iterable[bytes], piece_bytes: int = PIECE_BYTES) -> Iterator[Piece]:
    """Cuts one document, given in chunks of any size, into pieces of at most `piece_bytes`.

    The cut lies before the last blank line of the piece's second half, else before its last
    newline, else before its last space, else between two UTF-8 characters. Joined, the pieces are
    the document. To cut *before* white space is harmless to a GPT-2 style tokenizer: its words
    begin there, so that the pieces' tokens are the document's.
    """
    if piece_bytes < 8:
        raise ValueError(f"cut_document: piece_bytes must be at least 8, got {piece_bytes}.")
    rest = b""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > piece_bytes:
            stop = start + _length_of_piece(rest[start : start + piece_bytes + 1])
            yield Piece(rest[start:stop], ends_document=False)
            start = stop
        rest = rest[start:]
    if rest:
        yield Piece(rest, ends_document=True)


def as_pieces(documents: Iterable[str | bytes | Piece]) -> Iterator[Piece]:
    """Lets whole documents (`str`, `bytes`) and pieces of `read_documents` be used alike."""
    for document in documents:
        if isinstance(document, Piece):
            yield document
        else:
            text = document.encode() if isinstance(document, str) else document
            yield from cut_document([text])


def bundled_text(name: str = "moby-dick") -> bytes:
    """A text that comes with the package, UTF-8: Herman Melville's Moby-Dick, 1.2 MB, CC0."""
    folder = importlib.resources.files("lowbit_jax.data") / "texts"
    file = folder / f"{name}.txt"
    if not file.is_file():
        known = sorted(f.name.removesuffix(".txt") for f in folder.iterdir())
        raise ValueError(f"bundled_text: knows {', '.join(known)}, got {name!r}.")
    return file.read_bytes()


def _length_of_piece(window: bytes) -> int:
    """Where to cut `window`, one byte longer than a piece may be."""
    longest = len(window) - 1
    for separator in (b"\n\n", b"\n", b" "):
        # The separator may be the byte after the piece: the cut lies before it.
        at = window.rfind(separator, longest // 2)
        if at > 0:
            return len(window[:at].rstrip()) or at
    for length in range(longest, longest - 3, -1):
        if window[length] & 0xC0 != 0x80:  # not the inside of a UTF-8 character
            return length
    return longest


def _suffixes(path: Path) -> tuple[str, str]:
    """(kind, compression), lower case, "" where there is none."""
    last = path.suffix.lower()
    if last in _COMPRESSIONS:
        return Path(path.stem).suffix.lower(), last
    return last, ""


def _is_listed(path: Path, root: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return not is_hidden and _suffixes(path)[0] in _FOUND_IN_DIRECTORIES


def _read_chunks(path: Path, report: Callable[[int], None]) -> Iterator[bytes]:
    """The unpacked bytes of a file, in chunks."""
    compression = _suffixes(path)[1]
    with path.open("rb") as raw:
        stream = {".gz": _read_gzip, ".xz": _read_xz, ".zst": _read_zstd}.get(
            compression, _read_stream
        )(raw)
        consumed = 0
        try:
            for chunk in stream:
                yield chunk
                report(raw.tell() - consumed)
                consumed = raw.tell()
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"read_documents: {path} is truncated, damaged or not {compression}: {error}."
                " Fetch or pack it again."
            ) from error


def _read_stream(file) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


def _read_gzip(raw: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw) as file:
        yield from _read_stream(file)


def _read_xz(raw: BinaryIO) -> Iterator[bytes]:
    with lzma.LZMAFile(raw) as file:
        yield from _read_stream(file)


def _read_zstd(raw: BinaryIO) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(
            f"read_documents: {raw.name} needs the package zstandard;"
            " pip install 'lowbit-jax[zstd]', or unpack it first."
        ) from error
    # Not zstandard's stream_reader, which ends without a word where a file is cut off.
    unpacker = None
    try:
        while packed := raw.read(2**16):
            while packed:
                unpacker = unpacker or zstandard.ZstdDecompressor().decompressobj()
                yield unpacker.decompress(packed)
                packed = unpacker.unused_data if unpacker.eof else b""
                unpacker = None if unpacker.eof else unpacker
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
    if unpacker is not None:
        raise EOFError("the last zstd frame has no end")


def _read_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        rest.append(first)
        for line in others:
            yield b"".join(rest)
            rest = [line]
    yield b"".join(rest)


def _read_json_lines(
    path: Path, text_key: str, report: Callable[[int], None]
) -> Iterator[list[bytes]]:
    for number, line in enumerate(_read_lines(_read_chunks(path, report)), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[text_key]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"read_documents: {path}, line {number}: must be a JSON object with key"
                f" {text_key!r}, got {line[:60]!r}; name another key or mend the file."
            ) from error
        yield [_encode(text, f"{path}, line {number}")]


def _read_parquet(
    path: Path, text_key: str, report: Callable[[int], None]
) -> Iterator[list[bytes]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"read_documents: {path} needs the package pyarrow; pip install 'lowbit-jax[parquet]'."
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"read_documents: {path} is damaged or no parquet: {error}.") from error
    with file:
        if text_key not in file.schema_arrow.names:
            raise ValueError(
                f"read_documents: {path} has the columns {', '.join(file.schema_arrow.names)},"
                f" not {text_key!r}; name the one that holds the text."
            )
        rows, size, seen = file.metadata.num_rows, path.stat().st_size, 0
        for batch in file.iter_batches(batch_size=256, columns=[text_key]):
            for text in batch.column(0):
                if text.is_valid:
                    yield [_encode(text.as_py(), str(path))]
            done, seen = seen * size // rows, seen + len(batch)
            report(seen * size // rows - done)


def _encode(text: object, where: str) -> bytes:
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        raise ValueError(f"read_documents: {where}: the text must be a string, got {type(text)}.")
    return text.encode("utf-8", errors="replace")  # JSON may spell half a surrogate pair

import gzip
import json
import lzma
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lowbit_jax.data.text import (
    Piece,
    as_pieces,
    bundled_text,
    cut_document,
    find_files,
    read_documents,
)

TEXT = "Call me Ishmael.\n\nSome years ago — never mind how long.\n".encode()


def documents(pieces):
    """Joins pieces to documents again."""
    found, parts = [], []
    for piece in pieces:
        parts.append(piece.text)
        if piece.ends_document:
            found.append(b"".join(parts))
            parts = []
    assert not parts
    return found


def zstd_frames(data):
    """Two frames in one file, as `zstd` and concatenation make them."""
    half = len(data) // 2
    pack = zstandard.ZstdCompressor().compress
    return pack(data[:half]) + pack(data[half:])


PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd_frames}


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_text_file_is_one_document(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACKERS[suffix](TEXT))
    assert list(read_documents([path])) == [Piece(TEXT, ends_document=True)]


@pytest.mark.parametrize("suffix", PACKERS)
def test_each_json_line_is_a_document_even_across_read_chunks(tmp_path, suffix):
    texts = ["é" * 700_000, "b\nc", "", "\ud800 half a pair", "last"]  # the first spans chunks
    lines = "\n".join(json.dumps({"id": 1, "text": text}) for text in texts)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](lines.encode()))
    expected = [text.encode(errors="replace") for text in texts if text]
    assert documents(read_documents([path])) == expected


def test_each_parquet_row_is_a_document(tmp_path):
    rows = [f"row {i}" for i in range(600)] + [None]
    pyarrow.parquet.write_table(pyarrow.table({"body": rows}), tmp_path / "a.parquet")
    pieces = read_documents([tmp_path / "a.parquet"], text_key="body")
    assert documents(pieces) == [row.encode() for row in rows[:-1]]
    with pytest.raises(ValueError, match=r"has the columns body, not 'text'"):
        list(read_documents([tmp_path / "a.parquet"]))


def test_a_directory_is_its_text_files_in_sorted_order(tmp_path):
    for name in ("b.txt", "a/z.md.gz", "a/picture.png", ".hidden/c.txt", "a/b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(p.relative_to(tmp_path)) for p in find_files([tmp_path])]
    assert found == ["a/b.jsonl", "a/z.md.gz", "b.txt"]
    assert find_files([tmp_path / "a/picture.png"])  # asked for by name: read as text


def test_what_cannot_be_read_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no file that ends in"):
        find_files([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        list(read_documents([tmp_path / "nowhere.txt"]))
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 2: must be a JSON object with key 'text'"
    ):
        list(read_documents([tmp_path / "a.jsonl"]))
    (tmp_path / "b.jsonl").write_text('{"text": 3}')
    with pytest.raises(ValueError, match="must be a string"):
        list(read_documents([tmp_path / "b.jsonl"]))
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="damaged or no parquet"):
        list(read_documents([tmp_path / "a.parquet"]))
    with pytest.raises(ValueError, match="knows moby-dick"):
        bundled_text("ulysses")


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_truncated_or_foreign_archive_is_refused(tmp_path, suffix, damage):
    packed = PACKERS[suffix](bundled_text()[:100_000])
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(packed[:-20] if damage == "cut" else TEXT)
    with pytest.raises(ValueError, match=f"truncated, damaged or not {suffix}"):
        list(read_documents([path]))


@given(
    text=st.text("aé漢😀 \n", max_size=400).map(str.encode),
    piece_bytes=st.integers(8, 64),
    chunk=st.integers(1, 100),
)
def test_pieces_join_to_the_document_and_are_bounded(text, piece_bytes, chunk):
    chunks = [text[i : i + chunk] for i in range(0, len(text), chunk)]
    pieces = list(cut_document(chunks, piece_bytes))
    assert b"".join(piece.text for piece in pieces) == text
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True] * (
        len(pieces) > 0
    )
    for piece in pieces:
        assert 0 < len(piece.text) <= piece_bytes
        piece.text.decode()  # no character is cut in two
    assert pieces == list(as_pieces(cut_document([text], piece_bytes)))  # chunks do not matter


def test_a_cut_prefers_blank_lines_then_newlines_then_spaces():
    def first(text):
        return next(iter(cut_document([text.encode()], 20))).text

    assert first("one two three\n\nfour\nfive six seven") == b"one two three"
    assert first("one two three\nfour five six seven") == b"one two three"
    assert first("one two three four five six seven") == b"one two three four"
    assert first("onetwothreefourfivesixseven") == b"onetwothreefourfives"
    assert first("é" * 40) == ("é" * 10).encode()
    assert first("x" + "é" * 40) == ("x" + "é" * 9).encode()


def test_progress_adds_up_to_the_files(tmp_path):
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(bundled_text()))
    (tmp_path / "b.txt").write_bytes(TEXT)
    table = pyarrow.table({"text": ["x"] * 1000})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    counts = []
    assert len(list(read_documents([tmp_path], on_read=counts.append))) > 1000
    assert sum(counts) == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_memory_is_bounded_for_a_document_larger_than_the_bound(tmp_path):
    path = tmp_path / "one-line.txt.xz"
    with lzma.open(path, "wb", preset=0) as file:
        for _ in range(48):
            file.write(b"0123456789abcdef" * 2**16)  # 48 MiB without a newline
    tracemalloc.start()
    total = sum(len(piece.text) for piece in read_documents([path]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 48 * 2**20
    # Bound: a chunk of 1 MiB, the buffer it is added to (its old and its new copy), a piece, and
    # the decoder's own; far below the 48 MiB of the document.
    assert peak < 6 * 2**20

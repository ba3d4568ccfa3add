import json

import ml_dtypes
import numpy as np
import pytest

from lowbit_jax.models.pretrained.safetensors_file import (
    TensorEntry,
    open_safetensors,
    write_safetensors,
)

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn,
          ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu, np.int64, np.int32, np.int16, np.int8,
          np.uint64, np.uint32, np.uint16, np.uint8, np.bool_]  # fmt: skip


def write(path, arrays, metadata=None):
    entries = {name: TensorEntry(array.dtype, array.shape) for name, array in arrays.items()}
    write_safetensors(path, entries, arrays.__getitem__, metadata)


@pytest.fixture
def arrays():
    """One of each dtype with every byte in it, a scalar, an empty tensor and a transposed one."""
    raw = np.arange(256, dtype=np.uint8).repeat(8)
    found = {str(np.dtype(d)): raw.view(d).reshape(2, 4, -1) for d in DTYPES if d is not np.bool_}
    odd = {"scalar": np.float32(3), "empty": np.zeros((0, 3), np.float16), "odd": raw[:3]}
    found |= {name: np.asarray(array) for name, array in odd.items()}
    return found | {"bool": raw > 7, "transposed": raw.reshape(2, -1).T}


def test_every_dtype_comes_back_bit_by_bit(tmp_path, arrays):
    write(tmp_path / "a.safetensors", arrays, {"format": "pt"})
    file = open_safetensors(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt"}
    assert file.entries.keys() == arrays.keys()
    for name, array in arrays.items():
        read = file.read(name)
        assert (read.dtype, read.shape) == (array.dtype, array.shape)
        assert read.tobytes() == array.tobytes()
        assert file.entries[name].start % array.dtype.itemsize == 0
    with pytest.raises(ValueError, match="read-only"):
        file.read("uint8")[0] = 1
    assert not list(tmp_path.glob(".*"))


def test_the_package_reads_what_is_written_and_the_other_way(tmp_path, arrays):
    safetensors = pytest.importorskip("safetensors")
    numpy = pytest.importorskip("safetensors.numpy")
    # NumPy's own dtypes through its interface, the bytes of all the others through the parser.
    write(tmp_path / "a.safetensors", arrays)
    theirs = dict(safetensors.deserialize((tmp_path / "a.safetensors").read_bytes()))
    assert theirs.keys() == arrays.keys()
    for name, record in theirs.items():
        assert tuple(record["shape"]) == arrays[name].shape
        assert bytes(record["data"]) == arrays[name].tobytes()
    plain = {n: np.ascontiguousarray(a) for n, a in arrays.items() if a.dtype.kind in "fiub"}
    plain = {n: a for n, a in plain.items() if a.dtype.type.__module__ == "numpy"}
    numpy.save_file(plain, tmp_path / "b.safetensors", metadata={"k": "v"})
    file = open_safetensors(tmp_path / "b.safetensors")
    assert file.metadata == {"k": "v"}
    for name, array in plain.items():
        assert file.read(name).tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw + b"x",
        lambda raw: raw[:20],
        lambda raw: b"",
        lambda raw: b"\xff" * 8 + raw[8:],
        lambda raw: raw[:8] + b"[" + raw[9:],
        lambda raw: raw.replace(b'"F32"', b'"F3x"'),
        lambda raw: raw.replace(b'"shape":[2]', b'"shape":[3]'),
        lambda raw: raw.replace(b"[8,12]", b"[4, 8]"),
        lambda raw: b"GGUF" + raw,
    ],
    ids=["cut off", "longer", "cut header", "empty", "huge header", "no JSON", "unknown dtype",
         "other shape", "overlap", "another format"],
)  # fmt: skip
def test_damaged_files_are_found_when_opened(tmp_path, damage):
    path = tmp_path / "a.safetensors"
    write(path, {"x": np.ones(2, np.float32), "y": np.ones(1, np.float32)})
    raw = path.read_bytes()
    open_safetensors(path)
    assert damage(raw) != raw
    path.write_bytes(damage(raw))
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        open_safetensors(path)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {"x": np.ones(2, np.float32)})
    before = path.read_bytes()
    entry = TensorEntry(np.dtype(np.float32), (2,))
    with pytest.raises(ValueError, match="x was announced as float32"):
        write_safetensors(path, {"x": entry}, lambda name: np.ones(3, np.float32))
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, {"x": entry}, _interrupted)
    with pytest.raises(ValueError, match="does not know"):
        write(path, {"x": np.ones(2, np.complex64)})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def _interrupted(name):
    raise KeyboardInterrupt


def test_the_header_is_aligned_json(tmp_path):
    write(tmp_path / "a.safetensors", {"x": np.ones(2, np.float32)})
    raw = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    assert json.loads(raw[8 : 8 + length])["x"]["data_offsets"] == [0, 8]


def test_an_unknown_name_is_refused(tmp_path):
    write(tmp_path / "a.safetensors", {"x": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match="holds no tensor 'y'"):
        open_safetensors(tmp_path / "a.safetensors").read("y")

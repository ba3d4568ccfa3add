import errno
import os

import pytest

from lowbit_jax.files import sync, write_atomically, writing_name


@pytest.mark.parametrize(
    "content",
    ["é\n", "é\n".encode(), lambda file: file.write("é\n".encode())],
    ids=["text", "bytes", "function"],
)
def test_content_is_written_whole(tmp_path, content):
    write_atomically(tmp_path / "file", content)
    sync(tmp_path)
    assert (tmp_path / "file").read_bytes() == "é\n".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_interrupts_a_write_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def interrupt(file):
        file.write(b"new")
        assert writing_name(path).exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupt)
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_atomically(tmp_path / "file", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write: No space left.*file") as caught:
        write_atomically(tmp_path / "file", "new")
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "file").read_text() == "old"

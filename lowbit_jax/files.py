"""Files that are whole or not there, whatever ends the program that writes them."""

import os
import pathlib
from collections.abc import Callable
from typing import BinaryIO

WRITING = ".writing"  # ends the names of files and folders that are not finished


def write_atomically(
    path: pathlib.Path, content: str | bytes | Callable[[BinaryIO], object]
) -> None:
    """Writes a file so that a reader, or a kill, finds the old content or the new, never a part.

    It is written beside its place under another name, and moved once the disk has confirmed it.
    That the new name survives a power failure is sure only after a `sync` of the folder.

    Args:
      path: The file; one that is there is replaced.
      content: Text, which becomes UTF-8; bytes; or what writes into the open file.

    Raises:
      OSError: If it cannot be written. After this error, and any that `content` raises, the old
        content is there, and nothing beside it.
    """
    temporary = writing_name(path)
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError) or error.errno is None:
            raise
        # A full disk does not say which file it did not take.
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error


def writing_name(path: pathlib.Path) -> pathlib.Path:
    """Where a file or a folder is written before it gets its name: hidden, in the same folder."""
    return path.with_name(f".{path.name}{WRITING}")


def sync(path: pathlib.Path) -> None:
    """Has the disk confirm a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

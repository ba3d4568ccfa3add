"""Compressed blocks in a folder, each whole or not at all."""

import hashlib
import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from lowbit_jax.files import WRITING, write_atomically

_SETTINGS = "settings.json"


class KeptBlocks:
    """A folder of `block_000.npz`, ..., and the settings that they were made with.

    A file is written beside its place and then moved there, so that a kill leaves no part of one.
    Settings bind from the first block on.

    Args:
      folder: Made where it is missing.
      settings: Plain data for JSON.
      who: Complains, in messages.
      name: Of the files, where what is kept is no block.

    Raises:
      ValueError: If the folder holds blocks of other settings, or is one of something else.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        settings: Mapping[str, Any],
        *,
        who: str = "compress_blocks",
        name: str = "block",
    ):
        self.folder, self._who, self._name = folder, who, name
        text = json.dumps(dict(settings), indent=1, sort_keys=True) + "\n"
        path = folder / _SETTINGS
        names = {file.name for file in folder.glob("*")} if folder.exists() else set()
        if names and _SETTINGS not in names and not all(n.endswith(WRITING) for n in names):
            raise ValueError(
                f"{who}: {folder} holds other files and no {_SETTINGS}; choose an empty folder."
            )
        has_blocks = any(file.startswith(f"{name}_") for file in names)
        if has_blocks and (found := path.read_text()) != text:
            raise ValueError(
                f"{who}: {folder} was begun with other settings,"
                f" {_difference(found, text)}; go on with those, or choose another folder."
            )
        if not has_blocks:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)

    def save(self, index: int, tree: PyTree, notes: Mapping[str, Any]) -> None:
        """Writes the arrays of a block, and what is said of it, plain data for JSON."""
        arrays = {"notes": np.frombuffer(json.dumps(dict(notes)).encode(), np.uint8)}
        for number, leaf in enumerate(jax.tree.leaves(tree)):
            # As bytes: npz knows neither bfloat16 nor float8.
            arrays[f"{number}"] = np.frombuffer(np.ascontiguousarray(leaf).tobytes(), np.uint8)
        write_atomically(
            self._path(index), lambda file: np.savez(file, allow_pickle=False, **arrays)
        )

    def __contains__(self, index: int) -> bool:
        """Whether a block is there."""
        return self._path(index).exists()

    def load(self, index: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """What `save` wrote.

        Args:
          index: Of the block.
          like: Its shapes and dtypes.

        Raises:
          ValueError: If the file is damaged or of other shapes.
        """
        path = self._path(index)
        leaves, treedef = jax.tree.flatten(like)
        try:
            with np.load(path) as file:
                found = [
                    file[f"{number}"].view(leaf.dtype).reshape(leaf.shape)
                    for number, leaf in enumerate(leaves)
                ]
                notes = json.loads(file["notes"].tobytes())
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{self._who}: {path} cannot be read ({type(error).__name__}: {error}); delete"
                " it, and what it holds is computed anew."
            ) from error
        return treedef.unflatten(found), notes

    def _path(self, index: int) -> pathlib.Path:
        return self.folder / f"{self._name}_{index:03d}.npz"


def digest_of(tree: PyTree) -> str:
    """SHA-256 of the paths, shapes, dtypes and bytes of all leaves, in hexadecimal digits."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _difference(found: str, wanted: str) -> str:
    """The first setting that differs."""
    try:
        old, new = json.loads(found), json.loads(wanted)
        names = sorted({*old, *new})
        name = next(name for name in names if old.get(name) != new.get(name))
    except (ValueError, StopIteration, TypeError):
        return "which cannot be read"
    return f"{name} = {old.get(name)!r} where it is {new.get(name)!r} now"

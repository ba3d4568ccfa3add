import os
import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowbit_jax.train.checkpoint import (
    find_damage,
    list_checkpoints,
    restore_latest,
    save_checkpoint,
)
from lowbit_jax.train.state import TrainState, create_state


def make_state(step=0, width=4, dtype=jnp.float32):
    params = {"layers": {"weight": jnp.arange(2 * width, dtype=dtype).reshape(2, width) + step}}
    return create_state(params, optax.adam(1e-3))._replace(step=jnp.int32(step))


def restore(directory, target=None):
    messages = []
    found = restore_latest(directory, target or make_state(), warn=messages.append)
    return found, messages


def files_of(checkpoint):
    return sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.stat().st_size)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn])
def test_restored_state_is_the_saved_one_bit_for_bit(tmp_path, dtype):
    state = make_state(3, dtype=dtype)
    save_checkpoint(tmp_path, state, {"note": "x"})
    (restored, manifest), messages = restore(tmp_path, jax.eval_shape(lambda: state))
    chex.assert_trees_all_equal_dtypes(restored, state)
    chex.assert_trees_all_equal(restored, state)  # Exact: stored, not computed.
    assert isinstance(restored, TrainState)
    assert (manifest["step"], manifest["note"], messages) == (3, "x", [])


def test_without_checkpoints_there_is_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "missing") == (None, [])


def test_keeps_the_newest_n(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, make_state(step), {}, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]
    with pytest.raises(ValueError, match="keep must be at least 1"):
        save_checkpoint(tmp_path, make_state(4), {}, keep=0)


def damage(path: pathlib.Path, how: str):
    content = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flip a bit":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.parametrize("how", ["delete", "truncate", "flip a bit"])
def test_any_damaged_file_is_found_and_the_checkpoint_before_is_used(tmp_path, how):
    save_checkpoint(tmp_path, make_state(1), {})
    newest = save_checkpoint(tmp_path, make_state(2), {})
    shutil.copytree(newest, tmp_path / "copy")
    names = [path.relative_to(newest) for path in files_of(newest)]
    assert len(names) > 3
    for name in names:
        damage(newest / name, how)
        (restored, _), messages = restore(tmp_path)
        assert int(restored.step) == 1, name
        assert len(messages) == 1
        assert str(newest) in messages[0]
        shutil.copy(tmp_path / "copy" / name, newest / name)
    assert int(restore(tmp_path)[0][0].step) == 2


def test_any_changed_character_of_the_manifest_is_found(tmp_path):
    newest = save_checkpoint(tmp_path, make_state(2), {"note": "x"})
    manifest = newest / "manifest.json"
    good = manifest.read_bytes()
    assert find_damage(newest) is None
    for position in range(0, len(good), 17):
        if good[position : position + 1].isspace():
            continue  # between tokens it means nothing
        manifest.write_bytes(good[:position] + b"#" + good[position + 1 :])
        assert find_damage(newest) is not None, good[position - 20 : position + 20]


def test_a_kill_while_writing_leaves_the_checkpoint_before_and_the_next_save_cleans_up(tmp_path):
    save_checkpoint(tmp_path, make_state(1), {})
    complete = save_checkpoint(tmp_path, make_state(2), {})
    complete.rename(tmp_path / ".writing-2")  # what the disk holds before the final rename
    (restored, _), messages = restore(tmp_path)
    assert (int(restored.step), messages) == (1, [])
    save_checkpoint(tmp_path, make_state(3), {})
    assert not list(tmp_path.glob(".writing-*"))


def test_a_damaged_checkpoint_does_not_push_out_an_undamaged_one(tmp_path):
    save_checkpoint(tmp_path, make_state(1), {}, keep=2)
    save_checkpoint(tmp_path, make_state(2), {}, keep=2)
    (tmp_path / "step_00000002" / "manifest.json").unlink()
    save_checkpoint(tmp_path, make_state(3), {}, keep=2)
    (tmp_path / "step_00000003" / "manifest.json").unlink()
    (restored, _), messages = restore(tmp_path)
    assert int(restored.step) == 1
    assert len(messages) == 2


def test_when_all_are_damaged_it_says_so_instead_of_starting_anew(tmp_path):
    (save_checkpoint(tmp_path, make_state(1), {}) / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        restore(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, value, part):
    save_checkpoint(tmp_path, make_state(1), {})
    state = make_state(2)
    spoil = {part: jax.tree.map(
        lambda x: x.at[0, 1].set(value) if x.ndim == 2 else x, getattr(state, part)
    )}  # fmt: skip
    with pytest.raises(ValueError, match=r"step 2 is not finite in .*layers/weight"):
        save_checkpoint(tmp_path, state._replace(**spoil), {})
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_another_model_is_named_leaf_by_leaf(tmp_path):
    save_checkpoint(tmp_path, make_state(1), {})
    with pytest.raises(
        ValueError, match=r"layers/weight: saved float32\[2, 4\], wanted float32\[2, 8\]"
    ):
        restore(tmp_path, make_state(width=8))

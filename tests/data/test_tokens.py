import dataclasses
import json
import os
import resource
import shutil
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_jax.data import shards
from lowbit_jax.data.pipeline import make_batches
from lowbit_jax.data.split import is_validation
from lowbit_jax.data.text import as_pieces, bundled_text
from lowbit_jax.data.tokenizers import ByteTokenizer, count_bytes, train_bpe
from lowbit_jax.data.tokens import (
    MANIFEST,
    TokenArray,
    dataset_from_text,
    open_dataset,
    write_dataset,
)

TEXT = bundled_text()


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([TEXT[:200_000]], 600)


@pytest.fixture
def dataset(tmp_path):
    """A small dataset of several shards."""
    return write_dataset(
        [TEXT], ByteTokenizer(), tmp_path / "d", validation_fraction=0.1, shard_tokens=200_000
    )


def expected_splits(text, fraction):
    """The pieces of each split by the rule alone."""
    splits = {"train": [], "validation": []}
    for index, piece in enumerate(as_pieces([text])):
        splits["validation" if is_validation(index, fraction) else "train"].append(piece.text)
    return {name: b"".join(parts) for name, parts in splits.items()}


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_text_comes_back_split_by_the_rule(tmp_path, bpe, kind):
    tokenizer = bpe if kind == "bpe" else ByteTokenizer()
    dataset = write_dataset([TEXT], tokenizer, tmp_path, validation_fraction=0.1)
    assert dataset.tokenizer.fingerprint == tokenizer.fingerprint
    for name, text in expected_splits(TEXT, 0.1).items():
        tokens = getattr(dataset, name)
        assert dataset.tokenizer.decode_bytes(tokens[:]) == text
        # What bits per byte rest on: the header's count, and the count over tokens.
        assert tokens.text_bytes == len(text) == count_bytes(tokens[:], dataset.tokenizer)
        assert tokens.bytes_per_token == len(text) / len(tokens)


def test_a_separator_follows_each_document(tmp_path):
    documents = ["first", b"second", "", "third"]
    dataset = write_dataset(documents, ByteTokenizer(), tmp_path, validation_fraction=0.0)
    assert dataset.train[:].tobytes() == b"first\0second\0third\0"
    assert len(dataset.validation) == 0


def test_shards_do_not_show_in_the_tokens(tmp_path, dataset):
    files = sorted(path.name for path in dataset.path.glob("*.tokens"))
    assert files[:2] == ["train-00000.tokens", "train-00001.tokens"]
    one = write_dataset([TEXT], ByteTokenizer(), tmp_path / "one", validation_fraction=0.1)
    assert len(one.train.parts) == 1 < len(dataset.train.parts)
    np.testing.assert_array_equal(dataset.train[:], one.train[:])  # exact
    assert dataset.train.text_bytes == one.train.text_bytes


def test_preparing_twice_gives_the_same_files(tmp_path, dataset):
    again = write_dataset(
        [TEXT], ByteTokenizer(), tmp_path / "e", validation_fraction=0.1, shard_tokens=200_000
    )
    assert again.fingerprint == dataset.fingerprint
    for path in dataset.path.iterdir():
        assert (again.path / path.name).read_bytes() == path.read_bytes()


def test_a_dataset_in_memory_has_the_same_tokens(dataset, bpe):
    memory = dataset_from_text(TEXT, ByteTokenizer(), validation_fraction=0.1)
    for name in ("train", "validation"):
        np.testing.assert_array_equal(getattr(memory, name)[:], getattr(dataset, name)[:])
        assert getattr(memory, name).text_bytes == getattr(dataset, name).text_bytes
    assert memory.fingerprint != dataset_from_text(TEXT, bpe).fingerprint
    with pytest.raises(ValueError, match="got an empty one"):
        dataset_from_text("", bpe)


@given(
    sizes=st.lists(st.integers(0, 7), max_size=5),
    start=st.integers(-20, 20) | st.none(),
    stop=st.integers(-20, 20) | st.none(),
)
def test_a_token_array_slices_like_an_array(sizes, start, stop):
    whole = np.arange(sum(sizes), dtype=np.uint16)
    array = TokenArray(np.split(whole, np.cumsum(sizes)[:-1]) if sizes else [], text_bytes=0)
    assert len(array) == len(whole)
    np.testing.assert_array_equal(array[start:stop], whole[start:stop])
    assert [array[i] for i in range(-len(whole), len(whole))] == [*whole, *whole]
    with pytest.raises(IndexError):
        array[len(whole)]


def test_a_slice_in_steps_is_refused(dataset):
    with pytest.raises(ValueError, match="must have step 1, got 2"):
        dataset.train[::2]


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def damage_append(path):
    path.write_bytes(path.read_bytes() + b"more")


def damage_header(path):
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(bytes(data))


def damage_foreign(path):
    path.write_bytes(b"PK\x03\x04" + bytes(10_000))


def damage_empty(path):
    path.write_bytes(b"")


def damage_delete(path):
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "it is cut off"),
        (damage_append, "it is too long"),
        (damage_header, "damaged header"),
        (damage_foreign, "is no token shard"),
        (damage_empty, "is no token shard"),
        (damage_delete, "is missing"),
    ],
)
def test_a_damaged_shard_is_refused_at_opening(dataset, damage, message):
    damage(dataset.path / "train-00001.tokens")
    with pytest.raises(ValueError, match=message):
        open_dataset(dataset.path)


def test_changed_tokens_are_found_by_verify(dataset):
    open_dataset(dataset.path, verify=True)
    path = dataset.path / "validation-00000.tokens"
    data = bytearray(path.read_bytes())
    data[shards.HEADER_BYTES + 1000] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"checksum is .* instead of"):
        open_dataset(dataset.path, verify=True)


def test_a_shard_cut_off_while_it_is_read_is_an_error_that_names_it(dataset):
    batches = make_batches(dataset.train, batch_size=8, seq_len=64, seed=0)
    next(batches)
    path = dataset.path / "train-00001.tokens"
    os.truncate(path, shards.HEADER_BYTES + 1000)
    first = len(dataset.train.parts[0])
    # What is left can be read, and what is gone is no signal of the kernel.
    assert len(dataset.train[first : first + 1000]) == 1000
    with pytest.raises(OSError, match=r"train-00001.tokens must hold .*Copy or prepare"):
        dataset.train[first : first + 1001]
    with pytest.raises(OSError, match="it was cut off while it was in use"):
        next(batch for batch in batches if len(batch.inputs) == 0)  # reads on to the end


@pytest.mark.parametrize("how", ["deleted", "prepared anew"])
def test_a_dataset_that_goes_while_it_is_read_stays_with_its_reader(dataset, how):
    before = dataset.train[:]
    if how == "deleted":
        shutil.rmtree(dataset.path)
    else:
        write_dataset(["new"], ByteTokenizer(), dataset.path, overwrite=True)
    np.testing.assert_array_equal(dataset.train[:], before)  # exact


def test_a_disk_that_takes_no_more_is_told_and_preparing_can_be_repeated(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write: .*make room and prepare .*train-00000"):
            write_dataset([TEXT], ByteTokenizer(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(ValueError, match="preparation was interrupted"):
        open_dataset(tmp_path)
    write_dataset([TEXT], ByteTokenizer(), tmp_path)
    open_dataset(tmp_path, verify=True)


def rewrite(path, **changes):
    """Gives a shard a valid header that says something else."""
    header = dataclasses.asdict(shards.read_header(path)) | changes
    tokens = path.read_bytes()[shards.HEADER_BYTES :]
    for name in ("version", "count", "text_bytes", "checksum"):
        del header[name]
    writer = shards.ShardWriter(path, **header)
    writer.append(np.frombuffer(tokens, header["dtype"]), 1)
    return writer.close()


def test_verify_finds_tokens_outside_the_vocabulary(dataset):
    header = rewrite(dataset.path / "train-00000.tokens", vocab_size=100)
    with pytest.raises(ValueError, match="must be below vocab_size=100"):
        shards.verify_shard(dataset.path / "train-00000.tokens", header)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "0" * 16}, "fingerprint '0000000000000000' instead of"),
        ({"dtype": "uint16"}, "dtype 'uint16' instead of 'uint8'"),
        ({"index": 7}, "index 7 instead of 1"),
        ({"split": "validation"}, "split 'validation' instead of 'train'"),
    ],
)
def test_shards_of_several_datasets_do_not_mix(dataset, changes, message):
    rewrite(dataset.path / "train-00001.tokens", **changes)
    with pytest.raises(ValueError, match=message):
        open_dataset(dataset.path)


def test_shards_in_each_others_place_are_refused(dataset):
    a, b = (dataset.path / f"train-0000{i}.tokens" for i in (0, 1))
    a.rename(dataset.path / "c")
    b.rename(a)
    (dataset.path / "c").rename(b)
    with pytest.raises(ValueError, match=r"is not the shard that dataset\.json names"):
        open_dataset(dataset.path)


def test_another_version_is_refused(dataset, monkeypatch):
    monkeypatch.setattr(shards, "VERSION", 2)
    with pytest.raises(ValueError, match="version 1, this program reads 2"):
        open_dataset(dataset.path)
    with pytest.raises(ValueError, match="version 1, this program reads 2"):
        shards.read_header(dataset.path / "train-00000.tokens")


def test_another_tokenizer_is_refused(tmp_path, bpe):
    write_dataset([TEXT[:50_000]], bpe, tmp_path)
    other = train_bpe([TEXT[:100_000]], 500)
    (tmp_path / "tokenizer.json").write_text(other.to_json(), "utf-8")
    with pytest.raises(ValueError, match="the tokens were made with"):
        open_dataset(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        open_dataset(tmp_path)


def test_what_is_no_dataset_is_refused(tmp_path, dataset):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no dataset\.json: no dataset"):
        open_dataset(tmp_path)
    (dataset.path / MANIFEST).write_text('{"version"')
    with pytest.raises(ValueError, match="is no manifest"):
        open_dataset(dataset.path)


def interrupted():
    yield from [TEXT] * 30
    raise KeyboardInterrupt


def test_an_interrupted_preparation_is_refused_and_can_be_repeated(tmp_path):
    (tmp_path / "notes.txt").write_text("not ours")
    args = {"validation_fraction": 0.1, "shard_tokens": 2_000_000}
    with pytest.raises(KeyboardInterrupt):
        write_dataset(interrupted(), ByteTokenizer(), tmp_path, **args)
    assert list(tmp_path.glob("*.tokens"))  # whole shards ...
    assert list(tmp_path.glob("*.partial"))  # ... and half ones
    with pytest.raises(ValueError, match="preparation was interrupted after"):
        open_dataset(tmp_path)
    write_dataset([TEXT], ByteTokenizer(), tmp_path, **args)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"dataset.json", "notes.txt", "train-00000.tokens", "validation-00000.tokens"}


def test_a_finished_dataset_is_replaced_only_on_demand(dataset):
    with pytest.raises(ValueError, match="holds a finished dataset"):
        write_dataset(["new"], ByteTokenizer(), dataset.path)
    with pytest.raises(ValueError, match=r"must lie in \[0, 0\.5\]"):
        write_dataset(["n"], ByteTokenizer(), dataset.path, overwrite=True, validation_fraction=2.0)
    with pytest.raises(ValueError, match=r"an iterable of texts, got one .*; pass \[text\]"):
        write_dataset("a text", ByteTokenizer(), dataset.path, overwrite=True)
    assert open_dataset(dataset.path, verify=True).fingerprint == dataset.fingerprint
    new = write_dataset(["new"], ByteTokenizer(), dataset.path, overwrite=True)
    assert new.train[:].tobytes() == b"new\0"
    with pytest.raises(ValueError, match="at least one document"):
        write_dataset([], ByteTokenizer(), dataset.path, overwrite=True)


def test_check_says_what_does_not_fit(dataset):
    fits = {"vocab_size": 256, "seq_len": 512, "batch_size": 8}
    dataset.check(**fits)
    dataset.check(**fits | {"vocab_size": 300})
    with pytest.raises(ValueError, match=r"'bytes' in .*, 256, got 255"):
        dataset.check(**fits | {"vocab_size": 255})
    # Exact: the split that holds batch_size * seq_len + 1 tokens fits, one row more does not.
    rows = (len(dataset.validation) - 1) // 512
    dataset.check(**fits | {"batch_size": rows})
    with pytest.raises(ValueError, match="larger validation_fraction"):
        dataset.check(**fits | {"batch_size": rows + 1})
    dataset.check(**fits | {"batch_size": rows + 1}, needs_validation=False)


def test_the_manifest_names_all_shards(dataset):
    manifest = json.loads((dataset.path / MANIFEST).read_text())
    names = {f"{shard['split']}-{shard['index']:05d}.tokens" for shard in manifest["shards"]}
    assert names == {path.name for path in dataset.path.glob("*.tokens")}


def test_memory_is_bounded_for_a_stream_larger_than_the_bound(tmp_path):
    line = b"All visible objects, man, are but as pasteboard masks.\n" * 600  # 33 kB

    def stream():
        for _ in range(2600):
            yield bytes(bytearray(line))  # a new object each time

    tracemalloc.start()
    dataset = write_dataset(stream(), ByteTokenizer(), tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    total = dataset.train.text_bytes + dataset.validation.text_bytes
    assert total == 2600 * len(line)  # 86 MB
    # Bound: at most three groups of 8 MiB (read, tokenized, written), each with its tokens of the
    # same size, and 2 MiB for the rest.
    assert peak < 3 * 2 * 2**23 + 2**21

"""Batches of token windows: a pure function of (tokens, seed, step), read ahead by threads.

Window `i` holds the tokens `[i * seq_len, (i + 1) * seq_len]`, both ends included: `seq_len` inputs
and, one further, `seq_len` targets, so that each token but the first is a target once an epoch. An
epoch is a permutation of all windows drawn from the seed and the epoch's number; epochs follow each
other without a gap, also inside a batch. The permutation is computed, not stored: any step costs
the same, and a resumed run needs no state but its step.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int32, Integer

from lowbit_jax.data.tokens import TokenArray


class Batch(NamedTuple):
    """Model input and what it shall predict: `targets[:, i]` follows `inputs[:, i]`."""

    inputs: Int32[np.ndarray, "b t"]
    targets: Int32[np.ndarray, "b t"]


class _Windows:
    """The windows as a random-access source for grain."""

    def __init__(self, tokens: TokenArray, seq_len: int):
        self._tokens, self._seq_len = tokens, seq_len

    def __len__(self) -> int:
        return max(len(self._tokens) - 1, 0) // self._seq_len

    def __getitem__(self, index: int) -> Integer[np.ndarray, " t_plus_1"]:
        start = int(index) * self._seq_len
        return self._tokens[start : start + self._seq_len + 1]


def make_batches(
    tokens: TokenArray,
    *,
    batch_size: int,
    seq_len: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """An endless iterator over training batches from `start_step` on.

    Args:
      tokens: One split of a dataset.
      batch_size: Rows of the global batch. A process gets rows
        `[process_index, process_index + 1) * batch_size / process_count` of it, so that the
        global batch does not depend on the number of processes.
      seq_len: Tokens a row.
      seed: Any integer from 0 on.
      start_step: First step; `k` gives what the `k`-th `next` of a fresh iterator gives.
      process_index: `jax.process_index()`.
      process_count: `jax.process_count()`.

    Returns:
      Batches of `(batch_size / process_count, seq_len)`. A few are made ahead in threads; `close()`
      stops these, and so does the end of the program.

    Raises:
      ValueError: If there is no whole window, or the batch does not divide among the processes.
    """
    batches = _batches(tokens, batch_size, seq_len, seed, process_index, process_count)
    if start_step < 0:
        raise ValueError(f"make_batches: start_step must be 0 or more, got {start_step}.")
    # Two threads make 8M to 11M tokens/s of 64 x 512 (from files, two cores in use by others),
    # ten times what a 30M model trains on one GPU; more would only wait for Python's lock.
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(batches[start_step:].to_iter_dataset(options))


def batch_at(
    tokens: TokenArray,
    step: int,
    *,
    batch_size: int,
    seq_len: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batch:
    """The batch that `make_batches` gives at `step`, alone; arguments and errors as there."""
    batches = _batches(tokens, batch_size, seq_len, seed, process_index, process_count)
    batch = batches[step]
    assert batch is not None  # grain's datasets may be sparse, this one is not
    return batch


def validation_batches(
    tokens: TokenArray,
    *,
    batch_size: int,
    seq_len: int,
    max_batches: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Whole batches of windows that do not overlap, the same at every call, in their order.

    Windows that do not fill a last batch are left out, as are tokens that do not fill a window: a
    mean over the batches is a mean over equally many tokens each. With `max_batches`, the windows
    that are used lie evenly over the whole split: its beginning alone would be one subject.

    Args:
      tokens: One split of a dataset.
      batch_size: Rows of the global batch, divided among processes as in `make_batches`.
      seq_len: Tokens a row.
      max_batches: At most so many; None: all.
      process_index: `jax.process_index()`.
      process_count: `jax.process_count()`.

    Raises:
      ValueError: If there is not one whole batch, or it does not divide among the processes.
    """
    windows = _Windows(tokens, seq_len)
    rows = _rows_of_process(windows, batch_size, process_index, process_count)
    count = whole = len(windows) // batch_size
    if max_batches is not None:
        count = min(count, max_batches)
    if count < 1:
        raise ValueError(
            f"validation_batches: needs batch_size * seq_len + 1 = {batch_size * seq_len + 1}"
            f" tokens and max_batches of at least 1, got {len(tokens)} tokens and"
            f" max_batches={max_batches}; use a smaller batch or more text."
        )
    used = count * batch_size
    span = used if count == whole else len(windows)

    def batches() -> Iterator[Batch]:
        for first in range(0, used, batch_size):
            chosen = [(first + row) * span // used for row in rows]  # span == used: each in turn
            yield _to_batch([windows[i] for i in chosen])

    return batches()


def _batches(
    tokens: TokenArray,
    batch_size: int,
    seq_len: int,
    seed: int,
    process_index: int,
    process_count: int,
) -> "grain.MapDataset[Batch]":
    """Batch `step` of this process at index `step`, endless."""
    windows = _Windows(tokens, seq_len)
    rows = _rows_of_process(windows, batch_size, process_index, process_count)
    # grain's epoch e shuffles with seed + e: spread the seeds, lest seed 1 be seed 0 an epoch on.
    # Given outright, for grain does not promise to keep the ones it derives.
    shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    dataset = grain.MapDataset.source(windows).shuffle(seed=shuffle_seed).repeat()
    dataset = dataset.batch(len(rows), drop_remainder=True, batch_fn=_to_batch)
    return dataset[process_index::process_count]


def _rows_of_process(
    windows: _Windows, batch_size: int, process_index: int, process_count: int
) -> range:
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"make_batches: process_index must lie in [0, process_count), got {process_index} of"
            f" {process_count}."
        )
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"make_batches: batch_size must be a positive multiple of process_count, got"
            f" {batch_size} rows for {process_count} processes; change the batch size."
        )
    if len(windows) < 1:
        raise ValueError(
            f"make_batches: needs at least seq_len + 1 = {windows._seq_len + 1} tokens, got"
            f" {len(windows._tokens)}; use a shorter seq_len or more text."
        )
    rows = batch_size // process_count
    return range(process_index * rows, (process_index + 1) * rows)


def _to_batch(windows: Sequence[np.ndarray]) -> Batch:
    tokens = np.stack(windows).astype(np.int32)
    # Contiguous, as the transfer to a device wants them.
    return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy())

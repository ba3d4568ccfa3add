"""Batches on the devices: each process reads the rows that its own devices get."""

from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import NamedSharding

from lowbit_jax.data.pipeline import make_batches, validation_batches
from lowbit_jax.train.config import Config, UsageError


def train_batches(config: Config, start: int, place: NamedSharding | None) -> Iterator[Any]:
    """Training batches from step `start` on, `(inputs, targets)` on the devices.

    Together the processes read the batches that one process reads.

    Args:
      config: Of the run.
      start: First step.
      place: Of inputs and targets; None: the one device.

    Raises:
      UsageError: See `part_of_process`.
    """
    index, count = part_of_process(place, config.batch_size)
    batches = make_batches(
        config.data.train,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        seed=config.seed,
        start_step=start,
        process_index=index,
        process_count=count,
    )
    return (_on_devices(batch, place, config) for batch in batches)


def held_out_batches(
    config: Config, max_batches: int | None, place: NamedSharding | None
) -> Iterator[Any]:
    """Validation batches likewise; at most `max_batches`, None: all."""
    index, count = part_of_process(place, config.batch_size)
    batches = validation_batches(
        config.data.validation,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        max_batches=max_batches,
        process_index=index,
        process_count=count,
    )
    return (_on_devices(batch, place, config) for batch in batches)


def part_of_process(place: NamedSharding | None, batch_size: int) -> tuple[int, int]:
    """`(i, n)`: the devices of this process get the i-th of n equal parts of a batch.

    Processes whose devices share sequences, as along `tensor`, get the same part.

    Args:
      place: Of an array `(batch_size, ...)`; None: one device.
      batch_size: Sequences of all processes.

    Raises:
      UsageError: If what they get is no such part.
    """
    if place is None or place.is_fully_addressable:
        return 0, 1
    pieces = place.addressable_devices_indices_map((batch_size,)).values()
    bounds = sorted({index[0].indices(batch_size)[:2] for index in pieces if index is not None})
    start, stop = bounds[0][0], bounds[-1][1]
    rows = stop - start
    if sum(b - a for a, b in bounds) != rows or start % rows or batch_size % rows:
        raise UsageError(
            f"train: the devices of a process must get one part of the batch, got rows {bounds} of"
            f" {batch_size} on a mesh of {dict(place.mesh.shape)}; choose a mesh whose last sizes"
            " divide the devices of a process, or the other way round."
        )
    return start // rows, batch_size // rows


def _on_devices(batch: Any, place: NamedSharding | None, config: Config) -> Any:
    if place is None or place.is_fully_addressable:
        return jax.device_put(tuple(batch), place)
    shape = (config.batch_size, config.seq_len)
    return tuple(jax.make_array_from_process_local_data(place, rows, shape) for rows in batch)

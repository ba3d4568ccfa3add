"""One training step as a row of the table of memory: predicted, compiled, run.

Each row has a process of its own, for the peak that a device counts cannot be set back: several may
trace their programs, but one alone compiles and runs, with nothing beside it.
"""

import dataclasses
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from lowbit_jax.analysis.speed_of_light import run_speed_of_light
from lowbit_jax.bench.memory_case import Case, MemoryRow, case_config, plan_case
from lowbit_jax.models import flops_by_part
from lowbit_jax.ops import explain
from lowbit_jax.train.memory_plan import show_bytes
from lowbit_jax.train.phase import Phase
from lowbit_jax.train.placement import open_mesh
from lowbit_jax.train.planning import program_memory
from lowbit_jax.train.start import place_run, state_shapes
from lowbit_jax.train.state import leaf_paths

MARK = "memory-row "  # before the words that a parent process reads
TRACED = "traced"  # one of them


def measure(
    cases: Sequence[Case],
    *,
    wait: Callable[[], None] = lambda: None,
    fits_device: int | None = None,
    fits_host: int | None = None,
) -> list[MemoryRow]:
    """Compiles and runs the first case that should fit; what goes wrong is in its row.

    Args:
      cases: In the order of preference.
      wait: Called when the program is traced; it may compile and run once that returns.
      fits_device: Bytes that a plan may take; None: as many as it wants.
      fits_host: Likewise, of the host's memory.

    Returns:
      A row for each case up to the one that ran; those before it were skipped.
    """
    kind = jax.devices()[0].device_kind
    rows = []
    for case in cases:
        row = MemoryRow(case, "failed", "", kind, jax.__version__)
        try:
            plan = plan_case(case)
            host_bytes = sum(plan.host_bytes.values())
            row = dataclasses.replace(
                row,
                predicted_bytes=plan.total,
                predicted_part=plan.peak,
                predicted_host_bytes=host_bytes,
            )
            for size, most, of in (
                (plan.total, fits_device, "the device"), (host_bytes, fits_host, "the host")
            ):  # fmt: skip
                if most is not None and size > most and not row.note:
                    note = f"needs {show_bytes(size)} of {of}, may take {show_bytes(most)}"
                    row = dataclasses.replace(row, status="skipped", note=note)
            if not row.note:
                row = _run(row, wait)
        except Exception as error:  # out of memory, above all: the other rows are wanted
            note = f"{type(error).__name__}: {str(error)[:300]}"
            row = dataclasses.replace(row, status="failed", note=note)
        rows.append(row)
        if row.status != "skipped":
            break
    return rows


def _run(row: MemoryRow, wait: Callable[[], None]) -> MemoryRow:
    config, options = case_config(row.case)
    mesh = open_mesh(config, options)
    placement = None if mesh is None else place_run(config, mesh, options.zero, options.offload)
    phase = Phase(config, 0, config.model, placement)
    target = state_shapes(config, placement)
    single: Any = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batch_place = single if placement is None else placement.batch
    shape = (config.batch_size, config.seq_len)
    tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_place)
    traced = phase.train_step.trace(target, (tokens, tokens))
    flops = flops_by_part(config.model.config, config.seq_len)
    light = run_speed_of_light(flops, row.device, explain(traced))
    lowered = traced.lower()
    wait()
    start = time.perf_counter()
    # On a CPU only to see whether it works: quickly, then.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    compiled = lowered.compile(quick)
    row = dataclasses.replace(row, compile_time_s=time.perf_counter() - start)
    used = program_memory(compiled)
    row = dataclasses.replace(
        row,
        state_bytes=used.state_bytes,
        temporary_bytes=used.temporary_bytes,
        host_bytes=used.host_bytes,
    )
    state = _filled(target)
    ids = np.random.default_rng(0).integers(0, config.model.config.vocab_size, shape, np.int32)
    batch = jax.device_put((ids, np.roll(ids, -1, axis=1)), batch_place)
    times_s = []
    for _ in range(row.case.steps + 1):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        loss = float(metrics.loss)
        times_s.append(time.perf_counter() - start)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
    stats = jax.devices()[0].memory_stats() or {}
    in_use = card_bytes("used")
    step_time_s = statistics.median(times_s[1:])
    rate = shape[0] * shape[1] / step_time_s
    return dataclasses.replace(
        row,
        status="measured",
        peak_bytes=stats.get("peak_bytes_in_use"),
        limit_bytes=stats.get("bytes_limit"),
        card_bytes=in_use,
        step_time_s=step_time_s,
        tokens_per_s=rate,
        share_of_light=None if light is None else light.share(rate),
        mfu=None if light is None else light.mfu(rate),
    )


def _filled(target: PyTree) -> PyTree:
    """Weights of the usual size and zeros elsewhere, each sent where it belongs by itself.

    Drawn from a million numbers, over and over: for speed and bytes that does.
    """
    tile = (0.02 * np.random.default_rng(0).standard_normal(2**20)).astype(np.float32)

    def value(path: str, leaf: Any) -> Any:
        if path.startswith("params/") and path.endswith("/weight"):
            return np.resize(tile.astype(leaf.dtype), leaf.shape)
        is_scale = path.startswith("params/") and path.endswith("/scale")
        return np.ones(leaf.shape, leaf.dtype) if is_scale else np.zeros(leaf.shape, leaf.dtype)

    def send(path: str, leaf: Any) -> Any:  # one at a time: the host holds each twice meanwhile
        return jax.block_until_ready(jax.device_put(value(path, leaf), leaf.sharding))

    sent = [send(path, leaf) for path, leaf in leaf_paths(target)]
    return jax.tree.unflatten(jax.tree.structure(target), sent)


def _wait_for_parent() -> None:
    """Tells a parent process that the program is traced, and waits for a line from it."""
    print(f"{MARK}{TRACED}", flush=True)
    sys.stdin.readline()


def card_bytes(what: str) -> int | None:
    """Memory of the first card by nvidia-smi, "used" or "total"; None without it."""
    command = ["nvidia-smi", f"--query-gpu=memory.{what}", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return int(found.stdout.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def main(arguments: Sequence[str]) -> int:
    """A child process: cases and limits as JSON; prints the rows."""
    request = json.loads(arguments[0])
    cases = [Case(**fields) for fields in request.pop("cases")]
    rows = measure(cases, wait=_wait_for_parent, **request)
    print(f"{MARK}{json.dumps([dataclasses.asdict(row) for row in rows])}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

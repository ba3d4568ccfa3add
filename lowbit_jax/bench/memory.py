"""`python scripts/bench_memory.py`: memory of a training step, predicted, compiled and measured."""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from lowbit_jax.bench.memory_case import Case, MemoryRow, row_of
from lowbit_jax.bench.memory_report import FILE, load, markdown, save
from lowbit_jax.bench.memory_row import MARK, TRACED, card_bytes, measure
from lowbit_jax.train.memory_plan import show_bytes
from lowbit_jax.train.planning import HEADROOM, host_memory_bytes

_MODULE = "lowbit_jax.bench.memory_row"
_GIB = 2**30
# Of a card's memory, what CUDA's context, kernels and libraries take beside the allocator's.
_CONTEXT_BYTES = _GIB
_EVERYTHING = "moments+gradients+weights+residuals"


def table_cases(size: str, batch_size: int, seq_len: int, steps: int) -> list[Case]:
    """One flag at a time against none at all, what matters most first."""
    base = Case("none", size, batch_size=batch_size, seq_len=seq_len, steps=steps)
    flag = dataclasses.replace(base, baseline="none")
    recomputed = ("block", "swiglu", "ffn", "norm", "att", "qkv")
    offloaded = ("moments", "residuals", "gradients", "weights")
    rows = {name: dataclasses.replace(flag, recompute=name) for name in recomputed}
    rows |= {name: dataclasses.replace(flag, offload=name) for name in offloaded}
    rows["block, all"] = dataclasses.replace(flag, recompute="block", offload=_EVERYTHING)
    order = ("block", "moments", "swiglu", "residuals", "ffn", "gradients", "weights", "block, all",
             "norm", "att", "qkv")  # fmt: skip
    return [base, *(dataclasses.replace(rows[name], name=name) for name in order)]


def capped_cases(
    size: str, recipe: str, batch_sizes: Sequence[int], seq_len: int, steps: int
) -> list[Case]:
    """Everything offloaded; the largest batch first."""
    return [
        Case(
            f"{size}, {recipe}, {b} x {seq_len}", size, recipe=recipe, recompute="block",
            offload=_EVERYTHING, batch_size=b, seq_len=seq_len, steps=steps,
        )
        for b in batch_sizes
    ]  # fmt: skip


def largest_cases(
    sizes: Sequence[str], recipe: str, batch_size: int, seq_len: int, steps: int
) -> list[Case]:
    """The largest size first, of each size the way that offloads least."""
    ways = ("moments", "moments+gradients", "moments+gradients+weights", _EVERYTHING)
    return [
        Case(
            f"{size}, {recipe}, offload {way}", size, recipe=recipe, recompute="block",
            offload=way, batch_size=batch_size, seq_len=seq_len, steps=steps,
        )
        for size in sizes
        for way in ways
    ]  # fmt: skip


def main(
    only: Literal["1.5b", "7b", "largest"] = "1.5b",
    tiny: bool = False,
    out: pathlib.Path | None = None,
    rows: tuple[str, ...] = (),
    recipes: tuple[str, ...] = ("bf16", "fp8_tensorwise"),
    batch_size: int | None = None,
    seq_len: int | None = None,
    steps: int | None = None,
    memory_gib: float = 16,
    budget_s: float = 600,
) -> int:
    """Measures what recomputation and offloading free, and how large a model trains on one device.

    bfloat16 weights and moments, random tokens, a process for each row. "peak" is the most that
    the device's allocator had given out, "compiler" what XLA's memory analysis says. Freed bytes
    are against the row without flags; the last columns compare them with the prediction.

    Args:
      only: 1.5b: each flag by itself, at the shape of Qwen2.5-1.5B, as much memory as there is.
        7b: Qwen2.5-7B with everything offloaded, in --memory-gib, which the process cannot exceed.
        largest: the largest of Qwen2.5-32B, 14B and 7B whose plan fits the device and its host.
      tiny: A small model in this process, to see whether everything works.
      out: Folder of memory.json and memory.md; rows of other runs in it stay.
      rows: Of 1.5b: only these; none: all.
      recipes: Of 7b and largest.
      batch_size: Sequences; None: 4, of 7b the largest that fits.
      seq_len: Tokens of each; None: 2048.
      steps: Measured, after one to warm up; the median counts. None: 10, of larger models 5.
      memory_gib: Of the card for 7b, CUDA's context included, for which 1 GiB is set aside.
      budget_s: No row is started after this many seconds.
    """
    size = {"1.5b": "qwen2.5-1.5b", "7b": "qwen2.5-7b", "largest": ""}[only]
    seq_len = (32 if tiny else 2048) if seq_len is None else seq_len
    steps = (2 if tiny else 10 if only == "1.5b" else 5) if steps is None else steps
    least = min(steps, seq_len, 1 if batch_size is None else batch_size)
    if least < 1 or not memory_gib > _CONTEXT_BYTES / _GIB:
        print("error: --steps, --seq-len and --batch-size must be at least 1, --memory-gib more"
              " than the 1 that is set aside.", file=sys.stderr)  # fmt: skip
        return 2
    host_bytes = int(0.9 * host_memory_bytes())
    environment = {"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": str(host_bytes // 10**9)}
    limits: dict[str, Any] = {}
    total = card_bytes("total")
    if total is not None:
        environment["JAX_PLATFORMS"] = "cuda,cpu"  # rather an error than a large model on the CPU
    if only == "1.5b":
        cases = table_cases("tiny" if tiny else size, batch_size or 4, seq_len, steps)
        if unknown := set(rows) - {case.name for case in cases}:
            names = ", ".join(repr(case.name) for case in cases)
            print(f"error: --rows may be {names}, got {unknown.pop()!r}.", file=sys.stderr)
            return 2
        groups = [[case] for case in cases if not rows or case.name in rows]
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    else:
        usable = (total or 0) - _CONTEXT_BYTES
        if only == "7b":
            usable = int(memory_gib * _GIB) - _CONTEXT_BYTES
            batches = (32, 16, 8, 4, 2, 1) if batch_size is None else (batch_size,)
            groups = [
                capped_cases("tiny" if tiny else size, recipe, batches, seq_len, steps)
                for recipe in recipes
            ]
        else:
            sizes = ("tiny",) if tiny else tuple(f"qwen2.5-{n}b" for n in (32, 14, 7))
            groups = [
                largest_cases(sizes, recipe, batch_size or 4, seq_len, steps) for recipe in recipes
            ]
        if total is not None:
            environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"
            environment["XLA_CLIENT_MEM_FRACTION"] = f"{usable / total:.4f}"
        if total is not None or only == "7b":
            limits = {"fits_device": int((1 - HEADROOM) * usable)}
        limits["fits_host"] = host_bytes
    found: list[MemoryRow] = []
    start = time.perf_counter()
    measured = (
        (row for group in groups for row in measure(group, **limits))
        if tiny
        else _measure_apart(groups, limits, environment, budget_s, together=only == "1.5b")
    )
    for row in measured:
        found.append(row)
        print(f"[{time.perf_counter() - start:5.0f} s] {_line(row)}", flush=True)
        if out is not None:
            save(out, only, found)
    print(f"\n{markdown(found)}")
    if out is not None:
        (out / "memory.md").write_text(markdown(load(out)))
        print(f"wrote {out}: {FILE}, memory.md")
    return int(any(row.status == "failed" for row in found))


def _measure_apart(
    groups: Sequence[list[Case]],
    limits: dict[str, Any],
    environment: dict[str, str],
    budget_s: float,
    *,
    together: bool,
) -> Iterator[MemoryRow]:
    """A process for each group, again if its case fails; all trace before one runs, or each alone.

    Args:
      groups: Of each the first case that fits is measured; of one case, if `together`.
      limits: See `memory_row.measure`.
      environment: Of the processes.
      budget_s: No process runs its step after this.
      together: Whether all may hold the device while they trace.
    """
    start = time.perf_counter()
    waiting = [
        (cases, _Child(cases, limits, environment) if together else None) for cases in groups
    ]
    try:
        for _, child in waiting:
            if child is not None:
                child.traced.wait()
        while waiting and time.perf_counter() - start < budget_s:
            cases, child = waiting.pop(0)
            rows = (child or _Child(cases, limits, environment)).rows()
            yield from rows
            rest = cases[len(rows) :]
            if rows[-1].status == "failed" and rest:
                waiting.insert(0, (rest, None))
        for cases, _ in waiting:
            yield MemoryRow(cases[0], "skipped", f"the {budget_s:g} s were over")
    finally:
        for _, child in waiting:
            if child is not None:
                child.stop()


class _Child:
    """A process that measures the first of `cases` that fits, once told to.

    Attributes:
      traced: Set when its program is traced, or there will be none.
    """

    def __init__(self, cases: list[Case], limits: dict[str, Any], environment: dict[str, str]):
        self.traced = threading.Event()
        self._case = cases[0]
        request = {"cases": [dataclasses.asdict(case) for case in cases], **limits}
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, json.dumps(request)],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer: str | None = None
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def rows(self) -> list[MemoryRow]:
        """Lets it compile and run, and waits for what comes of it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.write("run\n")
            self._process.stdin.close()
        code = self._process.wait()
        self._reader.join()
        if self._answer is None:
            note = f"its process ended with exit status {code}"
            return [MemoryRow(self._case, "failed", note)]
        return [row_of(record) for record in json.loads(self._answer)]

    def stop(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(f"{MARK}{TRACED}"):
                self.traced.set()
            elif line.startswith(MARK):
                self._answer = line.removeprefix(MARK)
        self.traced.set()


def _line(row: MemoryRow) -> str:
    if row.tokens_per_s is None:
        return f"{row.case.name}: {row.status}: {row.note}"
    sizes = {"predicted": row.predicted_bytes, "compiler": row.compiled_bytes,
             "peak": row.peak_bytes}  # fmt: skip
    shown = (f"{name} {show_bytes(size)}" for name, size in sizes.items() if size is not None)
    return f"{row.case.name}: {', '.join(shown)}, {row.tokens_per_s:,.0f} tokens/s"

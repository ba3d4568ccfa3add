"""Rows of memory as a file and a table."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from lowbit_jax.bench.memory_case import Case, MemoryRow, row_of
from lowbit_jax.files import write_atomically
from lowbit_jax.train.memory_plan import show_bytes

FILE = "memory.json"
_HEADER = (
    "row", "predicted", "compiler", "peak", "host", "freed: predicted", "compiler", "peak",
    "prediction off by", "tokens/s", "of light", "MFU", "note",
)  # fmt: skip


def save(folder: pathlib.Path, group: str, rows: Sequence[MemoryRow]) -> None:
    """Puts the rows in place of those of their group in the file, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    groups = _groups(folder) | {group: [dataclasses.asdict(row) for row in rows]}
    write_atomically(folder / FILE, json.dumps(groups, indent=1) + "\n")


def load(folder: pathlib.Path) -> list[MemoryRow]:
    """All rows of the file."""
    return [row_of(record) for records in _groups(folder).values() for record in records]


def freed(row: MemoryRow, rows: Sequence[MemoryRow]) -> dict[str, int | None]:
    """Bytes less than the baseline's, as predicted, compiled and measured; {} without one.

    To a CPU's compiler the host's memory is the device's, so that it sees nothing freed there.
    """
    base = next((other for other in rows if other.case.name == row.case.baseline), None)
    if base is None:
        return {}

    def less(name: str) -> int | None:
        before, after = getattr(base, name), getattr(row, name)
        return None if before is None or after is None else before - after

    names = {"predicted": "predicted_bytes", "compiler": "compiled_bytes", "peak": "peak_bytes"}
    found = {name: less(attribute) for name, attribute in names.items()}
    return found | {"compiler": None} if _is_host_alone(row) else found


def _is_host_alone(row: MemoryRow) -> bool:
    return row.device == "cpu" and row.case.offload != "none"


def markdown(rows: Sequence[MemoryRow]) -> str:
    """The table, with where it was measured."""
    lines = [f"| {' | '.join(_HEADER)} |", f"|{' --- |' * len(_HEADER)}"]
    lines += [f"| {' | '.join(_cells(row, rows))} |" for row in rows]
    origins = sorted({f"{row.device}, jax {row.jax_version}" for row in rows if row.device})
    shapes = sorted({_describe(row.case) for row in rows})
    return "\n".join(
        [
            *lines,
            "",
            f"Memory of the device, host: of its host. {'; '.join(origins)}. {'; '.join(shapes)}.",
            "",
        ]
    )


def _cells(row: MemoryRow, rows: Sequence[MemoryRow]) -> tuple[str, ...]:
    less = freed(row, rows)
    found, expected = less.get("peak"), less.get("predicted")
    found = less.get("compiler") if found is None else found
    # Of bytes that were freed; where a flag has taken some, there is no such share.
    error = f"{expected / found - 1:+.1%}" if found and expected and found > 0 else ""
    note = row.note
    if row.card_bytes is not None and row.limit_bytes is not None:
        cap = f"allocator capped at {_size(row.limit_bytes)}, card {_size(row.card_bytes)}"
        note = "; ".join(filter(None, (note, cap)))
    if _is_host_alone(row):
        note = "; ".join(filter(None, (note, "the compiler counts the host's memory as well")))
    host = row.host_bytes or row.predicted_host_bytes
    return (
        row.case.name,
        _size(row.predicted_bytes),
        _size(row.compiled_bytes),
        _size(row.peak_bytes),
        _size(host) if host else "",
        _size(less.get("predicted")),
        _size(less.get("compiler")),
        _size(less.get("peak")),
        error,
        "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
        "" if row.share_of_light is None else f"{row.share_of_light:.0%}",
        "" if row.mfu is None else f"{row.mfu:.0%}",
        note.replace("|", "/").replace("\n", " "),
    )


def _describe(case: Case) -> str:
    return (
        f"{case.size}: {case.batch_size} x {case.seq_len} tokens, {case.recipe}, {case.moments}"
        f" moments, median of {case.steps} steps"
    )


def _size(size: int | None) -> str:
    if size is None:
        return ""
    return f"-{show_bytes(-size)}" if size < 0 else show_bytes(size)


def _groups(folder: pathlib.Path) -> dict[str, list[dict]]:
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

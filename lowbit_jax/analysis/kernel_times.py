"""Where a GPU's time goes: kernel times of a trace, added up by the operation they serve."""

import collections
import dataclasses
import gzip
import json
import pathlib
import re


@dataclasses.dataclass(frozen=True)
class KernelTime:
    """Time that one group of kernels took on the device."""

    name: str  # the group: an operation of the program, or the kernel itself
    total_us: float
    launches: int


def operation_names(hlo_text: str) -> dict[str, str]:
    """Maps each HLO instruction to the JAX operation that it came from.

    Args:
      hlo_text: `jax.jit(f).lower(...).compile().as_text()`.

    Returns:
      Instruction name to `op_name` metadata, such as `jit(step)/transpose(jvp(Llama))/mlp/dot`.
    """
    pattern = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*?op_name="([^"]*)"', re.MULTILINE)
    return dict(pattern.findall(hlo_text))


def kernel_times(
    trace_dir: str | pathlib.Path, operations: dict[str, str] | None = None
) -> list[KernelTime]:
    """Adds up GPU kernel times of the newest trace under `trace_dir`, longest first.

    Args:
      trace_dir: What `jax.profiler.trace` was given.
      operations: Result of `operation_names`; with it, kernels are grouped by JAX operation.

    Returns:
      One row a group; empty when the trace holds no GPU stream, as on a CPU.

    Raises:
      ValueError: If there is no trace under `trace_dir`.
    """
    traces = sorted(pathlib.Path(trace_dir).rglob("*.trace.json.gz"))
    if not traces:
        raise ValueError(
            f"kernel_times: no *.trace.json.gz under {trace_dir};"
            " record one with `with jax.profiler.trace(trace_dir): ...`."
        )
    with gzip.open(traces[-1]) as file:
        events = json.load(file)["traceEvents"]
    streams = {
        (e["pid"], e["tid"])
        for e in events
        if e.get("name") == "thread_name" and e["args"]["name"].startswith("Stream #")
    }
    kernel_instructions = {name.replace(".", "_"): name for name in operations or ()}
    total_us: dict[str, float] = collections.defaultdict(float)
    launches: dict[str, int] = collections.Counter()
    for event in events:
        if event.get("ph") != "X" or (event["pid"], event["tid"]) not in streams:
            continue
        name = str(event["name"])
        if operations is not None:
            instruction = str(event.get("args", {}).get("hlo_op", name))
            if instruction not in operations:  # Inside a CUDA graph only the kernel's name is kept.
                instruction = kernel_instructions.get(name, instruction)
            name = operations.get(instruction, instruction)
        total_us[name] += event.get("dur", 0.0)
        launches[name] += 1
    rows = [KernelTime(name, total_us[name], launches[name]) for name in total_us]
    return sorted(rows, key=lambda row: -row.total_us)

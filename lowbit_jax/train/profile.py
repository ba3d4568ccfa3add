"""Where the time of a training step goes, kernel by kernel."""

import dataclasses
import pathlib
import statistics
import tempfile
import time

import flax.linen as nn
import jax
import numpy as np

from lowbit_jax.analysis.kernel_times import KernelTime, kernel_times, operation_names
from lowbit_jax.train.config import Config
from lowbit_jax.train.state import create_state
from lowbit_jax.train.step import loss_function, make_train_step, step_plan
from pallas_kernels.measurement import BF16, data_sheet


@dataclasses.dataclass(frozen=True)
class StepProfile:
    """One compiled training step, measured; `str()` is a table.

    Attributes:
      device: Its kind.
      tokens: Tokens a step.
      compile_time_s: Tracing and compiling.
      step_times_s: Of each measured step, queued back to back in groups of five.
      temporary_bytes: What the step needs beside parameters, optimizer state and batch.
      mfu: Model FLOP over time over the dense bfloat16 peak; None where the peak is not known.
      kernels: Time of one step by JAX operation, longest first; empty where the profiler sees none.
    """

    device: str
    tokens: int
    compile_time_s: float
    step_times_s: tuple[float, ...]
    temporary_bytes: int
    mfu: float | None
    kernels: tuple[KernelTime, ...]

    def __str__(self) -> str:
        times_ms = [1e3 * t for t in self.step_times_s]
        median_ms = statistics.median(times_ms)
        mfu = "" if self.mfu is None else f", MFU {self.mfu:.1%}"
        lines = [
            f"{self.device}: {self.tokens / median_ms:.1f} ktok/s{mfu}; a step of {self.tokens:,}"
            f" tokens takes {median_ms:.2f} ms ({min(times_ms):.2f} to {max(times_ms):.2f})",
            f"compiled in {self.compile_time_s:.0f} s, {self.temporary_bytes / 2**30:.2f} GiB of"
            " temporaries",
        ]
        if self.kernels:
            total_us = sum(row.total_us for row in self.kernels)
            lines.append(f"{total_us / 1e3:.2f} ms in kernels; ms a step, launches, operation:")
            lines += [
                f"{row.total_us / 1e3:9.3f} {row.launches:6d}  {row.name}" for row in self.kernels
            ]
        return "\n".join(lines)


def profile_step(config: Config, *, steps: int = 40, traced_steps: int = 2) -> StepProfile:
    """Times the training step of `config` on random tokens, then records its kernels.

    Args:
      config: Model, optimizer, batch; its data are not read.
      steps: How many are timed, a multiple of 5 is used.
      traced_steps: How many more run under the profiler.
    """
    batch_shape = (config.batch_size, config.seq_len + 1)
    vocab_size = config.model.config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab_size, batch_shape, dtype=np.int32)
    batch = jax.device_put((tokens[:, :-1], tokens[:, 1:]))
    start = time.perf_counter()
    params = jax.jit(config.model.init)(jax.random.key(0), batch[0][:1])["params"]
    state = create_state(nn.meta.unbox(params), config.optimizer, config.store)
    plan = step_plan(config, config.model)
    step = make_train_step(loss_function(config.model), config.optimizer, plan)
    compiled = step.lower(state, batch).compile()
    compile_time_s = time.perf_counter() - start

    def take(state, count):
        for _ in range(count):
            state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics.loss)
        return state

    state = take(state, 3)
    times_s = []
    for _ in range(max(steps // 5, 1)):
        start = time.perf_counter()
        state = take(state, 5)
        times_s.append((time.perf_counter() - start) / 5)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            take(state, traced_steps)
        rows = kernel_times(pathlib.Path(folder), operation_names(compiled.as_text()))
    sheet = data_sheet(jax.devices()[0].device_kind)
    count = config.batch_size * config.seq_len
    mfu = None
    if sheet is not None and config.flops_per_token:
        mfu = config.flops_per_token * count / statistics.median(times_s) / sheet.peak[BF16]
    return StepProfile(
        device=jax.devices()[0].device_kind,
        tokens=count,
        compile_time_s=compile_time_s,
        step_times_s=tuple(times_s),
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        mfu=mfu,
        kernels=tuple(
            KernelTime(row.name, row.total_us / traced_steps, row.launches // traced_steps)
            for row in rows
        ),
    )

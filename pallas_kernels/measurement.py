"""What was measured: a row of the table, beside what the device's data sheet allows."""

import dataclasses
from typing import Literal

# Units that multiply, by what they read: the keys of FLOPs and of peaks.
BF16, FP8 = "bf16", "fp8"
# A call shorter than this, most of whose time the host needs to queue it, is bound by launches.
_SHORT_CALL_S = 2e-3
_HOST_BOUND_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class DataSheet:
    """What the maker promises of a device, dense products.

    Attributes:
      peak: FLOP/s by unit, `"bf16"` always among them.
      bandwidth: Of its memory, bytes/s.
    """

    peak: dict[str, float]
    bandwidth: float


# NVIDIA's data sheets and white papers, by the name that JAX reports; four digits where they have
# them. float8 products accumulate in float32; an A100 has none. Names that merely begin or end like
# these are of other cards: H200 NVL, slices of an H100.
_DATA_SHEETS = {
    "NVIDIA H100 80GB HBM3": DataSheet({BF16: 989.4e12, FP8: 1978.9e12}, 3.35e12),
    "NVIDIA H100 PCIe": DataSheet({BF16: 756e12, FP8: 1513e12}, 2e12),
    "NVIDIA H100 NVL": DataSheet({BF16: 835.5e12, FP8: 1671e12}, 3.9e12),
    "NVIDIA H200": DataSheet({BF16: 989.4e12, FP8: 1978.9e12}, 4.8e12),
    "NVIDIA GH200 480GB": DataSheet({BF16: 989.4e12, FP8: 1978.9e12}, 4e12),
    "NVIDIA B200": DataSheet({BF16: 2250e12, FP8: 4500e12}, 8e12),
    "NVIDIA A100-SXM4-40GB": DataSheet({BF16: 312e12}, 1.555e12),
    "NVIDIA A100-SXM4-80GB": DataSheet({BF16: 312e12}, 2.039e12),
    "NVIDIA A100 80GB PCIe": DataSheet({BF16: 312e12}, 1.935e12),
    "NVIDIA L40S": DataSheet({BF16: 362e12, FP8: 733e12}, 0.864e12),
    "NVIDIA GeForce RTX 4090": DataSheet({BF16: 165.2e12, FP8: 330.3e12}, 1.008e12),
    "NVIDIA GeForce RTX 5090": DataSheet({BF16: 209.5e12, FP8: 419e12}, 1.792e12),
}


def data_sheet(device_kind: str) -> DataSheet | None:
    """The data sheet of a device; None where it is not known."""
    return _DATA_SHEETS.get(device_kind)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One case, measured or not; plain data.

    Attributes:
      group: Of the comparison.
      work: Likewise.
      name: Of the case.
      device: Its kind.
      jax_version: Of JAX.
      status: Whether there are numbers.
      note: The path taken, or why there are no numbers.
      median_s: Seconds for a unit of work, over the repeats; each is the mean of queued calls.
      min_s: Their minimum.
      max_s: Their maximum.
      repeats: How many.
      host_share: Of that time, what the host needed to queue the calls, median.
      flops: See `Program`, as all that follow but the last two.
      bytes: Likewise.
      tokens: Likewise.
      memory_bytes: Likewise.
      floor_s: The least that the data sheet allows; None where the device is not known.
      ratios: Time of each baseline over the time of this case, median over the repeats, both of
        the same repeat: 2 is twice as fast.
      device_s: Seconds that kernels ran for a unit of work, by the profiler, without what lies
        between them; None where it was not asked for.
      device_ratios: As `ratios`, of `device_s`.
      settle_s: Seconds that the case ran by itself before each measurement.
    """

    group: str
    work: str
    name: str
    device: str
    jax_version: str
    status: Literal["measured", "skipped", "failed"]
    note: str = ""
    median_s: float | None = None
    min_s: float | None = None
    max_s: float | None = None
    repeats: int = 0
    host_share: float | None = None
    flops: dict[str, float] = dataclasses.field(default_factory=dict)
    bytes: int = 0
    tokens: int | None = None
    memory_bytes: int | None = None
    floor_s: float | None = None
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    device_s: float | None = None
    device_ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    settle_s: float = 0.0

    @property
    def flops_per_s(self) -> float | None:
        """All operations over the median; None where there are none."""
        total = sum(self.flops.values())
        return total / self.median_s if total and self.median_s else None

    @property
    def share_of_floor(self) -> float | None:
        """`floor_s / median_s`: 1 is as fast as the data sheet allows."""
        return self.floor_s / self.median_s if self.floor_s and self.median_s else None

    @property
    def mfu(self) -> float | None:
        """Model FLOP utilization: all operations over the bfloat16 peak, whatever the unit."""
        sheet = data_sheet(self.device)
        rate = self.flops_per_s
        return rate / sheet.peak[BF16] if sheet and rate else None

    @property
    def is_host_bound(self) -> bool:
        """Whether launching the calls took about as long as running them; never on a CPU."""
        if self.median_s is None or self.host_share is None or self.device == "cpu":
            return False
        return self.median_s < _SHORT_CALL_S and self.host_share > _HOST_BOUND_SHARE

    @property
    def device_note(self) -> str:
        """What the profiler said, for people to read; empty where it was not asked."""
        if self.device_s is None:
            return ""
        ratios = (f"{ratio:.2f} x {name}" for name, ratio in self.device_ratios.items())
        return ", ".join((f"kernels {show_time(self.device_s)}", *ratios))

    def __str__(self) -> str:
        name = f"{self.work}: {self.name}"
        if self.median_s is None or self.min_s is None or self.max_s is None:
            return f"{name:60} {self.status}: {self.note}"
        times = f"{show_time(self.median_s)} ({show_time(self.min_s)} to {show_time(self.max_s)})"
        parts = [f"{name:60} {times:34}"]
        if self.flops_per_s:
            parts.append(f"{show_rate(self.flops_per_s)} TFLOP/s")
        if self.share_of_floor:
            parts.append(f"{self.share_of_floor:4.0%} of floor")
        parts += [f"{ratio:.2f} x {baseline}" for baseline, ratio in self.ratios.items()]
        if self.device_s is not None:
            parts.append(self.device_note)
        return "  ".join(parts)


def show_time(seconds: float) -> str:
    """Four digits, in milliseconds from 1 on, in microseconds below."""
    return f"{1e3 * seconds:.4g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.4g} us"


def show_rate(flops_per_s: float) -> str:
    """TFLOP/s, three digits or whole numbers."""
    rate = flops_per_s / 1e12
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def floor_s(flops: dict[str, float], bytes: int, sheet: DataSheet | None) -> float | None:
    """`max(sum over units of FLOPs / peak, bytes / bandwidth)`: the units share one tensor core.

    What a device has no unit for, it multiplies in bfloat16.
    """
    if sheet is None:
        return None
    times_s = (n / sheet.peak.get(unit, sheet.peak[BF16]) for unit, n in flops.items())
    return max(sum(times_s), bytes / sheet.bandwidth)

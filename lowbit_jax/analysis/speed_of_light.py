"""How fast a device could train if it did nothing but multiply, and what share of that was reached.

The products of a model split by the unit that does them: those of the blocks in float8, as far as
the recipe quantizes them so, head and attention in bfloat16. Each part takes its operations over
the peak of its unit, one after the other, for all of them share one tensor core.
"""

import dataclasses
import math
from collections.abc import Mapping

from lowbit_jax.ops import Explanation
from pallas_kernels.measurement import BF16, FP8, data_sheet

PARTS = ("blocks", "head", "attention")
SPEEDS = ("tokens_per_s", "share_of_light", "mfu")  # what `speed_metrics` gives
# Paths of `quantized_dot` that multiply in float8 (block-scaled float4 could be faster still).
_FP8_PATHS = ("fp8", "hopper", "blackwell")


@dataclasses.dataclass(frozen=True)
class SpeedOfLight:
    """The least time of a token, and the rates that follow from it.

    Attributes:
      flops: Of a token, forward and backward, by part; recomputation counts nothing.
      units: Which unit multiplies, by part: `"bf16"` or `"fp8"`.
      peak: Of the device, dense, FLOP/s by unit.
      block_share: Of the operations of the blocks, those in their unit; the rest is in bfloat16.
    """

    flops: Mapping[str, int | float]
    units: Mapping[str, str]
    peak: Mapping[str, int | float]
    block_share: float = 1.0

    @property
    def token_times_s(self) -> dict[str, float]:
        """Seconds that the products of one token take on one device, by part."""
        times = {part: self.flops[part] / self.peak[self.units[part]] for part in PARTS}
        rest = self.flops["blocks"] / self.peak[BF16]
        times["blocks"] = self.block_share * times["blocks"] + (1 - self.block_share) * rest
        return times

    @property
    def tokens_per_s(self) -> float:
        """Of one device: `1 / sum over parts of FLOP / peak`."""
        return 1 / sum(self.token_times_s.values())

    def share(self, tokens_per_s: int | float) -> float:
        """Measured tokens a second and device over `tokens_per_s`: 1 is the speed of light."""
        return tokens_per_s / self.tokens_per_s

    def mfu(self, tokens_per_s: int | float) -> float:
        """Model FLOP utilization, all operations over the bfloat16 peak: comparable across formats.

        With products in float8 it may exceed 1; without, it equals `share`.

        References:
          Chowdhery et al., PaLM, arXiv:2204.02311, appendix B.
        """
        return tokens_per_s * sum(self.flops[part] for part in PARTS) / self.peak[BF16]

    def __str__(self) -> str:
        times, units = self.token_times_s, dict(self.units)
        total = sum(times.values())
        if self.block_share < 1:
            units["blocks"] += f" ({self.block_share:.0%} of its operations) and {BF16}"
        parts = (f"{part} {times[part] / total:.0%} in {units[part]}" for part in PARTS)
        return f"{self.tokens_per_s:,.0f} tokens/s: {', '.join(parts)}"


def speed_of_light(
    flops: Mapping[str, int | float],
    device: str | Mapping[str, int | float],
    block_unit: str = BF16,
    *,
    block_share: float = 1.0,
) -> SpeedOfLight:
    """`1 / (blocks / peak[block_unit] + (head + attention) / peak["bf16"])` tokens a second.

    Args:
      flops: Of a token by part, as `lowbit_jax.models.flops_by_part` counts them: `"blocks"`,
        `"head"`, `"attention"`.
      device: Its kind as JAX names it, or dense peaks in FLOP/s by unit.
      block_unit: `"fp8"` where the three products of the seven matrices run in float8, as 4-bit
        formats do that float8 holds; `"bf16"` otherwise.
      block_share: Of the operations of the blocks, those in `block_unit`, see `float8_share`; the
        rest is in bfloat16.

    Raises:
      ValueError: If the device is not known or lacks the unit, a part is missing, or the share is
        no share.

    References:
      Schultheis and Alistarh, LLMQ: Efficient Lower-Precision LLM Training for Consumer GPUs,
      arXiv:2512.15306. Recomputation earns no credit there either; of attention the causal half
      counts.
    """
    if block_unit not in (BF16, FP8):
        raise ValueError(
            f"speed_of_light: block_unit must be {BF16!r} or {FP8!r}, got {block_unit!r}."
        )
    if not 0 <= block_share <= 1:
        raise ValueError(f"speed_of_light: block_share must be in [0, 1], got {block_share}.")
    if set(flops) != set(PARTS):
        raise ValueError(
            f"speed_of_light: flops must have the parts {', '.join(PARTS)}, got"
            f" {', '.join(flops)}; make them with lowbit_jax.models.flops_by_part."
        )
    if isinstance(device, str):
        sheet = data_sheet(device)
        if sheet is None:
            raise ValueError(
                f"speed_of_light: no data sheet of the device {device!r}; pass its dense peaks,"
                " such as {'bf16': 989.4e12, 'fp8': 1978.9e12}."
            )
        device = sheet.peak
    missing = [unit for unit in (BF16, block_unit) if not device.get(unit, 0) > 0]
    if missing:
        raise ValueError(
            f"speed_of_light: peaks must be positive FLOP/s of {BF16!r} and {block_unit!r}, got"
            f" {dict(device)}, without {missing[0]!r}; choose a unit that the device has."
        )
    units = dict.fromkeys(PARTS, BF16) | {"blocks": block_unit}
    return SpeedOfLight(dict(flops), units, dict(device), block_share)


def float8_share(explanation: Explanation) -> float:
    """Share of the blocks' operations that a training step does in float8; 0 for none.

    By the paths that its products take: one that multiplies low-bit operands in bfloat16 is held to
    the speed of bfloat16. The three products of training have a third each, each matrix its part of
    that, whatever recomputation repeats.

    Args:
      explanation: Of the step, or of the gradient of a loss.
    """
    # By matrix and product: operations, those in float8, and how often it runs.
    found: dict[tuple[str, str], tuple[float, float, int]] = {}
    for row in explanation.rows:
        flops = float(math.prod(row.a_shape) * row.b_shape[-2] * (row.count or 1))
        total, fast, count = found.get((row.where, row.product), (0.0, 0.0, 0))
        fast += flops * (row.path in _FP8_PATHS)
        found[row.where, row.product] = total + flops, fast, count + (row.count or 1)
    runs: dict[str, int] = {}  # what a matrix runs least often, nobody repeats
    for (where, _), (_, _, count) in found.items():
        runs[where] = min(runs.get(where, count), count)
    shares: dict[str, tuple[float, float]] = {}
    for (where, product), (total, fast, count) in found.items():
        once = runs[where] / count
        so_far = shares.get(product, (0.0, 0.0))
        shares[product] = so_far[0] + once * total, so_far[1] + once * fast
    return sum(fast / total for total, fast in shares.values()) / max(len(shares), 1)


def run_speed_of_light(
    flops: Mapping[str, int | float], device_kind: str, explanation: Explanation
) -> SpeedOfLight | None:
    """`speed_of_light` of a step on a device, with the units that its products use.

    Args:
      flops: As for `speed_of_light`.
      device_kind: As JAX names it.
      explanation: As for `float8_share`.

    Returns:
      None for a device without a data sheet.
    """
    sheet = data_sheet(device_kind)
    if sheet is None:
        return None
    share = float8_share(explanation)
    unit = FP8 if share and FP8 in sheet.peak else BF16
    return speed_of_light(flops, sheet.peak, unit, block_share=share if unit == FP8 else 1.0)


def speed_metrics(
    tokens_per_s: float | None, light: SpeedOfLight | None, devices: int = 1
) -> dict[str, float]:
    """`tokens_per_s`, and with it `share_of_light` and `mfu` where the limit is known.

    Args:
      tokens_per_s: Of all devices; None gives {}.
      light: Of one device; None where it has no data sheet.
      devices: How many.
    """
    if tokens_per_s is None:
        return {}
    if light is None:
        return {"tokens_per_s": tokens_per_s}
    rate = tokens_per_s / devices
    share, mfu = light.share(rate), light.mfu(rate)
    return {"tokens_per_s": tokens_per_s, "share_of_light": share, "mfu": mfu}


def show_speed(
    tokens_per_s: float, share_of_light: float | None = None, mfu: float | None = None
) -> str:
    """The rate, and what is known of how good it is: `"58.9 ktok/s, 57% of light, MFU 57%"`."""
    parts = [f"{tokens_per_s / 1e3:.1f} ktok/s"]
    if share_of_light is not None:
        parts.append(f"{share_of_light:.0%} of light")
    if mfu is not None:
        parts.append(f"MFU {mfu:.0%}")
    return ", ".join(parts)

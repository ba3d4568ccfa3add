"""How fast a device could train if it did nothing but multiply, and what share of that was reached.

The products of a model split by the unit that can do them fastest: those of the blocks in float8,
if the recipe quantizes them, head and attention in bfloat16. Each part takes its operations over
the peak of its unit, one after the other, for all of them share one tensor core.
"""

import dataclasses
from collections.abc import Mapping

from pallas_kernels.measurement import BF16, FP8, data_sheet

PARTS = ("blocks", "head", "attention")


@dataclasses.dataclass(frozen=True)
class SpeedOfLight:
    """The least time of a token, and the rates that follow from it.

    Attributes:
      flops: Of a token, forward and backward, by part; recomputation counts nothing.
      units: Which unit multiplies, by part: `"bf16"` or `"fp8"`.
      peak: Of the device, dense, FLOP/s by unit.
    """

    flops: Mapping[str, int | float]
    units: Mapping[str, str]
    peak: Mapping[str, int | float]

    @property
    def token_times_s(self) -> dict[str, float]:
        """Seconds that the products of one token take on one device, by part."""
        return {part: self.flops[part] / self.peak[self.units[part]] for part in PARTS}

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
        times = self.token_times_s
        total = sum(times.values())
        parts = (f"{part} {times[part] / total:.0%} in {self.units[part]}" for part in PARTS)
        return f"{self.tokens_per_s:,.0f} tokens/s: {', '.join(parts)}"


def speed_of_light(
    flops: Mapping[str, int | float],
    device: str | Mapping[str, int | float],
    block_unit: str = BF16,
) -> SpeedOfLight:
    """`1 / (blocks / peak[block_unit] + (head + attention) / peak["bf16"])` tokens a second.

    Args:
      flops: Of a token by part, as `lowbit_jax.models.flops_by_part` counts them: `"blocks"`,
        `"head"`, `"attention"`.
      device: Its kind as JAX names it, or dense peaks in FLOP/s by unit.
      block_unit: `"fp8"` where the three products of the seven matrices run in float8, as 4-bit
        formats do that float8 holds; `"bf16"` otherwise.

    Raises:
      ValueError: If the device is not known or lacks the unit, or a part is missing.

    References:
      Schultheis and Alistarh, LLMQ: Efficient Lower-Precision LLM Training for Consumer GPUs,
      arXiv:2512.15306. Recomputation earns no credit there either; of attention the causal half
      counts.
    """
    if block_unit not in (BF16, FP8):
        raise ValueError(
            f"speed_of_light: block_unit must be {BF16!r} or {FP8!r}, got {block_unit!r}."
        )
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
    return SpeedOfLight(dict(flops), units, dict(device))

"""`QuantSpec`: what to quantize to, as plain data."""

import dataclasses
from typing import Literal

from lowbit_jax.numerics.formats import Format
from lowbit_jax.numerics.rounding import Rounding
from lowbit_jax.numerics.scales import E4M3_RULES, POWER_OF_TWO_RULES, ScaleRule, check_parts


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """What to quantize to. Hashable: pass it as a static argument of `jit`.

    Attributes:
      format: Element type, for example `formats.E2M1`.
      block_size: Neighbours along the last axis that share a scale; None: the whole last axis;
        "tensor": the last two axes (the whole array if it has no more).
      scale: Name of the rule that gives a block its scale; `lowbit_jax.numerics.scales` has the
        table.
      rounding: "nearest", ties to the even code, or "stochastic", which needs a key.

    Raises:
      ValueError: If the parts do not go together, for example `rms` for a format without a
        Gaussian clipping point.
    """

    format: Format
    block_size: int | Literal["tensor"] | None
    scale: ScaleRule = "absmax"
    rounding: Rounding = "nearest"

    def __post_init__(self):
        check_parts(self.scale, self.format, self.block_size, self.rounding)

    @property
    def scale_bits(self) -> int:
        """Bits of one stored scale, with its zero point."""
        if self.scale == "minmax":
            return 40
        return 8 if self.scale in POWER_OF_TWO_RULES + E4M3_RULES else 32

    def bits_per_param(self, k: int) -> float:
        """Bits an element of a long array with last axis `k`: codes and block scales.

        Without what is stored once: a global scale, or the one scale of a tensor.
        """
        if self.block_size == "tensor":
            return float(self.format.bits)
        return self.format.bits + self.scale_bits / (self.block_size or k)

    def __str__(self) -> str:
        block = "row" if self.block_size is None else self.block_size
        rounding = " stochastic" if self.rounding == "stochastic" else ""
        return f"{self.format.name}/{block} {self.scale}{rounding}"

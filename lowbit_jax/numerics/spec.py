"""`QuantSpec`: what to quantize to, as plain data."""

import dataclasses
import math
from typing import Literal, get_args

from lowbit_jax.numerics.formats import Format

Rounding = Literal["nearest", "stochastic", "eden"]

ScaleRule = Literal[
    "absmax",
    "minmax",
    "absmax_floor",
    "absmax_floor43",
    "absmax_ceil",
    "absmax_ct175",
    "absmax_e4m3",
    "absmax_e4m3_four_over_six",
    "rms",
    "rms_nearest",
    "std_floor",
]

POWER_OF_TWO_RULES = (
    "absmax_floor",
    "absmax_floor43",
    "absmax_ceil",
    "absmax_ct175",
    "rms_nearest",
    "std_floor",
)
E4M3_RULES = ("absmax_e4m3", "absmax_e4m3_four_over_six")
RMS_RULES = ("rms", "rms_nearest", "std_floor")
EXACT_ABSMAX_RULES = ("absmax", *E4M3_RULES)  # those that can leave any margin
GLOBAL_SCALE_RULES = ("absmax_floor43", *E4M3_RULES)

# The clipping points of QuEST's published code: the outermost level in units of the standard
# deviation. From 4 bits on they lie a little below the true optima (2.51401, 2.91615, 3.27799,
# 3.6111, 3.9222), which costs less than 0.2 % of the error.
GAUSSIAN_ALPHA = {
    "midrise1": 0.7978845587140913,
    "ternary": 1.2240089519030855,
    "midrise2": 1.4935346200015913,
    "midrise3": 2.051068354131873,
    "midrise4": 2.513930578568423,
    "midrise5": 2.9160938834961225,
    "midrise6": 3.276597282593217,
    "midrise7": 3.6010497188221655,
    "midrise8": 3.884938678807525,
    "e2m1": 2.92247856,
}


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """What to quantize to. Hashable: pass it as a static argument of `jit`.

    Attributes:
      format: Element type, for example `formats.E2M1`.
      block_size: Neighbours along the last axis that share a scale; None: the whole last axis;
        "tensor": the last two axes (the whole array if it has no more).
      scale: Name of the rule that gives a block its scale; `lowbit_jax.numerics.scales` has the
        table.
      rounding: "nearest", ties to the even code; "stochastic", element by element; or "eden",
        elements to nearest and the E4M3 scales stochastically (`lowbit_jax.numerics.eden`), for
        data under a fresh random rotation. The last two need a key. Stochastic rounding is
        unbiased where nothing clips: under `absmax_floor43` and `absmax_ceil`, and under the E4M3
        rule with a margin of 17/16 while the scale is a normal number (blocks below some 3e-5 of
        the array's abs-max have subnormal ones, which round more coarsely).
      margin: The outermost level stands for `margin` times the block's abs-max. Above 1 leaves
        room for the rounding of the scale: E4M3 rounds down by 16/17 at most. Below 1 clips on
        purpose. For `absmax` and the E4M3 rules.
      gain: Factor on the decoded values, part of `global_scale`; for the rules that have one.
      block_rows: Neighbours along the last axis but one that share the scale, too.
      correction_block: Of "eden": neighbours along the last axis that share a correction factor;
        None: block_size.

    Raises:
      ValueError: If the parts do not go together, for example `rms` for a format without a
        Gaussian clipping point.
    """

    format: Format
    block_size: int | Literal["tensor"] | None
    scale: ScaleRule = "absmax"
    rounding: Rounding = "nearest"
    margin: float = 1.0
    gain: float = 1.0
    block_rows: int = 1
    correction_block: int | None = None

    def __post_init__(self):
        check_parts(self)
        if self.correction_block == self.block_size:
            object.__setattr__(self, "correction_block", None)  # equal when they mean the same

    @property
    def needs_key(self) -> bool:
        """Whether rounding is random."""
        return self.rounding != "nearest"

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
        return self.format.bits + self.scale_bits / ((self.block_size or k) * self.block_rows)

    def __str__(self) -> str:
        block = "row" if self.block_size is None else self.block_size
        rows = f"{self.block_rows}x" if self.block_rows > 1 else ""
        words = [f"{self.format.name}/{rows}{block}", self.scale]
        if self.rounding != "nearest":
            correction = f"/{self.correction_block}" if self.correction_block else ""
            words.append(self.rounding + correction)
        if self.margin != 1:
            words.append(f"margin {self.margin:g}")
        if self.gain != 1:
            words.append(f"gain {self.gain:g}")
        return " ".join(words)


def check_parts(spec: QuantSpec) -> None:
    """Raises a ValueError if the parts of a `QuantSpec` do not go together."""
    _check_names(spec)
    _check_rule_and_format(spec)
    _check_block(spec)
    _check_rounding(spec)
    _check_factors(spec)


def _check_names(spec):
    """The names of the rules, and the types of the block's two sizes."""
    size, rows = spec.block_size, spec.block_rows
    if not (size in (None, "tensor") or (isinstance(size, int) and size > 0)):
        raise ValueError(
            f"QuantSpec: block_size must be a positive int, None (a row) or 'tensor', got {size!r}."
        )
    if not (isinstance(rows, int) and rows > 0):
        raise ValueError(f"QuantSpec: block_rows must be a positive int, got {rows!r}.")
    if spec.rounding not in get_args(Rounding):
        raise ValueError(
            f"QuantSpec: rounding must be 'nearest', 'stochastic' or 'eden', got {spec.rounding!r}."
        )
    if spec.scale not in get_args(ScaleRule):
        raise ValueError(
            f"QuantSpec: no scale rule {spec.scale!r}; choose one of"
            f" {', '.join(get_args(ScaleRule))}."
        )


def _check_rule_and_format(spec):
    rule, format = spec.scale, spec.format
    if (rule == "minmax") != (format.min == 0):
        raise ValueError(
            f"QuantSpec: 'minmax' goes with unsigned formats and they with it, got {rule!r} for"
            f" {format.name}; use unsigned({format.bits}) with 'minmax', or another of both."
        )
    if rule in RMS_RULES and format.name not in GAUSSIAN_ALPHA:
        raise ValueError(
            f"QuantSpec: {rule!r} has no Gaussian clipping point for {format.name}; choose one of"
            f" {', '.join(GAUSSIAN_ALPHA)}, or an absmax rule."
        )
    if rule in POWER_OF_TWO_RULES and format.kind == "midrise":
        raise ValueError(
            f"QuantSpec: {rule!r} is defined for float and integer formats, got {format.name}; use"
            " 'absmax' or 'rms'."
        )
    if rule == "absmax_floor43" and format.kind != "float":
        raise ValueError(
            f"QuantSpec: 'absmax_floor43' is for float formats, got {format.name}; use"
            " 'absmax_ceil', which never clips either."
        )
    if rule in E4M3_RULES and not (format.name == "e2m1" or format.kind == "integer"):
        raise ValueError(
            f"QuantSpec: {rule!r} goes with e2m1 or integer formats, got {format.name}; use"
            " 'absmax' or 'absmax_floor'."
        )
    if rule == "absmax_e4m3_four_over_six" and format.name != "e2m1":
        raise ValueError(f"QuantSpec: {rule!r} is defined for e2m1 only, got {format.name}.")


def _check_block(spec):
    rule, size = spec.scale, spec.block_size
    if size == "tensor" and rule != "absmax":
        raise ValueError(
            f"QuantSpec: block_size 'tensor' goes with scale 'absmax' only, got {rule!r}; use an"
            " integer block_size, or None for a scale a row."
        )
    if rule in E4M3_RULES and size is None:
        raise ValueError(
            f"QuantSpec: {rule!r} needs an integer block_size, got None; NVFP4 has 16."
        )
    if rule == "std_floor" and (not isinstance(size, int) or size & (size - 1) != 0):
        raise ValueError(
            f"QuantSpec: 'std_floor' needs a block_size that is a power of two, got {size};"
            " use 'rms_nearest'."
        )
    if spec.block_rows > 1 and (rule not in EXACT_ABSMAX_RULES or size == "tensor"):
        raise ValueError(
            f"QuantSpec: block_rows > 1 goes with {', '.join(EXACT_ABSMAX_RULES)} and a block_size"
            f" of its own, got block_rows={spec.block_rows} with {rule!r} and block_size={size!r};"
            " leave it at 1."
        )


def _check_rounding(spec):
    if spec.scale == "absmax_e4m3_four_over_six" and spec.needs_key:
        raise ValueError(
            f"QuantSpec: {spec.scale!r} with {spec.rounding} rounding is biased, for the choice of"
            " scale depends on the error; use 'absmax_e4m3'."
        )
    if spec.rounding == "eden" and (spec.scale != "absmax_e4m3" or spec.block_rows > 1):
        raise ValueError(
            "QuantSpec: 'eden' rounds E4M3 scales of single rows and goes with 'absmax_e4m3' and"
            f" block_rows=1, got {spec.scale!r} and {spec.block_rows}; use 'stochastic'."
        )
    block = spec.correction_block
    if block is None:
        return
    if spec.rounding != "eden":
        raise ValueError(
            f"QuantSpec: correction_block belongs to rounding 'eden', got {block!r} with"
            f" {spec.rounding!r}; leave it at None."
        )
    if not (isinstance(block, int) and block > 0) or block % spec.block_size:
        raise ValueError(
            "QuantSpec: correction_block must be a positive multiple of"
            f" block_size={spec.block_size}, got {block!r}."
        )


def _check_factors(spec):
    for name, rules in [("margin", EXACT_ABSMAX_RULES), ("gain", GLOBAL_SCALE_RULES)]:
        value = getattr(spec, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"QuantSpec: {name} must be positive and finite, got {value!r}.")
        if value != 1 and spec.scale not in rules:
            raise ValueError(
                f"QuantSpec: {name} goes with the rules {', '.join(rules)}, got {name}={value!r}"
                f" with {spec.scale!r}; leave it at 1."
            )

"""`QTensor`: a quantized array as it is stored."""

import dataclasses
import functools
import math
from typing import Any

import jax

from lowbit_jax.numerics.spec import QuantSpec


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "global_scale", "zero_points"],
    meta_fields=["spec"],
)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """Codes and scales; `x ~ level(codes) * scales * global_scale`. A pytree whose spec is static.

    The fields are not checked, for a pytree may hold anything: shapes, shardings, tracers. So
    `optax.apply_updates` refuses an array as the update of a QTensor, but would add a QTensor to
    its codes; no gradient of ours has that form. `apply_updates_low_precision` adds values.

    Attributes:
      codes: uint8 `(*batch, k * bits // 8)`, densely packed, for formats below 8 bits; else
        `(*batch, k)` of the format's storage dtype (int8, float8_e4m3fn or float8_e5m2).
      scales: `(*batch, k // block_size)`; `(*rest, n // block_rows, k // block_size)` where rows
        share them; `(*batch, 1)` for a scale a row; `(*rest, 1, 1)` (or `(1,)`) for one of the last
        two axes. uint8 biased exponents, float8_e4m3fn or float32.
      global_scale: float32 scalar, or `(*layers,)` from `quantize_matrices`; None where the rule
        has none.
      spec: What it was quantized to.
      zero_points: uint8 like `scales`, the code of zero, subtracted from the codes; None but for
        the rule `minmax`.
    """

    codes: Any
    scales: Any
    global_scale: Any
    spec: QuantSpec
    zero_points: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that it stands for."""
        *batch, last = self.codes.shape
        bits = self.spec.format.bits
        return (*batch, last * 8 // bits if bits < 8 else last)

    @property
    def nbytes(self) -> int:
        """Bytes that codes and scales take."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_param(self) -> float:
        """Bits an element, all scales included."""
        return 8 * self.nbytes / math.prod(self.shape)

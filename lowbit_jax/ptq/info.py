"""What a solver says about the layer that it has solved."""

import dataclasses
import functools
import math
from typing import Any

import jax


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["error", "damping", "failures"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Info:
    """A pytree of scalars; its fields are not checked, for a pytree may hold anything.

    Attributes:
      error: Float32, the relative layer error under the Hessian as it came; see `layer_error`.
      damping: Float32, what was added to the diagonal of the Hessian, as a fraction of its mean;
        0 for a solver that factors nothing.
      failures: int32, factorisations that failed. Each is repeated with more damping; where the
        last fails, too, the error is NaN, and so are the weights.
    """

    error: Any
    damping: Any
    failures: Any


def check_info(who: str, info: Info) -> None:
    """Raises if the layer was not solved; waits for the result.

    Args:
      who: The layer, for the message.
      info: From a solver, computed (not traced).

    Raises:
      ValueError: If the error is not finite.
    """
    if not math.isfinite(float(info.error)):
        raise ValueError(
            f"{who}: a solved layer has a finite error, got {float(info.error)} after"
            f" {int(info.failures)} failed factorisations, the last with a damping of"
            f" {float(info.damping):.3g}; look for NaN, infinities or an overflow in the layer's"
            " weights and calibration inputs."
        )

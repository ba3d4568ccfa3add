"""Gradient estimators: what the backward pass claims the derivative of rounding to be.

All three pass the cotangent through, times a mask; nothing of the scale is differentiated.

- straight_through: everywhere. Bengio et al., arXiv:1308.3432.
- clipped: where `|x| <= clip_scale * outermost level`.
- trust: where `|x| <= outermost level + half a step`. Panferov et al., QuEST, arXiv:2502.05003,
  state it as `|round(x) - x| <= half a step`. Inside the range rounding never errs by more, so the
  two are equal, and this form does not misfire on the boundary between two levels.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Shaped

from lowbit_jax.numerics.quantize import Factored, Key, quantize_factored, to_units
from lowbit_jax.numerics.spec import QuantSpec

Estimator = Literal["straight_through", "clipped", "trust"]

# The scale and the quotient are rounded, so that under `absmax` the largest entry comes back as
# the outermost level times 1 +- 3 * 2**-24. It is not clipped and must not be masked.
_SLACK = 1 + 2.0**-22


def quantize_and_mask(
    x: Shaped[ArrayLike, "..."],
    spec: QuantSpec,
    estimator: Estimator,
    clip_scale: float = 1.0,
    *,
    key: Key = None,
) -> tuple[Float[Array, "..."], Bool[Array, "..."] | None]:
    """The rounded values of `x` and the mask of its gradient.

    Args:
      x: `(*batch, k)`, any float dtype.
      spec: Target.
      estimator: Which mask.
      clip_scale: Of "clipped" only: the outermost level is multiplied by it. QuEST trains 1-bit
        models with 1.30.
      key: For a spec that needs one.

    Returns:
      Values in float32, and a bool mask of the same shape; None stands for "everywhere".

    Raises:
      ValueError: As `quantize_values`; or if there is no such estimator.
    """
    factored, mask = factored_and_mask(x, spec, estimator, clip_scale, key=key)
    return factored.multiply(), mask


def factored_and_mask(
    x: Shaped[ArrayLike, "..."],
    spec: QuantSpec,
    estimator: Estimator,
    clip_scale: float = 1.0,
    *,
    key: Key = None,
) -> tuple[Factored, Bool[Array, "..."] | None]:
    """`quantize_and_mask` with the values in two factors, for products that scale their result."""
    bound = mask_bound(spec, estimator, clip_scale)
    factored, units = quantize_factored(x, spec, key=key)
    return factored, _mask(units, bound)


def gradient_mask(
    x: Shaped[ArrayLike, "..."],
    spec: QuantSpec,
    estimator: Estimator,
    clip_scale: float = 1.0,
) -> Bool[Array, "..."] | None:
    """The mask of `quantize_and_mask`, from the scales alone: nothing is rounded.

    It takes no key, for no mask depends on one.

    Args:
      x: `(*batch, k)`, any float dtype.
      spec: Target.
      estimator: Which mask.
      clip_scale: Of "clipped" only.

    Returns:
      Bool, the shape of `x`; None stands for "everywhere".

    Raises:
      ValueError: As `quantize_and_mask`, but for the key.
    """
    bound = mask_bound(spec, estimator, clip_scale)
    return None if bound is None else _mask(to_units(x, spec), bound)


def mask_bound(spec: QuantSpec, estimator: Estimator, clip_scale: float = 1.0) -> float | None:
    """The mask is where `|x / scale|` is at most this; None stands for "everywhere".

    Raises:
      ValueError: If there is no such estimator.
    """
    check_estimator(estimator)
    if estimator == "straight_through":
        return None
    if estimator == "clipped":
        return clip_scale * spec.format.max * _SLACK
    return (spec.format.max + spec.format.last_step / 2) * _SLACK


def _mask(units, bound):
    return None if bound is None else jnp.abs(units) <= np.float32(bound)


def check_estimator(estimator: str) -> None:
    """Raises a ValueError if there is no estimator of that name."""
    if estimator not in get_args(Estimator):
        raise ValueError(
            f"fake_quantize: no estimator {estimator!r}; choose one of"
            f" {', '.join(get_args(Estimator))}."
        )


def fake_quantize(
    x: Shaped[ArrayLike, "..."],
    spec: QuantSpec,
    *,
    estimator: Estimator = "straight_through",
    clip_scale: float = 1.0,
    key: Key = None,
) -> Float[Array, "..."]:
    """`dequantize(quantize(x, spec))` in x.dtype, differentiable by `estimator`.

    Args:
      x: `(*batch, k)`, any float dtype.
      spec: Target; static under `jit`.
      estimator: "straight_through", "clipped" or "trust"; see the module.
      clip_scale: Of "clipped" only.
      key: For a spec that needs one; its cotangent is float0.

    Returns:
      Same shape and dtype as x; it has no forward-mode derivative. In bfloat16 the values are
      rounded once more: exact as long as level times scale fits 8 bits, as it does for e2m1 with
      power-of-two scales.

    Raises:
      ValueError: As `quantize_and_mask`.
    """
    return _fake_quantize(jnp.asarray(x), key, spec, estimator, clip_scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _fake_quantize(x, key, spec, estimator, clip_scale):
    values, _ = quantize_and_mask(x, spec, estimator, clip_scale, key=key)
    return values.astype(x.dtype)


def _fake_quantize_fwd(x, key, spec, estimator, clip_scale):
    values, mask = quantize_and_mask(x, spec, estimator, clip_scale, key=key)
    return values.astype(x.dtype), (mask, key)


def _fake_quantize_bwd(spec, estimator, clip_scale, residuals, g):
    del spec, estimator, clip_scale
    mask, key = residuals
    dkey = None if key is None else np.zeros(key.shape, jax.dtypes.float0)
    return (g if mask is None else jnp.where(mask, g, jnp.zeros_like(g))), dkey


_fake_quantize.defvjp(_fake_quantize_fwd, _fake_quantize_bwd)

"""Learning-rate schedules: functions of the number of updates already applied.

They take Python integers, traced scalars and arrays of counts, return float32, and hit the values
at their corners exactly. Optax's own pieces do not: `cosine_onecycle_schedule` multiplies the
peak by a quotient and back and cuts a fractional warm-up to an integer, and `linear_schedule`
computes `(start - end) * 1 + end`, which need not round to `start`.
"""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


def _interpolate(start: int | float, end: int | float, weight: jax.Array) -> jax.Array:
    # A convex combination: exact at weight 0 and at weight 1.
    return start * (1 - weight) + end * weight


def _progress(count: ArrayLike, start: int | float, length: int | float) -> jax.Array:
    # float32 holds counts up to 2**24 exactly.
    return jnp.clip((jnp.asarray(count, jnp.float32) - start) / max(length, 1e-9), 0.0, 1.0)


def _require_fractions(who: str, **fractions: int | float):
    for name, value in fractions.items():
        if not 0 <= value < 1:
            raise ValueError(f"{who}: {name} must lie in [0, 1), got {value}.")


def _require_steps(who: str, total_steps: int):
    if total_steps < 1:
        raise ValueError(f"{who}: total_steps must be at least 1, got {total_steps}.")


def one_cycle_cosine(
    peak: int | float,
    total_steps: int,
    warmup_fraction: int | float = 0.1,
    start_divisor: int | float = 100.0,
    end_divisor: int | float = 10.0,
) -> optax.Schedule:
    """Half a cosine from `peak / start_divisor` up to `peak`, half a cosine down to the end.

    The first update has `peak / start_divisor`, the last one, `count = total_steps - 1`, has
    `peak / end_divisor`, and later counts keep that. The peak lies at
    `count = warmup_fraction * total_steps - 1`, a fraction if need be: the corners of PyTorch's
    `OneCycleLR`, with which the QuEST and CAGE models were trained.

    Args:
      peak: Largest learning rate.
      total_steps: Number of updates, at least 1.
      warmup_fraction: Fraction of the updates that rise, in `[0, 1)`; 0 starts at the peak.
      start_divisor: `peak` over the first learning rate.
      end_divisor: `peak` over the last learning rate.

    Returns:
      `count -> learning rate`, float32.

    Raises:
      ValueError: If `total_steps` or `warmup_fraction` is out of range.

    References:
      Panferov et al., QuEST: Stable Training of LLMs with 1-Bit Weights and Activations,
      arXiv:2502.05003: start 1/100, warm-up over a tenth of the steps, end 1/10.
    """
    _require_steps("one_cycle_cosine", total_steps)
    _require_fractions("one_cycle_cosine", warmup_fraction=warmup_fraction)
    corner = max(warmup_fraction * total_steps - 1, 0)
    last = total_steps - 1

    def schedule(count):
        rise = 0.5 * (1 - jnp.cos(jnp.pi * _progress(count, 0, corner)))
        fall = 0.5 * (1 - jnp.cos(jnp.pi * _progress(count, corner, last - corner)))
        up = _interpolate(peak / start_divisor, peak, rise)
        down = _interpolate(peak, peak / end_divisor, fall)
        return jnp.where(jnp.asarray(count, jnp.float32) < corner, up, down)

    return schedule


def warmup_stable_decay(
    peak: int | float,
    total_steps: int,
    warmup_fraction: int | float = 0.01,
    decay_fraction: int | float = 0.2,
    start_divisor: int | float = 100.0,
    end_fraction: int | float = 0.0,
    decay: str = "one_minus_sqrt",
) -> optax.Schedule:
    """A linear rise from `peak / start_divisor`, a plateau at `peak`, a fall to the end value.

    With `x` the fraction of the decay that has passed, `"linear"` falls by `1 - x` and
    `"one_minus_sqrt"` by `1 - sqrt(x)`, both from `peak` to `end_fraction * peak`. The corners
    are `count = warmup_fraction * total_steps` and `count = (1 - decay_fraction) * total_steps`,
    each rounded to the nearest integer; the end value is reached at `count = total_steps`, so
    that the last update still moves the parameters when it is 0, and is kept afterwards.

    Args:
      peak: Largest learning rate.
      total_steps: Number of updates, at least 1.
      warmup_fraction: Fraction of the updates that rise, in `[0, 1)`.
      decay_fraction: Fraction of the updates that fall, in `[0, 1)`; 0 keeps the peak to the end.
      start_divisor: `peak` over the first learning rate.
      end_fraction: Last learning rate over `peak`.
      decay: `"linear"` or `"one_minus_sqrt"`.

    Returns:
      `count -> learning rate`, float32.

    Raises:
      ValueError: If a number is out of range, the two fractions exceed 1 together, or `decay`
        is not known.

    References:
      Hägele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations,
      arXiv:2405.18392: decay over 20 % of the steps by `1 - sqrt(x)`.
    """
    who = "warmup_stable_decay"
    _require_steps(who, total_steps)
    _require_fractions(who, warmup_fraction=warmup_fraction, decay_fraction=decay_fraction)
    if warmup_fraction + decay_fraction > 1:
        raise ValueError(
            f"{who}: warm-up and decay must fit into the run, got warmup_fraction"
            f"={warmup_fraction} + decay_fraction={decay_fraction} > 1; shorten one."
        )
    if decay not in ("linear", "one_minus_sqrt"):
        raise ValueError(f"{who}: decay must be 'linear' or 'one_minus_sqrt', got {decay!r}.")
    warmup = round(warmup_fraction * total_steps)
    corner = total_steps - round(decay_fraction * total_steps)

    def schedule(count):
        up = _interpolate(peak / start_divisor, peak, _progress(count, 0, warmup))
        fall = _progress(count, corner, total_steps - corner)
        fall = jnp.sqrt(fall) if decay == "one_minus_sqrt" else fall
        down = _interpolate(peak, end_fraction * peak, fall)
        return jnp.where(jnp.asarray(count, jnp.float32) < warmup, up, down)

    return schedule

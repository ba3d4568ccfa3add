"""Sizes of one launch of the kernel of `scaled_matmul`, and the order of its tiles."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.compat import plgpu
from pallas_kernels.scaled_matmul.tuning import (
    STEP_BYTES,
    Config,
    Shares,
    fitting_stages,
    share_out,
)

# Tiles along n that are visited before moving on along m, for the L2 cache.
_SWEEP = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one launch."""

    config: Config
    k_steps: int  # of `step` elements
    step: int
    stages: int
    shares: Shares
    m: int

    @property
    def rows(self) -> int:
        """Of a tile, computed by one consumer."""
        return self.config.tile_m // self.config.consumers

    @property
    def items(self) -> int:
        """Tiles and bands."""
        return self.shares.whole + self.shares.bands

    @property
    def has_idle_consumers(self) -> bool:
        """Whether some consumers have no rows of some tile."""
        return bool(self.shares.bands) or -self.m % self.config.tile_m >= self.rows


def plan_launch(a, b, epilogue, config) -> Plan:
    """Sizes for operands `(m, k)` and `(n, k)`; NotImplementedError if two stages do not fit."""
    (m, k), n = a.shape, b.shape[0]
    step = STEP_BYTES // a.dtype.itemsize
    k_steps = pl.cdiv(k, step)
    stages = min(config.stages, k_steps, fitting_stages(config, epilogue))
    if stages < min(2, k_steps):
        raise NotImplementedError(
            f"scaled_matmul: two stages of {config} do not fit into shared memory beside"
            f" {epilogue}; choose smaller tiles."
        )
    return Plan(config, k_steps, step, stages, share_out(m, n, config), m)


def stage_of(plan, step):
    """Where the operands of a step lie; unsigned, for the remainder takes fewer instructions."""
    stage = lax.rem(lax.convert_element_type(step, jnp.uint32), jnp.uint32(plan.stages))
    return lax.convert_element_type(stage, jnp.int32)


def for_each_tile(plan):
    """Decorates `f(row, column, band, steps_before)`, run for every tile or band of this block.

    `band` counts the rows of consumers in the tile at `row`; -1 or None is the whole tile.
    """
    config, shares = plan.config, plan.shares

    def decorate(f):
        @plgpu.nd_loop((plan.items,), collective_axes="sm")
        def _(info):
            (index,) = info.index
            band = None
            if shares.bands:
                past = index - shares.whole
                tile = shares.whole + lax.div(past, config.consumers)
                band = lax.select(past < 0, jnp.int32(-1), lax.rem(past, config.consumers))
                index = lax.select(past < 0, index, tile)
            row, column = plgpu.planar_snake(index, shares.tiles, 1, _SWEEP)
            if config.multicast:
                column = 2 * column + lax.axis_index("pair")
            steps_before = info.local_index * plan.k_steps
            f(row * config.tile_m, column * config.tile_n, band, steps_before)

    return decorate

"""How the kernel of `scaled_matmul` is cut into tiles, and which cut a shape gets."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.compat import num_sms
from pallas_kernels.scaled_matmul.epilogue import Epilogue

# Bytes of a row of shared memory that one swizzle covers: a k-step is 128 8-bit elements.
STEP_BYTES = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """Schedule of the kernel; what is computed depends on `promote` alone, and that in rounding.

    Attributes:
      tile_m: Rows of the output that a block computes at a time, up to 256, which one copy of
        scales can have.
      tile_n: Columns, a multiple of 64 up to 256.
      consumers: Warpgroups that multiply, 1 to 3; each owns `tile_m / consumers` rows, a multiple
        of 64. One more warpgroup loads.
      stages: k-steps of operands in flight; fewer where shared memory or k end first.
      promote: k-steps of 128 between two moves of the tensor core's sum, which keeps about 14
        bits of FP8 products, into float32 registers; None: never. The warpgroups move theirs at
        different k-steps, so that the others multiply while one drains its sum.
      overlap: Promoted blocks that follow one another without draining: the sum of a block is
        added while the first product of the next is under way. It takes a second accumulator.
      multicast: Whether pairs of blocks compute two tiles side by side along n and read the rows
        of a that both need once.
    """

    tile_m: int = 128
    tile_n: int = 128
    consumers: int = 2
    stages: int = 4
    promote: int | None = 4
    overlap: int = 1
    multicast: bool = False

    def __post_init__(self):
        if not 1 <= self.consumers <= 3 or self.tile_m % (64 * self.consumers):
            raise ValueError(
                "scaled_matmul: tile_m must give each of 1 to 3 consumers a multiple of 64 rows,"
                f" got tile_m={self.tile_m}, consumers={self.consumers}."
            )
        if not 64 <= self.tile_m <= 256:
            raise ValueError(f"scaled_matmul: tile_m must be 64 to 256, got {self.tile_m}.")
        if self.tile_n % 64 or not 64 <= self.tile_n <= 256:
            raise ValueError(
                f"scaled_matmul: tile_n must be 64, 128, 192 or 256, got {self.tile_n}."
            )
        if self.promote is None and self.overlap > 1:
            raise ValueError(
                "scaled_matmul: overlap says how sums are promoted, got promote=None;"
                " pass promote=4 or leave it out."
            )
        if (self.promote is not None and self.promote < 1) or self.overlap < 1:
            raise ValueError(
                "scaled_matmul: promote and overlap must be 1 or more,"
                f" got promote={self.promote}, overlap={self.overlap}."
            )
        if self.stages < 2:
            raise ValueError(f"scaled_matmul: stages must be 2 or more, got {self.stages}.")


# What a block may have on an H100, less a kilobyte for barriers and alignment.
_SHARED_MEMORY_BYTES = 226 * 1024

# Every entry compiles without spilled registers, transform and mask included: a thread has 232
# registers, 160 with three consumers, for the sums, of which promotion holds two sets and `overlap`
# one more. Median microseconds on one H100, measured by `bench.py`, of the gradients 4096 x 4096 x
# 16384 and 2048 x 2048 x 16384: float32 results with scales, mask and Hadamard 32. XLA's products
# alone took 431 and 106 of FP8, 807 and 192 of bfloat16. `promote=8` gained nothing.
CONFIGS = {
    "fp8_192x128": Config(tile_m=192, consumers=3),  # 473, 129; for odd numbers of tiles along n
    "fp8_192x128_pairs": Config(tile_m=192, consumers=3, multicast=True),  # 442, 135
    "fp8_128x128": Config(stages=6, overlap=2),  # 456, 111.5; for small products
    "fp8_128x256_unpromoted": Config(tile_n=256, promote=None),  # 417, 105; no bands fitted
    "bf16_128x256": Config(tile_n=256, promote=None),
    "bf16_128x128": Config(stages=6, promote=None),
}

# By bytes of an element: entries and their speed at many tiles, relative to each other. Of 8 bits:
# by `_cost`, the times above are due to 0.99 and, of pairs, 1.07 for the larger product, 0.96 and
# 0.90 for the smaller; times of bfloat16 results of 16384 x 4096 x 4096, to 1.08 to 1.13 and 1.09
# to 1.15. The numbers lie between, and choose the fastest of the three for each of these shapes.
# Of 16 bits they are assumed.
_CHOICES = {
    1: (("fp8_192x128", 1.07), ("fp8_192x128_pairs", 1.1), ("fp8_128x128", 1.0)),
    2: (("bf16_128x256", 1.1), ("bf16_128x128", 1.0)),
}
# With fewer the tensor cores wait for copies.
_FEWEST_CHOSEN_STAGES = 3
# A block copies a row of 128 bytes into shared memory while it multiplies this many entries of a
# tile with a k-step, at the speed 1: 57 bytes a cycle were sustained, and 1 is 28 entries a cycle.
_ENTRIES_A_ROW = 64


@dataclasses.dataclass(frozen=True)
class Shares:
    """How a result is shared out among the blocks, or the pairs of blocks that multicast.

    The tiles of a last round that occupies a part of the blocks are cut along m into bands, the
    rows of single consumers, where there are blocks for all bands. A block multiplies one of them
    with one consumer; the results are the same.

    Attributes:
      tiles: Tiles, or pairs of tiles, along m and n; those at the end may reach beyond the result.
      whole: How many of them are computed whole.
      bands: Into how many bands the others are cut.
      slots: Blocks or pairs that run at a time.
    """

    tiles: tuple[int, int]
    whole: int
    bands: int
    slots: int


def share_out(m: int, n: int, config: Config) -> Shares:
    """Shares of an `(m, n)` result on this device."""
    pair = 2 if config.multicast else 1
    tiles = math.ceil(m / config.tile_m), math.ceil(n / (config.tile_n * pair))
    slots = max(num_sms() // pair, 1)
    rest = math.prod(tiles) % slots
    if rest * config.consumers > slots:
        rest = 0
    return Shares(tiles, math.prod(tiles) - rest, rest * config.consumers, slots)


def fitting_stages(config: Config, epilogue: Epilogue) -> int:
    """Stages that fit into shared memory beside the buffers of the epilogue."""
    stage_bytes = (config.tile_m + config.tile_n) * STEP_BYTES
    free = _SHARED_MEMORY_BYTES - epilogue.shared_bytes(config.tile_m, config.tile_n)
    return free // stage_bytes


def choose_config(m: int, n: int, dtype: DTypeLike, epilogue: Epilogue) -> Config:
    """The entry whose rounds of tiles take the least time on this device.

    Args:
      m: Rows of the output.
      n: Columns.
      dtype: Of the operands.
      epilogue: What follows the sums.

    Raises:
      NotImplementedError: If three stages of no entry fit into shared memory.
    """
    costs = []
    for name, speed in _CHOICES[jnp.dtype(dtype).itemsize]:
        config = CONFIGS[name]
        if fitting_stages(config, epilogue) >= _FEWEST_CHOSEN_STAGES:
            costs.append((_cost(share_out(m, n, config), config, speed), name))
    if not costs:
        raise NotImplementedError(
            f"scaled_matmul: no entry of CONFIGS has shared memory for {epilogue}; pass a config."
        )
    return CONFIGS[min(costs)[1]]


def _cost(shares, config, speed):
    """Time of a k-step of all rounds, as the entries that a block multiplies at the speed 1."""

    def cost(rows):
        return max(rows * config.tile_n / speed, _ENTRIES_A_ROW * (rows + config.tile_n))

    total = math.ceil(shares.whole / shares.slots) * cost(config.tile_m)
    return total + (cost(config.tile_m // config.consumers) if shares.bands else 0)


def with_epilogue(a, b, a_scales, b_scales, mask=None, *, config, out_dtype=jnp.bfloat16):
    """`scaled_matmul` as it is compiled and timed: a mask brings the inverse transform along."""
    from pallas_kernels.scaled_matmul.op import scaled_matmul  # which chooses among these schedules

    inverse_hadamard = None if mask is None else 32
    return scaled_matmul(
        a, b, a_scales, b_scales, mask=mask, inverse_hadamard=inverse_hadamard,
        out_dtype=out_dtype, config=config,
    )  # fmt: skip


def lowering_cases() -> Iterator[tuple[str, Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]]:
    """Every entry with all that it can do: name, function, arguments; the first also without.

    Operands of 8 bits are e5m2 with scalar scales, those of 16 have scales of rows. There are whole
    tiles, bands of others, and consumers without rows.
    """
    m, n, k = 2904, 3200, 16384

    def operands(dtype, *scale_shapes):
        values = (jax.ShapeDtypeStruct((rows, k), dtype) for rows in (m, n))
        return (*values, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in scale_shapes))

    mask = jax.ShapeDtypeStruct((n // 32, m), jnp.uint32)
    name, config = next(iter(CONFIGS.items()))
    e4m3_rows = operands(jnp.float8_e4m3fn, (m,), (n,))
    yield f"{name}, scales", functools.partial(with_epilogue, config=config), e4m3_rows
    for name, config in CONFIGS.items():
        if name.startswith("bf16"):
            args = (*operands(jnp.bfloat16, (m,), (n,)), mask)
        else:
            args = (*operands(jnp.float8_e5m2, (), ()), mask)
        yield name, functools.partial(with_epilogue, config=config), args
        gradient = functools.partial(with_epilogue, config=config, out_dtype=jnp.float32)
        yield f"{name}, float32", gradient, args

"""How the kernel of `scaled_matmul` is cut into tiles, and which cut a shape gets."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

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
      multicast: Blocks of a cluster that share an operand: "b" stacks two tiles along m, which
        read the same rows of b, "a" puts two side by side along n; None: no cluster.
      grid_width: Tiles along n that are visited before moving on along m, for the L2 cache.
    """

    tile_m: int = 128
    tile_n: int = 128
    consumers: int = 2
    stages: int = 4
    promote: int | None = 4
    overlap: int = 1
    multicast: Literal["a", "b"] | None = None
    grid_width: int = 8

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
# one more. Median microseconds on an H100, measured as `bench.py` does, at 16384 x 4096 x 4096 with
# scales / with mask and Hadamard 32 besides, where XLA's FP8 product without scales took 347; then
# at 4096 x 4096 x 16384 with all that and a float32 result. `promote=8` gained nothing.
CONFIGS = {
    "fp8_192x128": Config(tile_m=192, consumers=3),  # 379 / 407, 465
    "fp8_192x128_multicast": Config(tile_m=192, consumers=3, multicast="a"),  # 376 / 400
    "fp8_128x192": Config(tile_n=192),  # 402 / 457, 458
    "fp8_128x128": Config(stages=6, overlap=2),  # 414 / 462, 467; small products
    "fp8_128x256_unpromoted": Config(tile_n=256, promote=None),  # 374 / 372
    "bf16_128x256": Config(tile_n=256, promote=None),
    "bf16_128x128": Config(stages=6, promote=None),
}

# By bytes of an element: entries and their speed at many tiles, relative to each other. Of 8 bits
# 1.08 to 1.13 follows from the times above, each over the waves of tiles that it took; of bfloat16
# it is assumed.
_CHOICES = {
    1: (("fp8_192x128", 1.1), ("fp8_128x128", 1.0)),
    2: (("bf16_128x256", 1.1), ("bf16_128x128", 1.0)),
}
# With fewer the tensor cores wait for copies.
_FEWEST_CHOSEN_STAGES = 3


def fitting_stages(config: Config, epilogue: Epilogue) -> int:
    """Stages that fit into shared memory beside the buffers of the epilogue."""
    stage_bytes = (config.tile_m + config.tile_n) * STEP_BYTES
    free = _SHARED_MEMORY_BYTES - epilogue.shared_bytes(config.tile_m, config.tile_n)
    return free // stage_bytes


def choose_config(m: int, n: int, dtype: DTypeLike, epilogue: Epilogue) -> Config:
    """The entry whose waves of tiles take the least time on this device.

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
            tiles = math.ceil(m / config.tile_m) * math.ceil(n / config.tile_n)
            waves = math.ceil(tiles / num_sms())
            costs.append((waves * config.tile_m * config.tile_n / speed, name))
    if not costs:
        raise NotImplementedError(
            f"scaled_matmul: no entry of CONFIGS has shared memory for {epilogue}; pass a config."
        )
    return CONFIGS[min(costs)[1]]


def lowering_cases() -> Iterator[tuple[str, Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]]:
    """Every entry with scales, mask and transform, and alone: name, function, arguments."""
    from pallas_kernels.scaled_matmul.op import scaled_matmul

    m, n, k = 16384, 4096, 4096
    for name, config in CONFIGS.items():
        dtype = jnp.bfloat16 if name.startswith("bf16") else jnp.float8_e4m3fn
        operands = (jax.ShapeDtypeStruct((m, k), dtype), jax.ShapeDtypeStruct((n, k), dtype))
        scales = tuple(jax.ShapeDtypeStruct((rows,), jnp.float32) for rows in (m, n))
        mask = jax.ShapeDtypeStruct((n // 32, m), jnp.uint32)

        def plain(a, b, a_scales, b_scales, config=config):
            return scaled_matmul(a, b, a_scales, b_scales, config=config)

        def full(a, b, a_scales, b_scales, mask, config=config):
            return scaled_matmul(
                a, b, a_scales, b_scales, mask=mask, inverse_hadamard=32, config=config
            )

        yield name, plain, (*operands, *scales)
        yield f"{name}, mask and Hadamard", full, (*operands, *scales, mask)

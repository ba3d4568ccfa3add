"""Sums over k-steps in the kernel of `scaled_matmul`, in the tensor core or promoted from it."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.compat import plgpu


def plain_sums(config, k_steps, await_step, multiply, release):
    """The product over all k-steps in the tensor core.

    Args:
      config: Schedule.
      k_steps: How many.
      await_step: Function of a step that waits for its operands.
      multiply: Function of accumulator and step that adds their product.
      release: Function of a step that hands its operands back.

    Returns:
      `(rows, tile_n)` float32 of a consumer.
    """
    await_step(0)

    def run(accumulator):
        multiply(accumulator, 0)
        _multiply_more(await_step, multiply, release, accumulator, 1, k_steps)
        sums = accumulator[...]
        release(k_steps - 1)
        return sums

    return pl.run_scoped(run, _accumulator(config))


def _multiply_more(await_step, multiply, release, accumulator, start, stop):
    """Steps `start` to `stop` of a product under way; the last one's operands are not released."""

    @pl.loop(start, stop)
    def _(k):
        await_step(k)
        multiply(accumulator, k)
        plgpu.wgmma_wait(1)  # all but the product just started have read their operands
        release(k - 1)


def promoted_sums(config, k_steps, await_step, multiply, release, *, warpgroup):
    """Sums of blocks of at most `promote` steps, added in float32; arguments of `plain_sums`.

    The first block of warpgroup w has about `(w + 1/2) promote / consumers` steps, so that no two
    drain at the same step. `overlap` blocks make a chain: the sum of one is read when the first
    product of the next is under way, for reading waits for all but the newest.
    """
    first = lax.max((2 * warpgroup + 1) * config.promote // (2 * config.consumers), 1)
    blocks = 1 + pl.cdiv(k_steps - 1, config.promote)

    def end(block):  # leaves one step at least to each block behind
        return lax.min(first + block * config.promote, k_steps - (blocks - 1) + block)

    def chain(block, length, total, previous=None):
        start = lax.select(block == 0, 0, end(block - 1))
        stop = end(block)
        # Outside the scope of the accumulator: nothing is between its zeros and the product, so
        # that the compiler multiplies without zeros to begin with.
        await_step(start)

        def run(accumulator):
            multiply(accumulator, start)
            subtotal = total
            if previous is not None:
                subtotal = total + plgpu.wgmma_accumulator_load(previous, wait_n=1)
                release(start - 1)
            _multiply_more(await_step, multiply, release, accumulator, start + 1, stop)
            if length > 1:
                return chain(block + 1, length - 1, subtotal, accumulator)
            sums = accumulator[...]
            release(stop - 1)
            return subtotal + sums

        return pl.run_scoped(run, _accumulator(config))

    total = plgpu.layout_cast(jnp.zeros(_shape(config), jnp.float32), plgpu.Layout.WGMMA)
    chains, rest = divmod(blocks, config.overlap)
    total = lax.fori_loop(
        0, chains, lambda i, total: chain(i * config.overlap, config.overlap, total), total
    )
    return chain(jnp.int32(chains * config.overlap), rest, total) if rest else total


def _accumulator(config):
    return plgpu.ACC(_shape(config), jnp.float32)


def _shape(config):
    return config.tile_m // config.consumers, config.tile_n

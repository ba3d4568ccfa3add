"""The kernel of `scaled_matmul` for Hopper: warp-specialized, persistent, promoted sums."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.compat import launch, num_sms, plgpu, swizzled
from pallas_kernels.scaled_matmul.epilogue import epilogue_scratch, load_inputs, write_tile
from pallas_kernels.scaled_matmul.tuning import STEP_BYTES, Config, fitting_stages

# Registers a thread of consumers and producer, by number of consumers: the pool is 65536 of a
# multiprocessor, in steps of 8 a thread.
_REGISTERS = {1: (240, 32), 2: (232, 40), 3: (160, 32)}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes of one launch."""

    config: Config
    k_steps: int  # of `step` elements
    step: int
    tiles: tuple[int, int]  # clusters of tiles along m and n
    stages: int
    blocks: int  # thread blocks along the axis "sm"

    @property
    def rows(self) -> int:
        """Of a tile, computed by one consumer."""
        return self.config.tile_m // self.config.consumers


def matmul_kernel(a, b, a_scales, b_scales, mask, hadamard, *, epilogue, config, interpret):
    """`epilogue(a b^T)`; arguments are checked and padded by `scaled_matmul`.

    Args:
      a: `(m, k)`.
      b: `(n, k)`.
      a_scales: `(m,)` rounded up to whole tiles, float32, or None.
      b_scales: `(n,)` rounded up to whole tiles, float32, or None.
      mask: `(words, m)` rounded up to whole tiles, uint32, or None.
      hadamard: `(signs, side, side)` bfloat16 of `hadamard_operand`, or None.
      epilogue: What is done with the sums, an `Epilogue`.
      config: Schedule.
      interpret: Run on the CPU.

    Returns:
      `(m, n)`.
    """
    plan = _plan(a, b, epilogue, config)
    optional = {"a_scales": a_scales, "b_scales": b_scales, "mask": mask, "hadamard": hadamard}
    present = [name for name, array in optional.items() if array is not None]
    scratch = {
        "a_stages": swizzled((plan.stages, config.tile_m, plan.step), a.dtype),
        "b_stages": swizzled((plan.stages, config.tile_n, plan.step), b.dtype),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
        "empty": _empty_barrier(plan),
        **epilogue_scratch(epilogue, config, interpret),
    }

    def body(a_ref, b_ref, *refs):
        inputs = dict(zip(present, refs, strict=False))
        out, *rest = refs[len(present) :]
        shared = dict(zip(scratch, rest, strict=True))
        warpgroup = lax.axis_index("wg")

        @pl.when(warpgroup == config.consumers)
        def _():
            plgpu.set_max_registers(_REGISTERS[config.consumers][1], action="decrease")
            if epilogue.inverse_hadamard:
                plgpu.copy_gmem_to_smem(
                    inputs["hadamard"], shared["hadamard"], shared["hadamard_full"]
                )
            _produce(plan, epilogue, a_ref, b_ref, inputs, shared)

        @pl.when(warpgroup < config.consumers)
        def _():
            plgpu.set_max_registers(_REGISTERS[config.consumers][0], action="increase")
            if epilogue.inverse_hadamard:
                plgpu.barrier_wait(shared["hadamard_full"])
            _consume(plan, epilogue, warpgroup, out, shared)

    cluster = {}
    if config.multicast is not None:
        cluster = {"cluster": (2,), "cluster_names": ("pair",)}
    call = launch(
        body,
        name="scaled_matmul",
        out_type=jax.ShapeDtypeStruct((a.shape[0], b.shape[0]), epilogue.out_dtype),
        scratch_types=list(scratch.values()),
        grid=(plan.blocks,),
        grid_names=("sm",),
        num_threads=config.consumers + 1,
        interpret=interpret,
        **cluster,
    )
    return call(a, b, *(optional[name] for name in present))


def _plan(a, b, epilogue, config):
    (m, k), n = a.shape, b.shape[0]
    step = STEP_BYTES // a.dtype.itemsize
    k_steps = pl.cdiv(k, step)
    pair_m = 2 if config.multicast == "b" else 1
    pair_n = 2 if config.multicast == "a" else 1
    # Odd numbers of tiles are rounded up: copies outside the array are clipped.
    tiles = (pl.cdiv(m, config.tile_m * pair_m), pl.cdiv(n, config.tile_n * pair_n))
    stages = min(config.stages, k_steps, fitting_stages(config, epilogue))
    if stages < min(2, k_steps):
        raise NotImplementedError(
            f"scaled_matmul: two stages of {config} do not fit into shared memory beside"
            f" {epilogue}; choose smaller tiles."
        )
    blocks = min(num_sms() // (pair_m * pair_n), tiles[0] * tiles[1])
    return _Plan(config, k_steps, step, tiles, stages, blocks)


def _empty_barrier(plan):
    if plan.config.multicast is None:
        return plgpu.Barrier(num_arrivals=plan.config.consumers, num_barriers=plan.stages)
    return plgpu.ClusterBarrier(
        collective_axes=("pair",),
        num_arrivals=plan.config.consumers,
        num_barriers=plan.stages,
    )


def _stage(plan, step):
    """Where the operands of a step lie; unsigned, for the remainder takes fewer instructions."""
    stage = lax.rem(lax.convert_element_type(step, jnp.uint32), jnp.uint32(plan.stages))
    return lax.convert_element_type(stage, jnp.int32)


def _for_each_tile(plan):
    """Decorates `f(row, column, steps_before)`, run for every tile of this block."""
    config = plan.config

    def decorate(f):
        @plgpu.nd_loop((plan.tiles[0] * plan.tiles[1],), collective_axes="sm")
        def _(info):
            (index,) = info.index
            row, column = plgpu.planar_snake(index, plan.tiles, 1, config.grid_width)
            if config.multicast == "b":
                row = 2 * row + lax.axis_index("pair")
            elif config.multicast == "a":
                column = 2 * column + lax.axis_index("pair")
            f(row * config.tile_m, column * config.tile_n, info.local_index * plan.k_steps)

    return decorate


def _produce(plan, epilogue, a, b, inputs, shared):
    """Fills stage after stage, k-step by k-step of every tile, and what its epilogue reads."""
    config = plan.config
    has_inputs = "inputs_full" in shared

    @_for_each_tile(plan)
    def _(row, column, steps_before):
        @pl.loop(0, plan.k_steps)
        def _(k):
            stage = _stage(plan, steps_before + k)

            @pl.when(steps_before + k >= plan.stages)
            def _():
                plgpu.barrier_wait(shared["empty"].at[stage])

            columns = pl.ds(k * plan.step, plan.step)
            plgpu.copy_gmem_to_smem(
                a.at[pl.ds(row, config.tile_m), columns],
                shared["a_stages"].at[stage],
                shared["full"].at[stage],
                collective_axes="pair" if config.multicast == "a" else None,
            )
            plgpu.copy_gmem_to_smem(
                b.at[pl.ds(column, config.tile_n), columns],
                shared["b_stages"].at[stage],
                shared["full"].at[stage],
                collective_axes="pair" if config.multicast == "b" else None,
            )

        # Behind the operands: the consumers have left the tile before, or are about to.
        if has_inputs:

            @pl.when(steps_before > 0)
            def _():
                plgpu.barrier_wait(shared["inputs_empty"])

            load_inputs(epilogue, config, row, column, inputs, shared)

    # A block of a cluster must outlive the last arrival of its peer; and every phase of a barrier
    # is observed, as the interpreter demands.
    for stage in range(plan.stages):
        plgpu.barrier_wait(shared["empty"].at[stage])
    if has_inputs:
        plgpu.barrier_wait(shared["inputs_empty"])


def _consume(plan, epilogue, warpgroup, out, shared):
    """Multiplies this warpgroup's rows of every tile and writes them."""
    config = plan.config
    rows = pl.ds(warpgroup * plan.rows, plan.rows)
    if config.promote is None:
        sums = _plain_sums
    else:
        sums = functools.partial(_promoted_sums, warpgroup=warpgroup)

    @_for_each_tile(plan)
    def _(row, column, steps_before):
        def stage(k):
            return _stage(plan, steps_before + k)

        def await_step(k):
            plgpu.barrier_wait(shared["full"].at[stage(k)])

        def multiply(accumulator, k):
            a = shared["a_stages"].at[stage(k), rows]
            plgpu.wgmma(accumulator, a, shared["b_stages"].at[stage(k)].T)

        def release(k):
            plgpu.barrier_arrive(shared["empty"].at[stage(k)])

        total = sums(plan, await_step, multiply, release)
        write_tile(
            epilogue,
            total,
            row + warpgroup * plan.rows,
            column,
            out,
            shared,
            warpgroup,
        )

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _plain_sums(plan, await_step, multiply, release):
    """The product over all k-steps in the tensor core."""
    await_step(0)

    def run(accumulator):
        multiply(accumulator, 0)
        _multiply_more(await_step, multiply, release, accumulator, 1, plan.k_steps)
        sums = accumulator[...]
        release(plan.k_steps - 1)
        return sums

    return pl.run_scoped(run, _accumulator(plan))


def _multiply_more(await_step, multiply, release, accumulator, start, stop):
    """Steps `start` to `stop` of a product under way; the last one's operands are not released."""

    @pl.loop(start, stop)
    def _(k):
        await_step(k)
        multiply(accumulator, k)
        plgpu.wgmma_wait(1)  # all but the product just started have read their operands
        release(k - 1)


def _promoted_sums(plan, await_step, multiply, release, *, warpgroup):
    """Sums of blocks of at most `promote` steps, added in float32.

    The first block of warpgroup w has about `(w + 1/2) promote / consumers` steps, so that no two
    drain at the same step. `overlap` blocks make a chain: the sum of one is read when the first
    product of the next is under way, for reading waits for all but the newest.
    """
    config, steps = plan.config, plan.k_steps
    first = lax.max((2 * warpgroup + 1) * config.promote // (2 * config.consumers), 1)
    blocks = 1 + pl.cdiv(steps - 1, config.promote)

    def end(block):  # leaves one step at least to each block behind
        return lax.min(first + block * config.promote, steps - (blocks - 1) + block)

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

        return pl.run_scoped(run, _accumulator(plan))

    chains, rest = divmod(blocks, config.overlap)
    total = plgpu.layout_cast(
        jnp.zeros((plan.rows, config.tile_n), jnp.float32), plgpu.Layout.WGMMA
    )
    total = lax.fori_loop(
        0, chains, lambda i, total: chain(i * config.overlap, config.overlap, total), total
    )
    return chain(jnp.int32(chains * config.overlap), rest, total) if rest else total


def _accumulator(plan):
    return plgpu.ACC((plan.rows, plan.config.tile_n), jnp.float32)

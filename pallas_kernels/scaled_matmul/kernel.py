"""The kernel of `scaled_matmul` for Hopper: warp-specialized, persistent, promoted sums."""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.compat import launch, plgpu, swizzled
from pallas_kernels.scaled_matmul.epilogue import (
    epilogue_scratch,
    leave_inputs,
    load_inputs,
    scalar_factor,
    write_tile,
)
from pallas_kernels.scaled_matmul.plan import for_each_tile, plan_launch, stage_of
from pallas_kernels.scaled_matmul.sums import plain_sums, promoted_sums

# Registers a thread of consumers and producer, by number of consumers: the pool is 65536 of a
# multiprocessor, in steps of 8 a thread.
_REGISTERS = {1: (240, 32), 2: (232, 40), 3: (160, 32)}


def matmul_kernel(a, b, a_scales, b_scales, mask, hadamard, *, epilogue, config, interpret):
    """`epilogue(a b^T)`; arguments are checked and padded by `scaled_matmul`.

    Args:
      a: `(m, k)`.
      b: `(n, k)`.
      a_scales: `(m,)` or `(1,)` float32, or None.
      b_scales: `(n,)` or `(1,)` float32, or None.
      mask: `(words, m)` uint32, or None.
      hadamard: `(signs, side, side)` bfloat16 of `hadamard_operand`, or None.
      epilogue: What is done with the sums, an `Epilogue`.
      config: Schedule.
      interpret: Run on the CPU.

    Returns:
      `(m, n)`.
    """
    plan = plan_launch(a, b, epilogue, config)
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
            _consume(plan, epilogue, warpgroup, inputs, out, shared)

    cluster = {}
    if config.multicast:
        cluster = {"cluster": (2,), "cluster_names": ("pair",)}
    call = launch(
        body,
        name="scaled_matmul",
        out_type=jax.ShapeDtypeStruct((a.shape[0], b.shape[0]), epilogue.out_dtype),
        scratch_types=list(scratch.values()),
        grid=(min(plan.items, plan.shares.slots),),
        grid_names=("sm",),
        num_threads=config.consumers + 1,
        interpret=interpret,
        **cluster,
    )
    return call(a, b, *(optional[name] for name in present))


def _empty_barrier(plan):
    if not plan.config.multicast:
        return plgpu.Barrier(num_arrivals=plan.config.consumers, num_barriers=plan.stages)
    return plgpu.ClusterBarrier(
        collective_axes=("pair",),
        num_arrivals=plan.config.consumers,
        num_barriers=plan.stages,
    )


def _produce(plan, epilogue, a, b, inputs, shared):
    """Fills stage after stage, k-step by k-step of every tile, and what its epilogue reads."""
    config = plan.config
    has_inputs = "inputs_full" in shared

    def copy_a(row, columns, stage, rows):
        plgpu.copy_gmem_to_smem(
            a.at[pl.ds(row + rows.start, rows.size), columns],
            shared["a_stages"].at[stage, rows],
            shared["full"].at[stage],
            collective_axes="pair" if config.multicast else None,
        )

    @for_each_tile(plan)
    def _(row, column, band, steps_before):
        @pl.loop(0, plan.k_steps)
        def _(k):
            stage = stage_of(plan, steps_before + k)

            @pl.when(steps_before + k >= plan.stages)
            def _():
                plgpu.barrier_wait(shared["empty"].at[stage])

            columns = pl.ds(k * plan.step, plan.step)
            copy_whole = functools.partial(copy_a, row, columns, stage, pl.ds(0, config.tile_m))
            if band is None:
                copy_whole()
            else:
                rows = pl.ds(band * plan.rows, plan.rows)
                copy_band = functools.partial(copy_a, row, columns, stage, rows)
                lax.cond(band < 0, copy_whole, copy_band)
            plgpu.copy_gmem_to_smem(
                b.at[pl.ds(column, config.tile_n), columns],
                shared["b_stages"].at[stage],
                shared["full"].at[stage],
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


def _consume(plan, epilogue, warpgroup, inputs, out, shared):
    """Multiplies this warpgroup's rows of every tile and writes them."""
    config = plan.config
    rows = pl.ds(warpgroup * plan.rows, plan.rows)
    if config.promote is None:
        sums = plain_sums
    else:
        sums = functools.partial(promoted_sums, warpgroup=warpgroup)
    factor = scalar_factor(epilogue, inputs)

    @for_each_tile(plan)
    def _(row, column, band, steps_before):
        own_row = row + warpgroup * plan.rows

        def stage(k):
            return stage_of(plan, steps_before + k)

        def await_step(k):
            plgpu.barrier_wait(shared["full"].at[stage(k)])

        def multiply(accumulator, k):
            a = shared["a_stages"].at[stage(k), rows]
            plgpu.wgmma(accumulator, a, shared["b_stages"].at[stage(k)].T)

        def release(k):
            plgpu.barrier_arrive(shared["empty"].at[stage(k)])

        def work():
            total = sums(config, plan.k_steps, await_step, multiply, release)
            write_tile(epilogue, total, own_row, column, factor, out, shared, warpgroup)

        def pass_by():
            @pl.loop(0, plan.k_steps)
            def _(k):
                await_step(k)
                release(k)

            leave_inputs(shared)

        if plan.has_idle_consumers:
            is_chosen = True if band is None else (band < 0) | (band == warpgroup)
            lax.cond(is_chosen & (own_row < plan.m), work, pass_by)
        else:
            work()

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

"""The state that a run starts from, and where it lies: drawn, restored or branched off."""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from lowbit_jax.analysis.speed_of_light import run_speed_of_light
from lowbit_jax.models import flops_by_part, logical_axes
from lowbit_jax.ops import explain
from lowbit_jax.train.branch import branch_off
from lowbit_jax.train.checkpoint import restore_latest
from lowbit_jax.train.config import Config, RunOptions, UsageError
from lowbit_jax.train.gradient_exchange import parse_exchange
from lowbit_jax.train.offload import NONE, draw_slowly, offloading_placement
from lowbit_jax.train.phase import Phase
from lowbit_jax.train.placement import Placement, make_placement
from lowbit_jax.train.run_directory import RunDirectory
from lowbit_jax.train.state import TrainState, create_state
from lowbit_jax.train.summary import describe_model, paths_table


def draw_state(config: Config, key: PRNGKeyArray) -> TrainState:
    """The state before the first step, its weights freshly drawn."""
    tokens = np.zeros((1, config.seq_len), np.int32)
    params = nn.meta.unbox(config.model.init(key, tokens)["params"])
    return create_state(params, config.optimizer, config.store)


def place_run(
    config: Config,
    mesh: Mesh,
    zero: int,
    offload: str = "none",
    gradient_exchange: str = "exact",
) -> Placement:
    """Where everything of a run lies on several devices, or in the host's memory.

    Raises:
      UsageError: If the state cannot lie so, or `offload` refuses what is to be offloaded.
    """
    model = config.model.config
    try:
        state = jax.eval_shape(lambda key: draw_state(config, key), jax.random.key(0))
        placement = make_placement(
            state,
            logical_axes(config.model),
            mesh,
            zero,
            pieces={"heads": model.n_heads, "kv_heads": model.kv_heads},
            micro_batches=config.micro_batches,
            exchange=parse_exchange(gradient_exchange),
        )
        return placement if offload == NONE else offloading_placement(placement, state, offload)
    except ValueError as error:
        raise UsageError(str(error)) from error


def state_shapes(config: Config, placement: Placement | None) -> TrainState:
    """Shapes, dtypes and shardings of the state, on one device without a placement."""
    shapes = jax.eval_shape(lambda key: draw_state(config, key), jax.random.key(0))
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: single, shapes) if placement is None else placement.state
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )


def initial_state(
    config: Config,
    run: RunDirectory,
    options: RunOptions,
    phases: Sequence[Phase],
    placement: Placement | None,
    say: Callable[[str], None],
) -> TrainState:
    """The newest undamaged checkpoint, that of another run, or freshly drawn weights.

    Says beforehand what will be trained, and by which paths.

    Args:
      config: Of the run.
      run: Its folder.
      options: Its options.
      phases: Their steps are traced, so that a recipe refuses shapes before anything is compiled.
      placement: Of the state on several devices.
      say: Prints a line.

    Raises:
      UsageError: If a recipe refuses the shapes, or the checkpoints do not fit or are damaged.
    """

    def warn(text: str) -> None:
        say(f"warning: {text}")

    # A key that no step has: those are folded with step numbers.
    key = jax.random.fold_in(jax.random.key(config.seed), 2**32 - 1)
    # Placed explicitly, as a restored state is: otherwise the step would compile twice. And each
    # part is drawn where it lies: no device holds a state that is cut as a whole.
    places = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if placement is not None:
        places = placement.state
    draw = functools.partial(draw_state, config)
    create = jax.jit(draw, out_shardings=places)
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), np.int32)
    try:
        if placement is not None:
            say(f"{placement.table}\n")
        say(describe_model(config))
        target = state_shapes(config, placement)
        for phase in phases:
            traced = phase.train_step.trace(target, (tokens, tokens))  # or a recipe refuses
            explanation = explain(traced)
            for line in paths_table(explanation):
                say(line)
            flops = flops_by_part(config.model.config, config.seq_len)
            device_kind = jax.devices()[0].device_kind
            phase.light = run_speed_of_light(flops, device_kind, explanation)
            if phase.light is not None:
                say(f"speed of light, a device: {phase.light}")
        restored = restore_latest(run.checkpoints, target, warn=warn)
        if restored is None and options.branch_from is not None:
            state = branch_off(
                run, options.branch_from, target, steps=config.steps, save=options.save, warn=warn
            )
            say(f"branching off from {options.branch_from} after step {int(state.step)}")
            return state
    except ValueError as error:
        raise UsageError(str(error)) from error
    if restored is None:
        is_offloaded = placement is not None and placement.offload != NONE
        return draw_slowly(draw, key, places) if is_offloaded else create(key)
    state, _ = restored
    say(f"resuming {run.path} after step {int(state.step)}")
    return state

"""The memory of a training step on an H100, by its compiler, on a machine without a GPU.

Needed are the wheels that `pallas_kernels/aot.py` names. Attention is XLA's, since cuDNN's kernels
do not compile without a GPU: its scores, of one layer under recompute "block", are what a GPU would
not hold.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from lowbit_jax.bench.memory_case import Case, case_config
from lowbit_jax.models import Llama
from lowbit_jax.train.phase import Phase
from lowbit_jax.train.start import place_run, state_shapes
from pallas_kernels.aot import H100


def lower_step(case: Case, implementation: str | None = None) -> jax.stages.Lowered:
    """The training step of a case, lowered for one H100 that may read the host's memory.

    Args:
      case: What would be measured on a GPU.
      implementation: Of quantized products; None would be chosen for this machine's device.
    """
    config, options = case_config(case)
    model = dataclasses.replace(config.model.config, attention="xla", implementation=implementation)
    config = dataclasses.replace(config, model=Llama(model))
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
    # Abstract: of devices that are only described, shardings forget the kind of memory.
    mesh: Any = AbstractMesh(
        (1, 1, 1), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, abstract_device=device
    )
    with jax.sharding.use_abstract_mesh(mesh):
        placement = place_run(config, mesh, options.zero, options.offload)
        phase = Phase(config, 0, config.model, placement)
        state = state_shapes(config, placement)
        tokens = jax.ShapeDtypeStruct(
            (config.batch_size, config.seq_len), np.int32, sharding=placement.batch
        )
        traced = phase.train_step.trace(state, (tokens, tokens))
        return traced.lower(lowering_platforms=("cuda",))


def compile_step(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The step of `lower_step` as a program for an H100: `memory_analysis()` and `as_text()`."""
    topology = topologies.get_topology_desc(
        topology_name="h100", platform="cuda", target_config=H100, topology="1x1x1"
    )
    device: Any = topology.devices[0]
    # Lowering took the compiler of this machine's device; there is no public way to name another.
    lowering: Any = lowered._lowering
    lowering.compile_args["backend"] = device.client
    return lowered.compile(device_assignment=(device,))

"""Many devices: meshes, and where the arrays of a training run lie on them."""

from lowbit_jax.parallel.collectives import quantized_all_gather, quantized_reduce_scatter
from lowbit_jax.parallel.endings import run_together, telling_others
from lowbit_jax.parallel.mesh import BATCH_AXES, MESH_AXES, batch_sharding, make_mesh, parse_mesh
from lowbit_jax.parallel.processes import find_cluster, join_processes
from lowbit_jax.parallel.sharding import (
    ZERO_STAGES,
    Layout,
    Parameter,
    ZeroStage,
    constrain,
    device_bytes,
    gather,
    make_layout,
    parameters_of,
    shardings,
)
from lowbit_jax.parallel.table import ShardingRow, ShardingTable, sharding_table
from lowbit_jax.parallel.together import is_first, on_each, on_first

__all__ = [
    "BATCH_AXES",
    "MESH_AXES",
    "ZERO_STAGES",
    "Layout",
    "Parameter",
    "ShardingRow",
    "ShardingTable",
    "ZeroStage",
    "batch_sharding",
    "constrain",
    "device_bytes",
    "find_cluster",
    "gather",
    "is_first",
    "join_processes",
    "make_layout",
    "make_mesh",
    "on_each",
    "on_first",
    "parameters_of",
    "parse_mesh",
    "quantized_all_gather",
    "quantized_reduce_scatter",
    "run_together",
    "sharding_table",
    "shardings",
    "telling_others",
]

"""Many devices: meshes, and where the arrays of a training run lie on them."""

from lowbit_jax.parallel.collectives import quantized_all_gather, quantized_reduce_scatter
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
    "join_processes",
    "make_layout",
    "make_mesh",
    "parameters_of",
    "parse_mesh",
    "quantized_all_gather",
    "quantized_reduce_scatter",
    "sharding_table",
    "shardings",
]

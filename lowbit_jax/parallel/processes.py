"""Several processes as one program: who takes part, found out or told.

For loops of your own; `lowbit_jax.train` runs in one process so far.
"""

import os
from collections.abc import Mapping
from typing import Literal

import jax

Cluster = Literal["slurm", "ompi", "mpi4py"]  # JAX's names for its ways to find out

# Seconds after which a process that says nothing counts as dead, and all others end.
HEARTBEAT_S = 30


def find_cluster(environment: Mapping[str, str] = os.environ) -> Cluster | None:
    """What has started this process as one of several, or None if it is alone.

    SLURM's `srun` with more than one task, or Open MPI's `mpirun` likewise (version 5 takes the
    package mpi4py). A shell that SLURM has given several tasks, but without `srun`, is one process.
    Kubernetes is not looked for: its jobs pass what they know to `join_processes`.
    """
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        return "slurm"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "ompi" if "OMPI_MCA_orte_hnp_uri" in environment else "mpi4py"
    return None


def join_processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Makes `jax.devices()` those of all processes; does nothing where there is one.

    To be called before anything else of JAX. A process that says nothing for `HEARTBEAT_S` counts
    as dead, and ends the others with an error.

    Args:
      coordinator: `host:port` of process 0, the same for all; None, like the two others: what
        `find_cluster` finds.
      num_processes: How many there are.
      process_id: Which this is, from 0.
      environment: Variables to find out by.

    Raises:
      ValueError: If some of the three are given and some not, or they contradict each other.
      RuntimeError: If the others cannot be reached.
    """
    given = (coordinator, num_processes, process_id)
    if all(value is None for value in given):
        cluster = find_cluster(environment)
        if cluster is not None:
            jax.distributed.initialize(
                cluster_detection_method=cluster, heartbeat_timeout_seconds=HEARTBEAT_S
            )
        return
    if coordinator is None or num_processes is None or process_id is None:
        raise ValueError(
            "join_processes: coordinator, num_processes and process_id come together, got"
            f" {coordinator}, {num_processes}, {process_id}; pass all three, or none under SLURM"
            " or Open MPI."
        )
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdigit()):
        raise ValueError(
            f"join_processes: coordinator must be host:port of process 0, got {coordinator!r}."
        )
    if not 0 <= process_id < num_processes:  # none is, where there are no processes
        raise ValueError(
            "join_processes: num_processes must be at least 1 and process_id below it, got"
            f" {num_processes} and {process_id}; number the processes from 0 on."
        )
    if num_processes > 1:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_S
        )

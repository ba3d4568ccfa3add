"""Several processes as one program: who takes part, found out or told."""

import os
from collections.abc import Mapping
from typing import Literal

import jax

Cluster = Literal["slurm", "ompi", "mpi4py", "k8s"]  # JAX's names for its ways to find out

# Seconds after which a process that says nothing counts as dead, and all others end.
HEARTBEAT_S = 30


def find_cluster(environment: Mapping[str, str] = os.environ) -> Cluster | None:
    """What has started this process as one of several, or None if it is alone.

    SLURM's `srun` with more than one task, Open MPI's `mpirun` likewise (version 5 takes the
    package mpi4py), or an indexed Kubernetes Job (which takes the package kubernetes and the right
    to read pods). A shell that SLURM has given several tasks, but without `srun`, is one process.
    """
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        return "slurm"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "ompi" if "OMPI_MCA_orte_hnp_uri" in environment else "mpi4py"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "k8s"
    return None


def join_processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Makes `jax.devices()` those of all processes; does nothing where there is one.

    To be called before anything else of JAX. If one process dies, the others end with an error
    within a minute: `HEARTBEAT_S` after it was heard of last.

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
            f" {coordinator}, {num_processes}, {process_id}; pass all three, or none under SLURM,"
            " Open MPI or Kubernetes."
        )
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdigit()):
        raise ValueError(
            f"join_processes: coordinator must be host:port of process 0, got {coordinator!r}."
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"join_processes: process_id must be 0 to {num_processes - 1} for num_processes="
            f"{num_processes}, got {process_id}; processes count from 0."
        )
    if num_processes > 1:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_S
        )

"""Several processes as one program: who takes part, found out or told.

All of them run the same program on the same arguments, each with devices of its own, and
`jax.devices()` are those of all. What they tell each other is in `together`, how they end in
`endings`.
"""

import os
from collections.abc import Mapping
from typing import Any, Literal

import jax

from lowbit_jax.parallel.endings import end_with_the_others

Cluster = Literal["slurm", "ompi", "mpi4py"]  # JAX's names for its ways to find out

# Seconds after which a process that says nothing counts as dead, and all others end.
HEARTBEAT_S = 30


def find_cluster(environment: Mapping[str, str] = os.environ) -> Cluster | None:
    """What has started this process as one of several, or None if it is alone.

    SLURM's `srun` with more than one task, or Open MPI's `mpirun` likewise (version 5 takes the
    package mpi4py). A shell that SLURM has given several tasks, but without `srun`, is one process.
    """
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        return "slurm"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "ompi" if "OMPI_MCA_orte_hnp_uri" in environment else "mpi4py"
    return None


def find_values(environment: Mapping[str, str] = os.environ) -> tuple[str, int, int] | None:
    """Coordinator, number of processes and number of this one, as the environment says them.

    `JAX_COORDINATOR_ADDRESS` and `JAX_NUM_PROCESSES` with `JAX_PROCESS_ID`, in the place of which
    Kubernetes gives `JOB_COMPLETION_INDEX` to each pod of an indexed job. None if one is missing.

    Raises:
      ValueError: If a number is none.
    """
    process = environment.get("JAX_PROCESS_ID", environment.get("JOB_COMPLETION_INDEX"))
    coordinator = environment.get("JAX_COORDINATOR_ADDRESS")
    processes = environment.get("JAX_NUM_PROCESSES")
    if coordinator is None or processes is None or process is None:
        return None
    if not (processes.isdecimal() and process.isdecimal()):
        raise ValueError(
            "join_processes: JAX_NUM_PROCESSES and JAX_PROCESS_ID (or JOB_COMPLETION_INDEX) must be"
            f" numbers, got {processes!r} and {process!r}; mend the environment or unset them."
        )
    return coordinator, int(processes), int(process)


def join_processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Makes `jax.devices()` those of all processes; does nothing where there is one.

    To be called before anything else of JAX. A process that says nothing for `HEARTBEAT_S` counts
    as dead, and JAX aborts the others; one that fails ends them at once (`run_together`).

    Args:
      coordinator: `host:port` of process 0, the same for all; None, like the two others: what
        `find_values` or else `find_cluster` finds.
      num_processes: How many there are.
      process_id: Which this is, from 0.
      environment: Variables to find out by.

    Raises:
      ValueError: If some of the three are given and some not, or they contradict each other.
      RuntimeError: If the others cannot be reached.
    """
    given = (coordinator, num_processes, process_id)
    if all(value is None for value in given) and (found := find_values(environment)) is not None:
        coordinator, num_processes, process_id = found
    elif all(value is None for value in given):
        cluster = find_cluster(environment)
        if cluster is not None:
            _join(cluster_detection_method=cluster)
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
    if not 0 <= process_id < num_processes:  # none is, where there are no processes
        raise ValueError(
            "join_processes: num_processes must be at least 1 and process_id below it, got"
            f" {num_processes} and {process_id}; number the processes from 0 on."
        )
    if num_processes > 1:
        _join(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            # Only there has JAX something to add: which device each task of a machine takes.
            cluster_detection_method=None if find_cluster(environment) else "deactivate",
        )


def _join(**how: Any) -> None:
    # Its handler of SIGTERM would keep the signal from the program.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(**how, heartbeat_timeout_seconds=HEARTBEAT_S)
    end_with_the_others()

import dataclasses
import inspect
import pathlib
import re
import typing

import pytest
import yaml

from lowbit_jax.parallel import processes
from lowbit_jax.parallel.processes import Cluster, find_cluster, find_values, join_processes
from lowbit_jax.train import RunOptions

SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_NTASKS": "4"}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}

# Each process has two devices with the numbers of its own; all add up all.
PROGRAM = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from lowbit_jax.parallel.processes import join_processes
join_processes(sys.argv[1], 2, int(sys.argv[2]))
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
own = np.arange(2, dtype=np.float32) + 10 * jax.process_index()
x = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("data")), own)
total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))(x)
print(f"process {jax.process_index()} of {jax.process_count()}: {float(total)}")
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (SRUN, "slurm"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script, no srun
        (MPIRUN | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:34911"}, "ompi"),
        (MPIRUN, "mpi4py"),
        (MPIRUN | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ],
)
def test_what_started_the_processes_is_found(environment, expected):
    assert find_cluster(environment) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1234", 2), "come together"),
        (("localhost", 2, 0), "must be host:port"),
        (("localhost:1234", 2, 2), "process_id below it"),
        (("localhost:1234", 0, 0), "num_processes must be at least 1"),
    ],
)
def test_contradictions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        join_processes(*arguments)


KUBERNETES = {"JAX_COORDINATOR_ADDRESS": "a-0-0.a:8476", "JAX_NUM_PROCESSES": "2"}


def test_what_a_pod_is_told_is_found():
    assert find_values({}) is None
    assert find_values(KUBERNETES) is None  # which of them?
    assert find_values({**KUBERNETES, "JOB_COMPLETION_INDEX": "1"}) == ("a-0-0.a:8476", 2, 1)
    told = {**KUBERNETES, "JOB_COMPLETION_INDEX": "1", "JAX_PROCESS_ID": "0"}
    assert find_values(told) == ("a-0-0.a:8476", 2, 0)
    with pytest.raises(ValueError, match="process_id below it"):
        join_processes(environment={**KUBERNETES, "JOB_COMPLETION_INDEX": "2"})
    with pytest.raises(ValueError, match=r"JAX_NUM_PROCESSES .* must be numbers, got 'two'"):
        join_processes(environment={**told, "JAX_NUM_PROCESSES": "two"})


@pytest.mark.parametrize(("environment", "method"), [({}, "deactivate"), (SRUN, None)])
def test_only_a_launcher_is_asked_for_what_else_there_is(monkeypatch, environment, method):
    asked = {}
    monkeypatch.setattr(processes, "_join", lambda **how: asked.update(how))
    join_processes("a:1", 2, 0, environment=environment)
    assert asked["cluster_detection_method"] == method


def test_the_names_are_those_of_jax():
    from jax._src import clusters

    known = {cluster.name for cluster in clusters.ClusterEnv._cluster_types}
    assert known >= set(typing.get_args(Cluster))


def test_the_guide_names_the_variables_that_are_read():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "guides" / "cluster.md").read_text()
    source = inspect.getsource(processes)
    names = set(re.findall(r"\b(?:SLURM|OMPI|JAX|JOB)_[A-Z_]+\b", page))
    assert len(names) > 5
    for name in names:
        assert name in source, name
    (jobset,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    jobset = yaml.safe_load(jobset)
    (workers,) = jobset["spec"]["replicatedJobs"]
    job, name = workers["template"]["spec"], jobset["metadata"]["name"]
    (container,) = job["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    for index in range(job["completions"]):  # as Kubernetes gives it to indexed jobs
        found = find_values({**environment, "JOB_COMPLETION_INDEX": str(index)})
        assert found == (f"{name}-{workers['name']}-0-0.{name}:8476", job["parallelism"], index)
    assert job["completionMode"] == "Indexed"
    arguments = container["command"][3:]
    options = {field.name for field in dataclasses.fields(RunOptions)} | {"data"}
    assert {a.split("=")[0][2:].replace("-", "_") for a in arguments} <= options


def test_one_process_needs_no_others():
    join_processes(environment={})
    join_processes("localhost:1", 1, 0)


def test_two_processes_see_the_devices_of_both(run_two):
    for index, ended in enumerate(run_two(PROGRAM, devices=2)):
        assert ended.code == 0, ended.err
        assert ended.out.splitlines()[-1] == f"process {index} of 2: 22.0"

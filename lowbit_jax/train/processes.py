"""What a run in several processes needs beside its mesh: one start, one folder and one end."""

import collections
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowbit_jax.parallel import on_each, on_first
from lowbit_jax.train.config import Config, RunIdentity, RunOptions, UsageError
from lowbit_jax.train.interrupts import StopRequest
from lowbit_jax.train.run_directory import RunDirectory, open_run_directory
from lowbit_jax.train.summary import Summary, load_summary

# Polls until a request to stop has reached all: as many as the loop lets steps be on the device.
_LAG = 2
# A network file system may take so long to show a new file to another machine.
_SEEN_S = 60.0


def check_alike(identity: RunIdentity, config: Config, options: RunOptions) -> None:
    """Whether all processes were started on the same arguments and data.

    To be called before anything else that they do together: what they exchange, and how often,
    follows from these.

    Raises:
      UsageError: In all processes, if not; it names one that differs, and in what.
    """
    said = {
        "arguments": identity.arguments,
        "config file": identity.source,
        "model": config.model.config,
        "data": config.data.fingerprint,
        "JAX": jax.__version__,
        **{
            f"--{field.name.replace('_', '-')}": getattr(options, field.name)
            for field in dataclasses.fields(options)
            if field.name not in ("coordinator", "processes", "process")  # they have met
        },
    }
    heard = on_each(lambda: {name: str(value) for name, value in said.items()})
    for number, other in enumerate(heard):
        differences = [name for name in said if other[name] != heard[0][name]]
        if differences:
            raise UsageError(
                "train: all processes must be started alike, and process"
                f" {number} differs from process 0 in {', '.join(differences)}; compare their"
                " command lines, data and versions."
            )


def check_mesh(mesh: Mesh | None) -> None:
    """Whether a mesh has the devices of all processes.

    Raises:
      UsageError: If not.
    """
    processes, devices = jax.process_count(), jax.device_count()
    if processes > 1 and (mesh is None or mesh.size != devices):
        raise UsageError(
            f"--mesh must have all {devices} devices of the {processes} processes, got"
            f" {1 if mesh is None else mesh.size}; {devices}x1x1 for example."
        )


@contextlib.contextmanager
def open_together(
    identity: RunIdentity,
    config: Config,
    options: RunOptions,
    warn: Callable[[str], None] = lambda text: None,
) -> Iterator[RunDirectory]:
    """Opens the folder of a run for all processes, checked and locked by the first of them.

    Args:
      identity: Of the run.
      config: Of the run.
      options: Of the run.
      warn: As in `open_run_directory`.

    Yields:
      The folder; in it a `summary.json` if the run is finished.

    Raises:
      UsageError: In all processes: as in `open_run_directory`; if the data are not those from
        before; if no checkpoint could be written; if a process does not see the folder.
    """
    with contextlib.ExitStack() as stack:

        def open_first() -> tuple[str, str | None]:
            run = stack.enter_context(
                open_run_directory(
                    identity,
                    options.run_dir,
                    fresh=options.fresh,
                    branch_from=options.branch_from,
                    warn=warn,
                )
            )
            opened.append(run)
            if not (run.path / "summary.json").exists():
                run.check_data(config.data.fingerprint)
                if options.save:
                    run.check_writable()
            return str(run.path.absolute()), run.mark

        opened: list[RunDirectory] = []
        path, mark = on_first(open_first, UsageError, OSError)
        run = opened[0] if opened else RunDirectory(pathlib.Path(path), None)
        if jax.process_count() > 1:
            on_each(lambda: _check_shared(run, mark), UsageError)
        yield run


def find_finished(run: RunDirectory) -> Summary | None:
    """The summary of a finished run as the first process sees it; None while it is not finished."""

    def find() -> dict[str, Any] | None:
        found = load_summary(run.path)
        return None if found is None else dataclasses.asdict(found)

    found = on_first(find, OSError)
    return None if found is None else Summary(**found)


class SharedStopRequest(StopRequest):
    """A request that all processes see at the same `poll`, whichever of them got the signal.

    Each `poll` starts a maximum over all processes and tells that of `_LAG` polls before: the
    numbers travel along with the steps, and nobody waits for them.
    """

    def __init__(self, own: StopRequest, mesh: Mesh):
        """`own`: what signals have asked this process for; `mesh`: of all processes."""
        super().__init__()
        self._own = own
        self._place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._maximum = jax.jit(jnp.max, out_shardings=everywhere)
        self._asked: collections.deque[jax.Array] = collections.deque()

    def poll(self) -> bool:
        """To be called by all processes equally often; the first to answer True does so in all."""
        numbers = np.full(len(self._place.addressable_devices), self._own.number, np.int32)
        shared = jax.make_array_from_process_local_data(self._place, numbers)
        self._asked.append(self._maximum(shared))
        if len(self._asked) > _LAG:
            self.number = self.number or int(self._asked.popleft())
        return bool(self)


def _check_shared(run: RunDirectory, mark: str | None) -> None:
    """Whether this process sees the folder that the first one has opened and marked."""
    give_up = time.monotonic() + _SEEN_S
    while (seen := run.mark) != mark:
        if time.monotonic() > give_up:
            found = "does not" if seen is None else "sees another one, which does not"
            raise UsageError(
                f"run directory: all processes must see the folder {run.path} of the first"
                f" one, and this one {found}; choose a --run-dir on a file system that all"
                " machines share, under the same path."
            )
        time.sleep(0.5)

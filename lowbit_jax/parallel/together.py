"""What several processes decide as one: files are written by the first, errors raised in all.

Each function is called by all processes, in the same order; in a program of one process it just
calls its argument. A process that does not come keeps the others waiting until `endings` ends them.
"""

import json
import platform
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def on_first(function: Callable[[], Any], *errors: type[Exception]) -> Any:
    """Calls `function` in the first process; what it returns or raises, all return or raise.

    Args:
      function: Its result must survive JSON.
      *errors: Of these types; another one ends the first process alone.
    """
    if jax.process_count() == 1:
        return function()
    said = _outcome(function, errors) if is_first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(said))))
    heard = multihost_utils.broadcast_one_to_all(_padded(said, size))
    return _result(json.loads(heard[:size].tobytes()), errors)


def on_each(function: Callable[[], Any], *errors: type[Exception]) -> list[Any]:
    """Calls `function` in all processes and returns all results, in their order, to each.

    An error in any of them is raised in all, with the name of the process, unless all agree.

    Args:
      function: Its result must survive JSON.
      *errors: Of these types; another one ends its process alone.
    """
    if jax.process_count() == 1:
        return [function()]
    said = _outcome(function, errors)
    sizes = multihost_utils.process_allgather(np.int32(len(said)))
    heard = multihost_utils.process_allgather(_padded(said, int(sizes.max())))
    outcomes = [json.loads(part[:size].tobytes()) for part, size in zip(heard, sizes, strict=True)]
    for index, outcome in enumerate(outcomes):
        if "error" in outcome:
            if any(other.get("message") != outcome["message"] for other in outcomes):
                outcome["message"] = f"process {index} on {outcome['host']}: {outcome['message']}"
            return _result(outcome, errors)
    return [outcome["value"] for outcome in outcomes]


def _outcome(function: Callable[[], Any], errors: tuple[type[Exception], ...]) -> bytes:
    try:
        outcome = {"value": function()}
    except errors as error:
        kind = next(kind for kind in errors if isinstance(error, kind))
        said = {"error": kind.__name__, "message": str(error)}
        outcome = {**said, "host": platform.node()}
    return json.dumps(outcome).encode()


def _result(outcome: dict[str, Any], errors: tuple[type[Exception], ...]) -> Any:
    if "error" in outcome:
        raise {kind.__name__: kind for kind in errors}[outcome["error"]](outcome["message"])
    return outcome["value"]


def _padded(said: bytes, size: int) -> np.ndarray:
    """To a power of two, so that few programs are compiled for all the lengths."""
    padded = np.zeros(1 << max(size - 1, 1023).bit_length(), np.uint8)
    padded[: len(said)] = np.frombuffer(said, np.uint8)
    return padded

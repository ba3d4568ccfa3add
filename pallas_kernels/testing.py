"""Bitwise comparison, timing of queued device work, and kernels interpreted on the CPU."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pallas_kernels.compat import interpreter, races_found


def assert_bitwise_equal(actual: Any, expected: Any) -> None:
    """Asserts that two pytrees of arrays have the same structure, dtypes, shapes and bits.

    NaNs are equal where their bits are. Arrays may live on different devices.

    Raises:
      AssertionError: Naming the leaf, the number of differing elements, and the first of them.
    """
    actual_leaves, actual_tree = jax.tree_util.tree_flatten_with_path(actual)
    expected_leaves, expected_tree = jax.tree_util.tree_flatten_with_path(expected)
    assert actual_tree == expected_tree, f"structures differ: {actual_tree} and {expected_tree}"
    for (path, a), (_, e) in zip(actual_leaves, expected_leaves, strict=True):
        name = jax.tree_util.keystr(path) or "array"
        a, e = np.asarray(a), np.asarray(e)
        assert a.dtype == e.dtype, f"{name}: dtype {a.dtype} is not {e.dtype}"
        assert a.shape == e.shape, f"{name}: shape {a.shape} is not {e.shape}"
        bits = np.dtype(f"u{a.dtype.itemsize}")
        a_bits = np.ascontiguousarray(a).view(bits).reshape(a.shape)
        e_bits = np.ascontiguousarray(e).view(bits).reshape(a.shape)
        differing = np.argwhere(a_bits != e_bits)
        if len(differing):
            first = tuple(int(i) for i in differing[0])
            raise AssertionError(
                f"{name}: {len(differing)} of {a.size} elements differ, the first at {first}:"
                f" {a[first]} (bits {a_bits[first]:#x}) is not {e[first]} (bits {e_bits[first]:#x})"
            )


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call, over repeated measurements of queued calls."""

    median_s: float
    min_s: float
    max_s: float

    def __str__(self) -> str:
        return f"{1e6 * self.median_s:.1f} us ({1e6 * self.min_s:.1f} to {1e6 * self.max_s:.1f})"


def time_device(
    fn: Callable[..., Any], *args: Any, repeats: int = 20, calls: int = 10, warmups: int = 3
) -> Timing:
    """Times `fn(*args)`: the median over `repeats` of the mean over `calls` queued calls.

    Calls are queued back to back and waited for together, so the host's launch cost hides behind
    the device's work, as in a training loop. Pass a jitted function; the first calls, which
    compile it, are not counted.
    """
    for _ in range(warmups):
        jax.block_until_ready(fn(*args))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            out = fn(*args)
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - start) / calls)
    return Timing(statistics.median(seconds), min(seconds), max(seconds))


def run_interpreted(fn: Callable[..., Any], *args: Any, num_cores: int = 2) -> Any:
    """`jax.jit(fn)(*args)` with Mosaic kernels interpreted on the CPU; `fn` passes interpret=True.

    Raises:
      AssertionError: If two threads raced for memory.
    """
    with interpreter(num_cores):
        out = jax.block_until_ready(jax.jit(fn)(*args))
    assert not races_found(), "the interpreter saw a race"
    return out

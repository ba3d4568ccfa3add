"""Bitwise comparison, and kernels interpreted on the CPU."""

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


def run_interpreted(fn: Callable[..., Any], *args: Any, num_cores: int = 2) -> Any:
    """`jax.jit(fn)(*args)` with Mosaic kernels interpreted on the CPU; `fn` passes interpret=True.

    Raises:
      AssertionError: If two threads raced for memory.
    """
    with interpreter(num_cores):
        out = jax.block_until_ready(jax.jit(fn)(*args))
    assert not races_found(), "the interpreter saw a race"
    return out

"""Bitwise comparison, and kernels interpreted on the CPU."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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


def parts_in_turn(
    fn: Callable[..., Any], *, mesh: jax.sharding.Mesh, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """What `jax.shard_map` computes, one part after the other on one device.

    To take its place where kernels are interpreted, for the interpreter knows one device. All specs
    must cut over the same mesh axes; `fn` must not exchange anything between devices.
    """
    is_spec = {"is_leaf": lambda spec: isinstance(spec, jax.sharding.PartitionSpec)}
    specs = jax.tree.leaves((in_specs, out_specs), **is_spec)
    cut = {(e,) if isinstance(e, str) else e for spec in specs for e in spec if e is not None}
    assert len(cut) <= 1, f"specs cut over different axes: {cut}"
    count = math.prod(mesh.shape[axis] for axes in cut for axis in axes)

    def on_each(*args):
        def part(spec, tree, i):
            if spec == jax.sharding.PartitionSpec():
                return tree
            axis = len(spec) - 1
            return jax.tree.map(lambda x: jnp.split(x, count, axis)[i], tree)

        made = []
        for i in range(count):
            parts = jax.tree.map(lambda s, t, i=i: part(s, t, i), in_specs, args, **is_spec)
            made.append(fn(*parts))

        def joined(spec, *parts):
            if spec == jax.sharding.PartitionSpec():
                return parts[0]
            return jnp.concatenate(parts, len(spec) - 1)

        return jax.tree.map(joined, out_specs, *made, **is_spec)

    return on_each

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.bench import GROUPS
from lowbit_jax.bench.groups import select
from lowbit_jax.bench.layer import describe_paths, split_flops, train_layer
from lowbit_jax.ops import Explanation
from lowbit_jax.ops.report import ProductRow
from pallas_kernels.mixed_matmul import bench as mixed_matmul


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_comparisons_carry_their_group_and_know_their_baselines(group, tiny):
    comparisons = GROUPS[group](tiny)
    assert len({comparison.work for comparison in comparisons}) == len(comparisons)
    for comparison in comparisons:
        names = [case.name for case in comparison.cases]
        assert comparison.group == group
        assert len(set(names)) == len(names)
        assert set(comparison.baselines) <= set(names)


def test_a_beginning_selects_groups():
    assert select(("step",)) == ("step_7b", "step_800m")
    assert select(("layer", "product")) == ("product", "layer")
    assert select(()) == tuple(GROUPS)
    with pytest.raises(ValueError, match="'nothing'"):
        select(("layer", "nothing"))


def row(product, a_format, b_format, path, count: int | None = 1):
    return ProductRow("", product, (8, 4), (2, 4), a_format, b_format, path, "", count)


def test_operations_in_fp8_are_those_of_two_low_bit_operands_whatever_the_path():
    rows = (
        row("y", "e2m1", "e2m1", "dequantize", count=3),
        row("dx", "-", "e2m1", "dequantize"),
    )
    assert split_flops(1000.0, Explanation(rows)) == {"bf16": 1000.0 - 384.0, "fp8": 384.0}
    # Padding cannot make them more than there are.
    assert split_flops(100.0, Explanation(rows)) == {"bf16": 0.0, "fp8": 100.0}


def test_paths_are_told_product_by_product():
    rows = (
        row("y", "e2m1", "e2m1", "hopper"),
        row("y", "e2m1", "e2m1", "hopper"),
        row("dw", "-", "-", "dequantize"),
        row("dx", "e2m1", "e2m1", "hopper"),
    )
    assert describe_paths(Explanation(rows)) == "y, dx: hopper; dw: plain"


def test_every_product_of_a_decoding_program_is_computed():
    # XLA drops what no result needs, and the time of one product would pass for that of all.
    (m, n, k), count = (16, 128, 256), 4
    x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    weights = [jax.ShapeDtypeStruct((n, k), jnp.bfloat16)] * count
    products = jax.jit(functools.partial(mixed_matmul._products, config=None))
    assert products.lower(x, weights).compile().cost_analysis()["flops"] >= count * 2 * m * n * k


def test_the_layer_that_is_timed_is_a_product_with_both_gradients():
    rng = np.random.default_rng(0)
    # Exact: small integers in bfloat16.
    x, w, g = (rng.integers(-2, 3, shape).astype(np.float32) for shape in ((4, 8), (2, 8), (4, 2)))
    y, dx, dw = train_layer("bf16")(*(jnp.asarray(a, jnp.bfloat16) for a in (x, w, g)), None)
    np.testing.assert_array_equal(np.asarray(y, np.float32), x @ w.T)
    np.testing.assert_array_equal(np.asarray(dx, np.float32), g @ w)
    np.testing.assert_array_equal(np.asarray(dw, np.float32), g.T @ x)

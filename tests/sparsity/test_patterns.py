"""Masks against sorting, brute force and hand-made ties; the projection that they make."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.sparsity import (
    NM,
    Unstructured,
    apply_masks,
    mask_of,
    masks_of_tree,
    onto_pattern,
)

masked = jax.jit(mask_of, static_argnums=(1, 2))


def by_sorting(scores, goes):
    """Drops the `goes` smallest of a vector, of equal ones the first."""
    keep = np.ones(len(scores), bool)
    keep[np.argsort(np.abs(scores), kind="stable")[:goes]] = False
    return keep


def scores_with_ties(shape, seed=0):
    # Eighths: of 64 entries many are equal, and some are zero of either sign.
    return np.round(np.random.default_rng(seed).normal(size=shape) * 4).astype(np.float32) / 8 * 1.0


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_it_is_a_stable_sort_for_every_comparison(sparsity):
    x = scores_with_ties((3, 8, 16))
    pattern = Unstructured(sparsity)
    matrix = [by_sorting(m.ravel(), int(128 * sparsity)).reshape(8, 16) for m in x]
    row = [[by_sorting(r, int(16 * sparsity)) for r in m] for m in x]
    column = [np.transpose([by_sorting(c, int(8 * sparsity)) for c in m.T]) for m in x]
    # Exact: comparisons only.
    np.testing.assert_array_equal(masked(x, pattern, "matrix"), matrix)
    np.testing.assert_array_equal(masked(x, pattern, "row"), row)
    np.testing.assert_array_equal(masked(x, pattern, "column"), column)


@hypothesis.given(
    st.lists(
        st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0]),
        min_size=12,
        max_size=12,
    ),
    st.integers(0, 11),
)
def test_the_count_is_exact_whatever_the_scores(values, goes):
    x = np.asarray(values, np.float32)
    mask = np.asarray(masked(x, Unstructured(goes / 12)))
    np.testing.assert_array_equal(mask, by_sorting(x, goes))


def test_all_scores_equal_lose_exactly_what_was_asked():
    assert int(jnp.sum(masked(jnp.zeros((4, 8)), Unstructured(0.4)))) == 20  # not 0
    np.testing.assert_array_equal(
        masked(jnp.zeros((1, 8)), NM(2, 4)), [[False, False, True, True] * 2]
    )


def test_a_fraction_is_a_floor_in_spite_of_binary():
    assert Unstructured(0.29).removed(100) == 29  # 0.29 * 100 < 29
    assert Unstructured(0.9).removed(1000) == 900
    assert Unstructured(0.5).removed(7) == 3


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8), NM(3, 3)], ids=str)
def test_n_of_m_keeps_the_n_largest(pattern):
    x = scores_with_ties((2, 5, 24))
    groups = x.reshape(-1, pattern.m)
    expected = [by_sorting(g, pattern.m - pattern.n) for g in groups]
    np.testing.assert_array_equal(masked(x, pattern), np.reshape(expected, x.shape))


def test_one_budget_for_a_tree_is_that_of_its_concatenation():
    tree = {"a": scores_with_ties((2, 4, 8), 1), "b": 3 * scores_with_ties((8, 8), 2)}
    tree["c"] = np.zeros(8, np.float32)
    masks = jax.jit(masks_of_tree, static_argnums=1)(tree, Unstructured(0.6))
    flat = np.concatenate([leaf.ravel() for leaf in tree.values()])
    kept = np.concatenate([np.ravel(leaf) for leaf in masks.values()])
    np.testing.assert_array_equal(kept, by_sorting(flat, int(0.6 * len(flat))))
    assert masks["c"].shape == (8,)


def test_a_sharded_array_has_the_mask_of_the_whole():
    mesh = jax.make_mesh((4, 2), ("n", "k"), (jax.sharding.AxisType.Auto,) * 2)
    x = scores_with_ties((16, 32))
    spread = jax.device_put(
        x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("n", "k"))
    )
    pattern = Unstructured(0.7)
    for per in ("matrix", "row", "column"):
        np.testing.assert_array_equal(masked(spread, pattern, per), masked(x, pattern, per))
    np.testing.assert_array_equal(masked(spread, NM(2, 4)), masked(x, NM(2, 4)))
    compiled = masked.lower(spread, pattern, "matrix").compile().as_text()
    assert "all-reduce" in compiled  # counts are added up
    assert "f32[16,32]" not in compiled.split("ENTRY")[1]  # the scores stay where they are


# --- the projection ------------------------------------------------------------------------------


def test_no_other_support_is_nearer():
    rng = np.random.default_rng(0)
    for _ in range(5):
        x, f = rng.normal(size=10).astype("f"), rng.exponential(size=10).astype("f")
        z = np.asarray(onto_pattern(Unstructured(0.6))(x, f))
        losses = [
            sum(f[i] * x[i] ** 2 for i in range(10) if i not in support)
            for support in itertools.combinations(range(10), 4)
        ]
        # Bound: ten float32 products and sums, each within 2^-23 relative.
        np.testing.assert_allclose(np.sum(f * (z - x) ** 2), min(losses), rtol=10 * 2**-23)
        assert np.sum(z != 0) == 4


def test_uniform_importance_is_magnitude_and_tiny_ones_do_not_underflow():
    x = jax.random.normal(jax.random.key(0), (8, 32))
    for project in (onto_pattern(Unstructured(0.5)), onto_pattern(NM(2, 4), budget="leaf")):
        np.testing.assert_array_equal(project(x, jnp.full_like(x, 0.25)), project(x))
        np.testing.assert_array_equal(project(x, jnp.full_like(x, 2.0**-100)), project(x))


def test_it_is_idempotent_keeps_dtypes_and_passes_no_gradient_through_the_choice():
    tree = {"w": scores_with_ties((8, 16)), "v": jnp.ones((4, 8), jnp.bfloat16)}
    for project in (
        onto_pattern(Unstructured(0.5)),
        onto_pattern(Unstructured(0.5), budget="tree"),
        onto_pattern(NM(2, 4)),
    ):
        once = project(tree)
        twice = project(once)
        for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)  # Exact: what was zeroed goes first.
    x = jnp.arange(1.0, 9.0)
    gradient = jax.grad(lambda x: jnp.sum(onto_pattern(Unstructured(0.5))(x)))(x)
    np.testing.assert_array_equal(gradient, [0, 0, 0, 0, 1, 1, 1, 1])


def test_masks_zero_what_is_not_finite():
    np.testing.assert_array_equal(
        apply_masks(jnp.array([jnp.nan, 1.0]), jnp.array([False, True])), [0, 1]
    )


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\), got 90"):
        Unstructured(90)
    with pytest.raises(ValueError, match=r"n must lie in 1 .. m, got 5:4; n is the number"):
        NM(5, 4)
    with pytest.raises(ValueError, match=r"2:4 needs a last axis that is a multiple of 4, got"):
        mask_of(jnp.ones((4, 6)), NM(2, 4))
    with pytest.raises(ValueError, match="must be a floating array, got int32"):
        mask_of(jnp.ones((4, 8), jnp.int32), NM(2, 4))
    with pytest.raises(ValueError, match="needs an Unstructured pattern, got 2:4"):
        onto_pattern(NM(2, 4), budget="tree")

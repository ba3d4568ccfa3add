"""Path masks: which leaves, on which containers, and what a misspelt pattern says."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from flax.core import FrozenDict

from lowbit_jax.numerics import FP8_E4M3, quantize
from lowbit_jax.optim import match_paths, resolve_mask


class Layer(NamedTuple):
    weight: float
    bias: float


class Variable:
    """A leaf in a node with one named child, as the entries of `flax.nnx.State` are."""

    def __init__(self, value):
        self.value = value


jax.tree_util.register_pytree_with_keys(
    Variable,
    lambda v: (((jax.tree_util.GetAttrKey("value"), v.value),), None),
    lambda _, children: Variable(*children),
)

PARAMS = {
    "embedding": {"weight": 1.0},
    "layers": [Layer(2.0, 3.0), Layer(4.0, 5.0)],
    "head": FrozenDict({"weight": 6.0}),
    "norm": Variable(7.0),
}


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        (["layers/.*/weight"], {2.0, 4.0}),
        (["layers/0/.*", "head/weight"], {2.0, 3.0, 6.0}),
        (["(?!layers).*"], {1.0, 6.0, 7.0}),
        (["norm/value"], {7.0}),
        (["layers|layers/0/weight"], {2.0}),  # the beginning of a path is not a path
        ([".*"], {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0}),
    ],
)
def test_true_on_exactly_the_matching_leaves(patterns, chosen):
    mask = match_paths(*patterns)(PARAMS)
    assert jax.tree.structure(mask) == jax.tree.structure(PARAMS)
    pairs = zip(jax.tree.leaves(mask), jax.tree.leaves(PARAMS), strict=True)
    assert {value for flag, value in pairs if flag} == chosen
    assert {type(flag) for flag in jax.tree.leaves(mask)} == {bool}


@pytest.mark.parametrize("pattern", ["layers", "weight", "layers/2/weight", "layers/./weigh"])
def test_a_pattern_that_matches_no_whole_path_names_itself_and_every_path(pattern):
    with pytest.raises(ValueError, match="match_paths") as error:
        match_paths("head/weight", pattern)(PARAMS)
    assert repr(pattern) in str(error.value)
    for path in ("embedding/weight", "layers/1/bias", "head/weight", "norm/value"):
        assert path in str(error.value)


def test_no_pattern_is_an_error():
    with pytest.raises(ValueError, match="needs a pattern"):
        match_paths()


def test_optax_masked_takes_it_under_jit():
    params = {"a": {"weight": jnp.ones(3)}, "b": jnp.ones(2)}
    tx = optax.masked(optax.scale(-2.0), match_paths("a/.*"))
    updates, _ = jax.jit(tx.update)(params, tx.init(params))
    assert updates["a"]["weight"].tolist() == [-2.0] * 3
    assert updates["b"].tolist() == [1.0] * 2


def test_a_quantized_weight_is_one_leaf_under_the_path_that_it_had():
    params = {"a": {"weight": jnp.ones((2, 8))}, "b": jnp.ones(2)}
    coded = {**params, "a": {"weight": quantize(params["a"]["weight"], FP8_E4M3)}}
    expected = {"a": {"weight": True}, "b": False}
    assert match_paths("a/weight")(params) == match_paths("a/weight")(coded) == expected
    for mask in (match_paths("a/.*"), {"a": True, "b": False}, expected):
        assert resolve_mask(mask, coded) == expected
    assert resolve_mask(None, coded) == {"a": {"weight": True}, "b": True}


def test_a_resolved_mask_keeps_the_places_without_gradient():
    gradients = {"a": None, "b": jnp.ones(2)}
    for mask in (None, match_paths("b"), {"a": True, "b": True}):
        assert resolve_mask(mask, gradients) == {"a": None, "b": True}

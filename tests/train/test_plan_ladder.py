"""The choice of a plan."""

import dataclasses
import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_jax.models import LlamaConfig
from lowbit_jax.models.recompute import dropped_names
from lowbit_jax.train.memory_plan import planner
from lowbit_jax.train.offload import offload_flags
from lowbit_jax.train.plan_ladder import LADDER, DoesNotFit, choose_plan, refusal

from .conftest import stored_of

SMALL = LlamaConfig(vocab_size=64, d_model=64, n_layers=4, n_heads=2, d_ff=256, dtype="float32")
TOKENS = 4 * 64


@pytest.fixture(scope="module")
def plan():
    stored = stored_of(SMALL)
    return planner(SMALL, batch_size=4, seq_len=64, stored=stored)


@pytest.fixture(scope="module")
def choose(plan):
    return functools.partial(choose_plan, SMALL, plan=plan, tokens=TOKENS)


def test_the_first_plan_of_the_ladder_that_fits_is_chosen(choose):
    first, before = choose(2**40)
    assert ((first.recompute, first.offload), first.loss_chunks, before) == (LADDER[0], 1, None)
    second, before = choose(first.total - 1)
    assert (second.recompute, second.offload) == LADDER[1] == ("unnamed", "none")
    assert before == first


def within(flags, others):
    """Whether all that `flags` drop is dropped by `others`."""
    if flags == "none" or others == "none":
        return flags == "none"
    return dropped_names(flags) <= dropped_names(others)


@given(share=st.floats(0, 1), many=st.booleans())
def test_nothing_smaller_fits_where_the_choice_does(share, many):
    # A large vocabulary makes the loss the peak, a small one the backward pass.
    model = dataclasses.replace(SMALL, vocab_size=8192 if many else 64)
    plan = plans_of(model)
    most, least = plan("none", 1, "none").total, plan("block", 16, LADDER[-1][1]).total
    limit = int(least + share * (most - least))
    found, _ = choose_plan(model, limit, plan, tokens=TOKENS)
    assert found.total <= limit
    smaller = [
        plan(recompute, chunks, offload)
        for recompute, offload in LADDER
        for chunks in (1, 2, 4, 8, 16)
        if within(recompute, found.recompute)
        and offload_flags(offload) <= offload_flags(found.offload)
        and chunks <= found.loss_chunks
    ]
    chosen = (found.recompute, found.loss_chunks, found.offload)
    for other in smaller:
        # Exact: one that fits is the choice itself.
        assert other.total > limit or (other.recompute, other.loss_chunks, other.offload) == chosen


@functools.cache
def plans_of(model):
    stored = stored_of(model)
    return functools.cache(planner(model, batch_size=4, seq_len=64, stored=stored))


def test_the_loss_is_cut_only_where_it_is_the_peak():
    model = dataclasses.replace(SMALL, vocab_size=8192)
    plan = plans_of(model)
    whole = plan("none", 1, "none")
    assert whole.peak == "loss"
    found, _ = choose_plan(model, whole.total - 1, plan, tokens=TOKENS)
    assert (found.recompute, found.loss_chunks) == ("none", 2)


def test_nothing_is_offloaded_that_need_not_be(choose):
    nothing = frozenset()
    least, _ = choose(2**40, offloadable=nothing)
    while least.recompute != "block":
        # Down the ladder, a byte too few for the last plan each time.
        smaller, before = choose(least.total - 1, offloadable=nothing)
        assert smaller.total < least.total <= before.total
        least = smaller
    with pytest.raises(DoesNotFit, match="use fewer sequences a micro-batch"):
        choose(least.total - 1, offloadable=nothing)
    below, _ = choose(least.total - 1)
    assert "moments" in below.offload
    assert below.total < least.total


def test_what_the_host_cannot_hold_is_not_offloaded(choose, plan):
    limit = plan("block", 1, "none").total - 1
    offloading, _ = choose(limit)
    needed = sum(offloading.host_bytes.values())
    assert choose(limit, host_bytes=needed)[0] == offloading
    with pytest.raises(DoesNotFit, match=r"it would fit, but that takes .* of the host's memory"):
        choose(limit, host_bytes=needed - 1)


def test_what_fits_nowhere_is_told_what_takes_most(choose):
    with pytest.raises(DoesNotFit, match=r"no plan fits into 1.00 KiB; .* of which .*; use"):
        choose(1024)


def test_activations_are_told_how_to_become_fewer():
    model = dataclasses.replace(SMALL, n_layers=64)
    stored = stored_of(model)
    plan = planner(model, batch_size=256, seq_len=64, stored=stored)
    assert "or recompute more (up to recompute 'block')." in refusal(plan("none", 1, "none"))
    assert "or offload residuals." in refusal(plan("block", 1, "none"))
    large = dataclasses.replace(SMALL, vocab_size=65536)
    stored = stored_of(large)
    plan = planner(large, batch_size=256, seq_len=64, stored=stored)
    assert "or cut the loss into more chunks (loss_chunks)." in refusal(plan("block", 1, "none"))

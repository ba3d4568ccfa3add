"""Recipes that change in the middle of a run."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from lowbit_jax.ops.recipes import get_recipe
from lowbit_jax.train.config import UsageError
from lowbit_jax.train.interrupts import Interrupted
from lowbit_jax.train.tracking import read_metrics

from .conftest import small_config, state_of
from .conftest import train_quietly as train_and_sample

train_quietly = functools.partial(train_and_sample, sample=False)

# What a rule matches keeps its recipe, here one composed by product, in every phase. It is random.
RULE = "layers/attention/v_proj/weight", "fp8_weights_sr:dx=nvfp4_nvidia"
QUIET = {"cage_total_strength": 0.0, "rules": ("=".join(RULE),)}
# A validation every 6 steps: one comes with the switch.
SCHEDULE = {"recipe": "int4_weights", "recipe_schedule": ("6:bf16",), **QUIET}


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "scheduled"
    summary, said = train_quietly(small_config(**SCHEDULE), run_dir)
    # It is measured under the last rules, and those quantize nothing to nearest.
    assert summary.quantization_error is None
    return run_dir, said


def assert_same_run(a, b, config):
    # Exact: the same programs on the same bits.
    rows, expected = (read_metrics(run / "metrics.jsonl", with_speeds=False) for run in (a, b))
    assert rows == expected
    jax.tree.map(np.testing.assert_array_equal, state_of(a, config), state_of(b, config))


def test_equals_one_run_of_the_first_recipe_and_a_branch_of_the_second(scheduled, tmp_path):
    first, second = (small_config(recipe=recipe, **QUIET) for recipe in ("int4_weights", "bf16"))
    with pytest.raises(Interrupted):
        train_quietly(first, tmp_path / "first", stop_after=6)
    train_quietly(second, tmp_path / "second", branch_from=str(tmp_path / "first"))
    # So the validation after step 6, the last of the first recipe, is under that recipe.
    assert_same_run(tmp_path / "second", scheduled[0], second)


def test_resumes_to_the_same_bits_at_and_after_the_switch(scheduled, tmp_path):
    config = small_config(**SCHEDULE)
    for step in (6, 14):
        with pytest.raises(Interrupted):
            train_quietly(config, tmp_path / "run", stop_after=step)
    _, said = train_quietly(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", scheduled[0], config)
    tables, unbroken = (text.partition("; compiling\n")[0] for text in (said, scheduled[1]))
    assert tables == unbroken  # of paths and of formats, in every phase


def test_the_table_shows_every_phase_and_the_log_the_switch(scheduled):
    _, said = scheduled
    before, after = said.split("once 6 steps are done:\n")
    assert re.search(r"mlp/down_proj/weight .* int4_weights\n", before)
    assert re.search(r"mlp/down_proj/weight .* bf16\n", after)
    for phase in (before, after):
        assert re.search(f"{RULE[0]} .* {RULE[0]} .* {RULE[1]}\n", phase)
    assert re.search(r"int4_weights +y +x: -, w: int4/32 absmax +-\n", after)
    assert re.search(r"int4_weights +dx +g: -, w: int4/32 absmax +-\n", after)
    assert said.count(f"step 6: from here on {'='.join(RULE)}, layers/.*_proj/weight=bf16\n") == 1


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (((12, (("layers/mlp/dwn_proj/weight", "bf16"),)),), "which matches none of"),
        (((12, ()), (6, ())), r"must increase and lie in \[1, 24\), got \[12, 6\]"),
        (((24, ()),), r"lie in \[1, 24\), got \[24\]"),
        (((0, ()),), r"lie in \[1, 24\), got \[0\]"),
    ],
)
def test_schedules_that_cannot_be_are_refused(schedule, said):
    schedule = tuple(
        (step, tuple((pattern, get_recipe(name)) for pattern, name in rules))
        for step, rules in schedule
    )
    with pytest.raises(UsageError, match=said):
        dataclasses.replace(small_config(**QUIET), recipe_schedule=schedule)

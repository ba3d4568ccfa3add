import dataclasses

import jax
import pytest

from lowbit_jax.bench import step
from lowbit_jax.models import LlamaConfig, flops_per_token
from pallas_kernels.measure import measure, tree_bytes

MODEL = LlamaConfig(32, 32, 1, 2, d_ff=64)
RECIPES = ("bf16", "BF16")  # the same one, so that the second is compiled already


@pytest.fixture(scope="module")
def training():
    """What two recipes trained, and the rows that this gave."""
    comparison = step.comparison("step", "tiny", MODEL, batch_size=2, seq_len=16, recipes=RECIPES)
    seen = {}

    def watched(build):
        def bind(compiled, inputs):
            seen.update(build=build, compiled=compiled, inputs=inputs)
            return build.bind(compiled, inputs)

        return build._replace(bind=bind)

    cases = tuple(
        dataclasses.replace(case, build=lambda shapes, case=case: watched(case.build(shapes)))
        for case in comparison.cases
    )
    rows = measure(dataclasses.replace(comparison, cases=cases), repeats=2, warmups=1)
    return seen, rows


def test_recipes_train_one_state_in_turn(training):
    seen, rows = training
    assert [row.status for row in rows] == ["measured"] * 2, rows
    # Of each recipe: the first step, one to warm up, and two measurements of three.
    assert int(seen["inputs"]["state"].step) == 2 * (1 + 1 + 2 * 3)


def test_a_row_says_what_a_step_does(training):
    seen, (row, _) = training
    state = seen["inputs"]["state"]
    assert row.tokens == 32
    assert row.flops == {"bf16": 32.0 * flops_per_token(MODEL, 16), "fp8": 0.0}
    assert row.bytes == 2 * tree_bytes(state) + 2 * 32 * 4
    assert row.memory_bytes >= tree_bytes(state)
    assert row.note.startswith("y, dx, dw: plain")


def test_a_step_that_failed_leaves_a_new_state_to_the_next(training):
    seen, _ = training
    del seen["inputs"]["state"]  # as after a failed call, whose state was given away
    program = seen["build"].bind(seen["compiled"], seen["inputs"])
    jax.block_until_ready(program.call())
    assert int(seen["inputs"]["state"].step) == 2

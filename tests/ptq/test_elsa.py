"""Elsa on a small network with a sparse teacher."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowbit_jax.optim import find_admm_state, match_paths
from lowbit_jax.ptq.descent import Keep
from lowbit_jax.ptq.elsa import ElsaSettings, prune_by_elsa, retrain
from lowbit_jax.sparsity import NM, Unstructured, onto_pattern

STEPS = 400
PRUNED = match_paths(".*/weight")


def forward(params, x):
    hidden = jnp.tanh(x @ params["first"]["weight"].T + params["bias"])
    return hidden @ params["second"]["weight"].T


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((forward(params, x) - y) ** 2)


def draw(rng, rows, columns, density):
    return (rng.normal(size=(rows, columns)) * (rng.random((rows, columns)) < density)).astype("f")


@pytest.fixture(scope="module")
def problem():
    """`(dense, batches, test)`: a dense student of a teacher of which 9 of 10 weights are zero."""
    rng = np.random.default_rng(0)
    teacher = {
        "first": {"weight": draw(rng, 32, 32, 0.1)},
        "second": {"weight": draw(rng, 16, 32, 0.1)},
        "bias": 0.1 * draw(rng, 1, 32, 1.0)[0],
    }
    data = []
    for _ in range(17):
        # Inputs of rank 16: many dense students fit, few of them sparse.
        x = jnp.asarray(draw(rng, 64, 16, 1.0) @ draw(np.random.default_rng(1), 16, 32, 1.0) / 4)
        data.append((x, forward(teacher, x)))
    start = jax.tree.map(
        lambda p: jnp.asarray(0.2 * rng.normal(size=p.shape), jnp.float32), teacher
    )
    batches = data[:-1]
    dense, _ = retrain(
        loss_fn, start, itertools.cycle(batches), steps=STEPS, learning_rate=1e-2, mask=None
    )
    return dense, batches, data[-1]


def run(problem, settings, mask=PRUNED, **options):
    dense, batches, _ = problem
    return prune_by_elsa(loss_fn, dense, itertools.cycle(batches), settings, mask=mask, **options)


def settings(pattern, **options):
    return ElsaSettings(
        pattern,
        **{"steps": STEPS, "learning_rate": 1e-2, "strength": 0.02, "interval": 8} | options,
    )


@pytest.fixture(scope="module")
def eighty(problem):
    return run(problem, settings(Unstructured(0.8)))


def zeros(params):
    return {name: int(jnp.sum(params[name]["weight"] == 0)) for name in ("first", "second")}


def test_the_result_has_the_zeros_that_were_asked_for_and_the_rest_trains_along(problem, eighty):
    params, _ = eighty
    assert zeros(params) == {"first": 819, "second": 409}  # floor(.8 * 1024), floor(.8 * 512)
    assert jnp.all(params["bias"] != problem[0]["bias"])


def test_elsa_beats_one_shot_magnitude_and_retraining_its_mask(problem, eighty):
    dense, batches, test = problem
    one_shot = {
        name: onto_pattern(Unstructured(0.8))(leaf) if name != "bias" else leaf
        for name, leaf in dense.items()
    }
    control, _ = retrain(
        loss_fn,
        one_shot,
        itertools.cycle(batches),
        steps=STEPS,
        learning_rate=1e-2,
        mask=PRUNED,
    )
    assert zeros(control) == zeros(one_shot)
    losses = {
        name: float(loss_fn(params, test))
        for name, params in {
            "dense": dense,
            "magnitude": one_shot,
            "retrained": control,
            "elsa": eighty[0],
        }.items()
    }
    print(losses)
    assert losses["elsa"] < losses["retrained"] < losses["magnitude"]


def test_low_precision_keeps_6_bytes_a_pruned_weight_instead_of_16():
    params = {"weight": jnp.ones((256, 512))}
    sizes = []
    for is_low in (False, True):
        tx = settings(Unstructured(0.8), is_low_precision=is_low).optimizer()
        state = jax.eval_shape(tx.init, params)
        sizes.append(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / 256 / 512)
    # Bound: a float32 scale for each 128 first moments, and a few scalars.
    assert 16 <= sizes[0] < 16.001
    assert 6 + 4 / 128 <= sizes[1] < 6.001 + 4 / 128


def test_one_budget_for_the_model_and_n_of_m(problem):
    shared, _ = run(problem, settings(Unstructured(0.8), budget="tree", is_objective_aware=False))
    counts = zeros(shared)
    assert sum(counts.values()) == 1228  # floor(.8 * 1536)
    assert counts != {"first": 819, "second": 409}
    halves, _ = run(problem, settings(NM(1, 4), steps=16))
    for name in ("first", "second"):
        groups = jnp.sum(halves[name]["weight"].reshape(-1, 4) != 0, axis=-1)
        np.testing.assert_array_equal(groups, 1)


def test_records_show_the_gap_closing(eighty):
    _, records = eighty
    assert [r.step for r in records] == list(range(8, STEPS + 1, 8))
    assert records[-1].gap < records[0].gap / 3
    # Bound: of a fifth that stays, all may go while as many others come.
    assert all(0 <= r.flips <= 2 * 0.2 + 1e-3 for r in records)
    assert any(r.flips > 0 for r in records)


class Killed(Exception):
    """Ends a run as a kill would: nothing that it leaves behind is tidied up."""


def kill_at(step):
    def report(record):
        if record.step == step:
            raise Killed

    return report


def pruning(problem, batches, keep, report=None):
    chosen = settings(Unstructured(0.8), steps=36, is_low_precision=True)
    return prune_by_elsa(
        loss_fn, problem[0], batches, chosen, mask=PRUNED, keep=keep, report=report
    )


def retraining(problem, batches, keep, report=None):
    sparse = onto_pattern(Unstructured(0.8))(problem[0])
    options = {"steps": 36, "learning_rate": 1e-2, "mask": PRUNED, "keep": keep}
    return retrain(loss_fn, sparse, batches, report=report, **options)


@pytest.mark.parametrize(("start", "killed_at"), [(pruning, 24), (retraining, 36)])
def test_a_killed_run_goes_on_with_the_same_bits(problem, tmp_path, start, killed_at):
    batches = [problem[1][i % 16] for i in range(36)]
    whole = start(problem, batches, None)
    keep = Keep(tmp_path, {"data": "same"}, every_s=0)
    if killed_at < 36:  # dies before step 24 is kept: step 16 is
        with pytest.raises(Killed):
            start(problem, batches, keep, kill_at(killed_at))
    else:
        start(problem, batches, keep)
    seen = []
    again = start(problem, batches, keep, lambda record: seen.append(record.step))
    assert seen == ([16, 24, 32, 36] if killed_at < 36 else [36])
    chex.assert_trees_all_equal(again, whole)  # Exact: parameters and records.
    assert [r.step for r in again[1]][-2:] == [32, 36]
    with pytest.raises(ValueError, match=r"begun with other batches than the 36 that came first"):
        start(problem, batches[::-1], keep)
    with pytest.raises(ValueError, match=r"other settings, data = 'same' where it is 'other' now"):
        start(problem, batches, keep._replace(settings={"data": "other"}))
    with pytest.raises(ValueError, match="params_sha256"):
        start((jax.tree.map(lambda p: 2 * p, problem[0]), *problem[1:]), batches, keep)
    file = tmp_path / "state_000.npz"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"state_000.npz cannot be read .* delete it"):
        start(problem, batches, keep)


def test_flips_are_the_changes_of_the_mask():
    """Against the masks of an optimizer that is run here."""

    def distance(params, goal):
        return jnp.sum((params - goal) ** 2)

    rng = np.random.default_rng(0)
    start, goals = jnp.asarray(draw(rng, 8, 16, 1.0)), [draw(rng, 8, 16, 1.0)] * 12
    chosen = settings(Unstructured(0.5), steps=12, interval=4, is_objective_aware=False)
    chosen = dataclasses.replace(chosen, learning_rate=0.3)
    _, records = prune_by_elsa(distance, start, goals, chosen, mask=None)
    tx, masks = chosen.optimizer(), []
    params, state = start, jax.jit(tx.init)(start)
    update = jax.jit(tx.update)
    for goal in (*goals, None):
        if int(find_admm_state(state).count) % 4 == 0:
            masks.append(np.asarray(find_admm_state(state).z) == 0)
        if goal is not None:
            updates, state = update(2 * (params - goal), state, params)
            params = optax.apply_updates(params, updates)
    expected = [np.mean(a != b) for a, b in itertools.pairwise(masks)]
    assert min(expected) > 0
    np.testing.assert_array_equal([r.flips for r in records], expected)  # Exact: n / 128.


def test_what_cannot_be_done_is_refused(problem):
    dense, batches, _ = problem
    with pytest.raises(ValueError, match=r"batch for each of 400 steps, got 16; pass more"):
        prune_by_elsa(loss_fn, dense, batches, settings(Unstructured(0.5)), mask=None)
    with pytest.raises(ValueError, match=r"interval must lie in 1 .. steps, got interval=32"):
        ElsaSettings(Unstructured(0.5), steps=16)
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), dense)
    with pytest.raises(ValueError, match="must be float32 while they train, got bfloat16"):
        prune_by_elsa(loss_fn, narrow, batches, settings(Unstructured(0.5)), mask=None)
    poisoned = jax.tree.map(lambda p: p * jnp.nan, dense)
    with pytest.raises(ValueError, match=r"loss must stay finite, got nan before step 8"):
        prune_by_elsa(loss_fn, poisoned, itertools.cycle(batches), settings(NM(2, 4)), mask=PRUNED)

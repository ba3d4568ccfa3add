import dataclasses
import json

import jax
import numpy as np
import pytest

from lowbit_jax.bench import scaling
from lowbit_jax.bench.scaling_row import Measured, Row, measure_row, sent_bytes


def measured(row, step_s=1.0, shift=0.0, perturbed=1e-6):
    losses = np.linspace(5, 4, 23) + shift
    off = tuple(losses + perturbed) if row.devices == 1 else ()
    return Measured(row, "a device", (step_s, step_s), tuple(losses), off, {}, "y: hopper", 2**30)


def test_a_tiny_run_of_two_simulated_devices_is_saved_and_not_repeated(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # as here
    measure_apart = scaling._measure_apart

    def measure(row, tiny):
        # The one of two devices in a process of its own, as all are; the others here: sooner.
        return measure_apart(row, tiny) if row.devices == 2 else measure_row(row)

    monkeypatch.setattr(scaling, "_measure_apart", measure)
    run = {"tiny": True, "recipes": ("bf16",), "zero": (3,), "out": tmp_path}
    assert scaling.main(**run) == 0
    found = scaling.load(tmp_path / scaling.FILE)
    assert [(m.row.devices, m.row.zero) for m in found] == [(1, 1), (2, 3), (1, 1)]
    assert set(found[1].sent["all-gather"]) == {"u16"}  # the dtype of the products
    said = capsys.readouterr().out
    assert "| tiny | bf16 | 2 | 3 | 2 x 128 |" in said
    assert (tmp_path / "scaling.md").read_text() in said
    monkeypatch.setattr(scaling, "_measure_apart", lambda *_: pytest.fail("measured again"))
    assert scaling.main(**run) == 0


def test_losses_and_speed_are_held_against_those_of_one_device(monkeypatch, capsys):
    rows = scaling.plan_rows(2, "800m", ("quartet",), (1,), ("int8",), device_batch=8, seq_len=64)
    one, both, rounded, whole = rows
    assert (one.devices, both.devices, whole.devices, whole.device_batch) == (1, 2, 1, 16)
    assert rounded == dataclasses.replace(both, gradient_exchange="int8")
    shifts = {both: 1e-5, rounded: 1.0}

    def measure(row, tiny):
        seconds = {one: 1.0, both: 1.1}.get(row, 2.0)
        return measured(row, seconds, shifts.get(row, 0.0))

    monkeypatch.setattr(scaling, "_measure_apart", measure)
    options = {"recipes": ("quartet",), "zero": (1,), "gradient_exchange": ("int8",), "seq_len": 64}
    assert scaling.main(**options) == 0
    said = capsys.readouterr().out
    assert "90.9%" in said  # 16 sequences in 1.1 s for twice 8 in 1 s
    assert "1.0e-05 (1.5e-05)" in said  # Bound: ten times 1e-6, and 5 * 2**-20
    shifts[both] = 1e-4
    assert scaling.main(**options) == 1
    assert scaling.main(devices=1) == 2


@pytest.mark.parametrize("place", [0, 1, 2])
def test_losses_that_are_no_numbers_are_not_equal(monkeypatch, place):
    # On one device with the batch of one, on two, and with the batch of two, the reference.
    rows = scaling.plan_rows(2, "800m", ("bf16",), (1,), (), device_batch=8, seq_len=64)

    def measure(row, tiny):
        return measured(row, shift=np.nan if row == rows[place] else 0.0)

    options = {"recipes": ("bf16",), "zero": (1,), "seq_len": 64}
    monkeypatch.setattr(scaling, "_measure_apart", lambda row, tiny: measured(row))
    assert scaling.main(**options) == 0
    monkeypatch.setattr(scaling, "_measure_apart", measure)
    assert scaling.main(**options) == 1


def test_a_bench_of_which_every_row_dies_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "_measure_apart", lambda row, tiny: None)
    assert scaling.main(recipes=("bf16",), zero=(1,), out=tmp_path / "new") == 1
    assert "| model |" in (tmp_path / "new" / "scaling.md").read_text()


def test_a_row_that_dies_is_reported_and_the_others_are_measured(monkeypatch, capsys):
    def die(row, tiny):
        return None if row.devices == 2 else measured(row)

    monkeypatch.setattr(scaling, "_measure_apart", die)
    assert scaling.main(recipes=("bf16",), zero=(1,)) == 1
    assert "| 800m | bf16 | 1 |" in capsys.readouterr().out


def test_rows_survive_the_file():
    row = measured(Row("800m", "quartet", 1))
    assert Measured.from_json(json.dumps(dataclasses.asdict(row))) == row


def test_results_of_collectives_are_counted_once_and_by_dtype():
    program = """
  %a = u8[8,4]{1,0} all-gather(%x), channel_id=1
  %b = ((u8[4,4]{1,0}, u16[2]{0}), (u8[8,4]{1,0}, u16[4]{0})) all-gather-start(%x, %y), channel_id=2
  %c = (u8[8,4]{1,0}, u16[4]{0}) all-gather-done(%b)
  %d = (f32[6]{0}, f32[2]{0}) reduce-scatter-start(%z), channel_id=3
  %e = f32[2]{0} reduce-scatter-done(%d)
  %f = (f32[3]{0}, bf16[]) all-reduce(%p, %q), channel_id=4
  %g = f32[3]{0} all-reduce-start(%p), channel_id=5
  %h = ((bf16[]), bf16[]) all-reduce-start(%p), channel_id=6
  %i = f32[3]{0} add(%p, %p)
"""
    assert sent_bytes(program) == {
        "all-gather": {"u8": 64, "u16": 8},
        "reduce-scatter": {"f32": 8},
        "all-reduce": {"f32": 24, "bf16": 4},
    }

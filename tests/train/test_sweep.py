import dataclasses
import io
import json
import os
import pathlib
import shutil
import signal
import textwrap
import threading
import time

import jax
import pytest
from rich.console import Console

from lowbit_jax.ops.recipes import get_recipe
from lowbit_jax.train.config import UsageError, load_config_file
from lowbit_jax.train.sweep import SweepOptions, parse_sweep_command, sweep
from lowbit_jax.train.sweep_plan import Plan, command_words
from lowbit_jax.train.sweep_results import paired_gaps, read_records, standard_error
from lowbit_jax.train.sweep_rows import Row, check_rows
from lowbit_jax.train.tracking import read_metrics

from .conftest import CONFIG, ROOT, SMALL
from .test_compare import SUMMARY

CONFIG_FILE = """
def get_config(recipe="a", size=1.0, data="x", steps=9, seed=0): ...
"""

# Stands in for scripts/pretrain.py: keeps its flags, files and exit codes, computes nothing.
PRETRAIN = textwrap.dedent("""
    import json, os, pathlib, signal, sys, time
    words = sys.argv[2:]
    switches = {w for w in words if w.startswith(("--no-", "--fresh"))}
    pairs = [w for w in words if w not in switches]
    flags = {k.removeprefix("--").replace("-", "_"): v for k, v in zip(pairs[::2], pairs[1::2])}
    run = pathlib.Path(flags.pop("run_dir"))
    stop_after, base = flags.pop("stop_after", None), flags.pop("branch_from", None)
    arguments = {"recipe": "a", "size": 1.0, "data": "x", "steps": 9, **flags}
    arguments |= {k: int(arguments[k]) for k in ("seed", "steps")}
    arguments["size"] = float(arguments["size"])
    run.mkdir(exist_ok=True)
    name = pathlib.Path(sys.argv[1]).stem
    (run / "run.json").write_text(json.dumps({"name": name, "arguments": arguments}))
    (run / "versions.json").write_text(json.dumps({"packages": {"jax": "0"}}))
    environment = {k: v for k, v in os.environ.items() if k.startswith(("CUDA", "XLA_PY", "JAX_C"))}
    started = {"words": sys.argv[1:], "environment": environment, "at": time.time()}
    with open(run.with_name(f"{run.name}.started"), "a") as log:
        print(json.dumps(started), file=log)
    recipe = arguments["recipe"]
    if recipe == "crash":
        print("working\\nerror: the disk is full\\nbye")
        sys.exit(1)
    if recipe == "diverge":
        print("error: train: step 3 is not finite in w.")
        sys.exit(3)
    if recipe == "mute":
        sys.exit(7)
    if base is not None:
        assert (pathlib.Path(base) / "checkpoints").is_dir(), "the base comes first"
    if recipe == "slow" and not (run / "checkpoints").exists():
        def save(*_):
            (run / "checkpoints").mkdir()
            sys.exit(143)
        signal.signal(signal.SIGTERM, save)
        print("ready", flush=True)
        time.sleep(60)
    deadline = time.time() + 30
    while recipe == "together" and len(list(run.parent.glob("*.started"))) < 4:
        assert time.time() < deadline, "alone"
        time.sleep(0.01)
    if stop_after is not None:
        (run / "checkpoints" / f"step_{int(stop_after):08d}").mkdir(parents=True)
        sys.exit(0)
    validated = "--no-validate" not in switches
    summary = json.loads(os.environ["FAKE_SUMMARY"])
    loss = 3.0 + arguments["seed"] ** 2 / 10 + (0.5 - arguments["seed"] / 8) * (recipe == "b")
    summary["validation_loss"] = loss if validated else None
    (run / "summary.json").write_text(json.dumps(summary))
""")


class Sweeps:
    """Sweeps in a folder of their own, with the stand-in for training."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.config = str(folder / "config.py")
        (folder / "config.py").write_text(CONFIG_FILE)
        (folder / "pretrain.py").write_text(PRETRAIN)
        self.printed = io.StringIO()

    def row(self, name, recipe="a", **fields):
        arguments = {"recipe": recipe, **fields.pop("arguments", {})}
        return Row(name=name, config=self.config, arguments=arguments, **fields)

    def run(self, rows, **options):
        chosen = SweepOptions(runs=self.folder / "runs", out=self.folder / "out")
        return sweep(
            rows,
            "Title",
            dataclasses.replace(chosen, **options),
            script=self.folder / "pretrain.py",
            console=Console(file=self.printed, width=200),
        )

    def started(self, run):
        """What each start of a run got, as the stand-in noted it."""
        path = self.folder / "runs" / f"{run}.started"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def results(self):
        return read_records(self.folder / "out" / "results.jsonl")

    @property
    def table(self):
        return (self.folder / "out" / "results.md").read_text()


@pytest.fixture
def sweeps(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SUMMARY", json.dumps(dataclasses.asdict(SUMMARY)))
    return Sweeps(tmp_path)


def test_gaps_are_paired_by_seed_with_the_standard_error_of_their_mean(sweeps):
    rows = [
        sweeps.row("base", seeds=(0, 1, 2), group="One", anchor="3.2 (3B)"),
        sweeps.row("b", "b", seeds=(0, 1, 2), baseline="base", group="One"),
        sweeps.row("later", group="Two"),
    ]
    report = sweeps.run(rows, only="base|b")
    assert sorted(report.succeeded) == sorted(
        f"{row}-s{s}" for row in ("base", "b") for s in range(3)
    )
    # By hand: losses 3, 3.1, 3.4 and gaps 0.5, 0.375, 0.25, mean 0.375, standard error
    # 0.125 / sqrt(3) = 0.0722. Unpaired the seeds' spread alone would be 0.12.
    assert paired_gaps(rows[1], sweeps.results) == pytest.approx([0.5, 0.375, 0.25])
    assert "| base | 3.1667 (3 seeds) |  |  | 1.200 |  |  | 3.2 (3B) |" in sweeps.table
    assert "| b | 3.5417 (3 seeds) | +0.3750 ± 0.0722 | base | 1.200 |  |  |  |" in sweeps.table
    assert "| later | to be run |" in sweeps.table
    assert "## One" in sweeps.table
    assert standard_error([1.0]) is None
    assert (sweeps.folder / "out" / "gaps.png").read_bytes().startswith(b"\x89PNG")
    lines = (sweeps.folder / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["run"] for line in lines][:3] == ["base-s0", "base-s1", "base-s2"]
    assert "[1/6] base-s0: loss 3.0000, " in sweeps.printed.getvalue()


def test_gaps_of_gaps_are_shown_against_the_row_to_which_all_lead_too(sweeps):
    rows = [
        sweeps.row("base", seeds=(0, 1)),
        sweeps.row("b", "b", seeds=(0, 1), baseline="base"),
        sweeps.row("c", seeds=(0, 1), baseline="b"),
    ]
    sweeps.run(rows)
    assert "| gap | to | gap to base | bits per byte |" in sweeps.table
    # By hand: losses 3 and 3.1 of base and c, 3.5 and 3.475 of b.
    assert "| base | 3.0500 (2 seeds) |  |  |  | 1.200 |" in sweeps.table
    assert "| b | 3.4875 (2 seeds) | +0.4375 ± 0.0625 | base | +0.4375 ± 0.0625 |" in sweeps.table
    assert "| c | 3.0500 (2 seeds) | -0.4375 ± 0.0625 | b | +0.0000 ± 0.0000 |" in sweeps.table


def test_what_is_finished_is_not_run_again_and_what_failed_is(sweeps):
    rows = [
        sweeps.row("good"),
        sweeps.row("bad", "crash"),
        sweeps.row("mute", "mute"),
        sweeps.row("wild", "diverge"),
        sweeps.row("last"),
    ]
    report = sweeps.run(rows)
    assert report.succeeded == ("good-s0", "last-s0")
    assert report.errors == {
        "bad-s0": "the disk is full",
        "mute-s0": "exit code 7: nothing printed",
        "wild-s0": "train: step 3 is not finite in w.",
    }
    assert "| bad | to be run |" in sweeps.table
    assert "| wild | diverged |" in sweeps.table
    assert sweeps.results["wild", 0]["error"] == "train: step 3 is not finite in w."
    sweeps.run(rows)
    counts = [len(sweeps.started(f"{row.name}-s0")) for row in rows]
    assert counts == [1, 2, 2, 1, 1]  # to diverge is a result


def test_results_outlive_the_folders_unless_told_otherwise(sweeps):
    row = sweeps.row("good")
    sweeps.run([row])
    for options, times in (({}, 1), ({"merge": False}, 2)):
        shutil.rmtree(sweeps.folder / "runs" / "good-s0", ignore_errors=True)
        sweeps.run([row], **options)
        assert len(sweeps.started("good-s0")) == times
        assert sweeps.results["good", 0]["validation_loss"] == 3.0
    # Lines of rows that the file no longer has are kept, and are not in the table.
    sweeps.run([sweeps.row("other")])
    assert sweeps.results.keys() == {("good", 0), ("other", 0)}
    assert "good" not in sweeps.table


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"data": "elsewhere"}, None),  # the place of the data
        ({"gone": 1}, None),  # an argument that the config no longer has
        ({"recipe": "b"}, "recipe is 'b' there, 'a' here"),
        ({"size": 2.0}, "size is 2.0 there, 1.0 here"),  # not stated by the row: its default
        ({"seed": 1}, "seed is 1 there, 0 here"),
        ({"steps": None}, "steps is None there, 9 here"),
        ({"config": "other"}, "config is 'other' there, 'config' here"),
    ],
    ids=str,
)
def test_a_folder_counts_if_it_holds_what_the_row_asks_for(sweeps, change, said):
    plan = Plan([sweeps.row("x")], sweeps.folder)
    arguments = {"recipe": "a", "size": 1.0, "data": "x", "steps": 9, "seed": 0, **change}
    record = {"config": arguments.pop("config", "config"), "arguments": arguments}
    assert plan.difference(plan.runs[0], record) == said


def test_a_stated_argument_must_be_in_the_record_and_a_default_need_not(sweeps):
    plan = Plan([sweeps.row("x", arguments={"data": "here"})], sweeps.folder)
    record = {"config": "config", "arguments": {"recipe": "a", "seed": 0}}
    assert "data is None there, 'here' here" in plan.difference(plan.runs[0], record)
    record["arguments"]["data"] = "here"
    assert plan.difference(plan.runs[0], record) is None


def test_a_folder_of_another_run_is_left_alone_and_the_others_run(sweeps):
    sweeps.run([sweeps.row("one"), sweeps.row("two", "b")])
    rows = [sweeps.row("one", "b"), sweeps.row("two", "b"), sweeps.row("three")]
    report = sweeps.run(rows, merge=False)
    assert report.succeeded == ("three-s0",)
    assert "recipe is 'a' there, 'b' here" in report.errors["one-s0"]
    assert len(sweeps.started("one-s0")) == 1
    assert "| one | to be run |" in sweeps.table


def branching_rows(sweeps, base_recipe="a"):
    return [
        sweeps.row("base", base_recipe, stop_after=7),
        sweeps.row("weak", branch_of="base"),
        sweeps.row("strong", "b", branch_of="base", baseline="weak"),
        sweeps.row("alone"),
    ]


def test_branches_share_a_base_that_runs_first_and_only_if_it_is_needed(sweeps):
    rows = branching_rows(sweeps)
    report = sweeps.run(rows, only="strong", gpus=("0",), jobs_per_gpu=2)
    assert report.succeeded == ("base-s0", "strong-s0")
    sweeps.run(rows)
    base = str(sweeps.folder / "runs" / "base-s0")
    words = {row.name: sweeps.started(f"{row.name}-s0")[0]["words"] for row in rows}
    assert [len(sweeps.started(f"{row.name}-s0")) for row in rows] == [1, 1, 1, 1]
    assert "--branch-from" not in words["base"] + words["alone"]
    assert words["base"][-2:] == ["--stop-after", "7"]
    assert not {"--no-save", "--fresh"} & set(words["base"])
    assert words["weak"][-4:] == ["--branch-from", base, "--no-save", "--fresh"]
    assert "| base |" not in sweeps.table
    assert "| strong | 3.5000 | +0.5000 | weak |" in sweeps.table
    # With all branches done the base may go.
    (sweeps.folder / "runs" / "base-s0" / "checkpoints" / "step_00000007").rmdir()
    assert sweeps.run(rows).succeeded == ()


def test_a_base_that_was_stopped_on_its_way_goes_on_before_others_branch_off(sweeps):
    (sweeps.folder / "runs" / "base-s0" / "checkpoints" / "step_00000003").mkdir(parents=True)
    report = sweeps.run(branching_rows(sweeps), only="weak")
    assert report.succeeded == ("base-s0", "weak-s0")


def test_what_waits_for_a_failed_base_fails_with_it(sweeps):
    report = sweeps.run(branching_rows(sweeps, "crash"))
    assert report.succeeded == ("alone-s0",)
    assert report.errors["strong-s0"] == "base-s0, for which it waits, failed"
    assert sweeps.started("weak-s0") == []


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_time_limit_stops_runs_cleanly_and_the_next_call_goes_on(sweeps):
    rows = [sweeps.row("slow", "slow", save=True), sweeps.row("after")]
    report = sweeps.run(rows, time_limit_s=3.0)
    assert (report.succeeded, report.left, report.signal_number) == ((), ("slow-s0", "after-s0"), 0)
    assert (sweeps.folder / "runs" / "slow-s0" / "checkpoints").is_dir()
    report = sweeps.run(rows, time_limit_s=60.0)
    assert report.succeeded == ("slow-s0", "after-s0")
    assert not {"--no-save", "--fresh"} & set(sweeps.started("slow-s0")[1]["words"])
    assert sweeps.run([sweeps.row("later")], time_limit_s=0.0).left == ("later-s0",)


def test_a_signal_ends_the_sweep_as_the_time_limit_does(sweeps):
    def interrupt():
        wait_for(lambda: sweeps.started("slow-s0"))
        wait_for(lambda: "ready" in (sweeps.folder / "runs" / "slow-s0.log").read_text())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    report = sweeps.run([sweeps.row("slow", "slow", save=True)])
    thread.join()
    assert (report.left, report.signal_number) == (("slow-s0",), signal.SIGINT)
    assert (sweeps.folder / "runs" / "slow-s0" / "checkpoints").is_dir()


def test_runs_share_gpus_as_asked(sweeps):
    rows = [sweeps.row("p", "together", seeds=(0, 1, 2, 3))]
    report = sweeps.run(rows, gpus=("0", "3"), jobs_per_gpu=2, data="there")
    assert sorted(report.succeeded) == ["p-s0", "p-s1", "p-s2", "p-s3"]  # each saw the others
    started = [sweeps.started(f"p-s{seed}")[0] for seed in range(4)]
    environments = [one["environment"] for one in started]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["0", "3", "0", "3"]
    assert {e["XLA_PYTHON_CLIENT_PREALLOCATE"] for e in environments} == {"false"}
    assert len({e["JAX_COMPILATION_CACHE_DIR"] for e in environments}) == 1
    assert all("there" in one["words"] for one in started)


def test_without_gpus_runs_come_one_after_the_other(sweeps):
    sweeps.run([sweeps.row("p", seeds=(0, 1))])
    first, second = (sweeps.started(f"p-s{seed}")[0] for seed in range(2))
    assert "CUDA_VISIBLE_DEVICES" not in first["environment"]
    first_ended = (sweeps.folder / "runs" / "p-s0" / "summary.json").stat().st_mtime
    assert first_ended <= second["at"]


def test_speed_is_measured_once_for_each_kind_of_step_and_shown_in_the_table(sweeps):
    rows = [
        sweeps.row("base", stop_after=5),
        sweeps.row("x", seeds=(0, 1)),
        sweeps.row("x_again", branch_of="base"),
        sweeps.row("y", "b"),
    ]
    report = sweeps.run(rows, measure_speed=True, gpus=("2", "3"), jobs_per_gpu=4)
    assert report.succeeded == ("x-s0", "y-s0")
    (first,) = sweeps.started("speed/x-s0")
    assert first["environment"]["CUDA_VISIBLE_DEVICES"] == "2"
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" not in first["environment"]
    assert {"--no-validate", "--no-save"} <= set(first["words"])
    assert first["words"][first["words"].index("--steps") + 1] == "60"
    assert read_records(sweeps.folder / "out" / "speed.jsonl").keys() == {("x", 0), ("y", 0)}
    assert "| x_again | to be run |  |  |  |  | 2,500 |" in sweeps.table
    assert sweeps.run(rows, measure_speed=True).succeeded == ()
    sweeps.run(rows, only="x")
    assert "| x | 3.0500 (2 seeds) |  |  | 1.200 |  | 2,500 |" in sweeps.table


def test_a_row_that_diverges_while_its_speed_is_measured_has_none(sweeps):
    rows = [sweeps.row("wild", "diverge"), sweeps.row("x")]
    report = sweeps.run(rows, measure_speed=True)
    assert (report.succeeded, list(report.errors)) == (("x-s0",), ["wild-s0"])
    assert "| x | to be run |  |  |  |  | 2,500 |" in sweeps.table
    assert "| wild | to be run |  |  |  |  |  |" in sweeps.table


def test_strengths_of_cage_have_one_speed_and_none_another():
    rows = [Row("x", "c.py", {"cage_total_strength": s}) for s in (0.0, 1.6, 5.0)]
    keys = [row.speed_key for row in [Row("x", "c.py"), *rows]]
    assert keys[0] == keys[1] != keys[2] == keys[3]


def test_runs_on_different_text_are_said_not_to_compare(sweeps, monkeypatch):
    sweeps.run([sweeps.row("one")])
    other = dataclasses.replace(SUMMARY, corpus="other")
    assert "Not comparable" not in sweeps.table
    monkeypatch.setenv("FAKE_SUMMARY", json.dumps(dataclasses.asdict(other)))
    first = sweeps.results["one", 0]
    (sweeps.folder / "runs" / "one-s0" / "summary.json").unlink()
    (sweeps.folder / "out" / "results.jsonl").write_text(json.dumps({**first, "corpus": "this"}))
    sweeps.run([sweeps.row("one"), sweeps.row("two")])
    assert "Not comparable: the runs differ in corpus: other, this" in sweeps.table


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([Row("a", "c"), Row("a", "c")], "names must differ, got 'a' twice"),
        ([Row("a/b", "c")], "fit for a folder .* got 'a/b'"),
        ([Row("a", "c", {"seed": 1})], "a must state its seeds in `seeds`"),
        ([Row("a", "c", baseline="b")], "a needs a row 'b'"),
        ([Row("a", "c"), Row("b", "c", branch_of="a")], "row with `stop_after`.*stop_after=None"),
        (
            [Row("a", "c", stop_after=1), Row("b", "c", branch_of="a", seeds=(0, 1))],
            r"its seeds \(0, 1\), got a with stop_after=1 and seeds \(0,\)",
        ),
    ],
    ids=str,
)
def test_rows_that_contradict_each_other_are_refused(rows, said):
    with pytest.raises(ValueError, match=said):
        check_rows(rows)


def test_arguments_become_the_words_that_tyro_reads():
    assert command_words("batch_size", 8) == ["--batch-size", "8"]
    assert command_words("remat", True) == ["--remat"]
    assert command_words("remat", False) == ["--no-remat"]
    assert command_words("rules", ("a=b", "c=d")) == ["--rules", "a=b", "c=d"]
    assert command_words("tokens", 30e6) == ["--tokens", "30000000.0"]


def test_a_damaged_results_file_is_an_error_and_stays(sweeps):
    out = sweeps.folder / "out"
    out.mkdir()
    (out / "results.jsonl").write_text('{"run": "x"}\n')
    with pytest.raises(ValueError, match="line 1, must be a JSON object with a row and a seed"):
        sweeps.run([sweeps.row("one")])
    assert (out / "results.jsonl").read_text() == '{"run": "x"}\n'


def test_results_under_other_arguments_are_not_overwritten(sweeps):
    sweeps.run([sweeps.row("one")])
    before = sweeps.results
    with pytest.raises(UsageError, match=r"one-s0 under other arguments \(size is 1.0"):
        sweeps.run([sweeps.row("one", arguments={"size": 2.0})], runs=sweeps.folder / "more")
    assert sweeps.results == before


def test_data_for_a_config_without_data_is_a_usage_error(sweeps):
    (sweeps.folder / "config.py").write_text("def get_config(recipe='a', seed=0): ...\n")
    with pytest.raises(UsageError, match="has no argument `data`; leave out --data"):
        sweeps.run([sweeps.row("one")], data="somewhere")


SWEEP_FILES = sorted((ROOT / "configs" / "sweeps").glob("*.py"))


@pytest.mark.parametrize("path", SWEEP_FILES, ids=lambda path: path.stem)
def test_rows_of_the_sweeps_fit_their_configs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    rows, title, options = parse_sweep_command([str(path), "--runs", "r", "--out", "o"])
    assert title.strip(".") == title != ""
    assert options.runs == pathlib.Path("r")
    plan = Plan(rows, options.runs)
    for row in rows:
        assert row.arguments.keys() <= plan.defaults(row.config).keys(), row.name
        get_recipe(row.arguments["recipe"])  # raises a ValueError if there is none


def test_eco_arms_of_the_toy_are_configs_that_build(monkeypatch):
    monkeypatch.chdir(ROOT)
    rows, _, _ = parse_sweep_command(["configs/sweeps/toy_cpu.py", "--runs", "r", "--out", "o"])
    get_config = load_config_file(CONFIG).get_config
    arms = [row for row in rows if row.arguments.get("optimizer") in ("eco", "naive")]
    assert len(arms) == 8
    for row in arms:
        assert get_config(**row.arguments).steps == row.arguments["steps"]


def test_the_30m_sweep_branches_where_cage_sets_in_and_shortens_to_the_decisive_rows(monkeypatch):
    monkeypatch.chdir(ROOT)
    get_rows = load_config_file("configs/sweeps/llama_30m.py", "get_rows").get_rows
    rows = get_rows(tokens=30e6)
    # 30e6 / (64 x 512) tokens are 916 steps; CAGE is silent while t / 916 <= 0.8, to t = 732.
    assert {row.stop_after for row in rows} == {None, 732}
    assert sum(row.branch_of is not None for row in rows) == 3 * 4
    fewer = get_rows(tokens=120e6, decisive=True)
    check_rows(fewer)
    assert {row.name for row in fewer} < {row.name for row in rows}
    assert all(len(row.seeds) == 3 for row in fewer)


def test_a_sweep_of_real_runs_ends_with_a_table(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    small = {**SMALL, "recipe": "bf16", "cage_total_strength": 0.0}
    rows = [
        Row("base", str(CONFIG), small, stop_after=7),
        Row("branch", str(CONFIG), {**small, "weight_decay": 0.2}, branch_of="base"),
    ]
    options = SweepOptions(runs=tmp_path / "runs", out=tmp_path / "out")
    report = sweep(rows, "Title", options, script=ROOT / "scripts" / "pretrain.py")
    assert report.succeeded == ("base-s0", "branch-s0"), report.errors
    record = read_records(tmp_path / "out" / "results.jsonl")["branch", 0]
    assert (record["steps"], record["device"]) == (24, "cpu")
    assert record["corpus"].startswith("moby-dick")
    assert f"{record['validation_loss']:.4f}" in (tmp_path / "out" / "results.md").read_text()
    base, branch = (
        read_metrics(tmp_path / "runs" / f"{r.name}-s0" / "metrics.jsonl") for r in rows
    )
    assert branch[: len(base)] == base
    assert [r["step"] for r in branch if r["split"] == "train"] == [*range(1, 25)]
    assert not (tmp_path / "runs" / "branch-s0" / "checkpoints").exists()

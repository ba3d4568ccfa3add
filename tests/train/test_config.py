import dataclasses
import re

import pytest

from lowbit_jax.models import Llama, count_params
from lowbit_jax.train.config import Config, UsageError, check_data, load_config_file, parse_command

from .conftest import CONFIG, ROOT

LLAMA = ROOT / "configs" / "llama.py"


@pytest.fixture(scope="module")
def tiny():
    return load_config_file(CONFIG).get_config(steps=10)


def test_knobs_reach_get_config_with_their_types():
    config, identity, options = parse_command(
        [str(CONFIG), "--peak-lr", "1e-3", "--steps", "7", "--run-dir", "x", "--no-save"]
    )
    assert (config.steps, options.run_dir, options.save, options.fresh) == (7, "x", False, False)
    assert identity.overrides == {"peak_lr": 1e-3, "steps": 7}
    assert identity.arguments["recipe"] == "quest_w4a4"
    assert identity.run_name == "llama_tiny_quest_cage-peak_lr=0.001-steps=7"
    # Warm-up and decay follow the number of steps: the peak lies at step 0.1 * 7, the end at 7.
    assert float(config.learning_rate(7)) == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.parametrize("path", [CONFIG, LLAMA], ids=lambda path: path.stem)
def test_help_explains_every_knob_and_shows_the_docstring(path, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_command([str(path), "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    module = load_config_file(path)
    # Boxed text wraps: compare the words alone.
    words = re.sub(r"[^A-Za-z0-9.]+", "", shown)
    squeeze = lambda text: re.sub(r"[^A-Za-z0-9.]+", "", text)  # noqa: E731
    assert squeeze(module.__doc__.splitlines()[0]) in words
    for function_or_class in (module.get_config, type(parse_command([str(CONFIG)])[2])):
        doc = function_or_class.__doc__
        knobs = re.findall(r"^ {6}(\w+): (.*)$", doc, re.M) or re.findall(
            r"^ {4}  (\w+): (.*)$", doc, re.M
        )
        assert len(knobs) >= 4
        for name, first_line in knobs:
            assert f"--{name.replace('_', '-')}" in shown
            assert squeeze(first_line)[:30] in words, name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bogus", "1"], "--bogus"),
        (["--steps", "many"], "invalid literal"),
    ],
)
def test_an_unknown_flag_or_type_exits_with_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_command([str(CONFIG), *arguments])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert said in printed.err + printed.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["configs/nothing.py"],
            r"no file configs/nothing.py; configs here: .*llama_tiny_quest_ca",
        ),
        ([str(CONFIG), "--recipe", "quest_w5a5"], "no recipe 'quest_w5a5'; there are .*quest_w4a4"),
        ([str(CONFIG), "--steps", "0"], "total_steps must be at least 1, got 0"),
        (
            [str(LLAMA), "--data", "synthetic", "--batch-size", "0"],
            "batch_size and seq_len must be at least 1, got 0",
        ),
        ([str(LLAMA), "--data", "nowhere"], "no such directory: nowhere"),
    ],
)
def test_what_a_user_gets_wrong_is_a_usage_error_that_says_what_there_is(
    arguments, said, monkeypatch
):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UsageError, match=said):
        parse_command(arguments)


def test_without_a_config_it_lists_those_there_are(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for arguments, code in (([], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as stopped:
            parse_command(arguments)
        assert stopped.value.code == code
        shown = capsys.readouterr()
        assert "configs/llama.py" in shown.out + shown.err


def test_a_file_without_get_config_is_refused(tmp_path):
    (tmp_path / "x.py").write_text("y = 1\n")
    with pytest.raises(UsageError, match="defines no function get_config"):
        load_config_file(tmp_path / "x.py")


def test_numbers_that_cannot_be_are_refused(tiny):
    with pytest.raises(UsageError, match="batch_size must be a multiple of micro_batches=3"):
        dataclasses.replace(tiny, micro_batches=3)
    for name in ("eval_interval", "final_eval_batches"):
        with pytest.raises(UsageError, match=f"{name} must be at least 1, got 0"):
            dataclasses.replace(tiny, **{name: 0})
    with pytest.raises(UsageError, match=r"seed must be in .* got -1"):
        dataclasses.replace(tiny, seed=-1)


def test_data_that_do_not_fit_are_refused_before_anything_compiles(tiny):
    check_data(tiny)
    with pytest.raises(UsageError, match="batch_size"):
        check_data(dataclasses.replace(tiny, batch_size=10**6))
    small = Llama(dataclasses.replace(tiny.model.config, vocab_size=128))
    with pytest.raises(UsageError, match=r"vocab_size must be at least .* 256, got 128"):
        check_data(dataclasses.replace(tiny, model=small))


# Non-embedding parameters: the published table of QuEST counts the blocks' matrices and the norms.
@pytest.mark.parametrize(
    ("size", "steps", "peak_lr", "millions"),
    [
        ("30m", 11444, 1.2e-3, 30.48),
        ("50m", 19073, 1.2e-3, 49.56),
        ("100m", 38147, 6e-4, 102.8),
        ("200m", 76294, 3e-4, 203.2),
        ("430m", 164032, 1.5e-4, 443.1),
        ("800m", 305176, 7.5e-5, 822.2),
    ],
)
def test_sizes_take_the_published_settings(size, steps, peak_lr, millions):
    config = load_config_file(LLAMA).get_config(size=size, data="synthetic")
    assert isinstance(config, Config)
    assert config.steps == steps  # published: the same but for rounding down
    assert float(config.learning_rate(round(0.1 * steps))) == pytest.approx(peak_lr, rel=1e-3)
    non_embedding = count_params(config.model.config)["non_embedding"]
    assert non_embedding / 1e6 == pytest.approx(millions, rel=1e-3)

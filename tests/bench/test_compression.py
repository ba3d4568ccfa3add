"""Tables of compression results: rows, order, lines that are resumed, and what is measured."""

import dataclasses
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from rich.console import Console
from scipy.special import erf

from lowbit_jax.bench import compression_subject
from lowbit_jax.bench.compression import CompressionOptions, compress_sweep
from lowbit_jax.bench.compression_bert import BertShape, layer_inputs, output_error
from lowbit_jax.bench.compression_outliers import inject_outliers
from lowbit_jax.bench.compression_report import results_markdown, save_plots
from lowbit_jax.bench.compression_rows import (
    Table,
    base_row,
    elsa_rows,
    expected_s,
    format_of,
    language_model_rows,
    method_of,
    pattern_of,
    quantization_rows,
    run_order,
    sparsity_rows,
)
from lowbit_jax.bench.compression_subject import LlamaSubject, nearest_blocks, split_sample
from lowbit_jax.data.text import bundled_text
from lowbit_jax.data.tokenizers import train_bpe
from lowbit_jax.models import Llama, LlamaConfig
from lowbit_jax.models.pretrained import save_pretrained
from lowbit_jax.numerics import INT4, MXFP4, NVFP4, dequantize, fake_quantize, quantize
from lowbit_jax.ptq.hessian import add_inputs, empty_hessian, layer_error
from lowbit_jax.ptq.methods import Method, compression_of
from lowbit_jax.ptq.perplexity import perplexity
from lowbit_jax.rotations import Hadamard
from lowbit_jax.sparsity import NM, Unstructured
from lowbit_jax.train import UsageError

QUIET = Console(quiet=True)


def table_of(rows, **fields):
    return Table(tuple(rows), "tiny", "nowhere", ("text.txt",), **fields)


def test_names_of_formats_and_patterns():
    assert format_of("mxfp4") == MXFP4
    assert format_of("int4g32") == dataclasses.replace(INT4, block_size=32)
    assert pattern_of("70%") == Unstructured(0.7)
    assert pattern_of("2:4") == NM(2, 4)
    with pytest.raises(ValueError, match="format_of: must be one of"):
        format_of("fp5")
    assert pattern_of("1:4").sparsity == 0.75
    with pytest.raises(ValueError, match="n:m, n kept of each m"):
        pattern_of("half")


def test_arguments_of_a_row_name_its_method():
    assert method_of({}) is None
    assert method_of({"outliers": True}) is None
    rotated = {"format": "int4g32", "method": "rtn_hadamard", "activations": "int4g32"}
    int4 = dataclasses.replace(INT4, block_size=32)
    assert method_of(rotated) == Method("rtn", int4, activations=int4, rotation=32)
    assert method_of({"format": "nvfp4", "method": "mr_gptq"}) == Method("mr_gptq", NVFP4)
    given = {"pattern": "90%", "method": "elsa", "steps": 64, "strength": 0.1}
    elsa = method_of({**given, "learning_rates": (1e-4, 2e-4)})
    assert (elsa.pattern, elsa.steps, elsa.strength) == (Unstructured(0.9), 64, 0.1)
    with pytest.raises(ValueError, match="method_of: must be one of rtn"):
        method_of({"format": "nvfp4", "method": "awq"})


def test_rows_have_their_seeds_and_run_in_order_of_cost():
    rows = language_model_rows(
        "t.py",
        formats=("mxfp4", "int3g64"),
        input_formats=("mxfp4",),
        patterns=("2:4",),
        seeds=2,
    )
    assert len(rows) == 2 + 2 * 2 * 6 + 6 + 3
    trained = elsa_rows("t.py", {"0%": ((1e-3,), ()), "50%": ((1e-3,), (0.1, 0.2))}, steps=4)
    assert len(trained) == 1 + 1 + 3
    assert trained[-1].arguments["strengths"] == (0.1, 0.2)
    assert trained[-1].arguments["steps"] == 4
    rows += trained[1:]
    by_name = {row.name: row for row in rows}
    assert len(by_name) == len(rows)
    assert by_name["mxfp4-w4a4-rtn"].seeds == (0,)
    assert by_name["mxfp4-w4a4-gptq-outliers"].seeds == (0, 1)
    assert by_name["mxfp4-w4a4-gptq-outliers"].baseline == "base-outliers"
    assert by_name["int3g64-w3a16-gptq"].group == "INT3G64, W3A16"
    assert method_of(by_name["s50-retrain"].arguments).mask_solver == "sparsegpt"
    order = [(row.name, seed) for row, seed in run_order(rows)]
    place = {name: i for i, name in enumerate(order)}
    assert order[0] == ("base", 0)
    for cheap, dear in (
        (("s2to4-magnitude", 0), ("mxfp4-w4a4-gptq", 0)),
        (("s2to4-wanda", 0), ("s0-retrain", 0)),
        (("s50-elsa", 0), ("mxfp4-w4a4-gptq", 1)),
    ):
        assert place[cheap] < place[dear]


class FakeSubject:
    """Loses more to nearest than by GPTQ; fails for one row, and is interrupted at another."""

    def __init__(self, fails="", stops="", error=None):
        self.calls, self.fails, self.stops = [], fails, stops
        self.error = error or ValueError("could not be factored")

    def measure(self, row, seed, on_step, folder):
        self.calls.append((row.name, seed))
        folder.mkdir(parents=True)  # which nobody finds afterwards
        on_step(1, 1)
        if row.name == self.stops:
            raise KeyboardInterrupt
        if row.name == self.fails:
            raise self.error
        loss = {"rtn": 0.4, "gptq": 0.1 + 0.01 * seed, "mr_gptq": 0.11}.get(
            row.arguments.get("method", ""), 0.0
        )
        return {
            "validation_loss": 3.0 + loss, "perplexity": math.exp(3 + loss),
            "validation_tokens": 100, "layer_error": 0.01 + loss, "bits_per_weight": 4.25,
            "solve_s": 0.0,
        }  # fmt: skip


METHODS = ("rtn", "gptq", "mr_gptq")
ROWS = [base_row("t.py"), *quantization_rows("t.py", ("mxfp4",), methods=METHODS, seeds=2)]
EXPECTED = {"gptq": 50.0, "mr_gptq": 50.0}


def run(out, subject, rows=ROWS, **options):
    table = table_of(rows, expected_s=EXPECTED)
    options = CompressionOptions(out, **options)
    return compress_sweep(table, "Tiny", options, console=QUIET, subject=subject)


def test_what_is_done_is_not_repeated_and_what_fails_is_a_line(tmp_path):
    subject = FakeSubject(fails="mxfp4-w4a16-mr_gptq")
    report = run(tmp_path, subject, only="base|.*rtn|.*mr_gptq")
    assert report.done == ("base, seed 0", "mxfp4-w4a16-rtn, seed 0")
    assert report.failed["mxfp4-w4a16-mr_gptq, seed 1"] == "could not be factored"
    again = FakeSubject()
    assert run(tmp_path, again).done == tuple(f"mxfp4-w4a16-gptq, seed {s}" for s in (0, 1))
    assert not list((tmp_path / "work").iterdir())
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["row"], line["seed"]) for line in lines] == [
        (row.name, seed) for row in ROWS for seed in row.seeds
    ]
    assert lines[-1]["error"] == "could not be factored"
    page = (tmp_path / "results.md").read_text()
    assert "| GPTQ (2 seeds) | 22.309 | 3.1050 | +0.1050 ± 0.0050 | 0.26 |" in page
    assert "failed: could not be factored" in page
    assert "| mxfp4-w4a16-gptq (0.105) | mxfp4-w4a16-rtn (0.4) | holds |" in page
    assert (tmp_path / "formats.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 | 8 GiB\nAllocator:"),
        NotImplementedError(),
    ],
    ids=["memory", "not covered"],
)
def test_what_a_device_or_a_method_cannot_do_is_a_line(tmp_path, error):
    subject = FakeSubject(fails="mxfp4-w4a16-gptq", error=error)
    report = run(tmp_path, subject)
    assert set(report.failed) == {f"mxfp4-w4a16-gptq, seed {s}" for s in (0, 1)}
    assert ("mxfp4-w4a16-mr_gptq", 1) in subject.calls
    first = str(error).split("\n")[0].replace("|", "/") or "NotImplementedError"
    assert f"| GPTQ (failed: {first}) |" in (tmp_path / "results.md").read_text()


def test_an_interrupt_keeps_the_rows_before_it(tmp_path):
    report = run(tmp_path, FakeSubject(stops="mxfp4-w4a16-gptq"))
    assert report.done == ("base, seed 0", "mxfp4-w4a16-rtn, seed 0")
    assert len(report.left) == 4
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


def test_no_row_starts_that_would_not_end_in_time(tmp_path):
    subject = FakeSubject()
    report = run(tmp_path, subject, time_limit_s=40.0)
    assert subject.calls == [("base", 0), ("mxfp4-w4a16-rtn", 0)]
    assert len(report.left) == 4
    # What was measured counts more than what was guessed.
    slow = {("x", 0): {"device": "cpu", "arguments": {"method": "gptq"}, "time_s": 7.0}}
    row = next(row for row in ROWS if row.name.endswith("-gptq"))
    table = table_of(ROWS, expected_s=EXPECTED)
    assert expected_s(row, table, slow, "cpu") == 7
    assert expected_s(row, table, slow, "gpu") == 50


def test_results_of_other_settings_are_refused(tmp_path):
    run(tmp_path, FakeSubject(), only="base")
    options = CompressionOptions(tmp_path)
    other = table_of(ROWS, window=256)
    with pytest.raises(UsageError, match="window is 512 there, 256 here"):
        compress_sweep(other, "Tiny", options, console=QUIET, subject=FakeSubject())


def test_a_list_runs_nothing(tmp_path):
    subject = FakeSubject()
    assert len(run(tmp_path, subject, list=True).left) == 6
    assert subject.calls == []
    assert not list(tmp_path.iterdir())


def test_a_table_without_results_says_so(tmp_path):
    table = table_of(ROWS)
    page = results_markdown("Tiny", table, {})
    assert "Nothing has been measured yet." in page
    assert "| MR-GPTQ (to be run) |" in page
    assert save_plots(tmp_path, table, {}) == []


# -- Outliers


MODEL = Llama(LlamaConfig(300, 64, 2, 2, d_ff=128, dtype="float32"))
TOKENS = np.random.default_rng(0).integers(0, 300, (4, 32), np.int32)


@pytest.fixture(scope="module")
def params():
    init = jax.jit(MODEL.init)(jax.random.key(0), TOKENS)["params"]
    return jax.tree.map(lambda x: 4 * np.asarray(x), nn.meta.unbox(init))


@pytest.fixture(scope="module")
def logits(params):
    apply = jax.jit(lambda p: MODEL.apply({"params": p}, TOKENS))
    return lambda changed: apply({**params, **changed})


def test_outliers_change_nothing_but_rounding(params, logits):
    # Exact: a power of two in a norm and its inverse in the columns move no rounding.
    exact = inject_outliers(params, factor=32.0)
    chex.assert_trees_all_equal(logits(exact), logits(params))
    injected = inject_outliers(params)
    # Bound: each weight and each input is rounded once more, 2^-24 relative, in each of the
    # products of two layers; logits are of order 1 (4 * 0.02 * sqrt(64) * 4).
    chex.assert_trees_all_close(logits(injected), logits(params), rtol=0, atol=1e-4)


def test_outliers_are_where_they_should_be(params):
    injected = inject_outliers(params, channels=3, factor=30.0, seed=1)
    for norm, reader in (
        ("attention_norm", ("attention", "k_proj")),
        ("mlp_norm", ("mlp", "up_proj")),
    ):
        ratio = injected["layers"][norm]["scale"] / params["layers"][norm]["scale"]
        assert ((ratio == 30).sum(axis=1) == 3).all()
        part, name = reader
        before, after = (p["layers"][part][name]["weight"] for p in (params, injected))
        np.testing.assert_allclose(after * ratio[:, None, :], before, rtol=3e-7)
    chex.assert_trees_all_equal(injected["final_norm"], params["final_norm"])
    other = inject_outliers(params, seed=2)["layers"]["mlp_norm"]["scale"]
    assert (other != inject_outliers(params)["layers"]["mlp_norm"]["scale"]).any()
    with pytest.raises(ValueError, match="channels must be 1 to 64"):
        inject_outliers(params, channels=65)


# -- Subjects


def test_rows_without_calibration_round_every_matrix_in_its_basis(params):
    ones = {"mlp/down_proj": jnp.stack([jnp.eye(128)] * 2)}
    blocks = list(nearest_blocks(params, compression_of(Method("rtn", MXFP4, rotation=32)), ones))
    w = params["layers"]["mlp"]["down_proj"]["weight"]
    for index, block in enumerate(blocks):
        expected = quantize(Hadamard(32).apply(w[index]), MXFP4)
        # Exact: rows that need no calibration run no block.
        chex.assert_trees_all_equal(block.kept["mlp/down_proj"], expected)
    assert len(blocks) == 2


def test_samples_are_even_and_disjoint(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bundled_text())
    train, validation, left = split_sample(
        [str(path)], train_bytes=400_000, validation_bytes=60_000, fraction=0.1
    )
    assert not set(train) & set(validation)
    assert left
    assert not set(left) & {*train, *validation}
    assert 200_000 <= sum(map(len, train)) <= 400_000
    assert 30_000 <= sum(map(len, validation)) <= 120_000
    with pytest.raises(ValueError, match="pieces for training and for validation"):
        split_sample([str(path)], train_bytes=1000, validation_bytes=1000, fraction=0.0)


@pytest.fixture(scope="module")
def subject(tmp_path_factory, params):
    folder = tmp_path_factory.mktemp("model")
    text = folder / "moby.txt"
    text.write_bytes(bundled_text()[30_000:230_000])  # past the contents, which repeat
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(train_bpe([text.read_bytes()[:20_000]], 300).to_json())
    save_pretrained(folder / "hf", MODEL, params, tokenizer=tokenizer, metadata={})
    return LlamaSubject(
        Table(
            (), "tiny", str(folder / "hf"), (str(text),), validation_fraction=0.2,
            calibration_tokens=20_000, samples=32, length=32, batch_size=1, eval_tokens=512,
            window=32, stride=32, hessian_samples=4, train_tokens=6000, train_batch_size=4,
        )
    )  # fmt: skip


def measure(subject, row, seed=0):
    return subject.measure(row, seed, lambda step, total: None)


def test_a_row_is_the_perplexity_of_rounded_weights(subject):
    base = measure(subject, base_row("t.py"))
    assert base["validation_tokens"] == 512
    row = quantization_rows("t.py", ("mxfp4",), methods=("rtn",))[0]
    found = measure(subject, row)
    params = subject.params(False)

    def rounded(path, w):
        is_matrix = w.ndim == 3
        return jax.vmap(lambda m: dequantize(quantize(m, MXFP4)))(w) if is_matrix else w

    expected = jax.tree_util.tree_map_with_path(rounded, params)
    result = perplexity(subject.model, expected, subject.evaluation, window=32)
    # Exact: the same weights, in the same program.
    assert found["validation_loss"] == result.loss
    assert found["validation_loss"] != base["validation_loss"]
    assert found["bits_per_weight"] == 4.25
    # Errors by path against a loop, on the Hessians that were recorded.
    w = params["layers"]["mlp"]["up_proj"]["weight"]
    matrices = subject.hessians(False)["mlp/up_proj"]
    loop = [
        float(layer_error(w[i], dequantize(quantize(w[i], MXFP4)), matrices[i])) for i in range(2)
    ]
    np.testing.assert_allclose(found["layer_errors"]["up_proj"], np.mean(loop), rtol=1e-5)


def test_rows_with_quantized_inputs_and_outliers(subject):
    (row,) = quantization_rows("t.py", ("mxfp4",), methods=("gptq",), activations=(True,), seeds=1)
    (nearest,) = quantization_rows("t.py", ("mxfp4",), methods=("rtn",))
    solved = measure(subject, row)
    assert solved["layer_error"] < measure(subject, nearest)["layer_error"]
    base = measure(subject, base_row("t.py"))
    assert solved["validation_loss"] != base["validation_loss"]
    injected = measure(subject, base_row("t.py", outliers=True))
    # Bound: see test_outliers_change_nothing_but_rounding; a loss is a mean over logits.
    assert abs(injected["validation_loss"] - base["validation_loss"]) < 1e-4


def spans(tokens):
    """All runs of 32 tokens, for which the book does not repeat itself."""
    return set(
        map(bytes, np.lib.stride_tricks.sliding_window_view(np.ascontiguousarray(tokens), 32))
    )


@pytest.fixture
def seen(monkeypatch):
    """Of the last call of each function that prunes: dtype, params, method, options, result."""
    calls = {}

    def spy(name):
        inner = getattr(compression_subject, name)

        def called(model, params, method, *arguments, **options):
            found = inner(model, params, method, *arguments, **options)
            calls[name] = (model.config.dtype, params, method, options, found)
            return found

        monkeypatch.setattr(compression_subject, name, called)

    spy("prune_model")
    spy("search_training")
    return calls


def up_proj(params):
    return params["layers"]["mlp"]["up_proj"]["weight"]


def test_a_one_shot_row_predicts_with_its_zeros(subject, seen):
    (row,) = sparsity_rows("t.py", ("50%",), methods=("wanda",), seeds=1)
    found = measure(subject, row)
    *_, options, pruned = seen["prune_model"]
    assert (up_proj(pruned.params) == 0).mean() == 0.5
    result = perplexity(subject.model, pruned.params, subject.evaluation, window=32)
    # Exact: the same weights, in the same program.
    assert found["validation_loss"] == result.loss
    assert 0 < found["layer_error"] < 1
    windows = np.stack(options["calibration"]).reshape(-1, 32)
    assert not set(map(bytes, windows)) & spans(subject.evaluation)


def test_a_trained_row_chooses_its_rate_without_the_evaluation(subject, seen):
    training = {"75%": {"steps": 2, "learning_rates": (1e-3, 1e-4)}}
    (row,) = sparsity_rows("t.py", ("75%",), methods=("retrain",), training=training)
    found = measure(subject, row)
    assert found["losses_held_out"].keys() == {"learning rate 0.001", "learning rate 0.0001"}
    best = min(found["losses_held_out"], key=found["losses_held_out"].get)
    assert f"learning rate {found['learning_rate']:g}" == best
    # Solved in the dtype of the table, trained in another, with the zeros that were found.
    assert (seen["prune_model"][0], seen["search_training"][0]) == ("float32", "bfloat16")
    assert seen["prune_model"][2].solver == "sparsegpt"
    before, after = seen["search_training"][1], seen["search_training"][4][0].params
    masks = [up_proj(params) == 0 for params in (before, after)]
    np.testing.assert_array_equal(*masks)
    assert masks[0].mean() == 0.75
    calibration = np.stack(seen["prune_model"][3]["calibration"]).reshape(-1, 32)
    options = seen["search_training"][3]
    held_out = np.concatenate(options["validation"])
    parts = {
        "training": spans(options["batches"].tokens),
        "held out": spans(np.append(held_out[:, :-1].ravel(), held_out[-1, -1])),
        "evaluation": spans(subject.evaluation),
    }
    assert not parts["training"] & parts["held out"]
    assert not (parts["training"] | parts["held out"]) & parts["evaluation"]
    assert set(map(bytes, calibration)) <= parts["training"]
    # The model may know its training pieces by heart, so that they choose no rate.
    assert not parts["held out"] & spans(subject.calibration)


def test_a_row_of_elsa_trains_the_dense_model_to_the_pattern(subject, seen):
    training = {
        "75%": {"steps": 4, "interval": 2, "learning_rates": (1e-3,), "strengths": (0.1, 0.2)}
    }
    (row,) = sparsity_rows("t.py", ("75%",), methods=("elsa",), training=training)
    found = measure(subject, row)
    assert "prune_model" not in seen  # no mask is found beforehand
    dtype, before, (method, _), options, (pruned, *_) = seen["search_training"]
    assert (dtype, method.solver, method.interval) == ("bfloat16", "elsa", 2)
    assert (up_proj(before) != 0).all()
    assert [row.step for row in pruned.records] == [2, 4]
    for path, w in ((p, pruned.params["layers"][p]) for p in ("attention", "mlp")):
        for name, matrix in w.items():
            assert np.mean(matrix["weight"] == 0) == 0.75, (path, name)
    result = perplexity(subject.model, pruned.params, subject.evaluation, window=32)
    # Exact: the same weights, in the same program, of the table's dtype and not that of training.
    assert found["validation_loss"] == result.loss
    assert (found["learning_rate"], found["layer_error"]) == (1e-3, None)
    tried = {f"learning rate 0.001, strength {s:g}": s for s in (0.1, 0.2)}
    assert tried.keys() == found["losses_held_out"].keys()
    best = min(found["losses_held_out"], key=found["losses_held_out"].get)
    assert found["strength"] == tried[best]
    assert not spans(options["batches"].tokens) & spans(subject.evaluation)


def test_a_killed_row_that_trains_goes_on(subject, tmp_path):
    training = {"75%": {"steps": 4, "interval": 2, "learning_rates": (1e-3, 1e-4)}}
    (row,) = sparsity_rows("t.py", ("75%",), methods=("elsa",), training=training)
    steps = []

    def be_killed(step, total):
        steps.append(step)
        if len(steps) == 3:  # in the training at the second learning rate
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        subject.measure(row, 0, be_killed, tmp_path)
    steps.clear()
    found = subject.measure(row, 0, lambda step, total: steps.append(step), tmp_path)
    assert steps == [4, 2, 4]  # the first is read, the second trained
    assert found["losses_held_out"] == measure(subject, row)["losses_held_out"]  # exact


# -- BERT


SHAPE = BertShape(n_layers=1, n_heads=2, norm_eps=1e-12)


@pytest.fixture(scope="module")
def bert():
    rng = np.random.default_rng(0)
    at, d, f = "encoder.layer.0", 16, 32

    def dense(n, k):
        return {"weight": rng.normal(size=(n, k)) / k**0.5, "bias": 0.1 * rng.normal(size=n)}

    def norm():
        return {"weight": 1 + 0.1 * rng.normal(size=d), "bias": 0.1 * rng.normal(size=d)}

    modules = {
        f"embeddings.{name}_embeddings": {"weight": rng.normal(size=(count, d))}
        for name, count in (("word", 20), ("position", 8), ("token_type", 2))
    }
    modules |= {f"{at}.attention.self.{n}": dense(d, d) for n in ("query", "key", "value")}
    modules |= {
        f"{at}.attention.output.dense": dense(d, d),
        f"{at}.intermediate.dense": dense(f, d),
    }
    modules |= {f"{at}.output.dense": dense(d, f), "embeddings.LayerNorm": norm()}
    modules |= {f"{at}.attention.output.LayerNorm": norm(), f"{at}.output.LayerNorm": norm()}
    return {
        f"{m}.{n}": w.astype(np.float32) for m, parts in modules.items() for n, w in parts.items()
    }


def test_bert_is_that_of_a_slow_loop_in_float64(bert):
    tokens = np.random.default_rng(1).integers(0, 20, (2, 5))
    w = {name: value.astype(np.float64) for name, value in bert.items()}
    at = "encoder.layer.0"

    def dense(name, x):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def norm(name, x):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-12) * w[f"{name}.weight"] + w[f"{name}.bias"]

    found, last = layer_inputs({n: jnp.asarray(v) for n, v in bert.items()}, tokens, SHAPE)
    for b, sentence in enumerate(tokens):
        x = [
            norm(
                "embeddings.LayerNorm",
                w["embeddings.word_embeddings.weight"][token]
                + w["embeddings.position_embeddings.weight"][i]
                + w["embeddings.token_type_embeddings.weight"][0],
            )
            for i, token in enumerate(sentence)
        ]
        for i in range(5):
            mixed = []
            for head in (slice(0, 8), slice(8, 16)):
                q = dense(f"{at}.attention.self.query", x[i])[head]
                scores = [q @ dense(f"{at}.attention.self.key", y)[head] / 8**0.5 for y in x]
                weights = np.exp(scores) / np.exp(scores).sum()
                values = [dense(f"{at}.attention.self.value", y)[head] for y in x]
                mixed.append(sum(a * v for a, v in zip(weights, values, strict=True)))
            mixed = np.concatenate(mixed)
            y = norm(
                f"{at}.attention.output.LayerNorm",
                x[i] + dense(f"{at}.attention.output.dense", mixed),
            )
            z = dense(f"{at}.intermediate.dense", y)
            wide = z * (1 + erf(z / 2**0.5)) / 2
            end = norm(f"{at}.output.LayerNorm", y + dense(f"{at}.output.dense", wide))
            of_layer = {
                "attention.self": x[i],
                "attention.output": mixed,
                "intermediate": y,
                "output": wide,
            }
            # Bound: float32 against float64 through some ten operations on numbers of order 1.
            for name, expected in of_layer.items():
                np.testing.assert_allclose(found[0][name][5 * b + i], expected, atol=1e-5)
            np.testing.assert_allclose(last[b, i], end, atol=1e-5)


def test_errors_of_outputs():
    x = jax.random.normal(jax.random.key(0), (256, 64))
    w = jax.random.normal(jax.random.key(1), (32, 64))
    matrix = add_inputs(empty_hessian(64), x).matrix
    q = quantize(w, MXFP4)
    # Bound: the same sum of squares in float32, in another order.
    np.testing.assert_allclose(
        output_error(w, x, q), layer_error(w, dequantize(q), matrix), rtol=1e-4
    )
    turn = Hadamard(32)
    rotated = quantize(turn.apply(w), MXFP4)
    expected = fake_quantize(turn.apply(x), MXFP4) @ dequantize(rotated).T
    y = x @ w.T
    found = output_error(w, x, rotated, activations=MXFP4, rotation=turn)
    np.testing.assert_allclose(found, jnp.sum((expected - y) ** 2) / jnp.sum(y**2), rtol=1e-4)

"""Orderings of compression methods: whose they are, and what a verdict needs."""

from lowbit_jax.bench.compression_claims import Claim, claims_of, judge, losses, verdicts_of
from lowbit_jax.bench.compression_rows import base_row, quantization_rows, sparsity_rows


def word(values, exact=()):
    return judge(Claim("a", "b", None), values, exact).word


def test_a_claim_is_open_within_two_standard_errors():
    # Standard error of (0, 2) is 1, so that of the difference to an exact value is 1.
    assert word({"a": [0.0, 2.0], "b": [3.5]}, "b") == "holds"
    assert word({"a": [0.0, 2.0], "b": [2.5]}, "b") == "open"
    assert word({"a": [0.0, 2.0], "b": [-1.5]}, "b") == "reversed"
    # And to two such seeds sqrt(2).
    assert word({"a": [0.0, 2.0], "b": [2.5, 4.5]}) == "open"
    assert word({"a": [0.0, 2.0], "b": [3.0, 5.0]}) == "holds"
    assert judge(Claim("a", "b", None), {"a": [], "b": [2.0]}) is None


def test_one_seed_of_several_is_no_verdict():
    one = {"a": [1.0], "b": [2.0]}
    assert word(one, "ab") == "holds"
    assert word(one, "b") == word(one) == "open (one seed)"
    assert word({"a": [1.0, 1.1], "b": [2.0]}) == "open (one seed)"
    rows = quantization_rows("t.py", ("int4g32",), methods=("rtn", "rtn_hadamard", "gptq"), seeds=1)
    values = {row.name: [float(i)] for i, row in enumerate(reversed(rows))}
    words = {v.claim.better: v.word for v in verdicts_of(rows, values)}
    assert words == {
        "int4g32-w4a16-gptq": "open (one seed)",
        "int4g32-w4a16-rtn_hadamard": "holds",
    }


def test_claims_have_the_sources_of_their_formats_and_inputs():
    formats = ("mxfp4", "mxfp4_fitted", "nvfp4", "int4g32", "int2g128")
    rows = quantization_rows("t.py", formats, activations=(False, True))
    rows += quantization_rows("t.py", formats, activations=(True,), outliers=True)
    sources = {(c.better, c.worse): c.source for c in claims_of(rows)}
    fp4, wush, gptq = "arXiv:2509.23202", "arXiv:2512.00956", "arXiv:2210.17323"

    def of(better, worse, format, width="w4a4", suffix=""):
        return sources[f"{format}-{width}-{better}{suffix}", f"{format}-{width}-{worse}{suffix}"]

    assert of("gptq", "rtn", "int4g32", "w4a16") == gptq
    assert of("gptq", "rtn", "mxfp4_fitted") == of("gptq", "rtn", "nvfp4") == fp4
    assert of("mr_gptq", "gptq", "mxfp4_fitted") == of("rtn", "rtn_hadamard", "nvfp4") == fp4
    assert of("rtn_hadamard", "rtn", "int4g32") == fp4
    assert of("wush", "mr_gptq", "mxfp4_fitted") == wush
    assert sources["nvfp4-w4a4-rtn", "mxfp4_fitted-w4a4-rtn"] == fp4
    # Other scales, inputs and formats, and injected outliers, are no paper's.
    assert of("gptq", "rtn", "nvfp4", "w4a16") is None
    assert of("gptq", "rtn", "int2g128", "w2a16") is None
    assert of("mr_gptq", "gptq", "mxfp4") is None
    assert of("mr_gptq", "gptq", "mxfp4_fitted", suffix="-outliers") is None
    assert sources["nvfp4-w4a4-rtn", "mxfp4-w4a4-rtn"] is None
    assert ("nvfp4-w4a4-mr_gptq", "nvfp4-w4a4-gptq") not in sources


def test_claims_of_patterns_go_by_their_zeros():
    def pairs(pattern):
        rows = sparsity_rows("t.py", (pattern,))
        return {tuple(n.split("-")[1] for n in (c.better, c.worse)) for c in claims_of(rows)}

    assert pairs("2:4") == pairs("50%") == {("wanda", "magnitude"), ("sparsegpt", "magnitude")}
    assert ("sparsegpt", "wanda") in pairs("1:4")
    assert ("elsa", "retrain") in pairs("90%") - pairs("80%")


def test_gaps_are_to_the_baseline_of_the_row():
    rows = [base_row("t.py"), *quantization_rows("t.py", ("mxfp4",), methods=("gptq",), seeds=2)]
    records = {
        ("base", 0): {"validation_loss": 3.0},
        (rows[1].name, 0): {"validation_loss": 3.5},
        (rows[1].name, 1): {"error": "no"},
    }
    assert losses(rows, records)[rows[1].name] == [0.5]

"""The published table of LLMQ, and what a wrong call is told."""

import pytest

from lowbit_jax.analysis import speed_of_light
from lowbit_jax.analysis.speed_of_light import float8_share, run_speed_of_light
from lowbit_jax.models import flops_by_part, llama_config
from lowbit_jax.ops import Explanation
from lowbit_jax.ops.report import ProductRow

H100 = "NVIDIA H100 80GB HBM3"

# Schultheis and Alistarh, LLMQ, arXiv:2512.15306: Qwen2.5 at 1024 tokens on one H100 SXM. The unit
# of the last printed digit of measured rates; then tokens a second at the speed of light, measured,
# and their quotient in percent: in float8 and in bfloat16.
TABLE = {
    "0.5b": (1000, (489_232, 164_000, 33.5), (319_585, 150_000, 46.9)),
    "1.5b": (100, (176_841, 73_000, 41.3), (103_867, 58_900, 56.7)),
    "3b": (100, (92_961, 40_400, 43.4), (52_164, 30_900, 59.2)),
    "7b": (10, (42_171, 19_150, 45.4), (22_989, 13_850, 60.2)),
    "14b": (10, (21_595, 9_360, 43.4), (11_578, 6_330, 54.7)),
}


@pytest.mark.parametrize("size", TABLE)
def test_published_speed_of_light(size):
    digit, *rows = TABLE[size]
    flops = flops_by_part(llama_config(f"qwen2.5-{size}"), 1024)
    for unit, (limit, measured, percent) in zip(("fp8", "bf16"), rows, strict=True):
        light = speed_of_light(flops, H100, unit)
        assert round(light.tokens_per_s) == limit  # Exact: to the printed digits.
        # Bound: half a unit of the last printed digit of both numbers.
        assert abs(100 * light.share(measured) - percent) <= 0.05 + 100 * 0.5 * digit / limit


def test_utilization_is_over_the_bfloat16_peak_whatever_the_unit():
    flops = {"blocks": 8.0, "head": 1.0, "attention": 1.0}
    peak = {"bf16": 8.0, "fp8": 16.0}
    slow, fast = (speed_of_light(flops, peak, unit) for unit in ("bf16", "fp8"))
    # Exact: sums of powers of two.
    assert (slow.tokens_per_s, fast.tokens_per_s) == (1 / 1.25, 1 / 0.75)
    assert slow.mfu(0.5) == fast.mfu(0.5) == 0.625
    assert fast.share(1 / 0.75) == 1.0
    assert str(fast) == "1 tokens/s: blocks 67% in fp8, head 17% in bf16, attention 17% in bf16"


def row(product, path, n, count=1, where=""):
    formats = ("e4m3", "e4m3") if path != "plain" else ("-", "-")
    return ProductRow(where, product, (4, 8), (n, 8), *formats, path, "", count)


def test_operations_in_float8_are_counted_by_product_and_path():
    rows = (
        row("y", "fp8", 3, 2),  # a quarter of the operations of y, made twice
        row("y", "dequantize", 9, 2),
        row("dx", "hopper", 5),
        row("dx", "hopper", 5, 7),
        row("dw", "dequantize", 7),
    )
    # Exact: sums of powers of two.
    assert float8_share(Explanation(rows)) == (1 / 4 + 1 + 0) / 3
    assert float8_share(Explanation(())) == 0


@pytest.mark.parametrize("repeated", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_what_is_computed_again_does_not_change_the_share(repeated):
    first, second = repeated
    rows = [row("y", "fp8", 3, 4 * first, "up"), row("y", "dequantize", 1, 4 * second, "down")]
    for product in ("dx", "dw"):
        rows += [row(product, "fp8", 3, 4, "up"), row(product, "dequantize", 1, 4, "down")]
    assert float8_share(Explanation(tuple(rows))) == 3 / 4  # Exact: powers of two.


def test_parts_of_the_blocks_in_each_unit_take_their_own_time():
    flops = {"blocks": 8.0, "head": 0.0, "attention": 0.0}
    peak = {"bf16": 8.0, "fp8": 16.0}
    # Exact: half in float8 takes 1 / 4 s, the other half 1 / 2 s.
    light = speed_of_light(flops, peak, "fp8", block_share=0.5)
    assert light.tokens_per_s == 1 / 0.75
    assert "blocks 100% in fp8 (50% of its operations) and bf16" in str(light)


def test_a_run_is_held_to_the_units_that_its_device_has():
    flops = {"blocks": 1.0, "head": 1.0, "attention": 1.0}
    in_float8 = Explanation((row("y", "fp8", 3),))
    units = {
        kind: run_speed_of_light(flops, kind, in_float8).units["blocks"]
        for kind in (H100, "NVIDIA A100-SXM4-80GB")
    }
    assert [*units.values()] == ["fp8", "bf16"]
    assert run_speed_of_light(flops, H100, Explanation(())).units["blocks"] == "bf16"
    assert run_speed_of_light(flops, "cpu", in_float8) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"blocks": 1.0}, H100, "fp8"), "must have the parts"),
        (({"blocks": 1, "head": 1, "attention": 1}, "abacus", "fp8"), "no data sheet"),
        (({"blocks": 1, "head": 1, "attention": 1}, {"bf16": 1.0}, "fp8"), "without 'fp8'"),
        (({"blocks": 1, "head": 1, "attention": 1}, H100, "int8"), "block_unit must be"),
    ],
)
def test_wrong_calls_are_told_what_to_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        speed_of_light(*arguments)

"""The published table of LLMQ, and what a wrong call is told."""

import pytest

from lowbit_jax.analysis import speed_of_light
from lowbit_jax.models import flops_by_part, llama_config

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

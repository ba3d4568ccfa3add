import dataclasses

import jax
import pytest

from lowbit_jax.numerics import (
    FP8_E4M3,
    FP8_E4M3_TENSOR,
    FP8_E5M2_TENSOR,
    INT4,
    MXFP4,
    NVFP4,
    QUEST_INT4,
)
from lowbit_jax.ops import dispatch

A100, ADA, H100 = (8, 0), (8, 9), (9, 0)


@pytest.mark.parametrize(
    ("a", "b", "capability", "path", "reason"),
    [
        (FP8_E4M3_TENSOR, FP8_E4M3_TENSOR, H100, "fp8", "formats and device"),
        (FP8_E5M2_TENSOR, FP8_E4M3_TENSOR, ADA, "fp8", "formats and device"),
        (FP8_E4M3_TENSOR, FP8_E4M3_TENSOR, A100, "dequantize", "8.9, this device has 8.0"),
        (FP8_E4M3_TENSOR, FP8_E4M3_TENSOR, None, "dequantize", "no CUDA device"),
        (FP8_E5M2_TENSOR, FP8_E5M2_TENSOR, H100, "dequantize", "e5m2 by e4m3 only"),
        (FP8_E4M3, FP8_E4M3_TENSOR, H100, "dequantize", "one scale a tensor"),
        (QUEST_INT4, QUEST_INT4, H100, "dequantize", "must be e4m3 or e5m2"),
        (None, FP8_E4M3_TENSOR, H100, "dequantize", "both operands"),
        (None, None, H100, "dequantize", "plain product"),
        (MXFP4, MXFP4, A100, "dequantize", "capability 9.0, this device has 8.0"),
        (NVFP4, NVFP4, H100, "dequantize", "are no powers of two"),
    ],
)
def test_path_follows_formats_and_device(a, b, capability, path, reason):
    plan = dispatch.choose("y", a, b, None, capability)
    assert plan.path == path
    assert reason in plan.reason


def test_a_path_asked_for_by_name_is_taken_on_any_device():
    for name in ("fp8", "dequantize"):
        for capability in (None, A100, H100):
            plan = dispatch.choose("y", FP8_E4M3_TENSOR, FP8_E5M2_TENSOR, name, capability)
            assert plan == (name, "asked for by name")


def test_a_path_asked_for_by_name_never_falls_back():
    for a, b in [(None, None), (MXFP4, MXFP4), (FP8_E4M3_TENSOR, None)]:
        with pytest.raises(NotImplementedError, match=r"'dx' of .* use implementation=None or"):
            dispatch.choose("dx", a, b, "fp8", H100)
    with pytest.raises(ValueError, match="None or one of fp8, hopper, dequantize, got 'triton'"):
        dispatch.choose("y", None, None, "triton", H100)


def test_float8_formats_with_one_scale_a_tensor_are_kept_as_codes():
    assert dispatch.has_float8_codes(FP8_E5M2_TENSOR)
    assert not dispatch.has_float8_codes(None)
    assert not dispatch.has_float8_codes(FP8_E4M3)
    assert not dispatch.has_float8_codes(dataclasses.replace(INT4, block_size="tensor"))


def test_capability_is_that_of_the_first_device(monkeypatch):
    @dataclasses.dataclass
    class Device:
        compute_capability: str

    for capability, expected in [("9.0", H100), ("12.1", (12, 1)), ("gfx942", None)]:
        monkeypatch.setattr(jax, "devices", lambda capability=capability: [Device(capability)])
        assert dispatch.cuda_capability() == expected
    monkeypatch.setattr(jax, "devices", lambda: [object()])
    assert dispatch.cuda_capability() is None


def test_foreign_scopes_are_not_products():
    for name in ("Dense_0", "lowbit", "lowbit y", "lowbit y|a|b", "a|b|c|d|e"):
        assert dispatch.parse_scope(name) is None
    fields = dispatch.parse_scope("lowbit dw|a|b|fp8|why")
    assert fields == ("dw", "a", "b", "fp8", "why")

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lowbit_jax.numerics import (
    FP8_E4M3,
    FP8_E4M3_TENSOR,
    FP8_E5M2_TENSOR,
    INT4,
    MXFP4,
    NVFP4,
    QUEST_INT4,
    QUEST_MXFP4,
)
from lowbit_jax.ops import dispatch
from lowbit_jax.ops.recipes import RTN_W4A4
from lowbit_jax.parallel import make_mesh
from pallas_kernels.compat import mosaic_obstacle
from pallas_kernels.partition import Partition

A100, ADA, H100, BLACKWELL = (8, 0), (8, 9), (9, 0), (10, 0)

needs_mosaic = pytest.mark.skipif(mosaic_obstacle() is not None, reason=str(mosaic_obstacle()))


@pytest.mark.parametrize(
    ("a", "b", "capability", "path", "reason"),
    [
        (FP8_E4M3_TENSOR, FP8_E4M3_TENSOR, H100, "fp8", "formats and device"),
        (FP8_E5M2_TENSOR, FP8_E4M3_TENSOR, ADA, "fp8", "formats and device"),
        (FP8_E4M3_TENSOR, FP8_E4M3_TENSOR, A100, "dequantize", "8.9, this device has 8.0"),
        (FP8_E4M3_TENSOR, FP8_E4M3_TENSOR, None, "dequantize", "no CUDA device"),
        (FP8_E5M2_TENSOR, FP8_E5M2_TENSOR, H100, "dequantize", "e5m2 by e4m3 only"),
        (FP8_E4M3, FP8_E4M3_TENSOR, H100, "dequantize", "one scale a tensor"),
        (QUEST_INT4, QUEST_INT4, A100, "dequantize", "must be e4m3 or e5m2"),
        (None, FP8_E4M3_TENSOR, H100, "dequantize", "both operands"),
        (None, None, H100, "dequantize", "plain product"),
        (MXFP4, MXFP4, A100, "dequantize", "capability 9.0, this device has 8.0"),
        (MXFP4, MXFP4, BLACKWELL, "dequantize", "capability 9.0, this device has 10.0"),
        (NVFP4, NVFP4, A100, "dequantize", "capability 9.0, this device has 8.0"),
    ],
)
def test_path_follows_formats_and_device(a, b, capability, path, reason):
    plan = dispatch.choose("y", a, b, None, capability)
    assert plan.path == path
    assert reason in plan.reason


@needs_mosaic
@pytest.mark.parametrize("spec", [MXFP4, QUEST_MXFP4, QUEST_INT4, RTN_W4A4.y_x], ids=str)
def test_formats_that_fold_go_through_the_kernels_on_hopper(spec):
    assert dispatch.choose("y", spec, spec, None, H100).path == "hopper"
    assert dispatch.choose("y", spec, spec, None, H100, shape=(16384, 4096, 4096)).path == "hopper"
    # A backward product that is not quantized has no 4-bit operand to multiply exactly.
    assert dispatch.choose("dw", None, spec, None, H100, is_kept=True).path == "dequantize"


@needs_mosaic
def test_operands_of_nvfp4_are_made_by_the_kernel_on_hopper():
    plan = dispatch.choose("y", NVFP4, NVFP4, None, H100, shape=(16384, 4096, 4096))
    assert plan.path == "hopper_bf16"
    small = dispatch.choose("y", NVFP4, NVFP4, None, H100, shape=(16, 4096, 4096))
    assert (small.path, "grows by 300%" in small.reason) == ("dequantize", True)


@needs_mosaic
@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((16, 4096, 4096), "grows by 300% in tiles of 64"),
        ((16384, 72, 128), "grows by 78% in tiles of 64"),
        ((16384, 4096, 4080), "words of 32 columns, got k=4080"),
        ((0, 4096, 4096), "nothing to compute"),
        ((2047, 4096, 4096), None),
        ((1000, 960, 992), None),
    ],
)
def test_small_and_ragged_products_stay_off_the_kernels(shape, reason):
    plan = dispatch.choose("y", MXFP4, MXFP4, None, H100, shape=shape)
    assert plan.path == ("hopper" if reason is None else "dequantize")
    assert (reason or "") in plan.reason
    by_name = dispatch.choose("y", MXFP4, MXFP4, "hopper", H100, shape=shape)
    assert by_name == ("hopper", "asked for by name")
    # The product of float8 codes needs no kernel of ours, but its operands are made by one.
    plan = dispatch.choose("y", FP8_E4M3_TENSOR, FP8_E4M3_TENSOR, None, H100, shape=shape)
    assert plan.path == "fp8"
    assert f"operands by {'rotate_quantize' if reason is None else 'XLA'}" in plan.reason


@needs_mosaic
def test_kernels_are_no_choice_where_jit_may_partition_the_product():
    obstacles = []

    def look(x, partition=None):
        obstacles.append(dispatch.partition_obstacle({"x": x}, partition, len(x)))
        return x

    mesh = make_mesh(2, 2)
    over_four = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((1024,), np.float32)
    # Several devices that nobody uses do not matter; arrays on a mesh do, a context, a constraint.
    jax.eval_shape(look, x)
    jax.jit(look).trace(x.update(sharding=over_four))
    with jax.set_mesh(mesh):
        jax.eval_shape(look, x)
    jax.jit(lambda x: look(jax.lax.with_sharding_constraint(x, over_four))).trace(x)
    jax.eval_shape(functools.partial(look, partition=Partition(mesh, ("data",))), x)
    jax.eval_shape(
        functools.partial(look, partition=Partition(mesh, ("data",))), x.update(shape=(640,))
    )
    in_parts = {"mesh": mesh, "in_specs": over_four.spec, "out_specs": over_four.spec}
    jax.eval_shape(jax.shard_map(look, **in_parts), x)
    jax.eval_shape(jax.shard_map(look, axis_names={"data"}, **in_parts), x)
    on_four = "over 4 devices, but no kernels; say how the tokens are cut (partition=...)"
    expected = [None, on_four, on_four, on_four, None, "640 tokens on 2 devices", None, "over 2"]
    for obstacle, said in zip(obstacles, expected, strict=True):
        assert obstacle is None if said is None else said in obstacle
    plan = dispatch.choose("y", MXFP4, MXFP4, None, H100, partition_obstacle=on_four)
    assert plan.path == "dequantize"
    assert on_four in plan.reason


def test_a_path_asked_for_by_name_is_taken_on_any_device():
    for name in ("fp8", "dequantize"):
        for capability in (None, A100, H100):
            plan = dispatch.choose("y", FP8_E4M3_TENSOR, FP8_E5M2_TENSOR, name, capability)
            assert plan == (name, "asked for by name")


def test_a_path_asked_for_by_name_never_falls_back():
    for a, b in [(None, None), (MXFP4, MXFP4), (FP8_E4M3_TENSOR, None)]:
        with pytest.raises(NotImplementedError, match=r"'dx' of .* use implementation=None or"):
            dispatch.choose("dx", a, b, "fp8", H100)
    with pytest.raises(ValueError, match="blackwell, mixed_matmul, got 'triton'"):
        dispatch.choose("y", None, None, "triton", H100)


def test_block_scaled_units_are_used_by_name_only():
    assert dispatch.choose("y", MXFP4, MXFP4, None, BLACKWELL).path == "dequantize"
    by_name = dispatch.choose("y", MXFP4, MXFP4, "blackwell", BLACKWELL)
    assert by_name == ("blackwell", "asked for by name")
    with pytest.raises(NotImplementedError, match=r"capability 10.0, this device has 9.0"):
        dispatch.choose("y", MXFP4, MXFP4, "blackwell", H100)
    with pytest.raises(NotImplementedError, match="results are bfloat16, float16 or float32"):
        dispatch.choose("y", MXFP4, MXFP4, "blackwell", BLACKWELL, dtypes=(np.float64,))


def test_float8_formats_with_one_scale_a_tensor_are_kept_as_codes():
    assert dispatch.has_float8_codes(FP8_E5M2_TENSOR)
    assert not dispatch.has_float8_codes(None)
    assert not dispatch.has_float8_codes(FP8_E4M3)
    assert not dispatch.has_float8_codes(dataclasses.replace(INT4, block_size="tensor"))


def test_capability_is_that_of_the_default_device(monkeypatch):
    @dataclasses.dataclass
    class Device:
        compute_capability: str

    cpu = jax.devices("cpu")[0]
    monkeypatch.setattr(jax, "devices", lambda *_: [object()])
    assert dispatch.cuda_capability() is None
    for capability, expected in [("9.0", H100), ("12.1", (12, 1)), ("gfx942", None)]:
        monkeypatch.setattr(jax, "devices", lambda *_, c=capability: [Device(c)])
        assert dispatch.cuda_capability() == expected
    # Of a machine with a GPU, but a program for its CPU.
    first = {"cpu": object(), None: Device("9.0")}
    monkeypatch.setattr(jax, "devices", lambda platform=None: [first[platform]])
    assert dispatch.cuda_capability() == H100
    for default in (cpu, "cpu"):
        with jax.default_device(default):
            assert dispatch.cuda_capability() is None


def test_foreign_scopes_are_not_products():
    for name in ("Dense_0", "lowbit", "lowbit y", "lowbit y|a|b", "a|b|c|d|e"):
        assert dispatch.parse_scope(name) is None
    fields = dispatch.parse_scope("lowbit dw|a|b|fp8|why")
    assert fields == ("dw", "a", "b", "fp8", "why")

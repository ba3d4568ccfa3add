"""Products with weights of codes: the arithmetic, the path that is taken, and what is refused."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.numerics import (
    FP8_E4M3,
    INT4,
    MXFP4,
    NVFP4,
    QuantSpec,
    dequantize,
    integer,
    quantize,
)
from lowbit_jax.ops import CodedWeight, DotRecipe, coded_dot, coded_dots, explain, quantized_dot
from lowbit_jax.ops.coded_dot import MEASURED_ROWS, plan
from lowbit_jax.rotations import Hadamard
from lowbit_jax.rotations.wush import BlockTransform
from pallas_kernels.compat import interpreter, kernel_names, lower_for_hopper, mosaic_obstacle
from pallas_kernels.mixed_matmul import mixed_matmul_reference
from pallas_kernels.mixed_matmul.tuning import MAX_ROWS
from pallas_kernels.testing import run_interpreted

mosaic = pytest.mark.skipif(mosaic_obstacle() is not None, reason=str(mosaic_obstacle()))
INT4_ROW = QuantSpec(integer(4), None)
HOPPER = (9, 0)
N, K = 64, 256
W = jax.random.normal(jax.random.key(0), (N, K))
X = jax.random.normal(jax.random.key(1), (2, 3, K))
T = BlockTransform(2 * jnp.eye(32) + 0.1 * jax.random.normal(jax.random.key(2), (8, 32, 32)))
dot = jax.jit(coded_dot, static_argnames="implementation")
codes = jax.jit(lambda w: dequantize(w.codes()))
dequantized = jax.jit(CodedWeight.dequantized)
apply = jax.jit(CodedWeight.apply)
packed = jax.jit(CodedWeight.packed)
reference = jax.jit(mixed_matmul_reference)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def coded(spec, activations=None, basis="none", transform=T):
    w = W
    if basis == "hadamard":
        w = Hadamard(32).apply(w)
    elif basis == "wush":
        w = transform.apply_to_weights(w)
    return CodedWeight(
        quantize(w, spec),
        transform if basis == "wush" else None,
        Hadamard(32) if basis == "hadamard" else None,
        activations,
    )


@pytest.mark.parametrize(
    ("spec", "basis"),
    [
        (MXFP4, "none"),
        (MXFP4, "hadamard"),
        (NVFP4, "wush"),
        (INT4, "hadamard"),
        (INT4_ROW, "none"),
        (FP8_E4M3, "wush"),
    ],
    ids=str,
)
def test_weight_only_is_the_product_with_weights_in_the_original_basis(spec, basis):
    w = coded(spec, None, basis)
    expected = np.asarray(X, np.float64) @ np.asarray(dequantized(w), np.float64).T
    found = dot(X, w)
    assert found.dtype == jnp.float32
    # Bound: 256 products below 25 in float32, in two orders, and a transform of condition below 4.
    chex.assert_trees_all_close(found, expected.astype(np.float32), rtol=0, atol=3e-3)
    half = X.astype(jnp.bfloat16)
    found = dot(half, w)
    assert found.dtype == jnp.bfloat16
    x, c = (np.asarray(z, np.float64) for z in (apply(w, half), codes(w)))
    # Bound: transformed inputs, weights and the result are rounded to 2**-9 each; a fourth such
    # error is for float32 sums and what is of second order.
    error = np.abs(np.asarray(found, np.float64) - x @ c.T)
    assert (error <= 2**-7 * (np.abs(x) @ np.abs(c).T)).all()


@pytest.mark.parametrize(("spec", "basis"), [(MXFP4, "hadamard"), (NVFP4, "none")], ids=str)
def test_quantized_activations_are_those_of_the_recipe(spec, basis):
    w = coded(spec, spec, basis)
    recipe = DotRecipe(y_x=spec, rotation=w.rotation)
    expected = jax.jit(quantized_dot, static_argnums=2)(X, dequantized(w), recipe)
    # Bound: weights that are rotated back and again, 256 products below 25 in float32.
    chex.assert_trees_all_close(dot(X, w), expected, rtol=0, atol=3e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_transform_of_the_matrix_comes_before_the_rounding_of_inputs(dtype):
    w = coded(MXFP4, MXFP4, "wush")
    x = X.astype(dtype)
    rounded = jax.jit(lambda x: dequantize(quantize(T.apply(x), MXFP4)))(x)
    expected = np.asarray(rounded, np.float64) @ np.asarray(codes(w), np.float64).T
    # Exact: sums of so few 4-bit products fit float32, in any order; rounded once.
    np.testing.assert_array_equal(dot(x, w), jnp.asarray(expected, dtype))


@pytest.mark.parametrize("basis", ["none", "hadamard", "wush"])
def test_under_a_scale_of_the_calibration_rows_do_not_know_each_other(basis):
    w = coded(NVFP4, NVFP4, basis)
    scaled = dataclasses.replace(w, input_global_scale=jnp.float32(2.0**-9))
    found = dot(X, scaled)
    x = np.asarray(apply(w, X))
    rounded = dequantize(quantize(x, NVFP4, global_scale=2.0**-9))
    expected = np.asarray(rounded, np.float64) @ np.asarray(codes(w), np.float64).T
    # Bound: 256 products below 25 in float32.
    chex.assert_trees_all_close(found, expected.astype(np.float32), rtol=0, atol=3e-3)
    louder = X.at[1, 2].multiply(50)
    chex.assert_trees_all_equal(dot(louder, scaled)[0], found[0])
    assert np.any(dot(louder, w)[0] != dot(X, w)[0])  # which takes the abs-max of all
    both = jax.jit(coded_dots)(X, {"a": scaled, "b": w})
    chex.assert_trees_all_equal(both, {"a": found, "b": dot(X, w)})


def test_several_weights_share_inputs_but_not_transforms():
    other = dataclasses.replace(T, matrices=T.matrices[::-1])
    weights = {
        "q": coded(MXFP4, MXFP4, "hadamard"),
        "v": coded(MXFP4, MXFP4, "wush"),
        "o": coded(MXFP4, MXFP4, "wush", other),
        "gate": coded(MXFP4, None, "hadamard"),
    }
    found = jax.jit(coded_dots)(X, weights)
    assert set(found) == set(weights)
    for name, w in weights.items():
        # Exact: the same operations.
        np.testing.assert_array_equal(found[name], dot(X, w), err_msg=name)
    rows = explain(coded_dots, X, weights).rows
    assert {row.where: row.a_format for row in rows}["gate"] == "-"
    assert sum(row.a_format == str(MXFP4) for row in rows) == 3


@mosaic
@pytest.mark.parametrize(("spec", "basis"), [(MXFP4, "hadamard"), (NVFP4, "wush")], ids=str)
def test_the_kernel_is_taken_where_it_can_run_and_equals_its_reference(spec, basis):
    w = packed(coded(spec, None, basis))
    x = X.astype(jnp.bfloat16)
    with interpreter():
        (row,) = explain(coded_dot, x, w).rows
    assert (row.path, row.a_shape, row.b_shape) == ("mixed_matmul", (6, K), (N, K))
    assert row.b_format == str(spec)
    found = run_interpreted(coded_dot, x, w)
    rows = apply(w, x).astype(jnp.bfloat16).reshape(-1, K)
    expected = np.asarray(reference(rows, w.codes()), np.float32)
    # Bound: float32 sums in another order, 2**-15 of their terms, and a rounding of the result.
    sizes = np.abs(np.asarray(rows, np.float32)) @ np.abs(codes(w)).T
    error = np.abs(np.asarray(found, np.float32).reshape(expected.shape) - expected)
    assert (error <= 2**-14 * sizes + 2**-7 * np.abs(expected)).all()


@mosaic
def test_any_number_of_rows_goes_through_the_kernel_by_name():
    w = packed(coded(MXFP4))
    x = jax.random.normal(jax.random.key(3), (2, 35, K)).astype(jnp.bfloat16)
    by_name = functools.partial(coded_dot, implementation="mixed_matmul")
    with interpreter():
        (row,) = explain(by_name, x, w).rows
    assert (row.path, row.a_shape, row.count) == ("mixed_matmul", (MAX_ROWS, K), 2)
    found = np.asarray(run_interpreted(by_name, x, w), np.float32)
    expected = np.asarray(dot(x, w), np.float32)
    # Bound: float32 sums in another order, 2**-15 of their terms, and roundings of both results.
    sizes = np.abs(np.asarray(x, np.float32)) @ np.abs(codes(w)).T
    assert (np.abs(found - expected) <= 2**-14 * sizes + 2**-7 * np.abs(expected)).all()


@mosaic
def test_a_scan_over_layers_lowers_for_hopper(monkeypatch):
    monkeypatch.setattr("lowbit_jax.ops.dispatch.cuda_capability", lambda: HOPPER)
    layers = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), packed(coded(MXFP4)))

    def model(x, layers):
        def layer(x, w):
            return jnp.tile(coded_dot(x, w), 4), None

        return jax.lax.scan(layer, x, layers)[0]

    x = jax.ShapeDtypeStruct((1, 4, K), jnp.bfloat16)
    assert kernel_names(lower_for_hopper(model, x, layers)) == ["lowbit_mixed_matmul"]
    (row,) = explain(model, x, layers).rows
    assert (row.path, row.count) == ("mixed_matmul", 3)
    many = jax.ShapeDtypeStruct((4, MEASURED_ROWS, K), jnp.bfloat16)
    (row,) = explain(model, many, layers).rows
    assert (row.path, row.reason) == (
        "dequantize",
        f"not mixed_matmul: {4 * MEASURED_ROWS} rows, measured up to {MEASURED_ROWS}",
    )


@mosaic
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, None),
        ({"capability": None}, "no CUDA device"),
        ({"capability": (8, 0)}, "compute capability 9.0"),
        ({"dtype": np.dtype(np.float32)}, "x must be bfloat16"),
        ({"shape": (MEASURED_ROWS + 1, N, K)}, "measured up to 16"),
        ({"is_packed": False}, "see pack_weights"),
        ({"spec": FP8_E4M3, "is_packed": False}, "weights must be E2M1"),
        ({"partition_obstacle": "8 devices"}, "8 devices"),
    ],
)
def test_the_reason_for_a_path_is_told(options, said):
    given = {
        "shape": (1, N, K), "dtype": np.dtype(jnp.bfloat16), "implementation": None,
        "capability": HOPPER, "spec": MXFP4, "is_packed": True, **options,
    }  # fmt: skip
    spec, is_packed = given.pop("spec"), given.pop("is_packed")
    w = jax.eval_shape(lambda: coded(spec).packed() if is_packed else coded(spec))
    found = plan(w, **given)
    assert found.path == ("mixed_matmul" if said is None else "dequantize")
    assert (said or "allow it") in found.reason


@pytest.mark.parametrize("name", ["mixed_matmul", "hopper", "fp8"])
def test_an_implementation_asked_for_by_name_is_taken_or_refused(name):
    with pytest.raises(NotImplementedError, match=f"implementation='{name}' does not cover"):
        coded_dot(X.astype(jnp.bfloat16), packed(coded(MXFP4)), implementation=name)
    with pytest.raises(NotImplementedError, match=f"implementation='{name}' does not cover"):
        coded_dot(X, coded(MXFP4, MXFP4), implementation=name)
    with pytest.raises(NotImplementedError, match="does not cover the product 'y'"):
        quantized_dot(X, W, DotRecipe(y_x=MXFP4), implementation="mixed_matmul")
    by_name = functools.partial(coded_dot, implementation="dequantize")
    (row,) = explain(by_name, X, coded(MXFP4)).rows
    assert (row.path, row.reason) == ("dequantize", "asked for by name")


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 0), reason="the compiler of JAX 0.10 drops barriers on CPU"
)
def test_a_loop_keeps_no_decoded_weights():
    w = coded(MXFP4, None, "hadamard")
    square = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * 4), w)
    layers = [square] * 4

    def model(x, layers):
        for w in layers:
            x = coded_dot(x, w)
        return x

    @jax.jit
    def run_often(x, layers):
        return jax.lax.fori_loop(0, 3, lambda _, x: model(x, layers), x)

    used = run_often.lower(X, layers).compile().memory_analysis().temp_size_in_bytes
    # Weights in float32 are 4 * 4 * 256^2 bytes: where they are made once, before the loop, all of
    # them are there at once.
    assert used < 2 * 4 * K * K


def test_wrong_calls_are_errors():
    w = coded(MXFP4)
    with pytest.raises(ValueError, match=r"x must be bfloat16 or float32, got float16"):
        coded_dot(X.astype(jnp.float16), w)
    with pytest.raises(ValueError, match=r"got \(2, 3, 128\) and \(64, 256\)"):
        coded_dot(X[..., :128], w)
    with pytest.raises(ValueError, match=r"got \(2, 3, 256\) and \(1, 64, 256\); stacked"):
        coded_dot(X, jax.tree.map(lambda leaf: leaf[None], w))
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        coded_dot(X, w, implementation="cutlass")


@pytest.mark.parametrize("activations", [None, MXFP4])
def test_nobody_differentiates_codes_unknowingly(activations):
    with pytest.raises(NotImplementedError, match="for inference and have no gradient"):
        jax.grad(lambda x: jnp.sum(coded_dot(x, coded(MXFP4, activations))))(X)

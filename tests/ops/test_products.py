"""The products themselves; that all paths agree is tested through `quantized_dot`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.numerics import FP8_E4M3_TENSOR
from lowbit_jax.ops import dispatch, products
from lowbit_jax.parallel import make_mesh
from pallas_kernels.partition import Partition


def equations_of(program):
    for eqn in program.eqns:
        yield eqn
        for value in eqn.params.values():
            if hasattr(value, "eqns"):
                yield from equations_of(value)


def product(a, b):
    bf16 = np.dtype(jnp.bfloat16)
    return products.float8(a, b, bf16, bf16, by_cublas=True)


def operand(rows, k=64):
    return products.Operand(jnp.ones((rows, k), jnp.float8_e4m3fn), jnp.float32(0.3))


def dot_of(a, b):
    """The one product in the program, and the dtypes of all that has the size of its result."""
    equations = list(equations_of(jax.make_jaxpr(product)(a, b)))
    (dot,) = (eqn for eqn in equations if eqn.primitive.name == "dot_general")
    size = dot.outvars[0].aval.size
    return dot, {v.aval.dtype for e in equations for v in e.outvars if v.aval.size == size}


@pytest.mark.parametrize(
    ("precision", "is_fast"), [(None, True), ("default", True), ("highest", False)]
)
def test_float8_products_are_scaled_within_one_call_of_cublas(precision, is_fast):
    # XLA recognizes a product times a scalar of its dtype, and leaves it to cuBLASLt if it names
    # one of two algorithms, of which the precision chooses.
    with jax.default_matmul_precision(precision):
        dot, dtypes = dot_of(operand(2048), operand(2048))
    name = "ANY_F8_ANY_F8_F32_FAST_ACCUM" if is_fast else "ANY_F8_ANY_F8_F32"
    assert dot.params["precision"] == jax.lax.DotAlgorithmPreset[name]
    assert dtypes == {np.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(2048, 1024, 64), (2048, 2048, 2**14), (2056, 4096, 64), (4096, 2056, 64), (48, 2**17, 64)],
    ids=["small", "long sums", "rows padded", "columns padded", "narrow"],
)
def test_what_might_not_be_one_call_is_scaled_in_float32(m, n, k):
    a, b = (jax.ShapeDtypeStruct((rows, k), jnp.float8_e4m3fn) for rows in (m, n))
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    dot, _ = dot_of(products.Operand(a, scale), products.Operand(b, scale))
    assert dot.outvars[0].aval.dtype == jnp.float32


def test_float8_products_of_one_row_and_batches_are_no_single_call():
    # XLA has no algorithm for a product of one row, of which it makes a sum.
    assert dot_of(operand(1), operand(2048))[0].params["precision"] is None
    # A scale each is no scalar: products are not batched.
    operands = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), operand(2048))
    program = jax.make_jaxpr(jax.vmap(product, (0, None)))(operands, operand(2048))
    dots = [eqn for eqn in equations_of(program) if eqn.primitive.name == "dot_general"]
    assert [eqn.outvars[0].aval.shape for eqn in dots] == [(2048, 2048)]


def test_products_that_jit_may_partition_are_left_to_it(monkeypatch):
    # cuBLASLt's call is one of a single device.
    monkeypatch.setattr(dispatch, "cuda_capability", lambda: (9, 0))
    a, b = operand(2048), operand(2048)
    plan, specs = dispatch.Plan("fp8", ""), (FP8_E4M3_TENSOR, FP8_E4M3_TENSOR)

    def precision(**how):
        run = functools.partial(
            dispatch.run, "y", plan, specs=specs, compute_dtype=jnp.bfloat16,
            out_dtype=jnp.bfloat16, **how,
        )  # fmt: skip
        equations = equations_of(jax.make_jaxpr(run)(a, b))
        (dot,) = (eqn for eqn in equations if eqn.primitive.name == "dot_general")
        return dot.params["precision"]

    assert precision(partition_obstacle="jit may partition") is None
    assert precision(partition=Partition(make_mesh(2), ("data",))) is not None
    assert precision() is not None

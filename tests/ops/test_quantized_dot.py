import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from lowbit_jax.numerics import (
    FP8_E4M3,
    INT4,
    MXFP4,
    MXFP4_FITTED,
    NVFP4,
    QUEST_INT2,
    QUEST_INT8,
    quantize_values,
)
from lowbit_jax.ops import DotRecipe, quantized_dot
from lowbit_jax.ops.recipes import (
    BF16,
    FP8_TENSORWISE,
    MXFP4_FORWARD,
    NVFP4_FORWARD,
    QUEST_W1A1,
    QUEST_W2A2,
    QUEST_W2A16,
    QUEST_W4A4,
    RTN_W4A4,
)
from lowbit_jax.rotations import Hadamard
from lowbit_jax.sparsity import onto_grid

M, N, K, BLOCK = 12, 10, 128, 64
# Panferov et al., QuEST, arXiv:2502.05003: the outermost level in standard deviations.
ALPHA = {1: (2 / np.pi) ** 0.5, 2: 1.49353462, 4: 2.513930578568423, 8: 3.884938678807525}


def arrays(*shapes, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def smaller_blocks(recipe):
    return dataclasses.replace(recipe, rotation=Hadamard(BLOCK))


def value_and_gradients(f, x, w, e):
    y, vjp = jax.vjp(f, x, w)
    return y, *vjp(e)


@functools.partial(jax.jit, static_argnums=(3, 4))
def run(x, w, e, recipe, implementation=None, key=None):
    dot = functools.partial(quantized_dot, recipe=recipe, implementation=implementation, key=key)
    return value_and_gradients(dot, x, w, e)


def assert_equal_up_to_summation(actual, expected, x, w, e, block=BLOCK):
    """Bound for y, dx and dw from two float32 computations of the same quantized operands.

    A sum of c products is off by at most (c + 20) 2^-24 of the sum of their moduli, the 20 for
    the roundings in scales and operands; a rotation back multiplies an error by at most
    sqrt(block) and adds `block` roundings. Operands grow by at most sqrt(block) in a rotation.
    """
    x, w, e = (np.abs(np.asarray(a, np.float64)) for a in (x, w, e))
    moduli = (x @ w.T, e @ w, e.T @ x)
    terms = (x.shape[1], w.shape[0], x.shape[0])
    for a, b, modulus, c in zip(actual, expected, moduli, terms, strict=True):
        bound = 2 * (c + block + 20) * 2**-24 * block * modulus.max()
        assert np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))) <= bound


def quest_reference(z, bits, clip_scale):
    """`z` rotated and rounded, with a straight-through gradient inside the mask.

    Also returns the least distance of an entry to a threshold, relative to entry plus step.
    """
    h = jnp.asarray(scipy.linalg.hadamard(BLOCK) / BLOCK**0.5, jnp.float32)
    z = jnp.einsum("abi,ij->abj", z.reshape(len(z), -1, BLOCK), h, precision="highest")
    z = z.reshape(len(z), -1)
    if bits == 16:
        return z, 1.0
    s = ALPHA[bits] * jnp.sqrt(jnp.mean(jax.lax.stop_gradient(z) ** 2, axis=1, keepdims=True))
    step = 2 * s / (2**bits - 1)
    q = jnp.round(jnp.clip(z, -s, s) / step + 0.5) * step - step / 2
    reach = s + step / 2 if clip_scale is None else clip_scale * s
    through = jnp.where(jnp.abs(z) <= reach, z, jax.lax.stop_gradient(z))
    units = jnp.abs(z / step)
    inside = units < 2 ** (bits - 1) - 0.5  # thresholds are the integers below half the levels
    to_threshold = jnp.where(inside, jnp.abs(units - jnp.round(units)), 1.0)
    to_mask = jnp.abs(units - reach / step)
    margin = jnp.min(jnp.minimum(to_threshold, to_mask) / (1 + units))
    return through + jax.lax.stop_gradient(q - through), margin


@pytest.mark.parametrize(
    ("recipe", "w_bits", "a_bits", "clip_scale"),
    [
        (QUEST_W4A4, 4, 4, None),
        (QUEST_W2A2, 2, 2, None),
        (QUEST_W1A1, 1, 1, 1.30),
        (QUEST_W2A16, 2, 16, None),
        (DotRecipe(y_x=QUEST_INT8, y_w=QUEST_INT2, estimator="clipped"), 2, 8, 1.0),
    ],
    ids=str,
)
def test_quest_equals_independent_fake_quantization(recipe, w_bits, a_bits, clip_scale):
    x, w, e = arrays((M, K), (N, K), (M, N))

    @jax.jit
    def reference(x, w, e):
        def dot(x, w):
            xq, x_margin = quest_reference(x, a_bits, clip_scale)
            wq, w_margin = quest_reference(w, w_bits, clip_scale)
            return jnp.matmul(xq, wq.T, precision="highest"), jnp.minimum(x_margin, w_margin)

        y, vjp, margin = jax.vjp(dot, x, w, has_aux=True)
        return (y, *vjp(e)), margin

    expected, margin = reference(x, w, e)
    # Only then must both round alike: a quotient carries at most 64 + 10 roundings of 2^-25 of an
    # error of either sign, whose root is 9.
    assert margin > 3 * 9 * 2**-25
    actual = run(x, w, e, smaller_blocks(recipe))
    assert_equal_up_to_summation(actual, expected, x, w, e)


def test_some_gradients_are_masked():
    # Two entries in different blocks, without a rotation: the outlier is beyond the grid.
    x = jnp.ones((1, K)).at[0, 3].set(100.0)
    recipe = dataclasses.replace(QUEST_W2A2, rotation=None, y_w=None)
    dx = run(x, jnp.ones((1, K)), jnp.ones((1, 1)), recipe)[1]
    expected = jnp.ones((1, K)).at[0, 3].set(0.0)
    np.testing.assert_array_equal(dx, expected)  # Exact: sums of one term.


@pytest.mark.parametrize("recipe", [QUEST_W4A4, MXFP4_FORWARD], ids=str)
def test_half_hadamard_equals_full_hadamard(recipe):
    x, w, e = arrays((M, K), (N, K), (M, N), seed=1)

    @jax.jit
    def full_hadamard(x, w):
        x = onto_grid(recipe.y_x, recipe.rotation)(x)
        return jnp.matmul(x, onto_grid(recipe.y_w, recipe.rotation)(w).T, precision="highest")

    half = run(x, w, e, recipe)[0]
    norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w, axis=1)
    # Bound: relative to the norms of a row pair, at most 128 roundings of 2^-24 in each rotation
    # back and in the product; of random sign, so that sqrt(3 * 128) * 2^-24 = 1.2e-6 is typical
    # and 1e-5 eight times that.
    assert np.max(np.abs(half - full_hadamard(x, w)) / norms) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_identity_has_exact_gradients(dtype):
    x, w, e = arrays((M, K), (N, K), (M, N))
    x, e = x.astype(dtype), e.astype(dtype)

    @jax.jit
    def plain(x, w, e):
        low = w.astype(dtype)
        return x @ low.T, e @ low, jnp.matmul(e.T, x, preferred_element_type=jnp.float32)

    chex.assert_trees_all_equal(run(x, w, e, BF16), plain(x, w, e))  # Exact: the same products.


def test_rotation_without_quantization_is_left_out():
    x, w, e = arrays((M, K), (N, K), (M, N))
    recipe = DotRecipe(rotation=Hadamard(BLOCK), backward_rotation=Hadamard(4, randomized=True))
    assert not recipe.needs_key
    chex.assert_trees_all_equal(run(x, w, e, recipe), run(x, w, e, BF16))


def residual_bytes(recipe, x, w):
    vjp = jax.eval_shape(
        lambda x, w: jax.vjp(functools.partial(quantized_dot, recipe=recipe), x, w)[1], x, w
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(vjp))


def test_residuals_are_small():
    x, w = arrays((M, K), (N, K))
    x = x.astype(jnp.bfloat16)
    entries, scales = (M + N) * K, 4 * (M + N)
    assert residual_bytes(BF16, x, w) == x.nbytes + w.nbytes  # the arguments themselves
    assert residual_bytes(QUEST_W4A4, x, w) == entries * (2 + 1) + scales  # with masks
    assert residual_bytes(RTN_W4A4, x, w) == entries * 2 + scales
    assert residual_bytes(FP8_TENSORWISE, x, w) == entries + 2 * 4  # codes and two scales


def test_unquantized_activations_are_kept_once_for_all_products_that_take_them():
    x, ws = jax.ShapeDtypeStruct((2, 3, 16), jnp.bfloat16), jnp.ones((4, 3, 16, 16))

    def loss(x, ws):
        def layer(x, w):  # three products of one x, as those for queries, keys and values
            return sum(quantized_dot(x, w[i], BF16) for i in range(3)), None

        return jnp.sum(jax.lax.scan(layer, x, ws)[0])

    program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, ws)
    forward = next(eqn for eqn in program.eqns if eqn.primitive.name == "scan")
    stacked = [v.aval.shape for v in forward.outvars if v.aval.shape[:1] == (4,)]
    assert stacked.count((4, 2, 3, 16)) == 1
    assert (4, 6, 16) not in stacked


@pytest.mark.parametrize("recipe", [BF16, QUEST_W4A4, FP8_TENSORWISE], ids=str)
def test_dtypes_of_a_mixed_precision_model(recipe):
    x, w, e = arrays((2, 3, K), (N, K), (2, 3, N))
    x, e = x.astype(jnp.bfloat16), e.astype(jnp.bfloat16)
    y, dx, dw = run(x, w, e, recipe)
    chex.assert_type([y, dx, dw], [jnp.bfloat16, jnp.bfloat16, jnp.float32])
    chex.assert_shape([y, dx, dw], [(2, 3, N), x.shape, w.shape])


@pytest.mark.parametrize(
    ("recipe", "dtypes"),
    [
        # Where scales are still to come, of rows in y and of all in three products, in float32.
        (RTN_W4A4, ["float32", "bfloat16", "float32"]),
        (FP8_TENSORWISE, ["float32"] * 3),
    ],
    ids=str,
)
def test_products_are_rounded_once_and_dw_never(recipe, dtypes):
    # Read from the program: XLA on the CPU keeps more precision than it is asked for.
    x, w, e = arrays((M, K), (N, K), (M, N))
    dot = functools.partial(quantized_dot, recipe=recipe)
    arguments = dot, x.astype(jnp.bfloat16), w, e.astype(jnp.bfloat16)
    program = jax.make_jaxpr(value_and_gradients, static_argnums=0)(*arguments)
    products = [eqn for eqn in program.eqns if eqn.primitive.name == "dot_general"]
    assert [eqn.outvars[0].aval.dtype.name for eqn in products] == dtypes


# One scale a row, one an array, and a constant of 4/3.
@pytest.mark.parametrize("spec", [RTN_W4A4.y_x, NVFP4, MXFP4_FITTED], ids=str)
def test_scales_wait_for_the_sums_so_that_products_of_few_bits_are_rounded_once(spec):
    recipe = DotRecipe(y_x=spec, y_w=spec)
    x, w = arrays((M, K), (N, K))
    y = quantized_dot(x.astype(jnp.bfloat16), w, recipe)  # op by op: nothing is left out
    values = jax.jit(lambda z: quantize_values(z, spec)[0])
    x_q, w_q = (np.asarray(values(z), np.float64) for z in (x.astype(jnp.bfloat16), w))
    exact, size = x_q @ w_q.T, np.abs(x_q) @ np.abs(w_q.T)
    # Bound: half a unit of bfloat16; float32 sums of K products, and two factors after them.
    # Values that had been rounded to bfloat16 with their scales would miss it by far.
    assert (
        np.abs(np.asarray(y, np.float64) - exact) <= 2**-8 * np.abs(exact) + (K + 4) * 2**-24 * size
    ).all()


def test_weights_are_quantized_from_float32():
    (w,) = arrays((N, 64))
    recipe = dataclasses.replace(RTN_W4A4, y_x=None)
    y = run(jnp.eye(64, dtype=jnp.bfloat16), w, jnp.ones((64, N), jnp.bfloat16), recipe)[0]
    quantized = jax.jit(lambda w: quantize_values(w, recipe.y_w)[0].astype(jnp.bfloat16))
    from_float32 = quantized(w)
    np.testing.assert_array_equal(y.T, from_float32)  # Exact: sums of one term.
    assert jnp.any(quantized(w.astype(jnp.bfloat16)) != from_float32)


def float8_error(z, spec):
    """Largest errors of rounding to nearest: half a unit of the last of 3 (2) mantissa bits, or
    half the smallest subnormal, 2^-9 (2^-16) times the scale."""
    mantissa_bits, smallest = {"e4m3": (3, 2**-9), "e5m2": (2, 2**-16)}[spec.format.name]
    scale = np.max(np.abs(z)) / spec.format.max
    return np.maximum(2.0 ** -(mantissa_bits + 1) * np.abs(z), smallest / 2 * scale) * (1 + 1e-6)


@pytest.mark.parametrize("implementation", ["dequantize", "fp8"])
def test_float8_is_within_rounding_of_float64(implementation):
    r = FP8_TENSORWISE
    x, w, e = arrays((M, K), (N, K), (M, N), seed=2)
    actual = run(x, w, e, r, implementation)
    x, w, e = (np.asarray(a, np.float64) for a in (x, w, e))
    # Bound: |Q(a)Q(b) - ab| <= |a| db + da |b| + da db for each term, and float32 sums.
    for y, a, b, a_spec, b_spec in [
        (actual[0], x, w.T, r.y_x, r.y_w),
        (actual[1], e, w, r.dx_g, r.y_w),
        (actual[2], e.T, x, r.dw_g, r.y_x),
    ]:
        da, db = float8_error(a, a_spec), float8_error(b, b_spec)
        bound = np.abs(a) @ db + da @ np.abs(b) + da @ db
        bound += (a.shape[1] + 4) * 2**-24 * (np.abs(a) + da) @ (np.abs(b) + db)
        error = np.abs(y - a @ b)
        assert np.all(error <= bound)
        assert np.max(error) > 1e-3  # it did round


def test_float8_implementations_compute_the_same_function():
    x, w, e = arrays((M, K), (N, K), (M, N), seed=3)
    for dtype in (jnp.float32, jnp.bfloat16):
        x, e = x.astype(dtype), e.astype(dtype)
        dequantized, native = (run(x, w, e, FP8_TENSORWISE, i) for i in ("dequantize", "fp8"))
        if dtype == jnp.float32:
            assert_equal_up_to_summation(native, dequantized, x, w, e, block=1)
        # Bound: as above, then one rounding to bfloat16 on either side of a tie.
        chex.assert_trees_all_close(native, dequantized, rtol=2**-7, atol=1e-4)


values_of = jax.jit(lambda z, spec: quantize_values(z, spec)[0], static_argnums=1)


def backward_reference(g, saved, spec, block):
    """`Q(g H) Q(saved H)^T`, written out."""
    h = scipy.linalg.hadamard(block).astype(np.float32)
    rotated = [(z.reshape(len(z), -1, block) @ h / block**0.5).reshape(z.shape) for z in (g, saved)]
    a, b = (np.asarray(values_of(jnp.asarray(z), spec), np.float64) for z in rotated)
    return a @ b.T


def test_backward_products_quantize_the_quantized_operands_again():
    m, n, k = 32, 64, 16
    recipe = DotRecipe(
        y_x=FP8_E4M3,
        y_w=INT4_ROW,
        dx_g=MXFP4,
        dx_w=MXFP4,
        dw_g=MXFP4,
        dw_x=MXFP4,
        backward_rotation=Hadamard(32),
    )
    # Small integers: rotated by +-1 sums they are exact, and far from all thresholds or on ties
    # that both sides see alike.
    x, w, e = (jnp.round(4 * a) for a in arrays((m, k), (n, k), (m, n), seed=4))
    y, dx, dw = run(x, w, e, recipe)
    x_q, w_q = (np.asarray(values_of(z, s)) for z, s in ((x, FP8_E4M3), (w, INT4_ROW)))
    e = np.asarray(e)
    # Bound: sums of c terms in float32.
    np.testing.assert_allclose(y, x_q @ w_q.T, atol=k * 2**-24 * np.max(abs(x_q) @ abs(w_q).T))
    for actual, g, saved in ((dx, e, w_q.T), (dw, e.T, x_q.T)):
        expected = backward_reference(g, saved, MXFP4, 32)
        bound = 2 * 64 * 2**-24 * np.max(np.abs(g) @ np.abs(saved).T) * 2
        np.testing.assert_allclose(actual, expected, atol=bound)
        assert np.max(np.abs(actual - g @ saved.T)) > 100 * bound  # it did quantize


INT4_ROW = dataclasses.replace(INT4, block_size=None)
STOCHASTIC = dataclasses.replace(MXFP4, scale="absmax_floor43", rounding="stochastic")


def random_backward(spec):
    return DotRecipe(
        dx_g=spec,
        dx_w=spec,
        dw_x=spec,
        dw_g=spec,
        backward_rotation=Hadamard(32, randomized=True),
    )


def test_stochastic_backward_products_are_unbiased():
    x, w, e = arrays((32, 32), (32, 32), (32, 32), seed=5)
    keys = jax.random.split(jax.random.key(6), 512)
    exact = (e @ w, e.T @ x)

    def draws(recipe):
        return jax.vmap(lambda key: run(x, w, e, recipe, None, key)[1:])(keys)

    for draw, mean in zip(draws(random_backward(STOCHASTIC)), exact, strict=True):
        standard_error = draw.std(0) / len(keys) ** 0.5
        # Statistical: 2 x 1024 entries at 5 standard errors, a false alarm in about 1 of 900 seeds.
        assert jnp.all(jnp.abs(draw.mean(0) - mean) <= 5 * standard_error)
    # The same test finds the bias of rounding to nearest, whose operands shrink by about 1 %:
    # the products lie 2 % short, 50 standard errors.
    nearest = dataclasses.replace(STOCHASTIC, rounding="nearest")
    for draw, mean in zip(draws(random_backward(nearest)), exact, strict=True):
        slopes = jnp.sum(draw * mean, axis=(1, 2)) / jnp.sum(mean**2)
        assert 1 - slopes.mean() > 5 * slopes.std() / len(keys) ** 0.5


def test_operands_of_a_product_are_rounded_independently():
    # Positive operands without a rotation: with one key for both, their errors would be alike on
    # the diagonal of dx, whose mean would lie 30 standard errors above that of the product.
    x, w, e = (jnp.abs(a) for a in arrays((32, 32), (32, 32), (32, 32), seed=7))
    recipe = DotRecipe(dx_g=STOCHASTIC, dx_w=STOCHASTIC)
    keys = jax.random.split(jax.random.key(8), 512)
    traces = jax.vmap(lambda key: jnp.trace(run(x, w, e, recipe, None, key)[1]))(keys)
    # Statistical: 5 standard errors, a false alarm in about 1 of 1.7 million seeds.
    assert abs(traces.mean() - jnp.trace(e @ w)) <= 5 * traces.std() / len(keys) ** 0.5


def test_the_key_determines_the_result():
    x, w, e = arrays((32, 32), (32, 32), (32, 32), seed=5)
    recipe = random_backward(STOCHASTIC)
    first, again, other = (run(x, w, e, recipe, None, jax.random.key(i)) for i in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)  # Exact: same program, same input.
    np.testing.assert_array_equal(first[0], other[0])  # the forward product is not random here
    assert jnp.any(first[1] != other[1])
    assert jnp.any(first[2] != other[2])
    # Old-style keys are keys too, and mean the same.
    chex.assert_trees_all_equal(first, run(x, w, e, recipe, None, jax.random.PRNGKey(0)))


def test_random_forward_rotation_cancels():
    x, w, e = arrays((M, K), (N, K), (M, N))
    recipe = DotRecipe(y_x=QUEST_INT8, y_w=QUEST_INT8, rotation=Hadamard(BLOCK, randomized=True))
    # These signs leave no entry beyond the grid, to be clipped; those of key 0 leave one.
    actual = run(x, w, e, recipe, None, jax.random.key(1))
    exact = (x @ w.T, e @ w, e.T @ x)
    for a, b, operands in zip(actual, exact, (2, 1, 1), strict=True):
        # Statistical: an 8-bit operand has a relative error of sqrt(8.8e-5); 3 times that.
        relative = jnp.linalg.norm(a - b) / jnp.linalg.norm(b)
        assert relative < 3 * (operands * 8.8e-5) ** 0.5


@pytest.mark.parametrize("recipe", [QUEST_W4A4, NVFP4_FORWARD], ids=str)
def test_leading_axes_are_tokens(recipe):
    x, w, e = arrays((2, 3, 2, K), (N, K), (2, 3, 2, N))
    y, dx, dw = run(x, w, e, recipe)
    flat = run(x.reshape(M, K), w, e.reshape(M, N), recipe)
    chex.assert_trees_all_equal((y.reshape(M, N), dx.reshape(M, K), dw), flat)  # Exact.
    one = jax.eval_shape(functools.partial(quantized_dot, recipe=recipe), x[0, 0, 0], w)
    assert one.shape == (N,)


def test_jit_equals_eager():
    x, w, e = arrays((M, K), (N, K), (M, N))
    recipe = smaller_blocks(QUEST_W4A4)
    eager = value_and_gradients(lambda x, w: quantized_dot(x, w, recipe), x, w, e)
    assert_equal_up_to_summation(eager, run(x, w, e, recipe), x, w, e)
    of_numpy = quantized_dot(np.asarray(x, np.float64), np.asarray(w, np.float64), recipe)
    np.testing.assert_array_equal(of_numpy, eager[0])  # Exact: float64 holds the same numbers.


def test_vmap_equals_a_loop():
    x, w, e = arrays((3, 4, K), (N, K), (3, 4, N))
    recipe = smaller_blocks(QUEST_W4A4)
    y, dx, dw = jax.jit(jax.vmap(lambda x, e: run(x, w, e, recipe)))(x, e)
    for i in range(3):
        expected = run(x[i], w, e[i], recipe)
        assert_equal_up_to_summation((y[i], dx[i], dw[i]), expected, x[i], w, e[i])
    # With a row of x a scale, all the rows at once are the same function.
    rows = x.reshape(-1, K), w, e.reshape(-1, N)
    together = (y.reshape(-1, N), dx.reshape(-1, K), dw.sum(0))
    assert_equal_up_to_summation(together, run(*rows, recipe), *rows)


def test_scan_and_checkpoint_change_nothing():
    (ws, x) = arrays((3, 64, 64), (8, 64))
    recipe = dataclasses.replace(random_backward(STOCHASTIC), **FORWARD_4BIT)
    recipe = dataclasses.replace(recipe, dw_x=None, dw_g=None)  # 8 tokens are no block of 32
    keys = jax.random.split(jax.random.key(0), 3)

    def layer(x, layer_input):
        w, key = layer_input
        return jnp.tanh(quantized_dot(x, w / 8, recipe, key=key)), None

    def loop(ws):
        y = x
        for i in range(3):
            y, _ = layer(y, (ws[i], keys[i]))
        return jnp.sum(y**2)

    def scanned(ws):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, (ws, keys))[0] ** 2)

    expected, actual = (jax.jit(jax.value_and_grad(f))(ws) for f in (loop, scanned))
    # Bound: forward and back through 3 layers, sums of 64 terms and 20 further roundings each, may
    # be taken in another order; a layer at most doubles an error, for |w / 8| is about 2. A value
    # that rounded the other way would show as 1e-2.
    bound = 2**3 * 6 * (64 + 20) * 2**-24
    np.testing.assert_allclose(actual[0], expected[0], rtol=bound)
    np.testing.assert_allclose(actual[1], expected[1], atol=bound * np.max(np.abs(expected[1])))


FORWARD_4BIT = {f: getattr(MXFP4_FORWARD, f) for f in ("y_x", "y_w", "rotation", "estimator")}


def test_wrong_arguments_are_refused_while_tracing():
    x, w = jnp.ones((4, 64)), jnp.ones((8, 64))

    def check(message, x, w, recipe, error=ValueError, **kwargs):
        f = functools.partial(quantized_dot, recipe=recipe, **kwargs)
        with pytest.raises(error, match=message):
            jax.eval_shape(f, x, w)

    check(r"w \(n, k\), got \(4, 64\) and \(64, 8\); a weight of \(k, n\)", x, w.T, BF16)
    check(r"w \(n, k\)", x, w[0], BF16)
    check(r"w \(n, k\)", x[0, 0], w, BF16)
    check("x must be one of bfloat16", x.astype(jnp.int8), w, BF16)
    check("x must be one of bfloat16", x.astype(jnp.float8_e4m3fn), w, BF16)
    check("w must be floating point, got int8", x, w.astype(jnp.int8), BF16)
    check("multiple of 128 for Hadamard 128, got 64", x, w, QUEST_W4A4)
    check("multiple of 128 for int4", x, w, DotRecipe(y_w=INT4))
    check("None or one of fp8, .*, got 'cudnn'", x, w, BF16, implementation="cudnn")
    check("random.*key=None", x, w, random_backward(STOCHASTIC))
    check(
        "does not cover the product 'y'", x, w, RTN_W4A4, NotImplementedError, implementation="fp8"
    )


def test_backward_blocks_are_checked_only_for_gradients():
    x, w = jnp.ones((4, 64)), jnp.ones((8, 64))
    recipe = DotRecipe(dx_g=MXFP4)
    assert jax.eval_shape(lambda x: quantized_dot(x, w, recipe), x).shape == (4, 8)
    with pytest.raises(ValueError, match=r"'dx' sums over n, the rows of w.*multiple of 32.*got 8"):
        jax.eval_shape(jax.grad(lambda x: quantized_dot(x, w, recipe).sum()), x)
    recipe = DotRecipe(dw_g=FP8_E4M3, backward_rotation=Hadamard(16))
    with pytest.raises(ValueError, match=r"'dw' sums over all tokens of x.*multiple of 16.*got 4"):
        jax.eval_shape(jax.grad(lambda x: quantized_dot(x, w, recipe).sum()), x)

"""Recipes that quantize all three products, against the equations of their papers."""

import dataclasses
import functools
import sys

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.linalg

from lowbit_jax.numerics import MXFP4, MXFP8_CEIL, quantize_values
from lowbit_jax.numerics.quantize import Factored
from lowbit_jax.ops import explain, get_recipe, quantized_dot
from lowbit_jax.ops.recipes import BF16
from lowbit_jax.rotations import Hadamard, hadamard_transform

T, N, K = 128, 128, 32  # tokens, rows of w, contraction
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@pytest.fixture(scope="module")
def arrays():
    """x, w and the gradient of y, Gaussian and float32."""
    keys = jax.random.split(jax.random.key(6), 3)  # far from thresholds
    shapes = ((T, K), (N, K), (T, N))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@functools.partial(jax.jit, static_argnums=(3,))
def run(x, w, g, recipe, key=None):
    y, vjp = jax.vjp(lambda x, w: quantized_dot(x, w, recipe, key=key), x, w)
    return y, *vjp(g)


# The papers' quantizers in NumPy, float64. Each returns values and how far the entry that is
# nearest to a threshold lies from it, relative to the entry.


def nearest_e2m1(units):
    thresholds = (E2M1[1:] + E2M1[:-1]) / 2
    magnitude = np.abs(units)
    rounded = np.sign(units) * E2M1[np.searchsorted(thresholds, magnitude)]
    margin = np.abs(magnitude[..., None] / thresholds - 1).min()
    return rounded, margin


def blocks_of(z, size):
    return z.reshape(len(z), -1, size)


def mxfp4_fitted(z):
    """Scale `2^e / 3` with `2^e <= absmax < 2^(e + 1)`."""
    blocks = blocks_of(z, 32)
    scale = 2.0 ** np.floor(np.log2(np.abs(blocks).max(-1, keepdims=True))) / 3
    rounded, margin = nearest_e2m1(blocks / scale)
    return (rounded * scale).reshape(z.shape), margin


def quest_mxfp4(z):
    """Scale: the power of two nearest to .48707976 rms; gradients where `|x| <= 6 scale`."""
    blocks = blocks_of(z, 32)
    log = np.log2(0.48707976 * np.sqrt((blocks**2).mean(-1, keepdims=True)))
    scale = 2.0 ** np.round(log)
    rounded, margin = nearest_e2m1(blocks / scale)
    margin = min(margin, np.abs(log - np.floor(log) - 0.5).min())
    margin = min(margin, np.abs(np.abs(blocks / scale) / 6 - 1).min())
    mask = np.abs(blocks / scale) <= 6
    return (rounded * scale).reshape(z.shape), mask.reshape(z.shape), margin


def to_e4m3(scale):
    """To nearest; all scales here are normal numbers, of 8 steps a power of two."""
    steps = scale / 2.0 ** (np.floor(np.log2(scale)) - 3)
    margin = np.abs((steps - np.floor(steps) - 0.5) / steps).min()
    return scale.astype(ml_dtypes.float8_e4m3fn).astype(np.float64), margin


def nvfp4(z, rows=1, four_over_six=False):
    """E4M3 scales for 16 (or rows x 16) entries and a float scale for the tensor."""
    n, k = z.shape
    blocks = z.reshape(n // rows, rows, k // 16, 16).swapaxes(1, 2)
    absmax = np.abs(blocks).max((2, 3), keepdims=True)
    global_scale = np.abs(z).max() / (6 * (256 if four_over_six else 448))
    candidates = []
    for widening in (1, 1.5) if four_over_six else (1,):
        scale, scale_margin = to_e4m3(widening * absmax / (6 * global_scale))
        rounded, margin = nearest_e2m1(blocks / (scale * global_scale))
        values = rounded * scale * global_scale
        error = ((values - blocks) ** 2).sum((2, 3), keepdims=True)
        candidates.append((error, values, min(margin, scale_margin)))
    error, values, margin = candidates[0]
    if four_over_six:
        other, wider, other_margin = candidates[1]
        values = np.where(other < error, wider, values)
        # An error of 2^-22 of 6 counts 20 times as much in a difference of about .3.
        margin = min(margin, other_margin, np.abs(other / error - 1).min() / 20)
    return values.swapaxes(1, 2).reshape(z.shape), margin


def hadamard(z, size, signs=1.0):
    h = scipy.linalg.hadamard(size) / size**0.5
    return (blocks_of(z * signs, size) @ h).reshape(z.shape)


def draw(key):
    """The documented order: keys of (y, dx, dw), and within each of (rotation, first, second)."""
    return list(jax.random.split(key, (3, 3)))


def signs_of(key, length):
    return np.asarray(jax.random.rademacher(key, (length,), jnp.float32), np.float64)


values_of = jax.jit(lambda z, spec, key: quantize_values(z, spec, key=key)[0], static_argnums=1)


def at_random(z, spec, key):
    """Stochastic roundings are those of `numerics`, proven there; what surrounds them is not."""
    return np.asarray(values_of(jnp.asarray(z, jnp.float32), spec, key), np.float64)


def quartet_reference(x, w, g, key, recipe):
    """Castro et al., Quartet, arXiv:2505.14669, algorithm 1, to nearest backward."""
    del recipe
    (_, (r_dx, _, _), (r_dw, _, _)), size = draw(key), 32
    (x_q, x_mask, m0), (w_q, w_mask, m1) = (quest_mxfp4(hadamard(z, size)) for z in (x, w))
    margins = [m0, m1]

    def backward(z, signs):
        values, margin = mxfp4_fitted(hadamard(z, size, signs))
        margins.append(margin)
        return values

    eps = signs_of(r_dx, N)
    dx = backward(g, eps) @ backward(w_q.T, eps).T
    eps = signs_of(r_dw, T)
    dw = backward(g.T, eps) @ backward(x_q.T, eps).T
    gradients = (hadamard(dx * x_mask, size), hadamard(dw * w_mask, size))
    return (x_q @ w_q.T, *gradients), min(margins)


def quartet2_reference(x, w, g, key, recipe):
    """Panferov et al., Quartet II, arXiv:2601.22813: no mask, no rotation to undo."""
    _, (r_dx, g_dx, w_dx), (r_dw, g_dw, x_dw) = draw(key)
    (x_q, m0), (w_q, m1) = (nvfp4(z, four_over_six=True) for z in (x, w))

    def backward(z, signs, key):
        return at_random(hadamard(z, 128, signs), recipe.dx_g, key)

    eps = signs_of(r_dx, N)
    dx = backward(g, eps, g_dx) @ backward(w_q.T, eps, w_dx).T
    eps = signs_of(r_dw, T)
    dw = backward(g.T, eps, g_dw) @ backward(x_q.T, eps, x_dw).T
    return (x_q @ w_q.T, dx, dw), min(m0, m1)


def nvidia_reference(x, w, g, key, recipe):
    """NVIDIA, Pretraining Large Language Models with NVFP4, arXiv:2509.25149."""
    _, (_, g_dx, _), (r_dw, g_dw, _) = draw(key)
    (x_q, m0), (w_q, m1) = nvfp4(x), nvfp4(w, rows=16)
    dx = at_random(g, recipe.dx_g, g_dx) @ w_q
    eps = signs_of(r_dw, T)
    x_again, m2 = nvfp4(hadamard(x.T, 16, eps))  # the original x, once more
    dw = at_random(hadamard(g.T, 16, eps), recipe.dw_g, g_dw) @ x_again.T
    return (x_q @ w_q.T, dx, dw), min(m0, m1, m2)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("quartet_rtn", quartet_reference),
        ("quartet2", quartet2_reference),
        ("nvfp4_nvidia", nvidia_reference),
    ],
)
def test_equals_the_equations_of_the_paper(arrays, name, reference):
    recipe, key = get_recipe(name), jax.random.key(8)  # far from thresholds
    actual = run(*arrays, recipe, key)
    expected, margin = reference(*(np.asarray(a, np.float64) for a in arrays), key, recipe)
    # Both must round alike. An entry is computed with about 128 + 10 roundings of 2^-25 on
    # average, of random sign: 12 of these, times 3.
    assert margin > 3 * 12 * 2**-25
    for a, e, terms in zip(actual, expected, (K, N, T), strict=True):
        # Bound: a sum of `terms` products whose two operands carry 138 roundings of 2^-24 each,
        # and 32 more for a rotation back, all of random sign: 6 roots of their number, relative to
        # the size of a sum. A value that rounded the other way would show as 1e-2.
        bound = 6 * (terms + 2 * 138 + 32) ** 0.5 * 2**-24
        assert np.max(np.abs(a - e)) <= bound * np.sqrt(np.mean(e**2))


# What is on the grid of MXFP8 along one axis is nearly all on that along the other: only a
# narrower format tells a second rounding from one of the original.
@pytest.mark.parametrize("spec", [MXFP8_CEIL, MXFP4], ids=str)
def test_mxfp8_quantizes_the_originals_along_each_contraction(arrays, spec):
    x, w, g = arrays
    formats = dict.fromkeys(("y_x", "y_w", "dx_g", "dx_w", "dw_x", "dw_g"), spec)
    recipe = dataclasses.replace(get_recipe("mxfp8"), **formats)

    @jax.jit
    def by_hand(x, w, g):
        q = lambda z: quantize_values(z, spec)[0]  # noqa: E731
        return [jnp.matmul(q(a), q(b).T) for a, b in ((x, w), (g, w.T), (g.T, x.T))]

    # Bound: the same operands; float32 sums of up to 256 products in another order.
    for a, e in zip(run(x, w, g, recipe), by_hand(x, w, g), strict=True):
        np.testing.assert_allclose(a, e, atol=2 * K * 2**-24 * np.max(np.abs(e)))


@pytest.mark.parametrize("name", ["quartet", "quartet2", "nvfp4_nvidia", "mxfp8"])
def test_with_quantizers_that_do_nothing_gradients_are_exact(arrays, name, monkeypatch):
    # The operands of a product share their signs, and rotations and transpositions cancel.
    module = sys.modules["lowbit_jax.ops.operands"]
    for quantizer in ("quantize_factored", "factored_and_mask"):
        untouched = lambda z, *args, **kwargs: (Factored(z, None), None)  # noqa: E731
        monkeypatch.setattr(module, quantizer, untouched)
    x, w, g = arrays
    recipe = dataclasses.replace(get_recipe(name), clip_scale=0.5)  # a jit key of its own
    actual = run(x, w, g, recipe, jax.random.key(3))
    for a, e in zip(actual, (x @ w.T, g @ w, g.T @ x), strict=True):
        # Bound: the published tolerance, 1e-5 of the largest entry.
        np.testing.assert_allclose(a, e, atol=1e-5 * np.max(np.abs(e)))


@dataclasses.dataclass(frozen=True)
class SignsOfOutputs(Hadamard):
    """The mistake of Quartet's first code: random signs after the transform."""

    def apply(self, x, *, key=None):
        return hadamard_transform(x, self.block_size) * self._signs(x, key)

    def inverse(self, x, *, key=None):
        return hadamard_transform(x * self._signs(x, key), self.block_size)


def test_signs_on_the_wrong_side_change_nothing_and_on_the_right_side_do(arrays):
    recipe = get_recipe("quartet_rtn")

    def gradients(rotation, seed=0):
        changed = dataclasses.replace(recipe, backward_rotation=rotation)
        return run(*arrays, changed, jax.random.key(seed))[1:]

    plain = gradients(Hadamard(32))
    # Exact: every product of two operands has both signs or none.
    chex.assert_trees_all_equal(gradients(SignsOfOutputs(32, randomized=True)), plain)
    right, other_key = (gradients(Hadamard(32, randomized=True), seed) for seed in (0, 1))
    for a, b, c in zip(right, plain, other_key, strict=True):
        # As different as two independent roundings: the errors of MXFP4 are about 17 % each.
        for one, two in ((a, b), (a, c)):
            assert 0.1 < jnp.linalg.norm(one - two) / jnp.linalg.norm(one) < 0.3


COUNTS = (1, 4, 16, 64)


@functools.partial(jax.jit, static_argnums=3)
def means_of_draws(x, w, g, recipe):
    """`|mean of B draws - expectation|^2 / |expectation|^2` for each B, and the slope of each draw.

    Of dx and dw together, whose expectation are the exact products of the quantized operands.
    """
    exact = jnp.stack(run(x, w, g, recipe.with_products(dx=BF16, dw=BF16))[1:])
    keys = jax.random.split(jax.random.key(11), COUNTS[-1])
    draws = jax.lax.map(lambda key: jnp.stack(run(x, w, g, recipe, key)[1:]), keys)
    means = jnp.stack([draws[:count].mean(0) for count in COUNTS])
    errors = jnp.sum((means - exact) ** 2, (1, 2, 3)) / jnp.sum(exact**2)
    return errors, jnp.sum(draws * exact, (1, 2, 3)) / jnp.sum(exact**2)


@pytest.mark.parametrize(("name", "variance"), [("quartet", 0.0578), ("quartet2", 0.0187)])
def test_gradients_are_unbiased_so_that_their_mean_converges(arrays, name, variance):
    # The relative variance of one draw: both operands', .0285 and .0093, on Gaussian data, and
    # their product.
    errors, slopes = means_of_draws(*arrays, get_recipe(name))
    # Statistical: over data and keys the product varies by 2.5 %; four times that.
    np.testing.assert_allclose(errors * np.array(COUNTS), variance, rtol=0.1)
    # Statistical: 5 standard errors, a false alarm in about 1 of 1.7 million seeds.
    assert abs(slopes.mean() - 1) <= 5 * slopes.std() / len(slopes) ** 0.5


def test_the_mean_of_gradients_rounded_to_nearest_levels_off(arrays):
    errors, slopes = means_of_draws(*arrays, get_recipe("quartet_rtn"))
    slope, standard_error = slopes.mean(), slopes.std() / len(slopes) ** 0.5
    # Operands shrink by .9911 on Gaussian data, and one of the two, rounded before, by less.
    assert 0.9911**2 - 5 * standard_error < slope < 0.9911 + 5 * standard_error
    assert 1 - slope > 10 * standard_error
    # What is left after 64 draws is the bias and a 64th of the variance; 10 % as above.
    np.testing.assert_allclose(errors[-1], (1 - slope) ** 2 + errors[0] / 64, rtol=0.1)
    assert errors[-1] > 1.25 * errors[0] / 64


def cosine(a, b):
    a, b = (jnp.concatenate([leaf.ravel() for leaf in leaves]) for leaves in (a, b))
    return jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b)


@functools.partial(jax.jit, static_argnums=1)
def cosine_of_mlp_gradients(key, recipe, width=256):
    """Between quantized and exact gradients of a random regression with two layers."""
    *keys, noise = jax.random.split(key, 5)
    *weights, x, target = (jax.random.normal(k, (width, width)) for k in keys)

    def loss(weights, recipe, keys):
        hidden = jax.nn.silu(quantized_dot(x, weights[0], recipe, key=keys[0]))
        y = quantized_dot(hidden, weights[1], recipe, key=keys[1])
        return jnp.mean((y - target) ** 2)

    weights = [w / width**0.5 for w in weights]
    quantized = jax.grad(loss)(weights, recipe, jax.random.split(noise))
    return cosine(quantized, jax.grad(loss)(weights, BF16, (None, None)))


@pytest.mark.parametrize(("name", "expected"), [("quartet", 0.949), ("quartet_rtn", 0.961)])
def test_gradients_of_an_mlp_point_the_right_way(name, expected):
    # Statistical: over seeds the cosine varies by 6e-4; five times that. Rounding costs .039
    # to nearest and .051 at random, of which .027 are the forward pass; Quartet II costs .019.
    actual = cosine_of_mlp_gradients(jax.random.key(0), get_recipe(name))
    np.testing.assert_allclose(actual, expected, atol=3e-3)


@pytest.mark.parametrize("name", ["quartet", "nvfp4_nvidia", "quartet2:y=bf16"])
def test_explain_shows_the_formats_of_each_product(arrays, name):
    recipe = get_recipe(name)
    rows = explain(lambda *args: run(*args, recipe, jax.random.key(0)), *arrays).rows
    shown = {row.product: (row.a_format, row.b_format) for row in rows}
    expected = {p: tuple(str(s or "-") for s in recipe.formats_of(p)) for p in ("y", "dx", "dw")}
    assert shown == expected


def test_only_what_backward_needs_is_kept(arrays):
    x, w, _ = arrays
    x = x.astype(jnp.bfloat16)

    def residual_bytes(name):
        vjp = jax.eval_shape(
            lambda x, w, key: jax.vjp(
                lambda x, w: quantized_dot(x, w, get_recipe(name), key=key), x, w
            )[1],
            *(x, w, jax.random.PRNGKey(0)),
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(vjp))

    key = 2 * 4
    assert residual_bytes("quartet") == (x.size + w.size) * (2 + 1) + key  # values and masks
    assert residual_bytes("quartet2") == (x.size + w.size) * 2 + 2 * 4 + key  # two global scales
    # The original activations and the quantized weights; the originals of both.
    assert residual_bytes("nvfp4_nvidia") == x.nbytes + w.size * 2 + 4 + key
    assert residual_bytes("mxfp8") == x.nbytes + w.nbytes

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.numerics import (
    E2M1,
    FP8_E4M3,
    FP8_E4M3_TENSOR,
    FP8_E5M2,
    MXFP4,
    MXFP4_FITTED,
    MXFP4_FITTED_ALIGNED,
    MXFP4_FITTED_STOCHASTIC,
    NVFP4,
    QUEST_INT2,
    QUEST_INT4,
    QUEST_MXFP4,
    QUEST_MXFP4_FLOOR,
    QuantSpec,
    dequantize,
    gradient_mask,
    quantize,
)
from lowbit_jax.numerics.estimators import mask_bound
from lowbit_jax.ops import recipes
from lowbit_jax.ops.quantized_dot import quantized_dot
from lowbit_jax.rotations.hadamard import Hadamard
from pallas_kernels.compat import lower_for_hopper, mosaic_obstacle
from pallas_kernels.folded import unfold, unpack_mask
from pallas_kernels.rotate_quantize import (
    Config,
    Keys,
    Target,
    rotate_quantize,
    rotate_quantize_reference,
)
from pallas_kernels.rotate_quantize.tuning import lowering_cases
from pallas_kernels.testing import assert_bitwise_equal, run_interpreted

needs_mosaic = pytest.mark.skipif(mosaic_obstacle() is not None, reason=str(mosaic_obstacle()))

PLAIN, RANDOM, WIDE = Hadamard(32), Hadamard(32, randomized=True), Hadamard(128)
CEIL = QuantSpec(E2M1, 32, "absmax_ceil")
CT175 = QuantSpec(E2M1, 32, "absmax_ct175")
CLIPPING_STOCHASTIC = QuantSpec(E2M1, 32, "absmax_floor", "stochastic")


STATIC = {"requantize": True, "mask_bound": mask_bound(QUEST_MXFP4, "clipped")}
reference = jax.jit(
    rotate_quantize_reference, static_argnames=("rows", "columns", "requantize", "mask_bound")
)


def keys(seed):
    return Keys(*jax.random.split(jax.random.key(seed)))


@dataclasses.dataclass(frozen=True)
class Case:
    rows: Target | None
    columns: Target | None
    shape: tuple[int, int] = (128, 128)
    dtype: type = jnp.bfloat16
    options: tuple[tuple[str, object], ...] = ()
    config: Config | None = None
    references: float | None = None  # given, this much larger than the exact ones
    is_spotted: bool = False  # zero blocks, zero rows and columns, outliers

    def input(self, seed=0, scale=1):
        """Multiples of 2**-7 up to 4, rows scaled by powers of two: all sums are exact."""
        rng = np.random.default_rng(seed)
        m, k = (size * scale for size in self.shape)
        x = rng.integers(-512, 513, (m, k)) / 128 * 2.0 ** rng.integers(-3, 4, (m, 1))
        if self.is_spotted:
            x[:32, 32:64] = 0
            x[33] = 0
            x[:, 7] = 0
            x[40, 40] = 2.0**100
            x[41] *= 2.0**-110
        return jnp.asarray(x, self.dtype)

    @property
    def divides(self):
        """By scales that are no powers of two, which a GPU does to two units in the last place."""
        targets = [target for target in (self.rows, self.columns) if target is not None]
        return any(target.spec.scale in ("absmax", "rms") for target in targets)

    def compare(self, x, runner, *, may_turn=False, **more):
        """Asserts that the kernel gives the bits of the reference.

        With `may_turn`, one in 100 entries may be the next level instead.
        """
        plain = functools.partial(
            rotate_quantize_reference, rows=self.rows, columns=self.columns, **dict(self.options)
        )
        given = {}
        if self.references is not None:
            exact = jax.jit(plain)(x)
            found = {"row_reference": exact.row_reference}
            found["column_reference"] = exact.column_reference
            given = {k: v * self.references for k, v in found.items() if v is not None}
        kernel = functools.partial(
            rotate_quantize,
            rows=self.rows,
            columns=self.columns,
            config=self.config,
            **dict(self.options),
            **more,
        )
        expected = jax.jit(lambda x, given: plain(x, **given))(x, given)
        actual = runner(lambda x, given: kernel(x, **given), x, given)
        actual, expected = jax.tree.map(np.asarray, (actual, expected))
        if may_turn:
            # Bound: the quotient is within an ulp of a tie wherever it rounds the other way, and
            # dyadic entries over dyadic maxima, which tie more often than others, do so rarely.
            for name in ("rows", "columns"):
                a, e = getattr(actual, name), getattr(expected, name)
                if a is None:
                    continue
                spacing = (
                    2
                    if self.rows.spec.format.kind == "midrise"
                    else np.abs(e.values.astype(np.float32)) / 8
                )
                turned = np.abs(a.values.astype(np.float32) - e.values.astype(np.float32))
                assert (turned <= np.maximum(spacing, 2.0**-9)).all()
                assert (turned > 0).mean() <= 0.01
                np.testing.assert_array_equal(a.scales, e.scales)
            return
        assert_bitwise_equal(actual, expected)  # exact: all sums of the input are


QUARTET_FORWARD = Case(
    Target(QUEST_MXFP4, PLAIN),
    Target(MXFP4_FITTED, RANDOM),
    options=(*STATIC.items(), ("column_keys", keys(3))),
)
QUARTET_BACKWARD = Case(
    Target(MXFP4_FITTED_STOCHASTIC, RANDOM),
    Target(MXFP4_FITTED_STOCHASTIC, RANDOM),
    options=(("row_keys", keys(1)), ("column_keys", keys(2))),
)
CASES = {
    "floor and ct175": Case(Target(MXFP4, PLAIN), Target(CT175, Hadamard(64))),
    "ceil without rotation, fitted with gain": Case(
        Target(CEIL), Target(MXFP4_FITTED_ALIGNED, Hadamard(16)), (64, 128)
    ),
    "std_floor, rms_nearest, a tile of two chunks along k": Case(
        Target(QUEST_MXFP4_FLOOR, PLAIN), Target(QUEST_MXFP4), (64, 128), config=Config(64, 128)
    ),
    "rows only, ragged": Case(Target(MXFP4, PLAIN), None, (40, 96)),
    "columns only, float32": Case(None, Target(MXFP4, PLAIN), (64, 128), jnp.float32),
    "Quartet forward": QUARTET_FORWARD,
    "Quartet forward, float32, ragged": dataclasses.replace(
        QUARTET_FORWARD, shape=(96, 160), dtype=jnp.float32
    ),
    "Quartet forward, given": dataclasses.replace(
        QUARTET_FORWARD,
        references=4.0,
        options=(*QUARTET_FORWARD.options, ("emit_references", True)),
    ),
    "Quartet backward": QUARTET_BACKWARD,
    "Quartet backward, float32": dataclasses.replace(
        QUARTET_BACKWARD, shape=(64, 128), dtype=jnp.float32, config=Config(64, 64)
    ),
    "signs along rows, rounded again": Case(
        Target(MXFP4, RANDOM),
        Target(MXFP4_FITTED, RANDOM),
        options=(("requantize", True), ("row_keys", keys(1)), ("column_keys", keys(2))),
    ),
    "signs along rows only": Case(
        Target(MXFP4, Hadamard(128, randomized=True)),
        Target(FP8_E4M3),
        options=(("row_keys", keys(1)),),
    ),
    "signs along columns only": Case(
        Target(QUEST_INT4, PLAIN),
        Target(MXFP4, RANDOM),
        options=(("column_keys", keys(1)),),
        references=1.0,
    ),
    "stochastic with clipping": Case(
        Target(CLIPPING_STOCHASTIC, PLAIN),
        None,
        (64, 128),
        options=(("row_keys", keys(1)), ("mask_bound", 0.75 * 6)),
    ),
    "Hadamard 128": Case(Target(MXFP4, WIDE), Target(QUEST_MXFP4, WIDE), is_spotted=True),
    "Hadamard 128, again": Case(
        Target(QUEST_MXFP4, WIDE), Target(MXFP4, PLAIN), options=(("requantize", True),)
    ),
    "references too small": Case(Target(MXFP4, PLAIN), Target(MXFP4_FITTED), references=0.125),
    "references far too small": Case(
        Target(MXFP4, PLAIN), Target(MXFP4_FITTED), references=2.0**-100
    ),
    "references far too small, by squares": Case(
        Target(QUEST_MXFP4, PLAIN), Target(QUEST_MXFP4_FLOOR), references=2.0**-100
    ),
    "references far too large": Case(
        Target(QUEST_MXFP4, PLAIN), Target(MXFP4_FITTED), references=2.0**60
    ),
    "zeros and outliers": Case(Target(QUEST_MXFP4), Target(MXFP4_FITTED, PLAIN), is_spotted=True),
    "FP8": Case(Target(FP8_E4M3), Target(FP8_E4M3_TENSOR, PLAIN), is_spotted=True),
    "QuEST, given": Case(
        Target(QUEST_INT4, WIDE),
        None,
        (64, 128),
        options=(("mask_bound", mask_bound(QUEST_INT4, "trust")),),
        references=1.0,
    ),
    "mid-rise by absmax": Case(
        Target(QuantSpec(QUEST_INT4.format, None), PLAIN),
        Target(QuantSpec(QUEST_INT2.format, "tensor"), PLAIN),
    ),
}


@needs_mosaic
@pytest.mark.parametrize("name", CASES)
def test_kernel_gives_the_bits_of_the_reference(name):
    case = CASES[name]
    case.compare(case.input(), run_interpreted, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_kernel_gives_the_bits_of_the_reference_on_a_gpu(name, seed):
    case = CASES[name]
    x = case.input(seed, scale=8)
    for _ in range(2):
        case.compare(x, lambda fn, *args: jax.jit(fn)(*args), may_turn=case.divides)


def agrees_but_for_ties(x, runner, **more):
    """Normal input, whose rotations round: entries differ only where two levels are as near."""
    rows, columns = Target(MXFP4, PLAIN), Target(QUEST_MXFP4, PLAIN)
    actual = runner(functools.partial(rotate_quantize, rows=rows, columns=columns, **more), x)
    expected = jax.jit(functools.partial(rotate_quantize_reference, rows=rows, columns=columns))(x)
    for name, z in (("rows", x), ("columns", x.T)):
        a, e = getattr(actual, name), getattr(expected, name)
        exact = np.asarray(z, np.float64).reshape(-1, 32) @ (PLAIN_MATRIX / np.sqrt(32))
        misses = [np.abs(exact - np.asarray(unfold(f)).reshape(-1, 32)) for f in (a, e)]
        # Bound: sums of 32 numbers in float32 err by 2**-20 of the largest at most.
        turned = np.abs(misses[0] - misses[1]) > 2**-20 * np.abs(exact).max(-1, keepdims=True)
        assert not turned.any(), name
        assert_bitwise_equal(np.asarray(a.scales), np.asarray(e.scales))


PLAIN_MATRIX = np.asarray(Hadamard(32).apply(jnp.eye(32)) * np.sqrt(32)).round()


@needs_mosaic
def test_kernel_agrees_but_for_ties_on_normal_input():
    x = jax.random.normal(jax.random.key(0), (128, 64), jnp.bfloat16)
    agrees_but_for_ties(x, run_interpreted, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 1])
def test_kernel_agrees_but_for_ties_on_normal_input_on_a_gpu(seed):
    x = jax.random.normal(jax.random.key(seed), (1024, 1024), jnp.bfloat16)
    agrees_but_for_ties(x, lambda fn, x: jax.jit(fn)(x))


@needs_mosaic
def test_scales_from_sums_of_squares_are_within_their_rounding_error():
    target = Target(QUEST_INT4, WIDE)
    x = jax.random.normal(jax.random.key(0), (64, 256), jnp.bfloat16)
    actual = run_interpreted(
        functools.partial(rotate_quantize, rows=target, columns=None, interpret=True), x
    )
    expected = reference(x, target, None)
    # Bound: 256 additions err by 2**-24 each, of which the root takes half; 2**-20 of the library.
    np.testing.assert_allclose(
        actual.row_reference, expected.row_reference, rtol=128 * 2**-24 + 2**-20, atol=0
    )
    np.testing.assert_array_equal(actual.rows.scales, actual.row_reference / 2)


@needs_mosaic
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_nan_stays_in_its_row_and_its_column():
    case = Case(Target(QUEST_MXFP4, PLAIN), Target(MXFP4, PLAIN))  # columns of two chunks
    clean = case.input()
    x = clean.at[50, 5].set(jnp.nan).at[70, 100].set(jnp.inf)
    run = functools.partial(rotate_quantize, rows=case.rows, columns=case.columns, interpret=True)
    actual = run_interpreted(run, x)
    expected = reference(clean, case.rows, case.columns)
    for name, spoilt in (("rows", [50, 70]), ("columns", [5, 100])):
        a, e = getattr(actual, name), getattr(expected, name)
        is_spoilt = np.isin(np.arange(len(a.scales)), spoilt)
        np.testing.assert_array_equal(np.isnan(a.scales), is_spoilt)
        kept = [jax.tree.map(lambda z, s=is_spoilt: np.asarray(z)[~s], f) for f in (a, e)]
        assert_bitwise_equal(*kept)


LAUNCHES = {name: (fn, shapes) for name, fn, shapes in lowering_cases()}


@needs_mosaic
def test_exact_references_take_one_pass_more():
    for name, passes in (
        ("both, exact", 2),
        ("Quartet forward, exact", 2),
        ("Quartet forward", 1),
    ):
        fn, shapes = LAUNCHES[name]
        module = lower_for_hopper(fn, *shapes)
        assert module.count("stablehlo.custom_call @mosaic_gpu") == passes, name


@needs_mosaic
@pytest.mark.parametrize("name", LAUNCHES)
def test_every_launch_lowers_for_hopper(name):
    fn, shapes = LAUNCHES[name]
    assert "lowbit_rotate_quantize" in lower_for_hopper(fn, *shapes)


def test_reference_makes_what_the_quantizers_make():
    x = QUARTET_FORWARD.input()
    rows, columns = QUARTET_FORWARD.rows, QUARTET_FORWARD.columns
    options = dict(QUARTET_FORWARD.options)
    out = reference(x, rows, columns, column_keys=options["column_keys"], **STATIC)
    rotated = PLAIN.apply(x)
    values = dequantize(quantize(rotated, QUEST_MXFP4))
    np.testing.assert_array_equal(unfold(out.rows), values)
    np.testing.assert_array_equal(
        unpack_mask(out.mask), gradient_mask(rotated, QUEST_MXFP4, "clipped")
    )
    again = RANDOM.apply(values.T, key=keys(3).rotation)
    np.testing.assert_array_equal(unfold(out.columns), dequantize(quantize(again, MXFP4_FITTED)))


def test_quantized_dot_multiplies_what_the_reference_makes():
    """Forward and for dx, with keys split as `quantized_dot` splits them."""
    recipe, key = recipes.QUARTET, jax.random.key(5)
    draw = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((64, 96),) * 3)]
    x, w, g = draw[0], draw[1], draw[2][:, :64]
    rotation, again = recipe.rotation, recipe.backward_rotation
    key_dx = jax.random.split(key, 3)[1]
    key_signs, key_g, key_w = jax.random.split(key_dx, 3)

    bound = mask_bound(recipe.y_x, recipe.estimator, recipe.clip_scale)

    @jax.jit
    def expected(x, w, g):
        y, vjp = jax.vjp(lambda x: quantized_dot(x, w, recipe, key=key), x)
        return y, vjp(g)[0]

    @jax.jit
    def actual(x, w, g):
        of_x = rotate_quantize_reference(x, Target(recipe.y_x, rotation), None, mask_bound=bound)
        of_w = rotate_quantize_reference(
            w,
            Target(recipe.y_w, rotation),
            Target(recipe.dx_w, again),
            requantize=True,
            column_keys=Keys(key_signs, key_w),
        )
        of_g = rotate_quantize_reference(
            g, Target(recipe.dx_g, again), None, row_keys=Keys(key_signs, key_g)
        )
        y = unfold(of_x.rows) @ unfold(of_w.rows).T
        dx = unfold(of_g.rows) @ unfold(of_w.columns).T
        return y, rotation.inverse(jnp.where(unpack_mask(of_x.mask), dx, 0))

    # Bound: sums of 96 and 64 products in float32, and of 32 of those, in another order.
    for a, e in zip(actual(x, w, g), expected(x, w, g), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=200 * 2**-24 * np.abs(e).max())


@pytest.mark.parametrize(
    ("error", "message", "rows", "columns", "options"),
    [
        (ValueError, "both None", None, None, {}),
        (ValueError, "rows run along must be a multiple of 128", Target(MXFP4, WIDE), None, {}),
        (ValueError, "row_keys.rounding=None", Target(CLIPPING_STOCHASTIC), None, {}),
        (ValueError, "column_keys.rotation=None", None, Target(MXFP4, RANDOM), {}),
        (ValueError, "mask is one of the rows", None, Target(MXFP4), {"mask_bound": 6.0}),
        (ValueError, "pass both", Target(MXFP4), None, {"requantize": True}),
        (
            NotImplementedError,
            "only rows that bfloat16 holds",
            *(Target(MXFP4_FITTED), Target(MXFP4)),
            {"requantize": True},
        ),
        (NotImplementedError, "one scale a row or a tensor", Target(NVFP4), None, {}),
        (NotImplementedError, "mid-rise up to 4 bits and e4m3", Target(FP8_E5M2), None, {}),
        (NotImplementedError, "reach 128 entries", Target(MXFP4, Hadamard(256)), None, {}),
    ],
)
def test_wrong_calls_say_what_to_do(error, message, rows, columns, options):
    with pytest.raises(error, match=message):
        rotate_quantize(jnp.ones((64, 64)), rows, columns, **options)


def test_other_inputs_are_refused():
    for x in (jnp.ones((2, 4, 64)), jnp.ones((64, 64), jnp.float16)):
        with pytest.raises(ValueError, match="a matrix of bfloat16 or float32"):
            rotate_quantize(x, Target(MXFP4), None)

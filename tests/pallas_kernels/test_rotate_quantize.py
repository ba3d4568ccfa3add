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
    FP8_E5M2_TENSOR,
    MXFP4,
    MXFP4_FITTED,
    MXFP4_FITTED_ALIGNED,
    MXFP4_FITTED_STOCHASTIC,
    NVFP4,
    NVFP4_16X16,
    NVFP4_EDEN,
    NVFP4_EDEN_128,
    NVFP4_FOUR_OVER_SIX,
    NVFP4_STOCHASTIC,
    QUEST_INT4,
    QUEST_INT5,
    QUEST_MXFP4,
    QUEST_MXFP4_FLOOR,
    QuantSpec,
    dequantize,
    gradient_mask,
    integer,
    quantize,
)
from lowbit_jax.numerics.estimators import mask_bound
from lowbit_jax.numerics.spec import (
    E4M3_RULES,
    GAUSSIAN_ALPHA,
    GLOBAL_SCALE_RULES,
    POWER_OF_TWO_RULES,
)
from lowbit_jax.ops import recipes
from lowbit_jax.ops.call import split_keys
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
from pallas_kernels.rotate_quantize.reference import finite_absmax, largest_scale_of
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
    reference: float | None = None  # given, so many times the abs-max
    is_spotted: bool = False  # zero blocks, zero rows and columns, outliers
    is_spoilt: bool = False  # a NaN and an infinity

    def input(self, seed=0, scale=1):
        """Multiples of 2**-7 up to 4, rows scaled by powers of two: all sums are exact."""
        rng = np.random.default_rng(seed)
        m, k = (size * scale for size in self.shape)
        x = rng.integers(-512, 513, (m, k)) / 128 * 2.0 ** rng.integers(-3, 4, (m, 1))
        if self.is_spotted:
            x[:32, 32:64] = 0
            x[33] = 0
            x[:, 7] = 0
            x[40, 40] = 2.0**12
            x[41] *= 2.0**-24
            x[42] *= 2.0**-60
        if self.is_spoilt:
            x[50, 5] = np.nan
            x[71, 5] = 2.0**13  # the largest, in the column of the NaN, not rotated with it
            x[70, 100] = np.inf
        return jnp.asarray(x, self.dtype)

    @property
    def divides(self):
        """By scales that are no powers of two, which a GPU may do to an ulp or two."""
        targets = [target for target in (self.rows, self.columns) if target is not None]
        return any(target.spec.scale in ("absmax", *E4M3_RULES) for target in targets)

    def both(self, x, runner, **more):
        """What the kernel gives, and the reference."""
        targets = {"rows": self.rows, "columns": self.columns, **dict(self.options)}
        kernel = functools.partial(rotate_quantize, config=self.config, **targets, **more)
        plain = jax.jit(functools.partial(rotate_quantize_reference, **targets))
        given = {}
        if self.reference is not None:
            finite = jnp.where(jnp.isfinite(x), jnp.abs(x), 0).max()
            given["reference"] = finite.astype(jnp.float32) * self.reference
        expected = plain(x, **given)
        actual = runner(lambda x, given: kernel(x, **given), x, given)
        return jax.tree.map(np.asarray, (actual, expected))

    def compare(self, x, runner, *, turned=0, **more):
        """Asserts that the kernel gives what the reference does, up to the sign of zeros.

        At most `turned` entries rounded at random may have gone to the other neighbour.
        """
        actual, expected = self.both(x, runner, **more)
        again = dict(self.options).get("requantize", False)
        is_bad = ~np.isfinite(np.asarray(x, np.float32))
        bad = {"rows": self.together(is_bad, self.rows)}
        bad["columns"] = self.together((bad["rows"] if again else is_bad).T, self.columns)
        for name in ("rows", "columns"):
            a, e = getattr(actual, name), getattr(expected, name)
            assert (a is None) == (e is None)
            if a is not None:
                assert a.values.dtype == e.values.dtype
                # Exact: all sums of the input are. Those of the squares of NVFP4's errors and
                # numbers are not, but no block is so near to where that would turn a choice.
                values = [np.array(f.values, np.float32) for f in (a, e)]
                if a.scales.ndim == 0:
                    values[1][bad[name]] = np.nan
                else:
                    bad_rows = bad[name].any(-1)
                    np.testing.assert_array_equal(np.isnan(a.scales), bad_rows)
                    values = [v[~bad_rows] for v in values]
                target = getattr(self, name)
                if turned and target.spec.rounding == "stochastic":
                    differs = ~((values[0] == values[1]) | np.isnan(values).all(0))
                    assert differs.sum() <= turned
                    values = [v[~differs] for v in values]
                np.testing.assert_array_equal(*values)
                np.testing.assert_array_equal(a.scales, e.scales)
        if actual.mask is not None:
            a, e = (np.array(unpack_mask(jnp.asarray(m))) for m in (actual.mask, expected.mask))
            e[bad["rows"]] = False
            np.testing.assert_array_equal(a, e)

    def together(self, entries, target):
        """These entries and those that are rotated together with them."""
        span = max(64, 1 if target is None else target.transform)
        padded = np.pad(entries, ((0, 0), (0, -entries.shape[1] % span)))
        spans = padded.reshape(len(entries), -1, span).any(-1)
        return np.repeat(spans, span, axis=-1)[:, : entries.shape[1]]


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
    "Quartet forward, zeros, outliers, NaN": dataclasses.replace(
        QUARTET_FORWARD, is_spotted=True, is_spoilt=True
    ),
    "Quartet backward": QUARTET_BACKWARD,
    "Quartet backward, float32": dataclasses.replace(
        QUARTET_BACKWARD, shape=(64, 128), dtype=jnp.float32, config=Config(64, 64)
    ),
    "Quartet backward, zeros, outliers, NaN, reference too large": dataclasses.replace(
        QUARTET_BACKWARD, is_spotted=True, is_spoilt=True, reference=3.0
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
    "stochastic with clipping, saturating": Case(
        Target(CLIPPING_STOCHASTIC, PLAIN),
        None,
        (64, 128),
        options=(("row_keys", keys(1)), ("mask_bound", 0.75 * 6)),
        reference=2.0**-9,
    ),
    "stochastic, reference far too small": Case(
        Target(CLIPPING_STOCHASTIC, PLAIN),
        Target(MXFP4_FITTED_STOCHASTIC, RANDOM),
        options=(("row_keys", keys(1)), ("column_keys", keys(2))),
        reference=2.0**-40,
    ),
    "Hadamard 128": Case(Target(MXFP4, WIDE), Target(QUEST_MXFP4, WIDE), is_spotted=True),
    "Hadamard 128, again": Case(
        Target(QUEST_MXFP4, WIDE), Target(MXFP4, PLAIN), options=(("requantize", True),)
    ),
    "reference too small": Case(
        Target(MXFP4, PLAIN), Target(MXFP4_FITTED), (64, 64), is_spotted=True, reference=2.0**-9
    ),
    "reference far too small": Case(
        Target(QUEST_MXFP4, PLAIN), Target(QUEST_MXFP4_FLOOR), (64, 64), reference=2.0**-40
    ),
    "reference far too large": Case(
        Target(QUEST_MXFP4, PLAIN), Target(MXFP4_FITTED), (64, 64), reference=2.0**25
    ),
    "zeros, outliers, NaN": Case(
        Target(CEIL), Target(CT175, PLAIN), is_spotted=True, is_spoilt=True
    ),
    "FP8 of rows": Case(Target(FP8_E4M3, PLAIN), Target(FP8_E5M2), is_spotted=True),
    "FP8 of the tensor, NaN": Case(
        Target(FP8_E4M3_TENSOR), Target(FP8_E4M3_TENSOR), is_spotted=True, is_spoilt=True
    ),
    "FP8 gradients, NaN, saturating": Case(
        Target(FP8_E5M2_TENSOR), Target(FP8_E5M2_TENSOR), is_spoilt=True, reference=2.0**-4
    ),
    "FP8 of rows beside rounding at random, zeros, outliers, NaN": Case(
        Target(FP8_E4M3),
        Target(MXFP4_FITTED_STOCHASTIC, RANDOM),
        options=(("column_keys", keys(2)),),
        is_spotted=True,
        is_spoilt=True,
    ),
    "NVFP4 with signs, beside rounding at random": Case(
        Target(MXFP4_FITTED_STOCHASTIC, RANDOM), Target(NVFP4), options=(("row_keys", keys(1)),)
    ),
    "NVFP4 four over six, and to nearest under a rotation, zeros, outliers, NaN": Case(
        Target(NVFP4_FOUR_OVER_SIX), Target(NVFP4, PLAIN), is_spotted=True, is_spoilt=True
    ),
    "NVFP4 at random, also under a rotation, zeros, outliers, NaN": Case(
        Target(NVFP4_STOCHASTIC),
        Target(NVFP4_STOCHASTIC, Hadamard(16, randomized=True)),
        options=(("row_keys", keys(1)), ("column_keys", keys(2))),
        config=Config(64, 64),
        is_spotted=True,
        is_spoilt=True,
    ),
    "mid-rise by absmax": Case(
        Target(QuantSpec(QUEST_INT4.format, None), PLAIN), None, (64, 64), is_spotted=True
    ),
}


NVFP4_CASES = {name: case for name, case in CASES.items() if "NVFP4" in name} | {
    "MS-EDEN": Case(  # interpreted where `quantized_dot` is
        Target(NVFP4_EDEN, Hadamard(128, randomized=True)),
        Target(NVFP4_EDEN, Hadamard(128, randomized=True)),
        options=(("row_keys", keys(1)), ("column_keys", keys(2))),
    )
}


@needs_mosaic
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("name", CASES)
def test_kernel_gives_the_numbers_of_the_reference(name):
    case = CASES[name]
    case.compare(case.input(), run_interpreted, interpret=True)


def run_on_gpu(fn, *args):
    return jax.jit(fn)(*args)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.divides])
def test_kernel_gives_the_numbers_of_the_reference_on_a_gpu(name, seed):
    case = CASES[name]
    x = case.input(seed, scale=8)
    # Statistical: the factor of the transform and 3/4 are one product in the kernel and two in the
    # reference, which differ by two units of 2**-24 at most; of a million entries half a one is
    # expected whose 22 random bits lie between, and more than six are one case in a million.
    assert x.size <= 2**20
    for _ in range(2):
        case.compare(x, run_on_gpu, turned=6)


def is_nearest(x, target, bound, runner, **more):
    """Asserts that no level is nearer than the one chosen, but for rounding of the quotient."""
    case = Case(target, None, options=(("mask_bound", bound),) if bound else ())
    actual, expected = case.both(x, runner, **more)
    values, scales = (np.asarray(z, np.float64) for z in actual.rows)
    # Bound: for "rms" 128 additions err by 2**-24 each, of which the root takes half, and the
    # library by 2**-20; else scales are the same.
    rtol = 64 * 2**-24 + 2**-20 if target.spec.scale == "rms" else 0
    np.testing.assert_allclose(scales, expected.rows.scales, rtol=rtol, atol=0)
    rotated = np.asarray(x if target.rotation is None else target.rotation.apply(x), np.float64)
    units = rotated / (scales[:, None] if scales.ndim else scales)
    format = target.spec.format
    levels = np.sort(format.grid * (2 if format.kind == "midrise" else 1))
    assert np.isin(values, levels).all()
    above = np.clip(np.searchsorted(levels, units), 1, len(levels) - 1)
    best = np.minimum(np.abs(units - levels[above - 1]), np.abs(units - levels[above]))
    # Bound: quotients are rounded to 2**-22 at most.
    assert (np.abs(units - values) <= best + 2**-21 * np.abs(units)).all()
    if bound:
        excess = np.abs(units) / (2 if format.kind == "midrise" else 1) - bound
        is_kept = np.asarray(unpack_mask(jnp.asarray(actual.mask)))
        is_clear = np.abs(excess) > 2**-21 * bound
        np.testing.assert_array_equal(is_kept[is_clear], (excess <= 0)[is_clear])


DIVIDED = {
    "QuEST": (Target(QUEST_INT4, WIDE), mask_bound(QUEST_INT4, "trust")),
    "absmax": (Target(QuantSpec(QUEST_INT4.format, None), PLAIN), 7.0),
    "FP8 of rows": (Target(FP8_E4M3, PLAIN), None),
    "FP8 of the tensor": (Target(FP8_E4M3_TENSOR), None),
    "FP8 gradients": (Target(FP8_E5M2_TENSOR), None),
}


@needs_mosaic
def test_quest_rounds_to_the_nearest_level():
    x = jax.random.normal(jax.random.key(0), (64, 128), jnp.bfloat16)
    is_nearest(x, *DIVIDED["QuEST"], run_interpreted, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", DIVIDED)
def test_quotients_round_to_the_nearest_level_on_a_gpu(name, seed):
    x = jax.random.normal(jax.random.key(seed), (512, 128), jnp.bfloat16)
    for _ in range(2):
        is_nearest(x, *DIVIDED[name], run_on_gpu)


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
    agrees_but_for_ties(x, run_on_gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NVFP4_CASES)
def test_few_blocks_of_nvfp4_differ_on_a_gpu(name, seed):
    case = NVFP4_CASES[name]
    x = jax.random.normal(jax.random.key(seed), (1024, 1024), case.dtype)
    actual, expected = case.both(x, run_on_gpu)
    for side in ("rows", "columns"):
        target = getattr(case, side)
        if target is None or not target.is_nvfp4:
            continue
        a, e = getattr(actual, side), getattr(expected, side)
        # Bound: the abs-max of sums of at most 128 numbers, and the products that make the scale.
        np.testing.assert_allclose(a.scales, e.scales, rtol=2**-20, atol=0)
        differs = a.values.astype(np.float32) != e.values.astype(np.float32)
        # Statistical: quotients err by 2 units of 2**-23 and rotated numbers by 2**-21 or so, and
        # there is a boundary in every interval of length 1: that is 2 of 2**20 entries. The 65,536
        # scales, and the choices of four over six, are as well determined. Of several at once five
        # are likely, 32 are not.
        assert differs.reshape(len(differs), -1, 16).any(-1).sum() <= 32


@needs_mosaic
def test_means_far_above_the_deviation_move_few_scales():
    target = Target(QUEST_MXFP4_FLOOR)
    x = 64 + jax.random.normal(jax.random.key(0), (64, 128), jnp.bfloat16).astype(jnp.float32)
    actual, expected = Case(target, None).both(x, run_interpreted, interpret=True)
    rows = np.asarray(x, np.float64).reshape(-1, 32)
    exact = np.log2(GAUSSIAN_ALPHA["e2m1"] / 6 * rows.std(-1))
    distance = np.abs(exact - np.round(exact))
    a, e = (f.values.astype(np.float32).reshape(-1, 32) for f in (actual.rows, expected.rows))
    is_equal = (a == e).all(-1)
    # Bound: in the library squares of numbers up to 1 lose 2**-30, in units of a power of two up to
    # four times the largest entry; in the kernel the mean errs by 2**-19 of the largest entry, the
    # square of which adds to the variance, and sums of squares err by 2**-18. Roots have half.
    ratio = np.abs(rows).max(-1) / rows.std(-1)
    assert is_equal[distance > 2**-18 + ratio**2 * 2**-25].all()
    assert is_equal.mean() > 0.9


LAUNCHES = {name: (fn, shapes) for name, fn, shapes in lowering_cases()}


@needs_mosaic
def test_only_scales_of_rows_and_of_rotated_nvfp4_take_a_pass_more():
    for name, passes in (
        ("both, exact", 1),
        ("Quartet forward, exact", 1),
        ("QuEST", 2),
        ("NVFP4 four over six, float32, exact", 1),
        ("Quartet II columns, exact", 2),
    ):
        fn, shapes = LAUNCHES[name]
        module = lower_for_hopper(fn, *shapes)
        assert module.count("stablehlo.custom_call @mosaic_gpu") == passes, name


@needs_mosaic
@pytest.mark.parametrize("name", [name for name in LAUNCHES if "exact" not in name])
def test_every_launch_lowers_for_hopper(name):
    fn, shapes = LAUNCHES[name]
    assert "lowbit_rotate_quantize" in lower_for_hopper(fn, *shapes)


@pytest.mark.parametrize("rule", POWER_OF_TWO_RULES)
@pytest.mark.parametrize("transform", [1, 32, 128])
def test_no_scale_exceeds_what_the_reference_allows(rule, transform):
    """On the worst rows: those of the transform, of entries of equal magnitude."""
    rotation = None if transform == 1 else Hadamard(transform)
    target = Target(QuantSpec(E2M1, 32, rule), rotation)

    @jax.jit
    def scales_and_allowed(x):
        y = x if rotation is None else rotation.apply(x)
        return quantize(y, target.spec).scales, largest_scale_of(target, finite_absmax(x))

    matrix = np.asarray(Hadamard(max(transform, 32)).apply(jnp.eye(max(transform, 32))))
    worst = np.sign(np.concatenate([matrix] * (128 // len(matrix)), axis=1))
    for size in (1.0, 1.2, 1.45, 1.7, 1.99):
        x = jnp.asarray(size * np.concatenate([worst, np.eye(128)]), jnp.float32)
        scales, allowed = scales_and_allowed(x)
        scales, allowed = np.asarray(scales, np.int32).max() - 127, np.log2(allowed)
        assert scales <= allowed <= scales + 1, size


@pytest.mark.parametrize("rule", [r for r in POWER_OF_TWO_RULES if r not in GLOBAL_SCALE_RULES])
@pytest.mark.parametrize("transform", [1, 32, 128])
def test_nothing_saturates_when_rounded_again(rule, transform):
    """On entries of equal magnitude, of rank one too, which transforms gather in one number."""
    rotation = None if transform == 1 else Hadamard(transform)
    rows = Target(QuantSpec(E2M1, 32, rule), rotation)
    matrix = np.sign(Hadamard(128).apply(jnp.eye(128)))
    random = np.random.default_rng(0).choice([-1.0, 1.0], (128, 128))
    worst = (matrix, np.outer(matrix[3], matrix[5]), np.outer(random[0], matrix[5]), random)
    x = np.stack([size * signs for signs in worst for size in (1.0, 1.46, 1.99)])

    @jax.jit
    @jax.vmap
    def largest(x):
        found = {}
        for again in ("absmax_ceil", "rms_nearest"):
            columns = Target(QuantSpec(E2M1, 32, again), rotation)
            out = rotate_quantize_reference(x, rows, columns, requantize=True)
            values = (out.rows.values, out.columns.values)
            found[again] = [jnp.abs(v.astype(jnp.float32)).max() for v in values]
        return found

    for again, found in largest(x.astype(np.float32)).items():
        # Exact: nothing is cut off at 57344, the largest number of e5m2.
        assert np.max(found) <= 49152, again


@needs_mosaic
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("rows", "columns", "more"),
    [
        (Target(QUEST_MXFP4, PLAIN), Target(MXFP4, WIDE), {}),
        (Target(MXFP4_FITTED_STOCHASTIC, RANDOM), None, {"row_keys": keys(1)}),
        (Target(MXFP4, PLAIN), Target(CEIL, PLAIN), {"requantize": True}),
    ],
    ids=["nearest", "random", "again"],
)
def test_an_entry_near_the_top_of_the_range_spoils_what_is_rotated_with_it_only(
    rows, columns, more
):
    x = np.random.default_rng(0).choice([-1.0, 1.0], (128, 128)) * 2.0**120
    x = jnp.asarray(x, jnp.bfloat16).at[3, 5].set(3e38)
    case = Case(rows, columns, options=tuple(more.items()))
    actual, expected = case.both(x, run_interpreted, interpret=True)
    spoilt = np.zeros((128, 128), bool)
    spoilt[3, 5] = True
    spoilt_rows = case.together(spoilt, rows)
    spoilt_columns = case.together((spoilt_rows if "requantize" in more else spoilt).T, columns)
    for out in (actual, expected):
        for folded, is_spoilt in ((out.rows, spoilt_rows), (out.columns, spoilt_columns)):
            if folded is not None:
                numbers = np.abs((folded.values.astype(np.float32) * folded.scales)[~is_spoilt])
                assert np.isfinite(numbers).all()
                assert numbers.max() > 2.0**120


@pytest.mark.parametrize("bound", [np.nan, np.inf])
def test_a_reference_that_is_not_finite_makes_nan(bound):
    out = reference(jnp.ones((32, 64)), Target(MXFP4), None, reference=jnp.float32(bound))
    assert jnp.isnan(unfold(out.rows)).all()


@pytest.mark.parametrize(
    ("rows", "columns", "options"),
    [
        (Target(FP8_E4M3_TENSOR, PLAIN), Target(QuantSpec(QUEST_INT4.format, "tensor")), {}),
        (Target(QUEST_INT4), Target(MXFP4, PLAIN), {"requantize": True}),
        (Target(MXFP4_FITTED), Target(QUEST_MXFP4), {"requantize": True}),
        (Target(MXFP4, PLAIN), Target(FP8_E4M3), {"requantize": True}),
        (Target(QuantSpec(integer(3), 32, "absmax_floor")), None, {}),
    ],
    ids=str,
)
def test_reference_takes_what_the_kernel_refuses(rows, columns, options):
    x = Case(rows, columns, dtype=jnp.float32).input()
    out = reference(x, rows, columns, **options)

    @functools.partial(jax.jit, static_argnames="target")
    def values(x, target):
        y = x if target.rotation is None else target.rotation.apply(x)
        return dequantize(quantize(y, target.spec))

    # Exact, for blocks lie within 28 binades.
    np.testing.assert_array_equal(unfold(out.rows), values(x, rows))
    if columns is not None:
        z = values(x, rows) if options else x
        np.testing.assert_array_equal(unfold(out.columns), values(z.T, columns))


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
    key_signs, key_g, key_w = split_keys(key)["dx"]

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


@needs_mosaic
def test_columns_that_one_pass_cannot_make_of_rounded_rows_are_made_in_the_backward_pass():
    recipe = dataclasses.replace(recipes.QUARTET, dx_w=FP8_E4M3)
    x, w, g = (jax.random.normal(jax.random.key(i), (64, 64), jnp.bfloat16) for i in range(3))

    def gradient(x, w, g, implementation):
        _, vjp = jax.vjp(
            lambda x: quantized_dot(
                x, w, recipe, key=jax.random.key(5), implementation=implementation
            ),
            x,
        )
        return vjp(g)[0].astype(jnp.float32)

    actual = run_interpreted(functools.partial(gradient, implementation="hopper"), x, w, g)
    expected = jax.jit(functools.partial(gradient, implementation="dequantize"))(x, w, g)
    # Bound: sums of 64 products in float32 and, rotated back, of 32 of those, in another order,
    # which may round to the neighbour in bfloat16, twice.
    atol = (200 * 2**-24 + 2 * 2**-8) * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


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
        (
            NotImplementedError,
            "columns with power-of-two scales only",
            *(Target(MXFP4), Target(FP8_E4M3)),
            {"requantize": True},
        ),
        (NotImplementedError, "single blocks of 16", Target(NVFP4_16X16), None, {}),
        (NotImplementedError, "single blocks of 16", None, Target(NVFP4_EDEN_128), {}),
        (NotImplementedError, "no mask", Target(NVFP4), None, {"mask_bound": 6.0}),
        (NotImplementedError, "mid-rise up to 4 bits and FP8", Target(QUEST_INT5), None, {}),
        (NotImplementedError, "without a rotation", Target(FP8_E4M3_TENSOR, PLAIN), None, {}),
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

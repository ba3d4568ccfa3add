"""Methods as named values: recipes for the products of linear layers, and how to find one."""

import dataclasses

from lowbit_jax.numerics import QuantSpec, integer, midrise, presets
from lowbit_jax.ops.dot_recipe import DotRecipe, join_name, split_name
from lowbit_jax.rotations import Hadamard, Rotation
from lowbit_jax.sparsity import Projection, identity, onto_grid

BF16 = DotRecipe(name="bf16")


def _fp8_tensorwise(gradients: QuantSpec, name: str) -> DotRecipe:
    """One scale a tensor in all three products.

    References:
      Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433: e4m3 where the values
      matter, e5m2 for the range of gradients.
    """
    forward = presets.FP8_E4M3_TENSOR
    return DotRecipe(y_x=forward, y_w=forward, dx_g=gradients, dw_g=gradients, name=name)


FP8_TENSORWISE = _fp8_tensorwise(presets.FP8_E5M2_TENSOR, "fp8_tensorwise")
FP8_TENSORWISE_E4M3 = _fp8_tensorwise(presets.FP8_E4M3_TENSOR, "fp8_tensorwise_e4m3")

# All operands of all products in MXFP8, each quantized along its own contraction axis from the
# original, gradients in e4m3 too: Mishra et al., Recipes for Pre-training LLMs with MXFP8,
# arXiv:2506.08027.
MXFP8 = DotRecipe(
    **dict.fromkeys(("y_x", "y_w", "dx_g", "dx_w", "dw_x", "dw_g"), presets.MXFP8_CEIL),
    requantize=False,
    name="mxfp8",
)


def _quest(bits: int, weight_only: bool = False, hadamard: bool = True) -> DotRecipe:
    """QuEST: Hadamard 128, Gaussian-optimal grid, gradients only where the grid reaches.

    References:
      Panferov et al., QuEST, arXiv:2502.05003. At one bit, as in its runs, the mask is the clip
      mask at 1.30 times the outermost level, 1.25 times without the Hadamard transform.
    """
    spec = presets.PRESETS[f"QUEST_INT{bits}"]
    one_bit_clip = 1.30 if hadamard else 1.25
    return DotRecipe(
        y_x=None if weight_only else spec,
        y_w=spec,
        rotation=Hadamard(128) if hadamard else None,
        estimator="clipped" if bits == 1 else "trust",
        clip_scale=one_bit_clip if bits == 1 else 1.0,
        name=f"quest_w{bits}a{16 if weight_only else bits}{'' if hadamard else '_no_hadamard'}",
    )


QUEST_W8A8, QUEST_W4A4, QUEST_W3A3, QUEST_W2A2, QUEST_W1A1 = (_quest(b) for b in (8, 4, 3, 2, 1))
QUEST_W4A16, QUEST_W3A16, QUEST_W2A16, QUEST_W1A16 = (
    _quest(b, weight_only=True) for b in (4, 3, 2, 1)
)
(
    QUEST_W4A4_NO_HADAMARD,
    QUEST_W3A3_NO_HADAMARD,
    QUEST_W2A2_NO_HADAMARD,
    QUEST_W1A1_NO_HADAMARD,
    QUEST_W8A8_NO_HADAMARD,
) = (_quest(b, hadamard=False) for b in (4, 3, 2, 1, 8))


def _rtn(bits: int) -> DotRecipe:
    """The baseline: abs-max mid-rise grid over the whole row, no rotation, straight through."""
    spec = QuantSpec(midrise(bits), None, "absmax")
    return DotRecipe(y_x=spec, y_w=spec, name=f"rtn_w{bits}a{bits}")


RTN_W8A8, RTN_W6A6, RTN_W5A5, RTN_W4A4, RTN_W3A3, RTN_W2A2, RTN_W1A1 = (
    _rtn(b) for b in (8, 6, 5, 4, 3, 2, 1)
)


def _weight_only(spec: QuantSpec, name: str) -> DotRecipe:
    """Weights alone, straight through: what ECO's weights on a grid are compared with."""
    return DotRecipe(y_w=spec, name=name)


def _stochastic(spec: QuantSpec) -> QuantSpec:
    return dataclasses.replace(spec, rounding="stochastic")


_INT4_WEIGHTS = QuantSpec(integer(4), 32)
FP8_WEIGHTS = _weight_only(presets.FP8_E4M3, "fp8_weights")
FP8_WEIGHTS_SR = _weight_only(_stochastic(presets.FP8_E4M3), "fp8_weights_sr")
INT4_WEIGHTS = _weight_only(_INT4_WEIGHTS, "int4_weights")
INT4_WEIGHTS_SR = _weight_only(_stochastic(_INT4_WEIGHTS), "int4_weights_sr")


def _backward(spec: QuantSpec, rotation: Rotation) -> dict:
    """Both backward products, and all four of their operands, in one format under one rotation."""
    return {
        **dict.fromkeys(("dx_g", "dx_w", "dw_x", "dw_g"), spec),
        "backward_rotation": rotation,
    }


def _quartet(forward: QuantSpec, backward: QuantSpec | None, name: str) -> DotRecipe:
    """Quartet: MXFP4 in all products; least error forward, least bias backward.

    Forward, a scale fitted to Hadamard data and gradients where `|x / s| <= 6` (`< 6` in the
    authors' code: an entry on the outermost level counts as inside here). Backward, abs-max scales
    that never clip, and the quantized operands of the forward pass once more under random signs,
    which multiply the input coordinates; the paper's first code had them on the side of the
    output, where they change nothing. The signs are fresh for each product.

    References:
      Castro et al., Quartet: Native FP4 Training Can Be Optimal for Large Language Models,
      arXiv:2505.14669.
    """
    return DotRecipe(
        y_x=forward,
        y_w=forward,
        rotation=Hadamard(32),
        estimator="clipped",
        **({} if backward is None else _backward(backward, Hadamard(32, randomized=True))),
        name=name,
    )


# The scale of QUEST_MXFP4 is the nearest power of two to the Gaussian optimum; "floor" is the
# authors' code, which rounds it down. "rtn" rounds to nearest backward, "aligned" does so with
# factor 1.009, which takes the mean shrinkage back.
MXFP4_FORWARD = _quartet(presets.QUEST_MXFP4, None, "mxfp4_forward")
QUARTET = _quartet(presets.QUEST_MXFP4, presets.MXFP4_FITTED_STOCHASTIC, "quartet")
QUARTET_RTN = _quartet(presets.QUEST_MXFP4, presets.MXFP4_FITTED, "quartet_rtn")
QUARTET_ALIGNED = _quartet(presets.QUEST_MXFP4, presets.MXFP4_FITTED_ALIGNED, "quartet_aligned")
QUARTET_FLOOR = _quartet(
    presets.QUEST_MXFP4_FLOOR, presets.MXFP4_FITTED_STOCHASTIC, "quartet_floor"
)
QUARTET_FLOOR_RTN = _quartet(presets.QUEST_MXFP4_FLOOR, presets.MXFP4_FITTED, "quartet_floor_rtn")


def _quartet2(forward: QuantSpec, backward: QuantSpec, name: str) -> DotRecipe:
    """Quartet II: NVFP4 in all products, unbiased backward by random rotation and random scales.

    No rotation forward: with blocks of 16 it raises the error of rounding to nearest (Egiazarian
    et al., arXiv:2509.23202). The scale reaches the abs-max, so that no mask is due. Backward, the
    quantized operands of the forward pass once more, rotated in blocks of 128.

    References:
      Panferov et al., Quartet II: Accurate LLM Pre-Training in NVFP4 by Improved Unbiased Gradient
      Estimation, arXiv:2601.22813.
    """
    return DotRecipe(
        y_x=forward,
        y_w=forward,
        **_backward(backward, Hadamard(128, randomized=True)),
        name=name,
    )


# "no46" leaves out the choice of four over six forward. "sr" rounds the elements stochastically,
# under the same rotation, "eden128" takes one correction factor for 128 elements instead of 16.
_FOUR_OVER_SIX = presets.NVFP4_FOUR_OVER_SIX
NVFP4_FORWARD = DotRecipe(y_x=presets.NVFP4, y_w=presets.NVFP4, name="nvfp4_forward")
QUARTET2 = _quartet2(_FOUR_OVER_SIX, presets.NVFP4_EDEN, "quartet2")
QUARTET2_NO46 = _quartet2(presets.NVFP4, presets.NVFP4_EDEN, "quartet2_no46")
QUARTET2_SR = _quartet2(_FOUR_OVER_SIX, presets.NVFP4_STOCHASTIC, "quartet2_sr")
QUARTET2_SR_NO46 = _quartet2(presets.NVFP4, presets.NVFP4_STOCHASTIC, "quartet2_sr_no46")
QUARTET2_EDEN128 = _quartet2(_FOUR_OVER_SIX, presets.NVFP4_EDEN_128, "quartet2_eden128")


def _nvfp4_nvidia(activations: QuantSpec, weights: QuantSpec, name: str) -> DotRecipe:
    """NVIDIA's NVFP4: weights in blocks of 16x16, the same forward and for `dx`.

    Gradients are rounded stochastically in both backward products. Only `dw` is rotated, in
    blocks of 16, and quantizes the original activations, to nearest. The signs are fresh for each
    step; the paper draws them once. Its layers kept in bfloat16 are a matter of rules, see
    `models.resolve_recipes`.

    References:
      NVIDIA, Pretraining Large Language Models with NVFP4, arXiv:2509.25149.
    """
    return DotRecipe(
        y_x=activations,
        y_w=weights,
        dx_g=presets.NVFP4_STOCHASTIC,
        dw_x=activations,
        dw_g=presets.NVFP4_STOCHASTIC,
        backward_rotation=Hadamard(16, randomized=True),
        requantize=False,
        rotates_dx=False,
        name=name,
    )


NVFP4_NVIDIA = _nvfp4_nvidia(presets.NVFP4, presets.NVFP4_16X16, "nvfp4_nvidia")
NVFP4_NVIDIA_46 = _nvfp4_nvidia(
    _FOUR_OVER_SIX, presets.NVFP4_16X16_FOUR_OVER_SIX, "nvfp4_nvidia_46"
)

RECIPES: dict[str, DotRecipe] = {
    value.name: value for value in list(globals().values()) if isinstance(value, DotRecipe)
}


def get_recipe(name: str) -> DotRecipe:
    """The recipe of that name in `RECIPES`, whatever the case; or one composed by product.

    After a colon, products that are computed as in other recipes: "quartet:y=bf16" quantizes only
    the backward products of Quartet, "quartet:dx=bf16,dw=bf16" only the forward one; see
    `DotRecipe.with_products`. The text is the name of the result.

    Raises:
      ValueError: If there is no such recipe, and the message lists all; if the text after the
        colon cannot be read; or for what `with_products` refuses.
    """
    base, products = split_name(name.lower())
    for part in (base, *products.values()):
        if part not in RECIPES:
            raise ValueError(f"get_recipe: no recipe {part!r}; there are {', '.join(RECIPES)}.")
    if not products:
        return RECIPES[base]
    composed = RECIPES[base].with_products(**{k: RECIPES[v] for k, v in products.items()})
    return dataclasses.replace(composed, name=join_name(base, products))


def weight_projection(recipe: DotRecipe) -> Projection:
    """`P(w)`, the weights that `recipe` computes with, in the basis of `w` and its dtype.

    For optimizers that pull weights towards the grid; the identity if weights are not quantized.

    Raises:
      ValueError: If the recipe quantizes weights at random, see `onto_grid`.
    """
    return identity if recipe.y_w is None else onto_grid(recipe.y_w, recipe.rotation)

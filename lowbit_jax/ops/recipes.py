"""What each product of a linear layer is computed in: methods as named values."""

import dataclasses

from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from lowbit_jax.numerics import Estimator, QuantSpec, midrise, presets
from lowbit_jax.rotations import Hadamard, Rotation
from lowbit_jax.sparsity import Projection, identity, onto_grid


@dataclasses.dataclass(frozen=True)
class DotRecipe:
    """How `y = x w^T` and its gradients `dx = g w`, `dw = g^T x` are quantized.

    Hashable plain data: a static argument. A field named `<product>_<operand>` is the format of
    one operand of one product; None leaves it in the compute dtype. Blocks and rotations run along
    the contraction axis of their product: `k` for y, `n` for dx, tokens for dw.

    Attributes:
      y_x: Format of `x` in the forward product.
      y_w: Format of `w` in the forward product.
      dx_g: Format of `g` in `dx`.
      dx_w: Format to which `dx` quantizes, again and along `n`, the weights that the forward
        product used; None uses those as they are.
      dw_x: The same for `x` in `dw`, along the tokens.
      dw_g: Format of `g` in `dw`.
      rotation: Basis of the forward product; both operands are rotated, whether quantized or
        not, so that the rotations cancel. Gradients are masked in this basis, then rotated back.
      backward_rotation: Basis of the two backward products, along their contraction axes.
      estimator: Which entries of `x` and `w` receive a gradient, see `fake_quantize`.
      clip_scale: Threshold of the estimator "clipped", in units of the outermost level.
      name: What it is called in tables. Recipes of other names and equal fields are equal.

    A rotation of a product neither of whose operands is quantized would cancel to rounding
    errors, and is left out.
    """

    y_x: QuantSpec | None = None
    y_w: QuantSpec | None = None
    dx_g: QuantSpec | None = None
    dx_w: QuantSpec | None = None
    dw_x: QuantSpec | None = None
    dw_g: QuantSpec | None = None
    rotation: Rotation | None = None
    backward_rotation: Rotation | None = None
    estimator: Estimator = "straight_through"
    clip_scale: float = 1.0
    name: str = dataclasses.field(default="", compare=False)

    def __post_init__(self):
        if not self.clip_scale > 0:
            raise ValueError(f"DotRecipe: clip_scale must be positive, got {self.clip_scale}.")

    @property
    def is_identity(self) -> bool:
        """Whether nothing is quantized: the plain product with its exact gradients."""
        return not any(spec is not None for spec in self._specs())

    @property
    def needs_key(self) -> bool:
        """Whether anything is random: stochastic rounding, or random signs of a rotation in use."""
        is_backward_quantized = any(spec is not None for spec in self._specs()[2:])
        rotations = (
            self.forward_rotation,
            self.backward_rotation if is_backward_quantized else None,
        )
        return any(r is not None and r.needs_key for r in rotations) or any(
            spec is not None and spec.rounding == "stochastic" for spec in self._specs()
        )

    @property
    def forward_rotation(self) -> Rotation | None:
        """`rotation` if the forward product quantizes an operand; else None, for it cancels."""
        return None if self.y_x is None and self.y_w is None else self.rotation

    def _specs(self) -> tuple[QuantSpec | None, ...]:
        return (self.y_x, self.y_w, self.dx_g, self.dx_w, self.dw_x, self.dw_g)

    def dot_general(
        self,
        lhs: Shaped[Array, "..."],
        rhs: Shaped[Array, "..."],
        dimension_numbers: tuple,
        precision=None,
        preferred_element_type=None,
        *,
        out_sharding=None,
        key: PRNGKeyArray | None = None,
        implementation: str | None = None,
    ) -> Float[Array, "..."]:
        """`jax.lax.dot_general` with `lhs` for x and `rhs` for w, for products without batch axes.

        A drop-in for `flax.linen.Dense(dot_general=recipe.dot_general)` and
        `flax.nnx.Linear(dot_general=recipe.dot_general)`. Those cast the kernel to their `dtype`
        before they call it, so that a bfloat16 layer quantizes bfloat16 weights here, whereas
        `quantized_dot` takes the float32 master weights.

        Args:
          lhs: `(*batch, k)`, or any axes; the contracted ones are moved to the end.
          rhs: `(k, n)`, or any axes, likewise.
          dimension_numbers: `((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch))`.
          precision: None; the products follow `jax.default_matmul_precision`.
          preferred_element_type: Dtype of the result; None: that of `lhs`.
          out_sharding: None.
          key: Randomness, if the recipe needs any. Layers hand over none: give them
            `functools.partial(recipe.dot_general, key=key)`, with a key that is new every step.
          implementation: See `quantized_dot`.

        Returns:
          The free axes of `lhs`, then those of `rhs`.

        Raises:
          ValueError: As `quantized_dot`.
          NotImplementedError: With batch axes, a precision or an output sharding.
        """
        # The one import against the file order: quantized_dot is a function of a recipe.
        from lowbit_jax.ops.quantized_dot import quantized_dot_general

        return quantized_dot_general(
            lhs,
            rhs,
            dimension_numbers,
            self,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
            key=key,
            implementation=implementation,
        )

    def __str__(self) -> str:
        if self.name:
            return self.name
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        parts = [f"{k}={v}" for k, v in given.items() if v is not None and k[-2:] in _OPERANDS]
        parts += [str(r) for r in (self.rotation, self.backward_rotation) if r is not None]
        return f"DotRecipe({', '.join(parts)})"


_OPERANDS = ("_x", "_w", "_g")


def _quest(bits: int, weight_only: bool = False) -> DotRecipe:
    """QuEST: Hadamard 128, Gaussian-optimal grid, gradients only where the grid reaches.

    References:
      Panferov et al., QuEST, arXiv:2502.05003. At one bit, as in its runs, the mask is the clip
      mask at 1.30 times the outermost level.
    """
    spec = presets.PRESETS[f"QUEST_INT{bits}"]
    return DotRecipe(
        y_x=None if weight_only else spec,
        y_w=spec,
        rotation=Hadamard(128),
        estimator="clipped" if bits == 1 else "trust",
        clip_scale=1.30 if bits == 1 else 1.0,
        name=f"quest_w{bits}a{16 if weight_only else bits}",
    )


def _rtn(bits: int) -> DotRecipe:
    """The baseline: abs-max mid-rise grid over the whole row, no rotation, straight through."""
    spec = QuantSpec(midrise(bits), None, "absmax")
    return DotRecipe(y_x=spec, y_w=spec, name=f"rtn_w{bits}a{bits}")


BF16 = DotRecipe(name="bf16")

# One scale a tensor in all three products: e4m3 where the values matter, e5m2 where the range does.
# Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433.
FP8_TENSORWISE = DotRecipe(
    y_x=presets.FP8_E4M3_TENSOR,
    y_w=presets.FP8_E4M3_TENSOR,
    dx_g=presets.FP8_E5M2_TENSOR,
    dw_g=presets.FP8_E5M2_TENSOR,
    name="fp8_tensorwise",
)

QUEST_W8A8, QUEST_W4A4, QUEST_W3A3, QUEST_W2A2, QUEST_W1A1 = (_quest(b) for b in (8, 4, 3, 2, 1))
QUEST_W4A16, QUEST_W3A16, QUEST_W2A16, QUEST_W1A16 = (
    _quest(b, weight_only=True) for b in (4, 3, 2, 1)
)
RTN_W8A8, RTN_W4A4, RTN_W3A3, RTN_W2A2 = (_rtn(b) for b in (8, 4, 3, 2))

# Quartet's forward pass with an exact backward: Castro et al., arXiv:2505.14669. The scale is the
# nearest power of two to the Gaussian optimum, where the authors' code rounds it down.
MXFP4_FORWARD = DotRecipe(
    y_x=presets.QUEST_MXFP4,
    y_w=presets.QUEST_MXFP4,
    rotation=Hadamard(32),
    estimator="clipped",
    name="mxfp4_forward",
)

# No rotation: with blocks of 16 it raises the error of rounding to nearest (Egiazarian et al.,
# arXiv:2509.23202). The scale reaches the abs-max, so that no mask is due.
NVFP4_FORWARD = DotRecipe(y_x=presets.NVFP4, y_w=presets.NVFP4, name="nvfp4_forward")

RECIPES: dict[str, DotRecipe] = {
    recipe.name: recipe
    for recipe in (
        BF16,
        FP8_TENSORWISE,
        QUEST_W8A8,
        QUEST_W4A4,
        QUEST_W3A3,
        QUEST_W2A2,
        QUEST_W1A1,
        QUEST_W4A16,
        QUEST_W3A16,
        QUEST_W2A16,
        QUEST_W1A16,
        RTN_W8A8,
        RTN_W4A4,
        RTN_W3A3,
        RTN_W2A2,
        MXFP4_FORWARD,
        NVFP4_FORWARD,
    )
}


def get_recipe(name: str) -> DotRecipe:
    """The recipe of that name in `RECIPES`, whatever the case of its letters.

    Raises:
      ValueError: If there is none; the message lists all.
    """
    recipe = RECIPES.get(name.lower())
    if recipe is None:
        raise ValueError(f"get_recipe: no recipe {name!r}; there are {', '.join(RECIPES)}.")
    return recipe


def weight_projection(recipe: DotRecipe) -> Projection:
    """`P(w)`, the weights that `recipe` computes with, in the basis of `w` and its dtype.

    For optimizers that pull weights towards the grid; the identity if weights are not quantized.

    Raises:
      ValueError: If the recipe quantizes weights at random, see `onto_grid`.
    """
    return identity if recipe.y_w is None else onto_grid(recipe.y_w, recipe.rotation)

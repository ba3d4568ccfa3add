"""`DotRecipe`: what each of the three products of a linear layer is computed in."""

import dataclasses
from typing import Literal

from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from lowbit_jax.numerics import Estimator, QuantSpec
from lowbit_jax.rotations import Rotation

Product = Literal["y", "dx", "dw"]
PRODUCTS: tuple[Product, ...] = ("y", "dx", "dw")


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
      dx_w: Format to which `dx` quantizes, along `n`, the weights that the forward product used;
        None uses those as they are.
      dw_x: The same for `x` in `dw`, along the tokens.
      dw_g: Format of `g` in `dw`.
      rotation: Basis of the forward product; both operands are rotated, whether quantized or
        not, so that the rotations cancel. Gradients are masked in this basis, then rotated back.
      backward_rotation: Basis of the two backward products, along their contraction axes.
      estimator: Which entries of `x` and `w` receive a gradient, see `fake_quantize`.
      clip_scale: Threshold of the estimator "clipped", in units of the outermost level.
      requantize: Whether `dx_w` and `dw_x` quantize what the forward product used, that is, for
        the second time. False: they quantize the operand as it was before (in the basis of
        `rotation`), which is then kept for the backward pass: rotated, in the compute dtype, or
        the argument itself.
      rotates_dx: Whether `backward_rotation` applies to `dx` as well; False: to `dw` alone.
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
    requantize: bool = True
    rotates_dx: bool = True
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
        """Whether anything is random: a rounding, or the signs of a rotation in use."""
        rotations = (self.rotation_of(product) for product in PRODUCTS)
        return any(r is not None and r.needs_key for r in rotations) or any(
            spec is not None and spec.needs_key for spec in self._specs()
        )

    def rotation_of(self, product: Product) -> Rotation | None:
        """The basis in which a product is taken; None if it quantizes nothing, for it cancels."""
        if product == "y":
            return self.rotation if self.y_x is not None or self.y_w is not None else None
        specs = (self.dx_g, self.dx_w) if product == "dx" else (self.dw_g, self.dw_x)
        if specs == (None, None) or (product == "dx" and not self.rotates_dx):
            return None
        return self.backward_rotation

    def formats_of(self, product: Product) -> tuple[QuantSpec | None, QuantSpec | None]:
        """Formats of the operands as they enter a product: (x, w) of y, (g, w) of dx, (g, x) of dw.

        What a backward product takes from the forward one without quantizing it again keeps its
        format there, unless it is rotated, which takes it off the grid.
        """
        if product == "y":
            return self.y_x, self.y_w
        if product == "dx":
            g, again, forward = self.dx_g, self.dx_w, self.y_w
        else:
            g, again, forward = self.dw_g, self.dw_x, self.y_x
        is_kept = again is None and self.rotation_of(product) is None
        return g, forward if is_kept else again

    def with_products(
        self,
        *,
        y: "DotRecipe | None" = None,
        dx: "DotRecipe | None" = None,
        dw: "DotRecipe | None" = None,
    ) -> "DotRecipe":
        """This recipe with single products computed as in other recipes.

        `quartet.with_products(y=BF16)` quantizes only the backward products of Quartet,
        `quartet.with_products(dx=BF16, dw=BF16)` only the forward one. `get_recipe` reads the same
        from a text: "quartet:dx=bf16,dw=bf16", which is also the name of the result.

        Args:
          y: Gives the formats of the forward product, rotation, estimator and `clip_scale`.
          dx: Gives the formats of `dx`, its rotation, and what `dx_w` quantizes (`requantize`).
          dw: The same for `dw`.

        Returns:
          The recipe; what no product uses is at its default.

        Raises:
          ValueError: If `dx` and `dw` would be rotated differently, but for `dx` not at all, or
            one would quantize its operand again and the other the original: no recipe says that.
        """
        forward, of_dx, of_dw = y or self, dx or self, dw or self
        rotations = [of_dx.rotation_of("dx"), of_dw.rotation_of("dw")]
        is_dx_quantized = of_dx.dx_g is not None or of_dx.dx_w is not None
        is_dw_quantized = of_dw.dw_g is not None or of_dw.dw_x is not None
        rotates_dx = not (is_dx_quantized and is_dw_quantized) or rotations[0] == rotations[1]
        if not rotates_dx and rotations[0] is not None:
            raise ValueError(
                "with_products: dx and dw must have one rotation, or dw alone, got"
                f" {rotations[0]} of {of_dx} for dx and {rotations[1]} of {of_dw} for dw; use"
                " dataclasses.replace on one of them for the same backward_rotation."
            )
        requantize = {
            source.requantize
            for source, again in ((of_dx, of_dx.dx_w), (of_dw, of_dw.dw_x))
            if again is not None
        }
        if len(requantize) > 1:
            raise ValueError(
                "with_products: dx and dw must both quantize what the forward product used or both"
                f" the original, got requantize={of_dx.requantize} of {of_dx} for dx and"
                f" {of_dw.requantize} of {of_dw} for dw; use dataclasses.replace on one of them."
            )
        replaced = {"y": y, "dx": dx, "dw": dw}
        return DotRecipe(
            y_x=forward.y_x,
            y_w=forward.y_w,
            dx_g=of_dx.dx_g,
            dx_w=of_dx.dx_w,
            dw_x=of_dw.dw_x,
            dw_g=of_dw.dw_g,
            rotation=forward.rotation_of("y"),
            backward_rotation=rotations[1] if rotations[0] is None else rotations[0],
            estimator=forward.estimator,
            clip_scale=forward.clip_scale,
            requantize=requantize.pop() if requantize else True,
            rotates_dx=rotates_dx,
            name=_name_of_products(self, {k: r for k, r in replaced.items() if r is not None}),
        )

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


def split_name(name: str) -> tuple[str, dict[str, str]]:
    """The name of a recipe and of those that replace products: "a:y=b" gives `("a", {"y": "b"})`.

    Raises:
      ValueError: If the part after the colon is not of the form `product=name,...`, with each of
        y, dx and dw once at most.
    """
    base, colon, rest = name.partition(":")
    pairs = [part.partition("=")[::2] for part in rest.split(",")] if colon else []
    products = {product.strip(): other.strip() for product, other in pairs}
    is_known = set(products) <= set(PRODUCTS) and all(products.values())
    if not is_known or len(products) < len(pairs):
        raise ValueError(
            "get_recipe: after the colon of a name come products and recipes as in"
            f" 'quartet:dx=bf16,dw=bf16', each of {', '.join(PRODUCTS)} once at most, got {name!r}."
        )
    return base.strip(), products


def join_name(base: str, products: dict[str, str]) -> str:
    """The inverse of `split_name`, products in their order."""
    parts = [f"{product}={products[product]}" for product in PRODUCTS if product in products]
    return f"{base}:{','.join(parts)}" if parts else base


def _name_of_products(recipe: DotRecipe, replaced: dict[str, DotRecipe]) -> str:
    """The name under which `get_recipe` finds the composed recipe; none if it could not."""
    names = {product: other.name for product, other in replaced.items()}
    if not recipe.name or not all(names.values()) or any(":" in name for name in names.values()):
        return ""
    base, products = split_name(recipe.name)
    return join_name(base, products | names)

"""What the products of one call have in common: which path each takes, and its randomness."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray, UInt32

from lowbit_jax.numerics import QuantSpec
from lowbit_jax.numerics.estimators import mask_bound
from lowbit_jax.ops import dispatch
from lowbit_jax.ops.dispatch import Plan
from lowbit_jax.ops.dot_recipe import DotRecipe, Product
from lowbit_jax.rotations import Hadamard
from pallas_kernels.partition import Partition
from pallas_kernels.rotate_quantize import Target
from pallas_kernels.scaled_matmul.epilogue import HADAMARD_BLOCKS


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of a call: one x, one recipe, and one weight or several.

    Attributes:
      recipe: What to quantize to.
      implementation: A path for all products; None: chosen for each.
      x_dtype: In which products are computed: that of `x`, but where x is made to be quantized.
      out_dtype: Of `y`.
      shape: Tokens, n and k, which choose the path.
      weights: Of each: dtype, that of its master if it came quantized, and whether it did.
      places: Of each, those of a `QuantizedWeight`.
      partition: How tokens are cut over devices on which kernels are to run; None: one device.
      partition_obstacle: Why they do not run on several, see `dispatch.partition_obstacle`.
    """

    recipe: DotRecipe
    implementation: str | None
    x_dtype: np.dtype
    out_dtype: np.dtype
    shape: tuple[int, int, int]
    weights: tuple[tuple[np.dtype, bool], ...]
    places: tuple[Any, ...] = (None,)
    partition: Partition | None = None
    partition_obstacle: str | None = None

    def plan(self, product: Product) -> Plan:
        """The path of a product."""
        recipe = self.recipe
        again = {"y": recipe.y_w, "dx": recipe.dx_w, "dw": recipe.dw_x}[product]
        return dispatch.choose(
            product,
            *recipe.formats_of(product),
            self.implementation,
            dispatch.cuda_capability(),
            rotation=recipe.rotation_of(product),
            is_kept=again is None,
            dtypes=(self.x_dtype, self.out_dtype) if product == "y" else (self.x_dtype,),
            shape=self.part_shape,
            partition_obstacle=self.partition_obstacle,
        )

    @property
    def part_shape(self) -> tuple[int, int, int]:
        """Tokens of a device, n and k."""
        tokens, n, k = self.shape
        return tokens if self.partition is None else tokens // self.partition.count, n, k

    @property
    def inverse_hadamard(self) -> int | None:
        """Block size of the rotation of y, if our kernel can undo it after a backward product."""
        rotation = self.recipe.rotation_of("y")
        if not isinstance(rotation, Hadamard) or rotation.needs_key:
            return None
        return rotation.block_size if rotation.block_size in HADAMARD_BLOCKS else None

    def target(self, product: Product, spec: QuantSpec | None) -> Target | None:
        """What the kernel is to make for a product; None if the operand is made without it."""
        path = self.plan(product).path
        if spec is None or path not in ("hopper", "fp8", "hopper_bf16"):
            return None
        rotation = self.recipe.rotation_of(product)
        if path == "fp8" and dispatch.quantizer_obstacle(
            spec,
            rotation,
            dispatch.cuda_capability(),
            self.x_dtype,
            self.part_shape,
            self.partition_obstacle,
        ):
            return None
        if path == "hopper_bf16" and (
            dispatch.nvfp4_obstacle(spec, rotation, (self.x_dtype,))
            or mask_bound(spec, self.recipe.estimator, self.recipe.clip_scale) is not None
        ):  # which has no mask
            return None
        assert rotation is None or isinstance(rotation, Hadamard)  # as all demand
        return Target(spec, rotation)

    def uses_kernel(self, product: Product) -> bool:
        """Whether our kernel computes a product."""
        return self.plan(product).path == "hopper"

    def takes_codes(self, product: Product) -> bool:
        """Whether the operands of a product are `QTensor`s."""
        return self.plan(product).path == "blackwell"


class ProductKeys(NamedTuple):
    """Randomness of a product, None where nothing is random."""

    rotation: PRNGKeyArray | UInt32[Array, "2"] | None
    first: PRNGKeyArray | UInt32[Array, "2"] | None
    second: PRNGKeyArray | UInt32[Array, "2"] | None


def split_keys(key, index: int = 0) -> dict[Product, ProductKeys]:
    """Independent keys for the rotation of each product and for its two operands.

    Those of several weights differ by `index`, but for what concerns the one x.
    """
    if key is None:
        return dict.fromkeys(("y", "dx", "dw"), ProductKeys(None, None, None))
    y, dx, dw = (ProductKeys(*three) for three in jax.random.split(key, (3, 3)))
    if index:

        def own(key):
            return jax.random.fold_in(key, index)

        y = y._replace(second=own(y.second))
        dx = ProductKeys(own(dx.rotation), own(dx.first), own(dx.second))
        dw = dw._replace(first=own(dw.first))
    return {"y": y, "dx": dx, "dw": dw}


def check_contraction(product: Product, size: int, recipe: DotRecipe) -> None:
    """Blocks of formats and rotation must divide the contraction axis of the product."""
    axis = {"y": "k, the last axis of x and w", "dx": "n, the rows of w", "dw": "all tokens of x"}
    new = {
        "y": (recipe.y_x, recipe.y_w),
        "dx": (recipe.dx_g, recipe.dx_w),
        "dw": (recipe.dw_g, recipe.dw_x),
    }
    rotation = recipe.rotation_of(product)
    blocks = {str(spec): spec.block_size for spec in new[product] if spec is not None}
    blocks[str(rotation)] = getattr(rotation, "block_size", None)
    for what, block_size in blocks.items():
        if isinstance(block_size, int) and size % block_size:
            raise ValueError(
                f"quantized_dot: the product {product!r} sums over {axis[product]}, whose size must"
                f" be a multiple of {block_size} for {what}, got {size}; pad it, or use"
                " dataclasses.replace on the recipe for a smaller block."
            )

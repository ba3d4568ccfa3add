"""Named ways to quantize a model: a solver, a format, and the basis in which it rounds.

    rtn       nearest levels                                with `rotation`: RTN + Hadamard
    gptq      GPTQ, in the order of activations             with `rotation`: of rotated weights
    mr_gptq   GPTQ in blocks of the format's Hadamard, searched scales
    wush      GPTQ in the basis of WUSH;  wush_rtn: nearest levels there

The quantized weights stand for weights in the original basis, `weight` of the compression: a model
with these multiplies as one that rotates its inputs and multiplies by the codes does, but for
rounding. Activations are quantized where the product takes them: rotated.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lowbit_jax.models import llama_rules
from lowbit_jax.models.linear import RecipeRules
from lowbit_jax.numerics import QTensor, QuantSpec, dequantize
from lowbit_jax.ops.dot_recipe import DotRecipe
from lowbit_jax.ptq.calibrate import CompressedBlock, Compression
from lowbit_jax.ptq.gptq import gptq
from lowbit_jax.ptq.grids import Search
from lowbit_jax.ptq.hessian import Hessian
from lowbit_jax.ptq.microscaled import default_rotation, mr_gptq, rotate_hessian
from lowbit_jax.ptq.rtn import rtn
from lowbit_jax.ptq.wush import wush_quantize
from lowbit_jax.rotations import Hadamard

Solver = Literal["rtn", "gptq", "mr_gptq", "wush", "wush_rtn"]


@dataclasses.dataclass(frozen=True)
class Method:
    """How the seven matrices of each block are quantized.

    Attributes:
      solver: See the head of this file.
      spec: Of the weights.
      activations: Of the inputs of the products; None: not quantized.
      rotation: Block of a Hadamard transform along k before the solver; None: none, and of mr_gptq
        that of the format.
      search: Of scales, see `grids.find_grid`; None: that of the format, of mr_gptq its own.
      damping: Of the Hessian, see `gptq`.

    Raises:
      ValueError: If there is no such solver, or what it cannot have was given.
    """

    solver: str
    spec: QuantSpec
    activations: QuantSpec | None = None
    rotation: int | None = None
    search: Search | None = None
    damping: float = 0.01

    def __post_init__(self):
        if self.solver not in get_args(Solver):
            raise ValueError(
                f"Method: solver must be one of {', '.join(get_args(Solver))}, got {self.solver!r}."
            )
        is_wush = self.solver.startswith("wush")
        if is_wush and (self.rotation is not None or self.activations is not None):
            raise ValueError(
                "Method: wush brings a transform of its own for each matrix, which a model does not"
                f" apply to quantized activations, got rotation={self.rotation} and"
                f" activations={self.activations}; leave both None."
            )
        for spec in (self.spec, self.activations):
            if spec is not None and spec.needs_key:
                raise ValueError(f"Method: formats must round to nearest, got {spec}.")

    @property
    def hadamard(self) -> Hadamard | None:
        """The rotation before the solver."""
        if self.rotation is not None:
            return Hadamard(self.rotation)
        return default_rotation(self.spec) if self.solver == "mr_gptq" else None


def compression_of(method: Method) -> Compression:
    """What `compress_blocks` needs; kept is a `QTensor`, of WUSH that and the transform."""
    rotation = method.hadamard
    search: Search = method.search or "rule"
    damping: dict[str, Any] = {"damping": method.damping}

    def solve(path: str, w: jax.Array, hessian: Hessian) -> tuple[PyTree, Any]:
        del path
        matrix, spec = hessian.matrix, method.spec
        if method.solver in ("wush", "wush_rtn"):
            inner, options = ("rtn", {}) if method.solver == "wush_rtn" else ("gptq", damping)
            q, info = wush_quantize(w, matrix, spec, solver=inner, search=search, **options)
            return (q, info.transform), info
        if method.solver == "mr_gptq":
            return mr_gptq(w, matrix, spec, rotation=rotation, search=method.search, **damping)
        if rotation is not None:
            w, matrix = rotation.apply(w), rotate_hessian(matrix, rotation)
        if method.solver == "rtn":
            return rtn(w, matrix, spec, search=search)
        return gptq(w, matrix, spec, search=search, **damping)

    def weight(path: str, kept: PyTree) -> jax.Array:
        del path
        q, transform = kept if isinstance(kept, tuple) else (kept, None)
        values = dequantize(jax.tree.map(jnp.asarray, q))
        if transform is not None:
            return transform.inverse_of_weights(values)
        return values if rotation is None else rotation.inverse(values)

    return Compression(solve, weight)


def activation_rules(method: Method) -> RecipeRules:
    """Recipes that quantize the inputs of the seven matrices, rotated as their weights are."""
    if method.activations is None:
        return ()
    return llama_rules(DotRecipe(y_x=method.activations, rotation=method.hadamard))


def quantized_params(
    params: PyTree, blocks: Iterable[CompressedBlock], compression: Compression
) -> PyTree:
    """The parameters with every matrix as its quantized weights say, in the original basis.

    Args:
      params: Stacked over layers.
      blocks: All of them, in order.
      compression: That made them.

    Returns:
      The same tree; matrices are NumPy arrays in the dtype that they had.
    """
    layers = {part: dict(value) for part, value in params["layers"].items()}
    blocks = list(blocks)
    for path in blocks[0].kept:
        part, name = path.split("/")
        old = layers[part][name]["weight"]
        new = np.empty(old.shape, old.dtype)
        for index, block in enumerate(blocks):
            new[index] = compression.weight(path, block.kept[path])
        layers[part][name] = {**layers[part][name], "weight": new}
    return {**params, "layers": layers}


def bits_per_weight(blocks: Iterable[CompressedBlock]) -> float:
    """Bits a weight of all matrices as they are kept: codes, scales and transforms.

    Packed codes of `QTensor.nbytes`; a transform as its array is stored.
    """
    bits = count = 0
    for block in blocks:
        for kept in block.kept.values():
            q, transform = kept if isinstance(kept, tuple) else (kept, None)
            assert isinstance(q, QTensor)
            bits += 8 * q.nbytes
            bits += 0 if transform is None else 8 * transform.matrices.nbytes
            count += int(np.prod(q.shape))
    return bits / count

"""Named ways to quantize a model: a solver, a format, and the basis in which it rounds.

    rtn       nearest levels                                with `rotation`: RTN + Hadamard
    gptq      GPTQ, in the order of activations             with `rotation`: of rotated weights
    mr_gptq   GPTQ in blocks of the format's Hadamard, searched scales
    wush      GPTQ in the basis of WUSH;  wush_rtn: nearest levels there

    model, params = quantized_model(model, params, blocks, method)

multiplies by the codes: inputs are transformed while the model runs, and rounded, transformed, if
the method has a format for them (W4A4; W4A16 without). `quantized_params` gives float weights in
the original basis instead, which multiply alike but for rounding, for whoever reads no codes.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lowbit_jax.models import Llama, LlamaConfig, llama_rules
from lowbit_jax.models.linear import RecipeRules
from lowbit_jax.numerics import QTensor, QuantSpec
from lowbit_jax.numerics.scales import calibrated_global_scale
from lowbit_jax.ops.coded_weight import CodedWeight, has_global_scale, map_coded
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
      activations: Of the inputs of the products, in the basis of the weights; None: not quantized.
      rotation: Block of a Hadamard transform along k before the solver; None: none, and of mr_gptq
        that of the format.
      search: Of scales, see `grids.find_grid`; None: that of the format, of mr_gptq its own.
      damping: Of the Hessian, see `gptq`.
      transform_dtype: Of the transforms of WUSH as they are kept, float32 or bfloat16, of half the
        size: see `wush`.

    Raises:
      ValueError: If there is no such solver, or what it cannot have was given.
    """

    solver: str
    spec: QuantSpec
    activations: QuantSpec | None = None
    rotation: int | None = None
    search: Search | None = None
    damping: float = 0.01
    transform_dtype: str = "float32"

    def __post_init__(self):
        if self.solver not in get_args(Solver):
            raise ValueError(
                f"Method: solver must be one of {', '.join(get_args(Solver))}, got {self.solver!r}."
            )
        if self.is_wush and self.rotation is not None:
            raise ValueError(
                "Method: wush brings a transform of its own for each matrix, got"
                f" rotation={self.rotation}; leave it None."
            )
        for spec in (self.spec, self.activations):
            if spec is not None and spec.needs_key:
                raise ValueError(f"Method: formats must round to nearest, got {spec}.")
        if self.transform_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"Method: transform_dtype must be float32 or bfloat16, got {self.transform_dtype}."
            )
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"Method: damping must be 0 or positive, got {self.damping}.")

    @property
    def is_wush(self) -> bool:
        """Whether each matrix has a transform of its own."""
        return self.solver in ("wush", "wush_rtn")

    @property
    def hadamard(self) -> Hadamard | None:
        """The rotation before the solver."""
        if self.rotation is not None:
            return Hadamard(self.rotation)
        return default_rotation(self.spec) if self.solver == "mr_gptq" else None


def check_widths(config: LlamaConfig, **parts: Any) -> None:
    """That blocks along the inputs divide the widths of the seven matrices.

    Args:
      config: Of the model.
      **parts: By what they are of: formats, rotations and patterns, or None.

    Raises:
      ValueError: If not, before anything is calibrated.
    """
    widths = sorted({config.d_model, config.n_heads * config.head_dim, config.mlp_width})
    for name, part in parts.items():
        size = getattr(part, "block_size", getattr(part, "m", None))
        wrong = [k for k in widths if isinstance(size, int) and k % size]
        if wrong:
            common = math.gcd(*widths)
            raise ValueError(
                f"check_widths: blocks of {size} ({name}: {part}) must divide the widths of all"
                f" inputs, got {', '.join(map(str, wrong))}; powers of two up to"
                f" {common & -common} do: see --block-size, --rotation and --pattern."
            )


def compression_of(method: Method) -> Compression:
    """What `compress_blocks` needs; kept is a `QTensor`, of WUSH that and the transform.

    Inputs are measured in the basis of the rotation; of WUSH as they are. A block that was
    compressed multiplies by float weights in the original basis, under the recipes
    of `calibration_model`; of WUSH with quantized activations by the codes, with its transforms.
    """
    rotation = method.hadamard
    search: Search = method.search or "rule"
    damping: dict[str, Any] = {"damping": method.damping}

    def solve(path: str, w: jax.Array, hessian: Hessian) -> tuple[PyTree, Any]:
        del path
        matrix, spec = hessian.matrix, method.spec
        if method.is_wush:
            inner, options = ("rtn", {}) if method.solver == "wush_rtn" else ("gptq", damping)
            options = {**options, "search": search, "dtype": method.transform_dtype}
            q, info = wush_quantize(w, matrix, spec, solver=inner, **options)
            return (q, info.transform), info
        if method.solver == "mr_gptq":
            return mr_gptq(w, matrix, spec, rotation=rotation, search=method.search, **damping)
        if rotation is not None:
            w, matrix = rotation.apply(w), rotate_hessian(matrix, rotation)
        if method.solver == "rtn":
            return rtn(w, matrix, spec, search=search)
        return gptq(w, matrix, spec, search=search, **damping)

    def weight(path: str, kept: PyTree) -> jax.Array | CodedWeight:
        del path
        coded = jax.tree.map(jnp.asarray, coded_weight(kept, method))
        return coded if method.is_wush and method.activations is not None else coded.dequantized()

    return Compression(solve, weight, transform_inputs=None if rotation is None else rotation.apply)


def coded_weight(kept: PyTree, method: Method, input_absmax: float | None = None) -> CodedWeight:
    """The weight that a model multiplies by, of what was kept of a matrix.

    Inputs in a format with a global scale get that of `input_absmax`, in the basis of the codes.
    """
    q, transform = kept if isinstance(kept, tuple) else (kept, None)
    scale, inputs = None, method.activations
    if input_absmax is not None and inputs is not None and has_global_scale(inputs):
        scale = calibrated_global_scale(input_absmax, inputs)
    return CodedWeight(q, transform, method.hadamard, inputs, scale)


def activation_rules(method: Method) -> RecipeRules:
    """Recipes that quantize the inputs of the seven matrices, rotated as their weights are.

    For float weights. None of WUSH, whose transforms are in no recipe but in the codes.
    """
    if method.activations is None or method.is_wush:
        return ()
    return llama_rules(DotRecipe(y_x=method.activations, rotation=method.hadamard))


def calibration_model(model: Llama, method: Method) -> Llama:
    """The model that `compress_blocks` is to run.

    It has the recipes of `activation_rules`: the inputs that a matrix is solved for come from
    quantized products, those before it in its own block included. Of WUSH those before it in its
    own block take inputs as they are, for their transforms are not known yet; blocks that were
    compressed round theirs in the basis of their transforms.

    References:
      Egiazarian et al., arXiv:2509.23202: Hessians of inputs that are rotated, not quantized, under
      active quantizers of activations.
    """
    return Llama(dataclasses.replace(model.config, recipe_rules=activation_rules(method)))


def quantized_model(
    model: Llama, params: Mapping[str, Any], blocks: Iterable[CompressedBlock], method: Method
) -> tuple[Llama, dict[str, Any]]:
    """The model and its parameters with a `CodedWeight` for every matrix.

    Nothing is decoded: what is new are codes, scales and transforms, on the host. Inputs in NVFP4
    get the global scale of the calibration, as servers do it; of WUSH, in whose basis none were
    seen, that of each batch. Models of equal methods have parameters of one tree structure, so that
    a function compiled for one serves all.

    Args:
      model: As it was trained or calibrated.
      params: Its parameters, stacked over layers.
      blocks: All of them, in order.
      method: That made them.

    Returns:
      The model without recipes, for the codes say how inputs are rounded; the parameters, codes
      stacked over layers as NumPy arrays, the rest as it was.

    Raises:
      ValueError: If there are not as many blocks as layers.
    """
    blocks = list(blocks)
    if len(blocks) != model.config.n_layers:
        raise ValueError(
            f"quantized_model: needs a block for each of {model.config.n_layers} layers, got"
            f" {len(blocks)}; pass all that compress_blocks yields."
        )
    layers = {part: dict(value) for part, value in params["layers"].items()}
    for path in blocks[0].kept:
        part, name = path.split("/")
        coded = [
            coded_weight(
                block.kept[path],
                method,
                None if method.is_wush else block.input_absmax.get(path),
            )
            for block in blocks
        ]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *coded)
        layers[part][name] = {**layers[part][name], "weight": stacked}
    plain = Llama(dataclasses.replace(model.config, recipe_rules=()))
    return plain, {**params, "layers": layers}


def with_activations(params: PyTree, activations: QuantSpec | None) -> PyTree:
    """The parameters with another format of inputs, None for none; codes and transforms stay.

    A global scale of inputs stays if the format is the same.

    Raises:
      ValueError: If there is no `CodedWeight`, or the format rounds at random.
    """

    def changed(w: CodedWeight) -> CodedWeight:
        scale = w.input_global_scale if activations == w.activations else None
        return dataclasses.replace(w, activations=activations, input_global_scale=scale)

    return map_coded(changed, params)


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
            weight = compression.weight(path, block.kept[path])
            new[index] = weight.dequantized() if isinstance(weight, CodedWeight) else weight
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

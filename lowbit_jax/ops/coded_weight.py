"""A weight of codes for inference: `y = Q(T x) C^T`, C the codes with their scales.

What a solver of `lowbit_jax.ptq` leaves of a matrix takes its place in a model: 4-bit weights stay
4 bits wide, in the basis in which they were rounded, and inputs are brought into that basis while
the model runs. Not differentiable: nothing here is trained.

References:
  Egiazarian et al., arXiv:2509.23202, section 4: block Hadamard transforms of inputs.
  WUSH, arXiv:2512.00956: a transform of its own for each block of each matrix.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped

from lowbit_jax.numerics import QTensor, QuantSpec, dequantize
from lowbit_jax.numerics.spec import E4M3_RULES
from lowbit_jax.rotations import Rotation
from pallas_kernels.mixed_matmul import PackedWeight, prepack, unpack
from pallas_kernels.mixed_matmul.layout import TILE


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["quantized", "transform", "input_global_scale"],
    meta_fields=["rotation", "activations"],
)
@dataclasses.dataclass(frozen=True)
class CodedWeight:
    """A matrix `(n, k)` as codes, a pytree; or several, stacked on leading axes of all its arrays.

    `coded_dot` multiplies by it, and `QuantizedLinear` takes it in place of its float weight. The
    arrays are not checked, for a pytree may hold anything.

    Attributes:
      quantized: The weights in the basis of the transform: a `QTensor`, or a `PackedWeight`, the
        same codes in the order of the kernel, see `packed`.
      transform: A `BlockTransform` of inputs, arrays; None: none.
      rotation: Of inputs, static and without random signs; None: none.
      activations: Format to which inputs are rounded, transformed; None: not rounded.
      input_global_scale: Of inputs in a format with E4M3 scales, as a calibration found it, `()` a
        matrix: no output then depends on the other rows of x. Larger inputs saturate. None: from
        the abs-max of all of x, so that outputs depend on what shares a batch with them.

    Raises:
      ValueError: If both transforms are given, anything needs a random key, or there is a global
        scale for inputs that have none.
    """

    quantized: Any
    transform: Any = None
    rotation: Rotation | None = None
    activations: QuantSpec | None = None
    input_global_scale: Any = None

    def __post_init__(self):
        if self.transform is not None and self.rotation is not None:
            raise ValueError(
                "CodedWeight: inputs have one transform, got both transform and"
                f" rotation={self.rotation}; leave one None."
            )
        for part in (self.rotation, self.activations):
            if part is not None and part.needs_key:
                raise ValueError(
                    f"CodedWeight: nothing random is repeated for every input, got {part}; take"
                    " Hadamard without signs, and formats that round to nearest."
                )
        if self.input_global_scale is not None and not has_global_scale(self.activations):
            raise ValueError(
                "CodedWeight: input_global_scale is for activations with E4M3 scales, got it for"
                f" {self.activations}; leave it None."
            )

    @property
    def spec(self) -> QuantSpec:
        """Format of the weights."""
        return self.quantized.spec

    @property
    def is_packed(self) -> bool:
        """Whether the codes lie in the order of the kernel."""
        return isinstance(self.quantized, PackedWeight)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(*layers, n, k)`."""
        if not self.is_packed:
            return self.quantized.shape
        *layers, n_tiles, k_tiles, _ = self.quantized.words.shape
        return *layers, n_tiles * TILE, k_tiles * TILE

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: codes, scales and transform."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def apply(self, x: Shaped[Array, "..."]) -> Float[Array, "..."]:
        """`T x` of `(*batch, k)` for one matrix, float32; x itself where there is no transform."""
        if self.transform is not None:
            return self.transform.apply(x)
        return x if self.rotation is None else self.rotation.apply(x)

    def codes(self) -> QTensor:
        """The weights as a `QTensor`, bit for bit the one that was packed."""
        if not self.is_packed:
            return jax.tree.map(jnp.asarray, self.quantized)
        return self._of_matrices(lambda w: unpack(w.quantized), one_by_one=True)

    def dequantized(self) -> Float[Array, "..."]:
        """W, `(*layers, n, k)` float32, in the original basis: `x W^T` is y, but for rounding.

        What a model would multiply by if it knew no codes; the activations are not rounded in it.
        """

        def of_matrix(w: CodedWeight):
            values = dequantize(w.codes())
            if w.transform is not None:
                return w.transform.inverse_of_weights(values)
            return values if w.rotation is None else w.rotation.inverse(values)

        return self._of_matrices(of_matrix)

    def packed(self) -> "CodedWeight":
        """The same weights in the order in which `mixed_matmul` reads them, of the same size.

        Raises:
          NotImplementedError: If the kernel does not cover spec or shape, see `prepack`.
        """
        if self.is_packed:
            return self
        words = self._of_matrices(lambda w: prepack(w.quantized), one_by_one=True)
        return dataclasses.replace(self, quantized=words)

    def _of_matrices(self, of_matrix, *, one_by_one=False):
        """The results for the matrices of a stack, stacked; `one_by_one` in the memory of one."""
        for _ in self.shape[:-2]:
            one = of_matrix
            of_matrix = functools.partial(jax.lax.map, one) if one_by_one else jax.vmap(one)
        return of_matrix(jax.tree.map(jnp.asarray, self))


def has_global_scale(activations: QuantSpec | None) -> bool:
    """Whether inputs in this format have a global scale that a calibration can find."""
    return activations is not None and activations.scale in E4M3_RULES


def map_coded(fn, params: PyTree) -> PyTree:
    """The tree with `fn(w)` in place of each `CodedWeight`, whatever else it holds as it is.

    Raises:
      ValueError: If there is none.
    """

    def is_coded(leaf):
        return isinstance(leaf, CodedWeight)

    leaves, treedef = jax.tree.flatten(params, is_leaf=is_coded)
    if not any(map(is_coded, leaves)):
        raise ValueError(
            "map_coded: the tree must hold a CodedWeight, got none; quantize the model first."
        )
    return treedef.unflatten([fn(leaf) if is_coded(leaf) else leaf for leaf in leaves])


def pack_weights(params: PyTree) -> PyTree:
    """The parameters with all codes in the order of the kernel, for generation: see `packed`.

    Matrix by matrix: beside `params` and the result one byte for each entry of one matrix, as
    compiled for a CPU. Products that the kernel does not compute unpack the codes.
    """
    return map_coded(jax.jit(CodedWeight.packed), params)

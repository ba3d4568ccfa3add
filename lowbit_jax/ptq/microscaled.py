"""MR-GPTQ: GPTQ of Hadamard-rotated weights for MXFP4 and NVFP4.

Egiazarian et al., Bridging the Gap Between Promise and Performance for Microscaling FP4
Quantization, arXiv:2509.23202, section 4. With H_b the normalised Hadamard matrix, block-diagonal,
`x w^T = (x H_b) (w H_b)^T`: weights are rotated once, inputs while the model runs. GPTQ then works
on `w H_b` with the Hessian of `x H_b`, with scales searched among those that the format can store,
in the order of activations; groups keep their place ("static activation reordering").

Rotation helps MXFP4, whose blocks of 32 under a power of two suffer from outliers, and hurts plain
rounding to NVFP4, whose blocks of 16 already isolate them.

Where we differ: the paper alternates tensor and block scales, its published code takes the abs-max
for the one and an unrounded search for the other. Here every candidate is one that can be stored.
"""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from lowbit_jax.numerics import QTensor, QuantSpec
from lowbit_jax.numerics.spec import E4M3_RULES
from lowbit_jax.ptq.gptq import Order, gptq
from lowbit_jax.ptq.grids import Search
from lowbit_jax.ptq.info import Info
from lowbit_jax.rotations import Hadamard, Rotation


def mr_gptq(
    w: Float[ArrayLike, "n k"],
    matrix: Float[ArrayLike, "k k"],
    spec: QuantSpec,
    *,
    rotation: Rotation | None = None,
    order: Order = "activation",
    damping: float | Float[Array, ""] = 0.01,
    search: Search | None = None,
    columns_per_block: int = 128,
) -> tuple[QTensor, Info]:
    """GPTQ of `w R` under the Hessian of `x R`, with searched scales.

    Args:
      w: `(n, k)` weights, (out, in), not rotated. Layers that read the same inputs and must share a
        global scale (queries, keys, values; gate and up) are stacked along n and cut afterwards.
      matrix: `(k, k)`, the Hessian of the inputs as they are, not rotated.
      spec: Target, with an integer block size; made for MXFP4, MXFP4_FITTED and NVFP4.
      rotation: R, orthogonal along k and without random signs; None: `Hadamard` in blocks of the
        spec. `Hadamard(128)` is often as good for MXFP4.
      order: See `gptq`.
      damping: See `gptq`.
      search: See `find_grid`; None: "alternating" for the E4M3 rules, else "mse".
      columns_per_block: See `gptq`.

    Returns:
      The quantized weights *in the rotated basis*: the layer computes
      `rotation.apply(x) @ dequantize(q).T`. And the `Info` of `gptq`.

    Raises:
      ValueError: As `gptq`; if the rotation needs a key or does not go with k.
    """
    rotation = default_rotation(spec) if rotation is None else rotation
    if rotation.needs_key:
        raise ValueError(
            f"mr_gptq: what multiplies the weights now must multiply every input later, got"
            f" {rotation}, which draws signs; use Hadamard({getattr(rotation, 'block_size', 32)})."
        )
    if search is None:
        search = "alternating" if spec.scale in E4M3_RULES else "mse"
    return gptq(
        rotation.apply(jnp.asarray(w)),
        rotate_hessian(matrix, rotation),
        spec,
        order=order,
        damping=damping,
        search=search,
        columns_per_block=columns_per_block,
    )


def default_rotation(spec: QuantSpec) -> Hadamard:
    """`Hadamard` in the blocks of the scales: 32 for MXFP4, 16 for NVFP4.

    Raises:
      ValueError: If the blocks of the spec are no power of two.
    """
    size = spec.block_size
    if not isinstance(size, int) or size < 2 or size & (size - 1):
        raise ValueError(
            "mr_gptq: the default rotation takes its blocks from the spec, a power of two from 2"
            f" on, got block_size={size!r}; pass a rotation (--rotation 32), or take gptq."
        )
    return Hadamard(size)


def rotate_hessian(matrix: Float[ArrayLike, "k k"], rotation: Rotation) -> Float[Array, "k k"]:
    """`R^T H R`, the Hessian of `x R`, float32: rotating every input would give the same mean."""
    rotated = rotation.apply(rotation.apply(jnp.asarray(matrix)).T)
    return (rotated + rotated.T) / 2

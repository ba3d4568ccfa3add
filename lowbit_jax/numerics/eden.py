"""MS-EDEN: elements to nearest, and the E4M3 scales of their blocks to values that are unbiased.

Panferov et al., Quartet II: Accurate LLM Pre-Training in NVFP4 by Improved Unbiased
Gradient Estimation, arXiv:2601.22813. With z a block in units of its scale a, q its nearest levels
and C a correction block,

    rho = sum_C z**2 / sum_C z * q,    a* = stochastic(rho * a),    x ~ q * a* * global_scale.

Under a random rotation q points along z on average, and rho restores the length of its projection:
`<z, rho * q> = <z, z>` holds in every correction block, and `E[a*] = rho * a`. All randomness is
in the rotation, which must be fresh (`Hadamard(randomized=True)`), and in one uniform a block. The
squared error stays near that of rounding to nearest, 2.5 times less than that of stochastic
rounding. In finite dimension the mean is off: its projection on x by 1e-4 and less with C the block
of 16, by 1e-3 with C = 128, which is what the paper's emulation has; across x, where rotated
entries take few values (x of two entries, 1 and -.7), by 1 %.

Where we differ: C is the block of 16 by default, as in the paper's CUDA kernels. The largest scale
is 256, not 255.99. Scales below E4M3's smallest normal number are rounded stochastically too, which
the kernels round to nearest; a block whose scale rounds to zero decodes to zero, as everywhere.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

from lowbit_jax.numerics.floats import order_free_sum
from lowbit_jax.numerics.formats import E4M3
from lowbit_jax.numerics.rounding import round_to_grid, stochastic_round
from lowbit_jax.numerics.scales import is_nan_scale, units_bound
from lowbit_jax.numerics.spec import QuantSpec


def eden_round(
    units: Float[Array, "*batch blocks size"],
    scales: Float[Array, "*batch blocks 1"],
    spec: QuantSpec,
    key: PRNGKeyArray | UInt32[Array, "2"],
) -> tuple[Float[Array, "*batch blocks size"], Float[Array, "*batch blocks 1"]]:
    """The levels q and the scales a* that `units` round to; see the module.

    Args:
      units: z, float32; 0 in blocks that are zero or not finite.
      scales: a, float8_e4m3fn, at most 256 to leave room for rho; NaN passes through.
      spec: The grid, and the correction block.
      key: One uniform a block is drawn.

    Returns:
      Float32 levels, 0 where the scale came out as 0, and float8_e4m3fn scales; the shapes of
      `units` and `scales`.
    """
    levels = round_to_grid(units, spec.format)
    assert isinstance(spec.block_size, int)  # as the E4M3 rules demand
    blocks = (spec.correction_block or spec.block_size) // spec.block_size
    corrected = (*scales.shape[:-2], scales.shape[-2] // blocks, blocks)

    def total(products):
        return order_free_sum(products.reshape(*corrected[:-1], -1))

    inverse_bound = np.float32(1 / units_bound(spec))  # a power of two; it cancels in rho
    z, q = units * inverse_bound, levels * inverse_bound
    projection = total(z * q)
    rho = jnp.where(projection > 0, total(z * z) / jnp.where(projection > 0, projection, 1), 1)
    wanted = rho * scales.astype(jnp.float32).reshape(corrected)
    drawn = stochastic_round(wanted, E4M3, key).astype(scales.dtype).reshape(scales.shape)
    drawn = jnp.where(is_nan_scale(scales), scales, drawn)
    return jnp.where(drawn.astype(jnp.float32) == 0, 0, levels), drawn

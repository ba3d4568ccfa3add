"""Llama 30M trained here: what quantization and pruning cost its perplexity.

Full-precision weights, unlike those of any published model at hand. The run is a BF16 one of
configs/llama.py on the same text, so that calibration and training windows come from its training
pieces and the evaluation from its validation pieces.

  python scripts/pretrain.py configs/llama.py --size 30m --recipe bf16 --data prepared
      --tokens 120e6 --run-dir runs/llama_30m_bf16
  python scripts/export_hf.py runs/llama_30m_bf16 --out models/llama_30m --dtype bfloat16
  python scripts/compress_sweep.py configs/compress/llama_30m.py --model models/llama_30m
      --text debian-docs.txt.xz --out docs/results/compression_llama_30m
"""

from lowbit_jax.bench.compression_rows import Table, language_model_rows

# Learning rates that Elsa and its control, the retrained mask, try, and penalties of Elsa: that of
# arXiv:2510.01650, which lowers it for sparser targets, and ten times as much, for it took four
# times the steps. The more zeros, the more there is to move.
_LOW = (6.25e-5, 1.25e-4, 2.5e-4)
_TRAINING = {
    "0%": ((1.25e-4, 2.5e-4, 5e-4), ()),
    "50%": (_LOW, (1e-2, 1e-1)),
    "60%": (_LOW, (5e-3, 5e-2)),
    "70%": ((1.25e-4, 2.5e-4, 5e-4, 1e-3), (2e-3, 2e-2)),
    "80%": ((1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3), (1e-3, 1e-2)),
    "90%": ((5e-4, 1e-3, 2e-3, 4e-3), (1e-3, 1e-2)),
    "2:4": (_LOW, (1e-2, 1e-1)),
}
# Guesses for an H100; rows that were measured count instead.
_EXPECTED_S = {
    "base": 6, "rtn": 3, "rtn_hadamard": 3, "wush_rtn": 4, "gptq": 7, "mr_gptq": 7, "wush": 8,
    "magnitude": 3, "wanda": 4, "sparsegpt": 7, "retrain": 80, "elsa": 160,
}  # fmt: skip


def get_table(
    model: str = "models/llama_30m",
    text: tuple[str, ...] = ("debian-docs.txt.xz",),
    seeds: int = 3,
    trained_seeds: int = 1,
    steps: int = 1000,
) -> Table:
    """Rows of this table.

    Args:
      model: Directory that scripts/export_hf.py wrote.
      text: That the run was trained on, as it was given to scripts/prepare_data.py.
      seeds: Of the calibration windows.
      trained_seeds: Of the batches of methods that train; with one their orderings stay open.
      steps: Of methods that train, at each learning rate, of 32 x 512 tokens.
    """
    rows = language_model_rows(
        __file__,
        # Papers on MXFP4 have the scale with 4/3; that of "mxfp4" is the OCP's.
        formats=("mxfp4_fitted", "mxfp4", "nvfp4", "int4g32", "int4g128", "int3g128", "int2g128"),
        input_formats=("mxfp4_fitted", "nvfp4", "int4g32", "mxfp4"),
        patterns=("50%", "60%", "70%", "80%", "90%", "2:4"),
        training={
            pattern: {"steps": steps, "learning_rates": rates, "strengths": strengths}
            for pattern, (rates, strengths) in _TRAINING.items()
        },
        seeds=seeds,
        trained_seeds=trained_seeds,
    )
    return Table(
        rows=tuple(rows),
        name="Llama 30M",
        model=model,
        text=text,
        train_tokens=8_000_000,
        expected_s=_EXPECTED_S,
    )

"""Llama 30M trained here: does Elsa beat retraining the mask that SparseGPT found?

Both train as many steps on the same batches and choose among the same learning rates by windows of
validation pieces that are not evaluated. The model is that of configs/compress/llama_30m.py.

  python scripts/compress_sweep.py configs/compress/llama_30m_elsa.py --model models/llama_30m
      --text debian-docs.txt.xz --out docs/results/elsa_llama_30m
"""

from lowbit_jax.bench.compression_rows import Table, elsa_rows

# Learning rates that Elsa and its control, the retrained mask, try, and penalties of Elsa: that of
# arXiv:2510.01650, which lowers it for sparser targets, and ten times as much, for it took four
# times the steps. The more zeros, the more there is to move.
_FEW = (1.25e-4, 2.5e-4, 5e-4)
_MANY = (2.5e-4, 5e-4, 1e-3)
_SEARCHES = {
    "0%": (_FEW, ()),
    "50%": (_FEW, (1e-2, 1e-1)),
    "60%": (_FEW, (5e-3, 5e-2)),
    "70%": (_MANY, (2e-3, 2e-2)),
    "80%": (_MANY, (1e-3, 1e-2)),
    "90%": ((5e-4, 1e-3, 2e-3), (1e-3, 1e-2)),
    "2:4": (_FEW, (1e-2, 1e-1)),
}


def get_table(
    model: str = "models/llama_30m",
    text: tuple[str, ...] = ("debian-docs.txt.xz",),
    seeds: int = 1,
    steps: int = 1000,
) -> Table:
    """Rows of this table.

    Args:
      model: Directory that scripts/export_hf.py wrote.
      text: That the run was trained on, as it was given to scripts/prepare_data.py.
      seeds: Of the batches, and of the windows for the masks; with one, orderings stay open.
      steps: At each learning rate, of 32 x 512 tokens.
    """
    return Table(
        rows=tuple(elsa_rows(__file__, _SEARCHES, steps=steps, seeds=seeds)),
        name="Llama 30M",
        model=model,
        text=text,
        train_tokens=8_000_000,
        # Guesses for an H100; rows that were measured count instead.
        expected_s={"base": 6, "sparsegpt": 7, "retrain": 80, "elsa": 160},
    )

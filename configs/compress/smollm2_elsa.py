"""SmolLM2-135M-Instruct from a Q4_1 file: does Elsa beat retraining the mask that SparseGPT found?

Both train as many steps on the same batches and choose among the same learning rates by windows of
validation pieces that are not evaluated. The file is that of configs/compress/smollm2.py. It saw
other texts than these before: training alone, without a zero, lowers the loss on them, which is
what the row at 0 % is for.

  python scripts/compress_sweep.py configs/compress/smollm2_elsa.py --text debian-docs.txt.xz
      --model SmolLM2-135M-Instruct.Q4_1.gguf --out docs/results/elsa_smollm2
"""

from lowbit_jax.bench.compression_rows import Table, elsa_rows

# Learning rates and the penalty of Elsa. Penalties are those of OPT-125M in arXiv:2510.01650, which
# lowers them for sparser targets; rates are larger than there, for steps are a fourth: of (2, 4,
# 8)e-4 retraining chose the last at 80 and 90 % by far.
_FEW = (1e-4, 2e-4, 4e-4)
_MANY = (8e-4, 1.6e-3, 3.2e-3)
_SEARCHES = {
    "0%": ((5e-5, 1e-4, 2e-4), ()),
    "50%": (_FEW, (1e-2,)),
    "60%": (_FEW, (5e-3,)),
    "70%": ((4e-4, 8e-4, 1.6e-3), (2e-3,)),
    "80%": (_MANY, (1e-3,)),
    "90%": (_MANY, (1e-3,)),
    "2:4": (_FEW, (1e-2,)),
}


def get_table(
    model: str = "SmolLM2-135M-Instruct.Q4_1.gguf",
    text: tuple[str, ...] = ("debian-docs.txt.xz",),
    seeds: int = 1,
    steps: int = 1000,
) -> Table:
    """Rows of this table.

    Args:
      model: The file.
      text: To train and evaluate with, disjoint pieces of it.
      seeds: Of the batches, and of the windows for the masks; with one, orderings stay open.
      steps: At each learning rate, of 8 x 512 tokens.
    """
    return Table(
        rows=tuple(elsa_rows(__file__, _SEARCHES, steps=steps, seeds=seeds)),
        name="SmolLM2-135M-Instruct (Q4_1)",
        model=model,
        text=text,
        train_batch_size=8,
        # Guesses for an H100; rows that were measured count instead.
        expected_s={"base": 10, "sparsegpt": 20, "retrain": 100, "elsa": 100},
    )

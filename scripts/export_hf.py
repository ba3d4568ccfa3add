"""Writes the newest weights of a run as a Hugging Face directory.

Example:
    python scripts/export_hf.py runs/llama_30m --out models/llama_30m --dtype bfloat16
    python scripts/export_hf.py runs/llama_30m_quartet --out models/llama_30m_mxfp4 --codes
"""

import pathlib
import sys
from typing import Literal

import tyro

from lowbit_jax.ptq.export import save_quantized
from lowbit_jax.ptq.quantized_directory import describe_directory
from lowbit_jax.train.pretrained_runs import export_run


def main(
    run: tyro.conf.Positional[pathlib.Path],
    *,
    out: pathlib.Path,
    codes: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> int:
    """Writes config.json, weights and tokenizer, for transformers and vLLM.

    Args:
      run: Folder of a run with a checkpoint.
      out: Directory to write; must not exist yet.
      codes: Write the codes that the run's recipe multiplies by, with the format of its inputs and
        its rotation, so that scripts/evaluate.py predicts as in training.
      dtype: Of the weights that are no codes; None: as the run stores them.
    """
    try:
        config, step = export_run(
            run, out, dtype=dtype, save_codes=save_quantized if codes else None
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: weights after step {step} of {config.steps}")
    if codes:
        print(describe_directory(out))
    elif config.model.config.recipe_rules:
        print("the recipe is not written: readers multiply by the unquantized weights")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))

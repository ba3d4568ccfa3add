"""Quantizes a model: from a directory (or GGUF file) to a directory of codes.

Example:
    python scripts/quantize.py MODEL --out OUT --format mxfp4 --method mr_gptq --text corpus.txt
    python scripts/quantize.py MODEL --out OUT --format nvfp4 --method gptq --text corpus.txt
    python scripts/quantize.py MODEL --out OUT --format int4 --block-size 32 --method gptq ...
"""

import dataclasses
import pathlib
import sys
from typing import Literal

import tyro

from lowbit_jax.data.tokenizers import BPETokenizer
from lowbit_jax.models.pretrained import load_pretrained, save_pretrained
from lowbit_jax.numerics import PRESETS
from lowbit_jax.progress import Progress
from lowbit_jax.ptq.calibrate import compress_blocks, over_devices
from lowbit_jax.ptq.export import save_quantized
from lowbit_jax.ptq.finished import check_places, finish_reports, is_written, what_is_kept
from lowbit_jax.ptq.methods import (
    Method,
    Solver,
    bits_per_weight,
    calibration_model,
    check_widths,
    compression_of,
    quantized_model,
    quantized_params,
)
from lowbit_jax.ptq.quantized_directory import describe_directory, is_quantized_directory
from lowbit_jax.ptq.report import save_report
from lowbit_jax.ptq.shared_scales import sharing_scales
from lowbit_jax.ptq.texts import calibration_batches, read_tokens, text_warnings, tokenizer_of


def main(
    model: tyro.conf.Positional[pathlib.Path],
    out: pathlib.Path,
    format: str,
    text: tuple[str, ...],
    method: Solver = "mr_gptq",
    block_size: int | None = None,
    rotation: int | None = None,
    activations: str | None = None,
    transform_dtype: Literal["float32", "bfloat16"] = "float32",
    store: Literal["codes", "floats"] = "codes",
    rest_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    samples: int = 128,
    length: int = 512,
    batch_size: int = 8,
    calibration_tokens: int = 1_000_000,
    seed: int = 0,
    tokenizer: str | None = None,
    dtype: str = "float32",
    work: pathlib.Path | None = None,
) -> int:
    """Quantizes the seven matrices of each block, one block after another.

    The directory holds packed codes and scales, in a layout of compressed-tensors where there is
    one; report.json, report.txt and report.png say what each matrix lost.

    Args:
      model: Directory as Hugging Face lays it out, or a GGUF file.
      out: Directory to write.
      format: Of the weights, a name in lowbit_jax.numerics.PRESETS in lower case.
      text: To calibrate with: files or directories.
      method: rtn, gptq, mr_gptq, wush or wush_rtn, see lowbit_jax/ptq/methods.py.
      block_size: Of the weights, inputs keep that of their format; None: the format's own.
      rotation: Block of a Hadamard transform before the solver; None: none, of mr_gptq its own.
      activations: Format of the inputs of all products, while the model is calibrated and of the
        model that is written; None: not quantized.
      transform_dtype: Of the transforms of wush and wush_rtn; in bfloat16 they take half the bits.
      store: codes, or floats: the weights at their quantized values, in the original basis and in
        float32, which any loader of float models reads; inputs are then not quantized.
      rest_dtype: Of what is not quantized, beside codes: embedding, head, norms and biases.
      samples: Calibration windows.
      length: Tokens of each.
      batch_size: Windows side by side; over several GPUs, if there are, as many as divide it.
      calibration_tokens: Of the text, from which windows are drawn.
      seed: Of the places of windows.
      tokenizer: Another one than the model's: a tokenizer.json of BPE (byte-level or
        SentencePiece's), a tokenizer.model, or "bytes".
      dtype: Of the computation, float32 or bfloat16.
      work: Folder in which blocks are kept, so that a killed run goes on; None: OUT.work, which is
        removed at the end.
    """
    kept = out.absolute().with_name(f"{out.absolute().name}.work") if work is None else work
    try:
        presets = {name.lower(): spec for name, spec in PRESETS.items() if not spec.needs_key}
        for name in (format, activations):
            if name is not None and name not in presets:
                raise ValueError(f"formats are {', '.join(presets)}, got {name!r}.")
        spec = presets[format]
        if block_size is not None:
            spec = dataclasses.replace(spec, block_size=block_size)
        inputs = None if activations is None else presets[activations]
        how = Method(
            method, spec, activations=inputs, rotation=rotation, transform_dtype=transform_dtype
        )
        arguments = {
            "model": str(model), "out": str(out.absolute()), "method": repr(how), "store": store,
            "text": list(text), "samples": samples, "length": length, "batch_size": batch_size,
            "calibration_tokens": calibration_tokens, "seed": seed, "tokenizer": tokenizer,
            "dtype": dtype, "rest_dtype": rest_dtype,
        }  # fmt: skip
        if is_written(out, kept, arguments):
            return finish(out, kept, removes=work is None)
        check_places(out, kept)
        loaded = load_pretrained(model, dtype, on_host=True)
        blocks_of = {"weights": spec, "inputs": inputs, "rotation": how.hadamard}
        check_widths(loaded.model.config, **blocks_of)
        found = tokenizer_of(model, loaded, tokenizer)
        carried = loaded.tokenizer_path if tokenizer is None else None
        if carried is None and isinstance(found, BPETokenizer):
            carried = found.model
        tokens = read_tokens(text, found, calibration_tokens)
        batches = calibration_batches(tokens, samples, length, batch_size, seed)
        for warning in text_warnings(loaded, length, len(tokens), samples):
            print(f"warning: {warning}", file=sys.stderr)
        compression = compression_of(how)
        if not how.is_wush:  # which has a transform, and scales, for each matrix
            compression = sharing_scales(compression)
        blocks = []
        with Progress() as bar:
            task = bar.add_task("blocks", total=loaded.model.config.n_layers)
            for block in compress_blocks(
                calibration_model(loaded.model, how),
                loaded.params,
                batches,
                compression,
                folder=kept,
                place=over_devices(batch_size),
                settings={"method": repr(how), "shares_scales": not how.is_wush},
            ):
                blocks.append(block)
                bar.advance(task)
        settings = {**arguments, "bits_per_weight": bits_per_weight(blocks)}
        save_report(kept, [report for block in blocks for report in block.reports], settings)
        rest = {"tokenizer": carried, "metadata": loaded.metadata}
        if store == "codes":
            coded = quantized_model(loaded.model, loaded.params, blocks, how)
            save_quantized(out, *coded, dtype=rest_dtype, **rest)
        else:
            params = quantized_params(loaded.params, blocks, compression)
            save_pretrained(out, loaded.model, params, **rest)
        return finish(out, kept, removes=work is None)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if told := what_is_kept(kept, removes=work is None):
            print(told, file=sys.stderr)
        return 2


def finish(out: pathlib.Path, kept: pathlib.Path, *, removes: bool) -> int:
    finish_reports(kept, out, removes=removes)
    print((out / "report.txt").read_text(), end="")
    print(f"wrote {out}" + (f": {describe_directory(out)}" if is_quantized_directory(out) else ""))
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))

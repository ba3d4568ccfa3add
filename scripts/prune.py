"""Prunes a model: from a directory (or GGUF file) to a directory.

Example:
    python scripts/prune.py MODEL --out OUT --method sparsegpt --sparsity 0.5 --text corpus.txt
    python scripts/prune.py MODEL --out OUT --method wanda --pattern 2:4 --text corpus.txt
    python scripts/prune.py MODEL --out OUT --method elsa --sparsity 0.9 --text corpus.txt
"""

import dataclasses
import math
import pathlib
import sys
from typing import Literal

import tyro

from lowbit_jax.data.tokenizers import BPETokenizer
from lowbit_jax.models import Llama
from lowbit_jax.models.pretrained import load_pretrained, save_pretrained
from lowbit_jax.numerics import PRESETS
from lowbit_jax.progress import Progress
from lowbit_jax.ptq.export import save_quantized
from lowbit_jax.ptq.finished import check_places, finish_reports, is_written, what_is_kept
from lowbit_jax.ptq.methods import check_widths
from lowbit_jax.ptq.quantized_directory import describe_directory, is_quantized_directory
from lowbit_jax.ptq.sparse_methods import (
    Callbacks,
    OneShot,
    SparseMethod,
    Trained,
    prune_model,
    search_training,
    training_grid,
)
from lowbit_jax.ptq.sparse_report import save_sparse_report
from lowbit_jax.ptq.texts import calibration_batches, read_tokens, text_warnings, tokenizer_of
from lowbit_jax.ptq.windows import TrainingWindows, held_out, mean_loss
from lowbit_jax.sparsity import parse_pattern
from lowbit_jax.sparsity.patterns import Comparison
from lowbit_jax.sparsity.sparse_projection import Budget


def main(
    model: tyro.conf.Positional[pathlib.Path],
    out: pathlib.Path,
    method: OneShot | Trained,
    text: tuple[str, ...] = (),
    sparsity: float | None = None,
    pattern: str | None = None,
    per: Comparison | None = None,
    budget: Budget = "leaf",
    format: str | None = None,
    store: Literal["codes", "floats"] = "codes",
    damping: float = 0.01,
    mask: OneShot = "magnitude",
    steps: int = 4096,
    learning_rates: tuple[float, ...] = (2e-4,),
    strengths: tuple[float, ...] = (0.01,),
    final_strength: float | None = None,
    interval: int = 32,
    objective_aware: bool = True,
    recompute: str = "none",
    samples: int = 128,
    length: int = 512,
    batch_size: int = 8,
    max_tokens: int | None = None,
    seed: int = 0,
    tokenizer: str | None = None,
    dtype: str = "float32",
    keep_every_s: float = 300.0,
    work: pathlib.Path | None = None,
) -> int:
    """Sets weights of the seven matrices of each block to zero, and prints how many of each.

    magnitude, wanda and sparsegpt take seconds a block and are for 50 to 60 % of zeros; elsa and
    elsa_l train on the loss of the whole model, hold its parameters and 16 or 6 bytes of state a
    weight on the device, and are for more. retrain trains what a mask has left as long as elsa
    would: give both the same --steps, --text and --learning-rates to see what elsa is worth.

    The directory holds dense float32 files with zeros in them, which any loader reads; with
    --format packed codes, zeros among them, as scripts/quantize.py writes them. report.json,
    report.txt and report.png say how many there are, and what each matrix lost.

    Args:
      model: Directory as Hugging Face lays it out, or a GGUF file.
      out: Directory to write.
      method: magnitude, wanda, sparsegpt, elsa, elsa_l or retrain.
      text: To calibrate or train with: files or directories. magnitude does without.
      sparsity: Fraction of zeros, such as 0.7; or else
      pattern: n:m, n kept of each m inputs, such as 2:4.
      per: Weights that compete: of a matrix, a row or a column; None: wanda's of a row, else of a
        matrix.
      budget: leaf: every matrix gets the same sparsity; tree: the model as a whole (magnitude,
        elsa, elsa_l, and retrain of a magnitude mask).
      format: Of what stays, a name in lowbit_jax.numerics.PRESETS in lower case, sparsegpt alone;
        None: not quantized.
      store: With a format: codes, all else in bfloat16; or floats, the weights at their quantized
        values in float32.
      damping: Of the Hessian, sparsegpt alone.
      mask: What retrain prunes by before it trains.
      steps: Of the training.
      learning_rates: Of the training, at its first step; they fall linearly to 0. Of several all
        are tried; that of least loss on the last 64 windows of the text, held out, is written.
      strengths: Of elsa's pull to the pattern, lam. Less of it, and a larger learning rate, for
        more zeros. Of several each is tried at each learning rate.
      final_strength: Where it is to go along a cosine; None: it stays.
      interval: Steps between elsa's projections.
      objective_aware: Whether they weigh weights with Adam's second moments.
      recompute: Activations that training computes anew to save memory, such as block; see
        lowbit_jax/models/recompute.py.
      samples: Calibration windows.
      length: Tokens of each window, of calibration and of training.
      batch_size: Windows side by side; of training, of a step.
      max_tokens: Of the text that are read; None: all for training, a million for calibration.
      seed: Of the places and the order of windows.
      tokenizer: Another one than the model's: a tokenizer.json of BPE (byte-level or
        SentencePiece's), a tokenizer.model, or "bytes".
      dtype: Of the computation, float32 or bfloat16. Weights are float32.
      keep_every_s: Seconds after which a training is kept once more.
      work: Folder in which a killed run goes on; None: OUT.work, which is removed at the end.
    """
    kept = out.absolute().with_name(f"{out.absolute().name}.work") if work is None else work
    try:
        presets = {name.lower(): spec for name, spec in PRESETS.items() if not spec.needs_key}
        if format is not None and format not in presets:
            raise ValueError(f"--format: must be one of {', '.join(presets)}, got {format!r}.")
        if not learning_rates or not strengths:
            raise ValueError("--learning-rates and --strengths: need at least one.")
        how = SparseMethod(
            method, parse_pattern(sparsity, pattern), per=per, budget=budget, damping=damping,
            spec=None if format is None else presets[format], mask_solver=mask, steps=steps,
            learning_rate=learning_rates[0], strength=strengths[0], final_strength=final_strength,
            interval=interval, is_objective_aware=objective_aware,
        )  # fmt: skip
        arguments = {
            "model": str(model), "out": str(out.absolute()), "method": repr(how),
            "learning_rates": learning_rates, "strengths": strengths, "text": text,
            "samples": samples, "length": length, "batch_size": batch_size,
            "max_tokens": max_tokens, "seed": seed, "tokenizer": tokenizer, "dtype": dtype,
            "recompute": recompute, "store": "floats" if format is None else store,
        }  # fmt: skip
        if is_written(out, kept, arguments):
            return finish(out, kept, removes=work is None)
        check_places(out, kept)
        if not text and (how.is_trained or how.needs_calibration):
            raise ValueError(f"--text: {method} needs a text.")
        loaded = load_pretrained(model, dtype, on_host=True)
        check_widths(loaded.model.config, pattern=how.pattern, weights=how.spec)
        llama = Llama(dataclasses.replace(loaded.model.config, recompute=recompute))
        carried, calibration, batches, validation = loaded.tokenizer_path, [], (), []
        if text or tokenizer is not None or model.is_file():
            found = tokenizer_of(model, loaded, tokenizer)
            carried = carried if tokenizer is None else None
            if carried is None and isinstance(found, BPETokenizer):
                carried = found.model
        if text:
            limit = 1_000_000 if max_tokens is None and not how.is_trained else max_tokens
            tokens = read_tokens(text, found, limit)
            if how.is_trained:
                tokens, validation = held_out(tokens, 64, length, batch_size)
                batches = TrainingWindows(tokens, length, batch_size, seed)
            if how.needs_calibration or not how.is_trained:
                calibration = calibration_batches(tokens, samples, length, batch_size, seed)
            needed = len(tokens) if calibration else None
            for warning in text_warnings(loaded, length, needed, samples):
                print(f"warning: {warning}", file=sys.stderr)
        with Progress() as bar:
            options = {
                "calibration": calibration, "batches": batches, "folder": kept,
                "on": progress(bar, how, llama.config.n_layers if calibration else 0),
                "keep_every_s": keep_every_s,
            }  # fmt: skip
            losses = {}
            if how.is_trained or len(learning_rates) * len(strengths) > 1:
                pruned, how, losses = search_training(
                    llama, loaded.params, training_grid(how, learning_rates, strengths),
                    validation=validation, **options,
                )  # fmt: skip
            else:
                pruned = prune_model(llama, loaded.params, how, **options)
        settings = {**arguments, "bits_per_weight": pruned.bits_per_weight}
        if how.is_trained:
            settings["learning_rate"] = how.learning_rate
            settings["losses_held_out"] = {
                tried.tried: loss if math.isfinite(loss) else None for tried, loss in losses.items()
            }
            settings["loss_held_out_before"] = mean_loss(llama, loaded.params, validation)
        kept.mkdir(parents=True, exist_ok=True)
        save_sparse_report(kept, pruned, how.pattern, settings)
        rest = {"tokenizer": carried, "metadata": loaded.metadata}
        if pruned.coded is not None and store == "codes":
            save_quantized(out, loaded.model, pruned.coded, **rest)
        else:
            save_pretrained(out, loaded.model, pruned.params, **rest)
        return finish(out, kept, removes=work is None)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if told := what_is_kept(kept, removes=work is None):
            print(told, file=sys.stderr)
        return 2


def progress(bar: Progress, how: SparseMethod, blocks: int) -> Callbacks:
    solving = bar.add_task("blocks", total=blocks, visible=blocks > 0)
    training = bar.add_task(how.solver, total=how.steps, visible=how.is_trained)

    def record(row):
        what = f"lr {current[-1]:g}, loss {row.loss:.4f}"
        what += f", gap {row.gap:.4f}, flips {row.flips:.2%}" if row.gap else ""
        bar.update(training, completed=row.step, description=f"{how.solver}: {what}")

    current = [how.learning_rate]
    return Callbacks(
        lambda block: bar.advance(solving), record, lambda m: current.append(m.learning_rate)
    )


def finish(out: pathlib.Path, kept: pathlib.Path, *, removes: bool) -> int:
    finish_reports(kept, out, removes=removes)
    print((out / "report.txt").read_text(), end="")
    print(f"wrote {out}" + (f": {describe_directory(out)}" if is_quantized_directory(out) else ""))
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))

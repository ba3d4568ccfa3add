"""What a finished run has to show for itself."""

import collections
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lowbit_jax.analysis.speed_of_light import SpeedOfLight, show_speed, speed_metrics
from lowbit_jax.analysis.text_baselines import text_baselines
from lowbit_jax.files import write_atomically
from lowbit_jax.models import Llama, count_params, recipe_table
from lowbit_jax.ops import Explanation
from lowbit_jax.ops.dot_recipe import PRODUCTS, DotRecipe
from lowbit_jax.ops.recipes import weight_projection
from lowbit_jax.parallel import on_first
from lowbit_jax.train.config import Config
from lowbit_jax.train.evaluate import Evaluation
from lowbit_jax.train.state import leaf_paths
from lowbit_jax.train.streaming import over_slices
from lowbit_jax.train.tracking import plot_loss

# xz needs a second for 1 MiB; the end of the training split says as much as all of it.
_BASELINE_BYTES = 2**22


@dataclasses.dataclass(frozen=True)
class Summary:
    """Results of a run; `str()` is the text for people, `summary.json` the record.

    Attributes:
      run_dir: Folder of the run.
      steps: Optimizer steps.
      train_tokens: Tokens trained on.
      validation_loss: Nats per token; None if not validated.
      validation_bits_per_byte: The same in bits per byte of text; None for synthetic data.
      validation_tokens: Tokens over which it is the mean.
      baselines: Bits per byte on the same validation text, see `text_baselines`.
      baseline_train_bytes: Training text that the baselines saw.
      quantization_error: `rms(w - Q(w)) / rms(w)` over all quantized weights; None if there are
        none.
      tokens_per_s: Median over the steps of this process; None if it took too few.
      mfu: Model FLOP utilization, against the device's dense bfloat16 peak; None without one.
      share_of_light: `tokens_per_s` over what the devices would do that only multiply, see
        `analysis.speed_of_light`; None without a data sheet.
      device: Its kind.
      sample_prompt: Text that the model was given.
      sample: What it made of it; None without a generator.
      files: What lies where.
      corpus: Fingerprint of the data: runs on the same text, split and tokenizer share it.
    """

    run_dir: str
    steps: int
    train_tokens: int
    validation_loss: float | None
    validation_bits_per_byte: float | None
    validation_tokens: int | None
    baselines: dict[str, float]
    baseline_train_bytes: int
    quantization_error: float | None
    tokens_per_s: float | None
    mfu: float | None
    device: str
    sample_prompt: str
    sample: str | None
    files: dict[str, str]
    corpus: str = ""
    share_of_light: float | None = None

    def __str__(self) -> str:
        lines = []
        if self.sample is not None:
            shown = f"{self.sample_prompt}|{self.sample}".replace("\n", "\n  ")
            # Bytes of an untrained model may be control codes: none may reach the terminal.
            shown = "".join(
                c if c == "\n" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown
            )
            lines += ["sample:", f"  {shown}", ""]
        lines.append(f"{self.train_tokens:,} tokens in {self.steps:,} steps on {self.device}")
        if self.tokens_per_s is not None:
            speed = show_speed(self.tokens_per_s, self.share_of_light, self.mfu)
            lines.append(f"speed               {speed} (median)")
        if self.quantization_error is not None:
            lines.append(
                f"quantization error  rms(w - Q(w)) / rms(w) = {self.quantization_error:.4f}"
            )
        if self.validation_loss is not None:
            lines.append(
                f"validation loss     {self.validation_loss:.4f} nats per token"
                f" over {self.validation_tokens:,} tokens"
            )
        if self.validation_bits_per_byte is not None:
            lines.append("bits per byte of the validation text:")
            rows = {"this model": self.validation_bits_per_byte, **self.baselines}
            rows = sorted(rows.items(), key=lambda row: row[1])
            lines += [f"  {name:<17} {value:6.3f}" for name, value in rows]
            if self.baselines:
                seen = f"{self.baseline_train_bytes:,} bytes of training text"
                lines.append(f"  (the others saw {seen})")
        lines += ["files:", *(f"  {name:<17} {path}" for name, path in self.files.items())]
        return "\n".join(lines)


def describe_model(config: Config) -> str:
    """The tables of recipes and the sizes of model and run, for the start of a run."""
    counts = count_params(config.model.config)
    recipes: dict[DotRecipe | None, None] = {}  # as a set that keeps their order
    lines = []
    for step, model in config.phases:
        table = recipe_table(model)
        recipes |= dict.fromkeys(row.recipe for row in table.rows)
        lines += [f"once {step:,} steps are done:"] if step else []
        lines += [str(table), ""]
    lines += formats_table([r for r in recipes if r is not None and not r.is_identity])
    shown = "\n".join(lines).rstrip()
    return (
        f"{shown}\n"
        f"{counts['total']:,} parameters ({counts['non_embedding']:,} without embedding and head),"
        f" {len(config.data.train):,} training and {len(config.data.validation):,} validation"
        f" tokens ({config.data.tokenizer.name}),\n"
        f"{config.steps:,} steps of {config.batch_size} x {config.seq_len} tokens"
        f" on {jax.devices()[0].device_kind}; compiling"
    )


def formats_table(recipes: Sequence[DotRecipe]) -> list[str]:
    """Lines of a table: formats and rotation of each product of each recipe; [] for no recipe."""
    cells = [("recipe", "product", "formats of its operands", "rotation")]
    for recipe in recipes:
        for product, operands in zip(PRODUCTS, ("xw", "gw", "gx"), strict=True):
            formats = zip(operands, recipe.formats_of(product), strict=True)
            cells.append(
                (
                    str(recipe),
                    product,
                    ", ".join(f"{operand}: {spec or '-'}" for operand, spec in formats),
                    str(recipe.rotation_of(product) or "-"),
                )
            )
    if len(cells) == 1:
        return []
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    return [
        "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]])
        for row in cells
    ]


def paths_table(explanation: Explanation) -> list[str]:
    """Lines that say which path the products of quantized operands take, and why; [] for none.

    Args:
      explanation: Of a training step.
    """
    found: dict[tuple[str, str], collections.Counter[str]] = {}
    for row in explanation.rows:
        if row.a_format != "-" or row.b_format != "-":
            products = found.setdefault((row.path, row.reason), collections.Counter())
            products[row.product] += row.count or 1
    return [
        f"{', '.join(f'{count} {product}' for product, count in products.items())} a step by the"
        f" path {path!r} ({reason})"
        for (path, reason), products in found.items()
    ]


def summarize(
    config: Config,
    run_dir: pathlib.Path,
    params: PyTree,
    *,
    final: Evaluation | None,
    tokens_per_s: float | None,
    generate: Callable[..., Any] | None,
    with_baselines: bool,
    has_checkpoint: bool,
    light: SpeedOfLight | None = None,
    devices: int = 1,
) -> Summary:
    """Measures what is left to measure, writes sample, plot and `summary.json`.

    Of several processes the first one writes and measures the baselines, while the others wait;
    all take part in what the devices measure.

    Args:
      config: Of the run.
      run_dir: Its folder.
      params: Final parameters, dequantized.
      final: The last validation, if there was one.
      tokens_per_s: As the loop measured it.
      generate: See `train`.
      with_baselines: Whether to measure the text baselines, which takes seconds.
      has_checkpoint: Whether there are checkpoints.
      light: Of one device, for the recipes of the last steps; None without a data sheet.
      devices: How many trained.

    Raises:
      OSError: In all processes, if a file cannot be written.
    """
    sample = None
    if generate is not None and config.sample_prompt:
        sample = _sample(config, params, generate)

    def write_sample() -> tuple[dict[str, float], int]:
        if sample is not None:
            write_atomically(run_dir / "sample.txt", config.sample_prompt + sample)
        if with_baselines and final is not None and final.bits_per_byte is not None:
            return _baselines(config)
        return {}, 0

    baselines, baseline_train_bytes = on_first(write_sample, OSError)
    device = jax.devices()[0].device_kind
    speed = speed_metrics(tokens_per_s, light, devices)
    files = {
        "checkpoints": "checkpoints" if has_checkpoint else None,
        "metrics": "metrics.jsonl",
        "TensorBoard": "tensorboard",
        "loss plot": "loss.png",
        "config": "config.py",
        "arguments": "run.json",
        "versions": "versions.json",
        "sample": None if sample is None else "sample.txt",
        "summary": "summary.json",
    }
    summary = Summary(
        run_dir=str(run_dir),
        steps=config.steps,
        train_tokens=config.steps * config.batch_size * config.seq_len,
        validation_loss=None if final is None else final.loss,
        validation_bits_per_byte=None if final is None else final.bits_per_byte,
        validation_tokens=None if final is None else final.tokens,
        baselines=baselines,
        baseline_train_bytes=baseline_train_bytes,
        quantization_error=quantization_error(config.phases[-1][1], params),
        tokens_per_s=tokens_per_s,
        mfu=speed.get("mfu"),
        share_of_light=speed.get("share_of_light"),
        device=device,
        sample_prompt=config.sample_prompt,
        sample=sample,
        files={name: str(run_dir / file) for name, file in files.items() if file is not None},
        corpus=config.data.fingerprint,
    )

    def write_summary() -> None:
        plot_loss(run_dir)
        record = json.dumps(dataclasses.asdict(summary), indent=1)
        write_atomically(run_dir / "summary.json", record + "\n")  # last: the run is finished

    on_first(write_summary, OSError)
    return summary


def load_summary(run_dir: pathlib.Path) -> Summary | None:
    """The summary of a finished run; None while it is not finished."""
    path = run_dir / "summary.json"
    return Summary(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def quantization_error(model: Llama, params: PyTree) -> float | None:
    """`rms(w - Q(w)) / rms(w)` over all weights that the forward pass quantizes; None if none."""
    leaves = dict(leaf_paths(params))
    error, square = 0.0, 0.0
    for row in recipe_table(model).rows:
        if row.recipe is None or row.recipe.y_w is None:
            continue
        if row.recipe.y_w.needs_key:
            continue  # no one Q(w)
        residual, norm = _error_squares(leaves[row.path], row.recipe)
        error, square = error + float(residual), square + float(norm)
    return (error / square) ** 0.5 if square else None


@functools.partial(jax.jit, static_argnums=1)
def _error_squares(stacked, recipe):
    """Of weights `(layers, k, n)` in either memory, a layer at a time as the model sees them."""

    def squares(w):
        w = w.astype(jnp.float32)
        return jnp.sum(jnp.square(w - weight_projection(recipe)(w))), jnp.sum(jnp.square(w))

    return jax.tree.map(jnp.sum, over_slices(squares, stacked, stacked.shape[0]))


def _sample(config: Config, params: PyTree, generate: Callable[..., Any]) -> str:
    tokenizer = config.data.tokenizer
    prompt = np.asarray(tokenizer.encode_batch([config.sample_prompt])[0], np.int32)[None]
    model, key = config.phases[-1][1], jax.random.key(config.seed)
    rngs = {"quantize": key}  # ignored unless a recipe is random

    def apply_fn(params, tokens):
        return model.apply({"params": params}, tokens, rngs=rngs)

    tokens = generate(
        apply_fn,
        params,
        jnp.asarray(prompt),
        steps=config.sample_tokens,
        temperature=config.sample_temperature,
        key=key,
        window=config.seq_len,
    )
    return tokenizer.decode(np.asarray(tokens)[0, prompt.shape[1] :])


def _baselines(config: Config) -> tuple[dict[str, float], int]:
    data = config.data
    tokens = int(_BASELINE_BYTES / data.train.bytes_per_token)
    train = data.tokenizer.decode_bytes(data.train[max(len(data.train) - tokens, 0) :])
    validation = data.tokenizer.decode_bytes(data.validation[:tokens])
    return text_baselines(train, validation), len(train)

"""Rows of a table of compression results: which methods, formats and patterns, in which order.

A row is a `Row` of a sweep whose arguments are read here:

    {}                                                    the model as it is
    {"format": "int4g32", "method": "gptq"}               weights; "int4g32": INT4 in groups of 32
    {..., "activations": "mxfp4"}                         and inputs
    {"pattern": "2:4", "method": "wanda"}                 zeros; "70%" of a matrix, or N:M
    {..., "learning_rates": (1e-4, 2e-4)}                 of methods that train: the best of these
    {..., "outliers": True}                               of the model with injected outliers
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lowbit_jax.numerics import PRESETS, QuantSpec
from lowbit_jax.ptq.methods import Method
from lowbit_jax.ptq.sparse_methods import SparseMethod
from lowbit_jax.sparsity import Pattern, parse_pattern
from lowbit_jax.train.sweep_rows import Row

# Solver, and whether a Hadamard transform in blocks of the format comes before it.
QUANTIZERS: dict[str, tuple[str, bool]] = {
    "rtn": ("rtn", False),
    "rtn_hadamard": ("rtn", True),
    "wush_rtn": ("wush_rtn", False),
    "gptq": ("gptq", False),
    "mr_gptq": ("mr_gptq", False),
    "wush": ("wush", False),
}
ONE_SHOT = ("magnitude", "wanda", "sparsegpt")
TRAINED = ("retrain", "elsa")
# What depends on no calibration window and no batch.
SEEDLESS = ("rtn", "rtn_hadamard", "magnitude")


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows, and what they have in common.

    Attributes:
      rows: In the order in which they matter; see `run_order`.
      name: Of the model, for page and lines.
      model: Directory as Hugging Face lays it out or GGUF file; of an encoder a directory.
      kind: "llama": perplexity. "bert": errors of the outputs of single layers.
      text: Files or directories, cut into training and validation pieces as `data.split` does.
      validation_fraction: Of the pieces; for evaluation.
      calibration_tokens: Of an even sample of the training pieces, from which windows are drawn.
      samples: Calibration windows.
      length: Tokens of each window.
      batch_size: Windows side by side, in calibration and evaluation.
      eval_tokens: Counted tokens of an even sample of the validation pieces.
      window: Of the perplexity.
      stride: Of the perplexity.
      hessian_samples: Validation windows on whose inputs errors of layers are measured.
      train_tokens: Of an even sample of the training pieces, for methods that train.
      train_batch_size: Windows a step of these, of `length` tokens.
      dtype: Of the computation.
      train_dtype: Of the computation of methods while they train.
      expected_s: Seconds of a row by method, where none has been measured yet.
    """

    rows: tuple[Row, ...]
    name: str
    model: str
    text: tuple[str, ...]
    kind: Literal["llama", "bert"] = "llama"
    validation_fraction: float = 0.01
    calibration_tokens: int = 1_000_000
    samples: int = 128
    length: int = 512
    batch_size: int = 8
    eval_tokens: int = 131_072
    window: int = 512
    stride: int = 512
    hessian_samples: int = 32
    train_tokens: int = 4_000_000
    train_batch_size: int = 32
    dtype: str = "float32"
    train_dtype: str = "bfloat16"
    expected_s: Mapping[str, int | float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in ("calibration_tokens", "samples", "length", "batch_size", "eval_tokens",
                     "window", "stride", "hessian_samples", "train_tokens",
                     "train_batch_size"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"Table: {name} must be at least 1, got {getattr(self, name)}.")
        for name in ("samples", "hessian_samples"):
            if getattr(self, name) % self.batch_size:
                raise ValueError(
                    f"Table: {name} must be a multiple of batch_size={self.batch_size}, got"
                    f" {getattr(self, name)}."
                )

    @property
    def settings(self) -> dict[str, Any]:
        """On what results depend beside row and seed, plain data; of texts the file's name."""
        values = dataclasses.asdict(self)
        del values["rows"], values["expected_s"], values["model"]
        values["text"] = [text.rstrip("/").rsplit("/", 1)[-1] for text in self.text]
        return values


def format_of(name: str) -> QuantSpec:
    """A preset in lower case, with another block size after a "g": "mxfp4", "int4g32".

    Raises:
      ValueError: If there is no such preset.
    """
    presets = {key.lower(): spec for key, spec in PRESETS.items() if not spec.needs_key}
    found = re.fullmatch(r"(.+?)(?:g(\d+))?", name)
    if found is None or found[1] not in presets:
        raise ValueError(
            f"format_of: must be one of {', '.join(presets)}, or that with a block size, such as"
            f" int4g32, got {name!r}."
        )
    spec = presets[found[1]]
    return spec if found[2] is None else dataclasses.replace(spec, block_size=int(found[2]))


def pattern_of(name: str) -> Pattern:
    """`Unstructured` of "70%", `NM` of "2:4".

    Raises:
      ValueError: If it is neither.
    """
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)%", name):
        return parse_pattern(float(found[1]) / 100)
    return parse_pattern(n_of_m=name)


def method_of(arguments: Mapping[str, Any]) -> Method | SparseMethod | None:
    """What the arguments of a row ask for; None: nothing, the model as it is.

    Raises:
      ValueError: If there is no such method, format or pattern.
    """
    given = dict(arguments)
    given.pop("outliers", None)
    if not given:
        return None
    name = given.pop("method")
    if "pattern" in given:
        for searched in ("learning_rates", "strengths"):  # of a search, not of a method
            given.pop(searched, None)
        return SparseMethod(name, pattern_of(given.pop("pattern")), **given)
    if name not in QUANTIZERS:
        raise ValueError(f"method_of: must be one of {', '.join(QUANTIZERS)}, got {name!r}.")
    solver, is_rotated = QUANTIZERS[name]
    spec = format_of(given.pop("format"))
    inputs = given.pop("activations", None)
    rotation = spec.block_size if is_rotated and isinstance(spec.block_size, int) else None
    activations = None if inputs is None else format_of(inputs)
    return Method(solver, spec, activations=activations, rotation=rotation, **given)


def base_row(config: str, *, outliers: bool = False) -> Row:
    """The model as it is, or with injected outliers, which change nothing but rounding."""
    arguments = {"outliers": True} if outliers else {}
    name = "base-outliers" if outliers else "base"
    return Row(name, config, arguments, baseline="base" if outliers else None, group="Model")


def quantization_rows(
    config: str,
    formats: Sequence[str],
    *,
    methods: Sequence[str] = tuple(QUANTIZERS),
    activations: Sequence[bool] = (False,),
    outliers: bool = False,
    seeds: int = 3,
    baseline: str | None = "base",
) -> list[Row]:
    """Each method in each format, without and with quantized inputs of the same format.

    Args:
      config: File of the table.
      formats: See `format_of`.
      methods: Of `QUANTIZERS`.
      activations: False: weights alone, True: inputs too.
      outliers: Of the model with injected outliers, against that as the baseline.
      seeds: Of the calibration windows; methods without calibration have one.
      baseline: Name of the row to compare with.
    """
    rows = []
    for format in formats:
        spec = format_of(format)
        for method in methods:
            for is_both in activations:
                width = f"w{spec.format.bits}a{spec.format.bits if is_both else 16}"
                suffix = "-outliers" if outliers else ""
                arguments: dict[str, Any] = {"format": format, "method": method}
                if is_both:
                    arguments["activations"] = format
                if outliers:
                    arguments["outliers"] = True
                rows.append(
                    Row(
                        f"{format}-{width}-{method}{suffix}",
                        config,
                        arguments,
                        seeds=tuple(range(1 if method in SEEDLESS else seeds)),
                        baseline=f"{baseline}{suffix}" if baseline else None,
                        group=f"{format.upper()}, {width.upper()}"
                        + (", injected outliers" if outliers else ""),
                    )
                )
    return rows


def sparsity_rows(
    config: str,
    patterns: Sequence[str],
    *,
    methods: Sequence[str] = (*ONE_SHOT, *TRAINED),
    training: Mapping[str, Mapping[str, Any]] | None = None,
    seeds: int = 3,
    trained_seeds: int = 1,
) -> list[Row]:
    """Each method at each pattern.

    Args:
      config: File of the table.
      patterns: See `pattern_of`.
      methods: Of `SparseMethod`.
      training: By pattern, the arguments of `SparseMethod` for methods that train, and
        "learning_rates" that each of them tries, Elsa at each of its "strengths".
      seeds: Of calibration windows.
      trained_seeds: Of the batches of methods that train, and of the windows for their masks.
    """
    rows = []
    for pattern in patterns:
        for method in methods:
            arguments: dict[str, Any] = {"pattern": pattern, "method": method}
            count = 1 if method in SEEDLESS else seeds
            if method in TRAINED:
                arguments |= (training or {}).get(pattern, {})
                count = trained_seeds
            if method == "retrain" and pattern != "0%":
                arguments["mask_solver"] = "sparsegpt"
            if method == "retrain":
                arguments.pop("strengths", None)
            name = pattern.replace("%", "").replace(":", "to")
            rows.append(
                Row(
                    f"s{name}-{method}", config, arguments, seeds=tuple(range(count)),
                    baseline="base", group=f"Sparsity {pattern}",
                )
            )  # fmt: skip
    return rows


def language_model_rows(
    config: str,
    *,
    formats: Sequence[str],
    input_formats: Sequence[str],
    patterns: Sequence[str],
    seeds: int = 3,
) -> list[Row]:
    """All rows of a language model that do not train: as it is, quantized, pruned.

    Args:
      config: File of the table.
      formats: Of weights alone.
      input_formats: Of these those that quantize inputs, too, and the model with outliers.
      patterns: See `sparsity_rows`.
      seeds: Of calibration windows.
    """
    rows = [base_row(config), base_row(config, outliers=True)]
    for is_injected in (False, True):
        rows += quantization_rows(
            config, input_formats, activations=(True, False), outliers=is_injected, seeds=seeds
        )
    rest = [format for format in formats if format not in input_formats]
    rows += quantization_rows(config, rest, seeds=seeds)
    return rows + sparsity_rows(config, patterns, methods=ONE_SHOT, seeds=seeds)


def elsa_rows(
    config: str,
    searches: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    steps: int,
    seeds: int = 1,
) -> list[Row]:
    """Elsa beside SparseGPT and the retrained mask of SparseGPT, all at each pattern.

    Args:
      config: File of the table.
      searches: By pattern the learning rates that both try, and the strengths of Elsa. "0%" is the
        dense model, trained on as long as Elsa.
      steps: At each of them.
      seeds: Of the batches, and of the windows for the masks.
    """
    training = {
        pattern: {"steps": steps, "learning_rates": rates, "strengths": strengths}
        for pattern, (rates, strengths) in searches.items()
    }
    how: dict[str, Any] = {"training": training, "seeds": seeds, "trained_seeds": seeds}
    rows = [base_row(config)]
    for pattern in searches:
        methods = ("retrain",) if pattern == "0%" else ("sparsegpt", "retrain", "elsa")
        rows += sparsity_rows(config, (pattern,), methods=methods, **how)
    return rows


def run_order(rows: Sequence[Row]) -> list[tuple[Row, int]]:
    """Rows with their seeds as they are run: first seeds first, among them the cheap ones.

    Those that need no calibration come first, those that train last; otherwise the order stays.
    """

    def cost(row: Row) -> int:
        method = row.arguments.get("method")
        return 2 if method in TRAINED else 1 if method and method not in SEEDLESS else 0

    runs = [(row, seed) for row in rows for seed in row.seeds]
    return sorted(runs, key=lambda run: (run[1], cost(run[0])))


def expected_s(
    row: Row, table: Table, records: Mapping[tuple[str, int], dict[str, Any]], device: str
) -> float:
    """Seconds that a row will take: the mean of what rows of its method took on this device.

    Where there are none, what the table says of the method; 0 if it says nothing.
    """

    def key(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        return arguments.get("method"), "activations" in arguments, arguments.get("steps")

    found = [
        record["time_s"]
        for record in records.values()
        if record.get("device") == device
        and key(record["arguments"]) == key(row.arguments)
        and math.isfinite(record.get("time_s", math.nan))
    ]
    if found:
        return sum(found) / len(found)
    return float(table.expected_s.get(row.arguments.get("method", "base"), 0.0))

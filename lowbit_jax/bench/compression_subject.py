"""What rows of a table of compression results share: model, tokens, inputs of its layers.

A subject is loaded once; `measure` of it does one row and gives what its line holds.
"""

import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PyTree

from lowbit_jax.bench.compression_bert import (
    SOURCE_OF,
    SOURCES,
    Bert,
    layer_hessians,
    layer_inputs,
    load_bert,
    output_error,
    text_windows,
)
from lowbit_jax.bench.compression_outliers import inject_outliers
from lowbit_jax.bench.compression_rows import Table, format_of, method_of
from lowbit_jax.data.split import is_validation, sample_train
from lowbit_jax.data.text import Piece, read_documents
from lowbit_jax.models import Llama
from lowbit_jax.models.pretrained import load_pretrained
from lowbit_jax.ptq.calibrate import CompressedBlock, Compression, MatrixReport, compress_blocks
from lowbit_jax.ptq.hessian import Hessian, layer_error
from lowbit_jax.ptq.info import Info, check_info
from lowbit_jax.ptq.methods import (
    Method,
    bits_per_weight,
    calibration_model,
    compression_of,
    quantized_model,
    quantized_params,
)
from lowbit_jax.ptq.perplexity import perplexity
from lowbit_jax.ptq.sparse_methods import (
    Callbacks,
    SparseMethod,
    prune_model,
    search_training,
    training_grid,
)
from lowbit_jax.ptq.texts import calibration_batches, tokenizer_of
from lowbit_jax.ptq.windows import TrainingWindows
from lowbit_jax.sparsity import Unstructured
from lowbit_jax.train.sweep_rows import Row

# More than a text has bytes a token, so that as many bytes hold the tokens that are asked for.
_BYTES_PER_TOKEN = 8
# Windows that choose among learning rates: of validation pieces that are not evaluated, for the
# model may have been trained on the training pieces, and low rates keep what it knows by heart.
_HELD_OUT = 64
# Of methods that train: what a killed row loses at most.
_KEEP_EVERY_S = 60.0
_OnStep = Callable[[int, int], None]


@runtime_checkable
class Subject(Protocol):
    """A loaded model and its texts."""

    def measure(
        self, row: Row, seed: int, on_step: _OnStep, folder: pathlib.Path | None = None
    ) -> dict[str, Any]:
        """The numbers of a row's line.

        Args:
          row: What to measure.
          seed: Of its seeds.
          on_step: Is told what is done of how much.
          folder: Of this row and seed, where a killed run of methods that train goes on; None:
            nowhere.
        """
        ...


def load_subject(table: Table) -> Subject:
    """Loads what a table is of.

    Raises:
      ValueError: If model or text cannot be read, or the text is too short.
      OSError: If a file is missing.
    """
    return BertSubject(table) if table.kind == "bert" else LlamaSubject(table)


def split_sample(
    paths: Sequence[str], *, train_bytes: int, validation_bytes: int, fraction: float
) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Even samples of the training and of the validation pieces of a text, and what is left.

    Left are the validation pieces that are not in the sample. All three are disjoint.

    One pass. The split is that of `data.split`, so that a model that was trained on the same files
    has not seen the validation pieces.

    Args:
      paths: See `read_documents`.
      train_bytes: Of the first sample: that many, or half as many, where there are.
      validation_bytes: Of the second, likewise.
      fraction: Of the pieces, for validation.

    Raises:
      ValueError: If one of them is empty.
    """
    kept: list[bytes] = []

    def tee() -> Iterator[Piece]:
        for index, piece in enumerate(read_documents(paths)):
            if is_validation(index, fraction):
                kept.append(piece.text)
            yield piece

    train = sample_train(tee(), train_bytes, fraction)
    stride = max(1, sum(map(len, kept)) // max(validation_bytes, 1))
    if not train or not kept:
        raise ValueError(
            "split_sample: needs pieces for training and for validation, got"
            f" {len(train)} and {len(kept)} in {', '.join(paths)}; take a longer text, or a larger"
            " validation_fraction."
        )
    return train, kept[::stride], [piece for at, piece in enumerate(kept) if at % stride]


class LlamaSubject:
    """A language model: its perplexity, and what compression does to its layers."""

    def __init__(self, table: Table):
        """Loads model, tokenizer and the texts for calibration and evaluation."""
        self.table = table
        path = pathlib.Path(table.model)
        loaded = load_pretrained(path, table.dtype)
        self.model = loaded.model
        self._tokenizer = tokenizer_of(path, loaded)
        train, validation, self._left = split_sample(
            table.text,
            train_bytes=_BYTES_PER_TOKEN * table.calibration_tokens,
            validation_bytes=_BYTES_PER_TOKEN * (table.eval_tokens + table.window),
            fraction=table.validation_fraction,
        )
        self.calibration = self._tokens(train, table.calibration_tokens)
        self.evaluation = self._tokens(validation, table.eval_tokens + 1)
        self._params = {False: loaded.params}
        self._hessians: dict[bool, dict[str, Float[Array, "l k k"]]] = {}

    @functools.cached_property
    def training(self) -> Integer[np.ndarray, " n"]:
        """Tokens for methods that train."""
        table = self.table
        pieces = read_documents(table.text)
        wanted = _BYTES_PER_TOKEN * table.train_tokens
        found = sample_train(pieces, wanted, table.validation_fraction)
        return self._tokens(found, table.train_tokens)

    @functools.cached_property
    def held_out(self) -> list[Integer[np.ndarray, "b t"]]:
        """Windows of validation pieces that are not evaluated, to choose a learning rate by.

        Raises:
          ValueError: If there are too few of them.
        """
        table, batch_size = self.table, self.table.train_batch_size
        batches = max(_HELD_OUT // batch_size, 1)
        wanted = batches * batch_size * table.length + 1
        tokens = self._tokens(self._left, wanted) if self._left else np.zeros(0, np.int32)
        if len(tokens) < wanted:
            raise ValueError(
                f"LlamaSubject: needs {wanted} tokens of validation pieces beside the evaluated"
                f" ones to choose a learning rate, got {len(tokens)}; take a longer text, a larger"
                " validation_fraction, or fewer eval_tokens."
            )
        places = np.arange(batches * batch_size)[:, None] * table.length
        windows = tokens[places + np.arange(table.length + 1)]
        return list(windows.reshape(batches, batch_size, -1))

    def params(self, outliers: bool) -> Mapping[str, Any]:
        """The parameters on the device, as they are or with injected outliers."""
        if outliers not in self._params:
            changed = inject_outliers(self._params[False])
            self._params[outliers] = jax.tree.map(jnp.asarray, changed)
        return self._params[outliers]

    def hessians(self, outliers: bool) -> dict[str, Float[Array, "l k k"]]:
        """Of the inputs of each matrix of the uncompressed model, on validation text, by path."""
        if outliers not in self._hessians:
            table = self.table
            batches = calibration_batches(
                self.evaluation, table.hessian_samples, table.length, table.batch_size, seed=0
            )
            # Nothing is compressed: what a matrix "keeps" is itself, and the Hessian beside it.
            recorder = Compression(
                lambda path, w, hessian: (
                    (w, hessian.matrix),
                    Info(jnp.float32(0), jnp.float32(0), jnp.int32(0)),
                ),
                lambda path, kept: kept[0],
            )
            params = self.params(outliers)
            blocks = list(compress_blocks(self.model, params, batches, recorder))
            found: dict[str, Array] = {}
            by_bytes: dict[bytes, Array] = {}
            for path in blocks[0].kept:
                stacked = np.stack([block.kept[path][1] for block in blocks])
                # Matrices that share an input share its Hessian.
                start = stacked[0].tobytes()
                found[path] = by_bytes.setdefault(start, jnp.asarray(stacked))
            self._hessians[outliers] = found
        return self._hessians[outliers]

    def measure(
        self, row: Row, seed: int, on_step: _OnStep, folder: pathlib.Path | None = None
    ) -> dict[str, Any]:
        """Compresses, and predicts the validation text; see `Subject`."""
        outliers = bool(row.arguments.get("outliers", False))
        method = method_of(row.arguments)
        start = time.perf_counter()
        model, params = self.model, self.params(outliers)
        found: dict[str, Any] = {"bits_per_weight": None, "layer_error": None}
        if isinstance(method, Method):
            model, params, bits = self._quantized(method, outliers, seed, on_step)
            found["bits_per_weight"] = bits
        elif isinstance(method, SparseMethod):
            pruned, chosen = self._pruned(row, method, outliers, seed, on_step, folder)
            params, found["bits_per_weight"] = pruned.params, pruned.bits_per_weight
            found |= chosen
        params = jax.block_until_ready(jax.tree.map(jnp.asarray, params))
        found["solve_s"] = time.perf_counter() - start
        if method is not None and not (isinstance(method, SparseMethod) and method.is_trained):
            found |= self._layer_errors(params, outliers)  # training keeps the loss, no outputs
        result = perplexity(
            model, params, self.evaluation, window=self.table.window, stride=self.table.stride,
            batch_size=self.table.batch_size,
        )  # fmt: skip
        return found | {
            "validation_loss": result.loss,
            "perplexity": result.perplexity,
            "validation_tokens": result.tokens,
        }

    def _tokens(self, pieces: Sequence[bytes], limit: int) -> Integer[np.ndarray, " n"]:
        encoded = self._tokenizer.encode_batch(pieces)
        # From each piece as much, so that the first ones do not fill the limit.
        share = -(-limit // len(encoded))
        short = sum(max(0, share - len(tokens)) for tokens in encoded)
        share += -(-short // len(encoded))
        return np.concatenate([tokens[:share] for tokens in encoded])[:limit].astype(np.int32)

    def _calibration(
        self, seed: int, tokens: Integer[np.ndarray, " n"] | None = None
    ) -> list[Integer[np.ndarray, "b t"]]:
        """Windows that the seed draws, of other tokens than those for calibration if given."""
        table = self.table
        tokens = self.calibration if tokens is None else tokens
        return calibration_batches(tokens, table.samples, table.length, table.batch_size, seed)

    def _quantized(self, method: Method, outliers: bool, seed: int, on_step: _OnStep):
        """Model, parameters and bits a weight."""
        params, compression = self.params(outliers), compression_of(method)
        if method.solver == "rtn":
            made = nearest_blocks(params, compression, self.hessians(outliers))
        else:
            model = calibration_model(self.model, method)
            made = compress_blocks(model, params, self._calibration(seed), compression)
        blocks, total = [], self.model.config.n_layers
        for block in made:
            blocks.append(block)
            on_step(len(blocks), total)
        bits = bits_per_weight(blocks)
        if method.activations is None:
            # Float weights in the original basis: all such rows run what was compiled once.
            return self.model, quantized_params(params, blocks, compression), bits
        # Inputs in NVFP4 take the abs-max of a batch, for RTN needs no calibration to have another.
        blocks = [block._replace(input_absmax={}) for block in blocks]
        return *quantized_model(self.model, params, blocks, method), bits

    def _pruned(
        self,
        row: Row,
        method: SparseMethod,
        outliers: bool,
        seed: int,
        on_step: _OnStep,
        folder: pathlib.Path | None,
    ):
        """What is left of the model, and of methods that train what their learning rates gave."""
        table, params, count = self.table, self.params(outliers), itertools.count(1)
        on = Callbacks(
            block=lambda block: on_step(next(count), self.model.config.n_layers),
            record=lambda record: on_step(record.step, method.steps),
        )
        if not method.is_trained:
            windows = self._calibration(seed) if method.needs_calibration else ()
            return prune_model(self.model, params, method, calibration=windows, on=on), {}
        trained = method
        if method.solver == "retrain":
            windows = self._calibration(seed, self.training) if method.needs_calibration else ()
            first = prune_model(
                self.model, params, method.one_shot, calibration=windows, on=on, folder=folder
            )
            params = first.params
            # The mask is there, found in `dtype`: with nothing more to go, its zeros stay.
            trained = dataclasses.replace(
                method, pattern=Unstructured(0.0), mask_solver="magnitude"
            )
        arguments = row.arguments
        pruned, best, losses_of = search_training(
            Llama(dataclasses.replace(self.model.config, dtype=table.train_dtype)),
            params,
            training_grid(
                trained, arguments.get("learning_rates", ()), arguments.get("strengths", ())
            ),
            validation=self.held_out,
            batches=TrainingWindows(self.training, table.length, table.train_batch_size, seed),
            on=on,
            folder=folder,
            keep_every_s=_KEEP_EVERY_S,
        )
        losses = {m.tried: x if np.isfinite(x) else None for m, x in losses_of.items()}
        chosen = {"learning_rate": best.learning_rate, "losses_held_out": losses}
        if best.solver != "retrain":
            chosen["strength"] = best.strength
        return pruned, chosen

    def _layer_errors(self, params: PyTree, outliers: bool) -> dict[str, Any]:
        """Mean over all matrices, and by matrix; with inputs as the uncompressed model has them."""
        before, by_name = self.params(outliers)["layers"], {}
        for path, matrix in self.hessians(outliers).items():
            part, name = path.split("/")
            weight = params["layers"][part][name]["weight"]
            by_name[name] = _errors(before[part][name]["weight"], weight, matrix)
        means = {name: float(np.mean(errors)) for name, errors in by_name.items()}
        return {
            "layer_error": float(np.mean([np.asarray(e) for e in by_name.values()])),
            "layer_errors": means,
        }


def nearest_blocks(
    params: Mapping[str, Any],
    compression: Compression,
    hessians: Mapping[str, Float[Array, "l k k"]],
) -> Iterator[CompressedBlock]:
    """Blocks of a method that needs no calibration: no block is run.

    Args:
      params: Stacked over layers.
      compression: Of a method whose result does not depend on the Hessian.
      hessians: By path, for the errors in the reports.
    """
    count = len(next(iter(hessians.values())))
    for index in range(count):
        kept, reports = {}, []
        for path, stacked in hessians.items():
            part, name = path.split("/")
            w = jnp.asarray(params["layers"][part][name]["weight"][index], jnp.float32)
            start = time.perf_counter()
            result, info = compression.solve(path, w, Hessian(stacked[index], jnp.float32(0)))
            check_info(f"layer {index}, {path}", info)
            kept[path] = jax.tree.map(np.asarray, result)
            numbers = float(info.error), float(info.damping), int(info.failures)
            reports.append(MatrixReport(index, path, *numbers, time.perf_counter() - start))
        yield CompressedBlock(kept, tuple(reports))


@jax.jit
def _errors(w, weight, matrices):
    """Relative errors `(layers,)` of stacked matrices; `weight` may hold codes."""

    def of_layer(parts):
        w, weight, matrix = parts
        values = weight.dequantized() if hasattr(weight, "dequantized") else weight
        return layer_error(w, values, matrix)

    return jax.lax.map(of_layer, (w, weight, matrices))


class BertSubject:
    """An encoder: errors of the outputs of its single layers on validation text."""

    def __init__(self, table: Table):
        """Loads encoder and texts."""
        self.table = table
        self.bert: Bert = load_bert(pathlib.Path(table.model))
        self._weights = {name: jnp.asarray(w) for name, w in self.bert.weights.items()}
        train, validation, _ = split_sample(
            table.text,
            train_bytes=_BYTES_PER_TOKEN * table.calibration_tokens,
            validation_bytes=_BYTES_PER_TOKEN * table.hessian_samples * table.length,
            fraction=table.validation_fraction,
        )
        tokenizer = self.bert.tokenizer
        self._windows = text_windows(tokenizer, train, table.length)
        held_out = text_windows(tokenizer, validation, table.length)
        count, wanted = len(held_out), table.hessian_samples
        if count < wanted:
            raise ValueError(
                f"BertSubject: needs {wanted} windows of {table.length} validation tokens, got"
                f" {count}; take a longer text, or fewer or shorter windows."
            )
        chosen = held_out[np.arange(wanted) * count // wanted]
        found = layer_inputs(self._weights, jnp.asarray(chosen), self.bert.shape)[0]
        self._inputs = jax.block_until_ready(found)
        self._hessians: tuple[int, Any] = (-1, None)
        self._solved: tuple[Any, Any] = (None, None)

    def measure(
        self, row: Row, seed: int, on_step: _OnStep, folder: pathlib.Path | None = None
    ) -> dict[str, Any]:
        """Solves every matrix, for the inputs that it has in the uncompressed encoder."""
        del folder  # A row takes seconds.
        arguments = dict(row.arguments)
        inputs = arguments.pop("activations", None)
        method = method_of(arguments)
        if not isinstance(method, Method):
            raise ValueError(f"BertSubject: rows quantize, got {row.name}; take a Llama to prune.")
        activations = None if inputs is None else format_of(inputs)
        start = time.perf_counter()
        kept, bits = self._solve(method, seed, on_step)
        found: dict[str, Any] = {"bits_per_weight": bits, "solve_s": time.perf_counter() - start}
        errors = {}
        for (layer, path), result in kept.items():
            errors.setdefault(path, []).append(
                output_error(
                    jnp.asarray(self.bert.matrix(layer, path)),
                    self._inputs[layer][SOURCE_OF[path]],
                    result,
                    activations=activations,
                    rotation=method.hadamard,
                )
            )
        by_path = {path: float(np.mean(values)) for path, values in errors.items()}
        # As many matrices of each kind, so that the mean of means is that of all.
        return found | {"layer_error": float(np.mean([*by_path.values()])), "layer_errors": by_path}

    def _solve(self, method: Method, seed: int, on_step: _OnStep):
        """What is kept of each matrix, and bits a weight; of the last method as it was."""
        if self._solved[0] == (method, seed):
            return self._solved[1]
        hessians, compression = self._calibrated(seed), compression_of(method)
        kept, count = {}, self.bert.shape.n_layers
        for layer in range(count):
            for source, paths in SOURCES.items():
                for path in paths:
                    w = jnp.asarray(self.bert.matrix(layer, path))
                    result, info = compression.solve(path, w, hessians[layer][source])
                    check_info(f"layer {layer}, {path}", info)
                    kept[layer, path] = result
            on_step(layer + 1, count)
        block = CompressedBlock({f"{l} {p}": value for (l, p), value in kept.items()}, ())
        self._solved = (method, seed), (kept, bits_per_weight([block]))
        return self._solved[1]

    def _calibrated(self, seed: int) -> list[dict[str, Hessian]]:
        """Hessians of windows that the seed draws."""
        if self._hessians[0] != seed:
            table = self.table
            drawn = np.random.default_rng(seed).choice(len(self._windows), table.samples, False)
            batches = self._windows[drawn].reshape(-1, table.batch_size, table.length)
            self._hessians = seed, layer_hessians(self.bert, self._weights, list(batches))
        return self._hessians[1]

"""Named ways to prune a model, and the function that prunes one by any of them.

    magnitude  the smallest weights go
    wanda      those that add least to the outputs of their row
    sparsegpt  column by column, what stays moves to make up; it may be quantized in the same pass
    elsa       training on the loss of the model under ADMM
    elsa_l     the same in 6 bytes of state a weight instead of 16
    retrain    a mask of the first three, then training of what it left: the control of elsa

The first three solve block after block for calibration tokens; the others train. Only the seven
matrices of each block are pruned: never embeddings, norms or the head, which train along.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree, Shaped

from lowbit_jax.models import Llama
from lowbit_jax.models.llama import QUANTIZABLE_PATHS
from lowbit_jax.numerics import QTensor, QuantSpec, dequantize
from lowbit_jax.optim.masks import match_paths, resolve_mask
from lowbit_jax.ptq.calibrate import CompressedBlock, Compression, MatrixReport, compress_blocks
from lowbit_jax.ptq.descent import Diverged, Keep, Record
from lowbit_jax.ptq.elsa import ElsaSettings, prune_by_elsa, retrain
from lowbit_jax.ptq.hessian import Hessian
from lowbit_jax.ptq.magnitude import magnitude
from lowbit_jax.ptq.methods import (
    Method,
    bits_per_weight,
    quantized_model,
    quantized_params,
)
from lowbit_jax.ptq.sparsegpt import sparsegpt
from lowbit_jax.ptq.wanda import wanda
from lowbit_jax.ptq.windows import language_model_loss, mean_loss
from lowbit_jax.sparsity import NM, Pattern, onto_pattern
from lowbit_jax.sparsity.patterns import Comparison
from lowbit_jax.sparsity.sparse_projection import Budget

OneShot = Literal["magnitude", "wanda", "sparsegpt"]
Trained = Literal["elsa", "elsa_l", "retrain"]
PRUNED = match_paths(*QUANTIZABLE_PATHS)


@dataclasses.dataclass(frozen=True)
class SparseMethod:
    """How the seven matrices of each block are pruned.

    Attributes:
      solver: See the head of this file.
      pattern: `Unstructured(fraction that goes)` or `NM(kept, of)`.
      per: Entries that compete, see `sparsity.mask_of`; None: those of a row for wanda, else those
        of a matrix.
      budget: "leaf": every matrix is equally sparse; "tree": one budget for all of them, where the
        smallest entries of the whole model go. Not of wanda and sparsegpt, whose scores of
        different matrices do not compare.
      spec: Of the weights that stay, sparsegpt alone; None: not quantized.
      damping: Of the Hessian, sparsegpt alone, see `gptq`.
      mask_solver: Of retrain: what is pruned before the training. sparsegpt also moves weights.
      steps: Of the trained ones, like all below: of the optimizer.
      learning_rate: At the first step; it falls linearly to 0.
      strength: Of Elsa, like all below but the last, see `ElsaSettings`: lam at the first step.
      final_strength: At the last; None: the same.
      interval: Steps between projections.
      is_objective_aware: Whether the projection weighs with Adam's second moments.
      max_grad_norm: To which gradients are clipped; None: not clipped.

    Raises:
      ValueError: If there is no such solver, or what it cannot have was given.
    """

    solver: str
    pattern: Pattern
    per: Comparison | None = None
    budget: Budget = "leaf"
    spec: QuantSpec | None = None
    damping: float = 0.01
    mask_solver: str = "magnitude"
    steps: int = 4096
    learning_rate: float = 2e-4
    strength: float = 0.01
    final_strength: float | None = None
    interval: int = 32
    is_objective_aware: bool = True
    max_grad_norm: float | None = 1.0

    def __post_init__(self):
        one_shot = get_args(OneShot)
        if self.solver not in (*one_shot, *get_args(Trained)):
            raise ValueError(
                f"SparseMethod: solver must be one of {', '.join(one_shot + get_args(Trained))},"
                f" got {self.solver!r}."
            )
        if self.mask_solver not in one_shot:
            raise ValueError(
                f"SparseMethod: mask_solver must be one of {', '.join(one_shot)}, got"
                f" {self.mask_solver!r}."
            )
        if self.budget == "tree" and self._masked_by in ("wanda", "sparsegpt"):
            raise ValueError(
                f"SparseMethod: {self._masked_by} compares entries within a matrix, got"
                " budget='tree'; take magnitude, elsa or retrain of a magnitude mask, or"
                " budget='leaf'."
            )
        if self.spec is not None and self.solver != "sparsegpt":
            raise ValueError(
                f"SparseMethod: of these only sparsegpt quantizes what stays, got {self.solver}"
                f" with {self.spec}; leave spec None, or quantize afterwards."
            )
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"SparseMethod: damping must be 0 or positive, got {self.damping}.")
        if self.steps < 1 or not self.learning_rate > 0:
            raise ValueError(
                "SparseMethod: steps must be at least 1 and learning_rate positive, got"
                f" {self.steps} and {self.learning_rate}."
            )
        onto_pattern(self.pattern, self.comparison, self.budget)  # which says what it cannot do
        if self.solver.startswith("elsa"):
            _ = self.elsa_settings

    @property
    def _masked_by(self) -> str:
        return self.mask_solver if self.solver == "retrain" else self.solver

    @property
    def is_trained(self) -> bool:
        """Whether it takes a batch a step."""
        return self.solver in get_args(Trained)

    @property
    def needs_calibration(self) -> bool:
        """Whether it needs the inputs of matrices. magnitude takes them for its report alone."""
        return self._masked_by in ("wanda", "sparsegpt")

    @property
    def comparison(self) -> Comparison:
        """Entries that compete."""
        if self.per is None:
            return "row" if self._masked_by == "wanda" else "matrix"
        return self.per

    @property
    def one_shot(self) -> "SparseMethod":
        """Of retrain what comes before the training."""
        return dataclasses.replace(self, solver=self._masked_by)

    @property
    def tried(self) -> str:
        """What a search tells methods apart by: the learning rate, and of Elsa the strength."""
        strength = f", strength {self.strength:g}" if self.solver != "retrain" else ""
        return f"learning rate {self.learning_rate:g}{strength}"

    @property
    def elsa_settings(self) -> ElsaSettings:
        """For `prune_by_elsa`."""
        return ElsaSettings(
            self.pattern,
            steps=self.steps,
            learning_rate=self.learning_rate,
            strength=self.strength,
            final_strength=self.final_strength,
            interval=self.interval,
            per=self.comparison,
            budget=self.budget,
            is_objective_aware=self.is_objective_aware,
            is_low_precision=self.solver == "elsa_l",
            max_grad_norm=self.max_grad_norm,
        )


def sparse_compression_of(method: SparseMethod) -> Compression:
    """What `compress_blocks` needs for magnitude, wanda and sparsegpt.

    Kept is the pruned matrix in float32, or a `QTensor` where there is a spec.

    Raises:
      ValueError: If the method trains, or has one budget for all matrices.
    """
    if method.is_trained or method.budget == "tree":
        raise ValueError(
            "sparse_compression_of: solves one matrix at a time, got solver="
            f"{method.solver!r} and budget={method.budget!r}; use prune_model."
        )
    pattern, per = method.pattern, method.comparison

    def solve(path: str, w: jax.Array, hessian: Hessian) -> tuple[PyTree, Any]:
        if isinstance(pattern, NM) and w.shape[1] % pattern.m:
            raise ValueError(
                f"sparse_compression_of: {pattern} needs widths that are multiples of {pattern.m},"
                f" got {w.shape} of {path}; choose another pattern."
            )
        if method.solver == "sparsegpt":
            return sparsegpt(
                w, hessian.matrix, pattern, per=per, damping=method.damping, spec=method.spec
            )
        solver = wanda if method.solver == "wanda" else magnitude
        return solver(w, hessian.matrix, pattern, per=per)

    def weight(path: str, kept: PyTree) -> jax.Array:
        del path
        if isinstance(kept, QTensor):
            return dequantize(jax.tree.map(jnp.asarray, kept))
        return jnp.asarray(kept)

    return Compression(solve, weight)


class Pruned(NamedTuple):
    """A pruned model.

    Attributes:
      params: In the structure and dtypes that they had.
      reports: Of the matrices that were solved for calibration tokens.
      records: Of the training.
      bits_per_weight: Of the quantized ones, codes and scales without the mask; else None.
      coded: Of the quantized ones the parameters with a `CodedWeight` for each matrix, as
        `quantized_model` gives them; else None.
    """

    params: PyTree
    reports: tuple[MatrixReport, ...]
    records: tuple[Record, ...]
    bits_per_weight: float | None
    coded: PyTree | None = None


class Callbacks(NamedTuple):
    """For progress bars.

    Attributes:
      block: With each block that was solved.
      record: With each record of a training.
      method: Of a search, with the method before each of its runs.
    """

    block: Callable[[CompressedBlock], None] = lambda block: None
    record: Callable[[Record], None] = lambda record: None
    method: Callable[[SparseMethod], None] = lambda method: None


def prune_model(
    model: Llama,
    params: Mapping[str, Any],
    method: SparseMethod,
    *,
    calibration: Sequence[Shaped[np.ndarray, "..."]] = (),
    batches: Iterable[Shaped[np.ndarray, "..."]] = (),
    folder: pathlib.Path | None = None,
    settings: Mapping[str, Any] | None = None,
    on: Callbacks | None = None,
    keep_every_s: float = 300.0,
) -> Pruned:
    """Prunes the seven matrices of each block.

    Args:
      model: Its recipes must not need a key.
      params: Its parameters, stacked over layers; not changed. Arrays on the host will do: solved
        are they a layer at a time, trained on the device as a whole, in float32.
      method: What to do.
      calibration: Of the solved ones, tokens as `compress_blocks` takes them. magnitude does
        without, and then reports nothing.
      batches: Of the trained ones, `(b, t + 1)` tokens a step, as `TrainingWindows` gives.
      folder: Where a run that is killed goes on; None: nowhere.
      settings: What the result depends on beside all this; plain data for JSON.
      on: Called along the way.
      keep_every_s: Of a training, see `Keep`.

    Raises:
      ValueError: As `compress_blocks` and `descend`; or if N:M does not divide a width.
    """
    on = Callbacks() if on is None else on
    arguments = folder, {} if settings is None else settings, on
    start = _solved(model, params, method, calibration, *arguments)
    if not method.is_trained:
        return start
    return _trained(model, start, method, batches, *arguments, keep_every_s)


def search_training(
    model: Llama,
    params: Mapping[str, Any],
    methods: Sequence[SparseMethod],
    *,
    validation: Sequence[Shaped[np.ndarray, "..."]],
    calibration: Sequence[Shaped[np.ndarray, "..."]] = (),
    batches: Iterable[Shaped[np.ndarray, "..."]] = (),
    folder: pathlib.Path | None = None,
    settings: Mapping[str, Any] | None = None,
    on: Callbacks | None = None,
    keep_every_s: float = 300.0,
) -> tuple[Pruned, SparseMethod, dict[SparseMethod, float]]:
    """`prune_model` by each method, and the result of least loss on tokens held out.

    Elsa and retrain compare honestly when both are given the same rates, steps and batches.

    Args:
      model: As in `prune_model`, like all not listed.
      params: See there.
      methods: Of one that trains, with different learning rates or strengths; see `training_grid`.
      validation: Batches `(b, t + 1)` of one shape that are in no other argument.
      calibration: See `prune_model`.
      batches: One iterable that can be iterated over for each method.
      folder: With one folder a method.
      settings: See `prune_model`.
      on: See there.
      keep_every_s: See there.

    Returns:
      The best, its parameters on the host; its method; and the loss of each method, infinite where
      it or the loss of the training was not finite.

    Raises:
      ValueError: As `prune_model`, but for methods that diverge while another does not; or if they
        do not train, or differ in anything else, or are the same twice, or there are none, or no
        validation.
    """
    who = "search_training"
    methods = tuple(methods)
    firsts = {_without_search(method) for method in methods}
    if len(firsts) != 1 or not methods[0].is_trained or len(set(methods)) < len(methods):
        got = "; ".join(f"{method.solver} at {method.tried}" for method in methods) or "none"
        if len(firsts) > 1:
            names = [field.name for field in dataclasses.fields(SparseMethod)]
            differ = [n for n in names if len({getattr(first, n) for first in firsts}) > 1]
            got = f"methods that differ in {', '.join(differ)}"
        raise ValueError(
            f"{who}: needs one method that trains, at different learning rates or strengths, got"
            f" {got}."
        )
    if not len(validation):
        raise ValueError(f"{who}: needs validation batches, got none; hold windows out.")
    if iter(batches) is batches:
        raise ValueError(
            f"{who}: batches must start anew for each method, got an iterator; pass a list or"
            " TrainingWindows."
        )
    on = Callbacks() if on is None else on
    settings = {} if settings is None else settings
    start = _solved(model, params, methods[0], calibration, folder, settings, on)
    losses: dict[SparseMethod, float] = {}
    best = None
    for method in methods:
        on.method(method)
        losses[method] = math.inf
        try:
            found = _trained(model, start, method, batches, folder, settings, on, keep_every_s)
        except Diverged:  # Not stored: its frames hold parameters and state on the device.
            continue
        loss = mean_loss(model, found.params, validation)
        if not math.isfinite(loss):
            continue
        losses[method] = loss
        if best is None or loss < losses[best[1]]:
            best = found._replace(params=jax.tree.map(np.asarray, found.params)), method
    if best is None:
        tried = "; ".join(f"{loss} at {method.tried}" for method, loss in losses.items())
        raise ValueError(
            f"{who}: the held-out loss must be finite for one method at least, got {tried}; lower"
            " learning rate or strength, or look for NaN in the parameters and batches."
        )
    return *best, losses


def training_grid(
    method: SparseMethod, learning_rates: Sequence[float], strengths: Sequence[float] = ()
) -> tuple[SparseMethod, ...]:
    """The method at each learning rate, and of Elsa at each strength; none: its own."""
    used = (strengths if method.solver != "retrain" else ()) or (method.strength,)
    return tuple(
        dataclasses.replace(method, learning_rate=rate, strength=strength)
        for strength in used
        for rate in learning_rates or (method.learning_rate,)
    )


def _without_search(method: SparseMethod) -> SparseMethod:
    """The same for all methods of a search."""
    return dataclasses.replace(
        method, learning_rate=SparseMethod.learning_rate, strength=SparseMethod.strength
    )


def _solved(model, params, method, calibration, folder, settings, on) -> Pruned:
    """What does not train: a whole method, or what is there before the training."""
    if method.solver.startswith("elsa"):
        return Pruned(params, (), (), None)
    first = method.one_shot
    if not first.needs_calibration and (first.budget == "tree" or not len(calibration)):
        return Pruned(_without_inputs(params, first), (), (), None)
    compression, blocks = sparse_compression_of(first), []
    for block in compress_blocks(
        model,
        params,
        calibration,
        compression,
        folder=None if folder is None else folder / "blocks",
        settings={**settings, "pruned_by": repr(_without_training(first))},
    ):
        blocks.append(block)
        on.block(block)
    reports = tuple(report for block in blocks for report in block.reports)
    pruned = Pruned(quantized_params(params, blocks, compression), reports, (), None)
    if first.spec is None:
        return pruned
    _, coded = quantized_model(model, params, blocks, Method("rtn", first.spec))
    return pruned._replace(bits_per_weight=bits_per_weight(blocks), coded=coded)


def _without_inputs(params: PyTree, method: SparseMethod) -> PyTree:
    """Magnitude; one matrix at a time on the device, unless all share a budget."""
    project = jax.jit(onto_pattern(method.pattern, method.comparison, method.budget))
    flags = resolve_mask(PRUNED, params)
    chosen = [p for p, f in zip(*map(jax.tree.leaves, (params, flags)), strict=True) if f]
    if method.budget == "tree":
        pruned = iter(jax.tree.map(np.asarray, project(chosen)))
    else:
        pruned = (np.stack([np.asarray(project(w)) for w in p]) for p in chosen)
    return jax.tree.map(lambda f, p: next(pruned) if f else p, flags, params)


def _without_training(method: SparseMethod) -> SparseMethod:
    """The same for all methods of a search, whose mask is found once."""
    return dataclasses.replace(_without_search(method), steps=1)


def _trained(model, start: Pruned, method, batches, folder, settings, on, keep_every_s) -> Pruned:
    loss_fn = language_model_loss(model)
    keep = None
    if folder is not None:
        about = {**settings, "method": repr(method), "model_config": repr(model.config)}
        keep = Keep(folder / method.tried.replace(", ", "_").replace(" ", "_"), about, keep_every_s)
    options = {"mask": PRUNED, "report": on.record, "keep": keep}
    if method.solver == "retrain":
        params, records = retrain(
            loss_fn,
            start.params,
            batches,
            steps=method.steps,
            learning_rate=method.learning_rate,
            max_grad_norm=method.max_grad_norm,
            **options,
        )
    else:
        params, records = prune_by_elsa(
            loss_fn, start.params, batches, method.elsa_settings, **options
        )
    return start._replace(params=params, records=records)

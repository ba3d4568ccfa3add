"""Elsa as a procedure: prune a trained model by a few thousand steps on its own loss.

One-shot solvers keep the outputs of single layers and collapse beyond 50 to 60 % of zeros; Elsa
(arXiv:2510.01650) minimises the loss of the whole model under the constraint; see
`lowbit_jax/optim/admm.py`. Because it trains, its honest control is `retrain`: a mask found in one
shot and the same number of steps for what it left.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from lowbit_jax.optim.admm import (
    admm_finish,
    admm_strength,
    constraint_gap,
    elsa,
    elsa_low_precision,
    find_admm_state,
)
from lowbit_jax.optim.low_precision import dequantize_leaves
from lowbit_jax.optim.masks import Mask, resolve_mask
from lowbit_jax.sparsity import Pattern, onto_pattern
from lowbit_jax.sparsity.patterns import Comparison
from lowbit_jax.sparsity.sparse_projection import Budget, SparseProjection

LossFn = Callable[[PyTree, Any], Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class ElsaSettings:
    """What `prune_by_elsa` does; plain data. The defaults are those of the released code.

    Attributes:
      pattern: What stays.
      steps: Of the optimizer; 4096 in the released example.
      learning_rate: At the first step; it falls linearly to 0. 1e-5 to 2e-4 for large models, more
        for sparser targets.
      strength: lam at the first step.
      final_strength: At the last; None: the same.
      strength_kind: How it goes from one to the other, see `admm_strength`.
      interval: Steps between projections.
      per: Entries that compete, see `mask_of`.
      budget: "leaf": every matrix is equally sparse; "tree": one budget for all of them.
      is_objective_aware: Whether the projection weighs with Adam's second moments.
      is_low_precision: Elsa-L: 6 bytes of state a weight instead of 16.
      max_grad_norm: To which gradients are clipped before the pull is added; None: not clipped.
    """

    pattern: Pattern
    steps: int = 4096
    learning_rate: float = 2e-4
    strength: float = 0.01
    final_strength: float | None = None
    strength_kind: str = "cosine"
    interval: int = 32
    per: Comparison = "matrix"
    budget: Budget = "leaf"
    is_objective_aware: bool = True
    is_low_precision: bool = False
    max_grad_norm: float | None = 1.0

    def __post_init__(self):
        if not 0 < self.interval <= self.steps:
            raise ValueError(
                f"ElsaSettings: interval must lie in 1 .. steps, got interval={self.interval} and"
                f" steps={self.steps}; z and u would never be updated."
            )

    @property
    def projection(self) -> SparseProjection:
        """Onto the pattern."""
        return onto_pattern(self.pattern, self.per, self.budget)

    def optimizer(self, mask: Mask = None) -> optax.GradientTransformation:
        """`elsa` or `elsa_low_precision` with these settings, for the leaves of `mask`."""
        final = self.strength if self.final_strength is None else self.final_strength
        return (elsa_low_precision if self.is_low_precision else elsa)(
            _linear_decay(self.learning_rate, self.steps),
            self.projection,
            strength=admm_strength(self.strength, final, self.steps, self.strength_kind),
            interval=self.interval,
            is_objective_aware=self.is_objective_aware,
            mask=mask,
            max_grad_norm=self.max_grad_norm,
        )


class ElsaRecord(NamedTuple):
    """What is seen after an update of z and u.

    Attributes:
      step: Steps so far.
      loss: Mean over the steps since the last record.
      gap: `|x - z| / |x|` of the constrained leaves.
      flips: Fraction of their entries that z has zeroed or brought back since the last record.
    """

    step: int
    loss: float
    gap: float
    flips: float


def prune_by_elsa(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    settings: ElsaSettings,
    *,
    mask: Mask,
    report: Callable[[ElsaRecord], None] | None = None,
) -> tuple[PyTree, tuple[ElsaRecord, ...]]:
    """`params` on the pattern, after `settings.steps` steps on `loss_fn`.

    Args:
      loss_fn: `(params, batch) -> loss`, for example nats a token of the next token.
      params: Of a trained model; not changed. Float leaves.
      batches: One a step.
      settings: See there.
      mask: Leaves that are pruned, as `optax.masked` takes it (`match_paths` builds one): the
        matrices of the blocks. The others train along. None: all of them.
      report: Called with each record as it comes.

    Returns:
      `(params, records)`. The zeros of the pruned leaves are the pattern.

    Raises:
      ValueError: If there are fewer batches than steps, or the loss becomes NaN or infinite.

    References:
      Elsa: extreme LLM sparsity by surrogate-free ADMM, arXiv:2510.01650.
    """
    tx = settings.optimizer(mask)
    records = []

    @jax.jit
    def look(params, state, zeros):
        now = _zeros_of(state)
        changed = sum(jnp.sum(a != b) for a, b in zip(now, zeros, strict=True))
        return constraint_gap(params, state), changed / sum(z.size for z in now), now

    zeros = jax.jit(_zeros_of)(tx.init(params))

    def watch(step, losses, params, state):
        nonlocal zeros
        gap, flips, zeros = look(params, state, zeros)
        record = ElsaRecord(
            step, _mean_loss("prune_by_elsa", step, losses), float(gap), float(flips)
        )
        records.append(record)
        if report is not None:
            report(record)

    params, state = _descend(
        "prune_by_elsa", loss_fn, tx, params, batches, settings.steps, settings.interval, watch
    )
    finish = jax.jit(
        lambda params, state: admm_finish(
            params,
            state,
            settings.projection,
            mask=mask,
            is_objective_aware=settings.is_objective_aware,
        )
    )
    return finish(params, state), tuple(records)


def retrain(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    *,
    steps: int,
    learning_rate: float,
    mask: Mask = None,
    max_grad_norm: float | None = 1.0,
    b2: float = 0.95,
) -> PyTree:
    """Adam for what a mask has left: zeros of the pruned leaves stay zero.

    Args:
      loss_fn: As in `prune_by_elsa`.
      params: Pruned.
      batches: One a step.
      steps: Of Adam.
      learning_rate: At the first step; it falls linearly to 0.
      mask: The leaves that were pruned; the others train whole.
      max_grad_norm: To which gradients are clipped, those of what stays; None: not clipped.
      b2: Decay of Adam's second moment, that of `elsa`.

    Raises:
      ValueError: As `prune_by_elsa`.
    """
    who = "retrain"
    stays = jax.tree.map(
        lambda flag, p: p != 0 if flag else jnp.ones((), bool), resolve_mask(mask, params), params
    )

    def drop(updates):
        return jax.tree.map(lambda g, s: jnp.where(s, g, jnp.zeros((), g.dtype)), updates, stays)

    steps_of = [
        optax.stateless(lambda updates, params: drop(updates)),
        optax.adam(_linear_decay(learning_rate, steps), b2=b2),
    ]
    if max_grad_norm is not None:
        steps_of.insert(1, optax.clip_by_global_norm(max_grad_norm))

    def watch(step, losses, params, state):
        _mean_loss(who, step, losses)

    tx = optax.chain(*steps_of)
    return _descend(who, loss_fn, tx, params, batches, steps, min(32, steps), watch)[0]


def _linear_decay(learning_rate, steps):
    return optax.linear_schedule(learning_rate, 0.0, steps)


def _zeros_of(state):
    return [z == 0 for z in jax.tree.leaves(dequantize_leaves(find_admm_state(state).z))]


def _descend(who, loss_fn, tx, params, batches, steps, interval, watch):
    """Parameters and state after so many steps; `watch` looks every `interval` of them."""

    def step_of(params, state, batch):
        loss, gradients = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    step = jax.jit(step_of, donate_argnums=(0, 1))
    params = jax.tree.map(lambda p: jnp.array(p, copy=True), params)  # what is donated is ours
    state = tx.init(params)
    losses, batches = [], iter(batches)
    for done in range(1, steps + 1):
        try:
            batch = next(batches)
        except StopIteration:
            raise ValueError(
                f"{who}: needs a batch for each of {steps} steps, got {done - 1}; pass more, or"
                " cycle through them."
            ) from None
        params, state, loss = step(params, state, batch)
        losses.append(loss)
        if done % interval == 0:
            watch(done, losses, params, state)
            losses = []
    return params, state


def _mean_loss(who, step, losses):
    loss = float(jnp.mean(jnp.stack(losses)))
    if not jnp.isfinite(loss):
        raise ValueError(
            f"{who}: the loss must stay finite, got {loss} before step {step}; lower learning_rate"
            " or strength, or look for NaN in the parameters and batches."
        )
    return loss

"""Elsa as a procedure: prune a trained model by a few thousand steps on its own loss.

One-shot solvers keep the outputs of single layers and collapse beyond 50 to 60 % of zeros; Elsa
(arXiv:2510.01650) minimises the loss of the whole model under the constraint; see
`lowbit_jax/optim/admm.py`. Because it trains, its honest control is `retrain`: a mask found in one
shot and the same number of steps for what it left.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

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
from lowbit_jax.ptq.descent import Keep, LossFn, Record, Watch, descend
from lowbit_jax.sparsity import Pattern, onto_pattern
from lowbit_jax.sparsity.patterns import Comparison
from lowbit_jax.sparsity.sparse_projection import Budget, SparseProjection


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
        for strength in (self.strength, self.final_strength):
            if strength is not None and not 0 <= strength < math.inf:
                raise ValueError(
                    f"ElsaSettings: strengths must be 0 or positive, got {strength}; less of it for"
                    " more zeros."
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


def prune_by_elsa(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    settings: ElsaSettings,
    *,
    mask: Mask,
    report: Callable[[Record], None] | None = None,
    keep: Keep | None = None,
) -> tuple[PyTree, tuple[Record, ...]]:
    """`params` on the pattern, after `settings.steps` steps on `loss_fn`.

    Args:
      loss_fn: `(params, batch) -> loss`, for example nats a token of the next token.
      params: Of a trained model; not changed. Float32 leaves.
      batches: One a step.
      settings: See there.
      mask: Leaves that are pruned, as `optax.masked` takes it (`match_paths` builds one): the
        matrices of the blocks. The others train along. None: all of them.
      report: Called with each record as it comes.
      keep: Where a run that is killed goes on; None: nowhere.

    Returns:
      `(params, records)`. The zeros of the pruned leaves are the pattern.

    Raises:
      ValueError: As `descend`.

    References:
      Elsa: extreme LLM sparsity by surrogate-free ADMM, arXiv:2510.01650.
    """
    who = "prune_by_elsa"
    params, state, records = descend(
        who,
        loss_fn,
        settings.optimizer(mask),
        params,
        batches,
        steps=settings.steps,
        interval=settings.interval,
        watch=Watch(jax.jit(_zeros_of), jax.jit(_look)),
        report=report,
        keep=_of(keep, who, settings=repr(settings)),
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
    return finish(params, state), records


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
    report: Callable[[Record], None] | None = None,
    keep: Keep | None = None,
) -> tuple[PyTree, tuple[Record, ...]]:
    """Adam for what a mask has left: zeros of the pruned leaves stay zero.

    Elsa's Adam, clipping and decay of the learning rate, without the pull.

    Args:
      loss_fn: As in `prune_by_elsa`.
      params: Pruned.
      batches: One a step.
      steps: Of Adam.
      learning_rate: At the first step; it falls linearly to 0.
      mask: The leaves that were pruned; the others train whole.
      max_grad_norm: To which gradients are clipped, those of what stays; None: not clipped.
      b2: Decay of Adam's second moment, that of `elsa`.
      report: As in `prune_by_elsa`.
      keep: See there.

    Returns:
      `(params, records)`.

    Raises:
      ValueError: As `descend`.
    """
    flags = resolve_mask(mask, params)

    def drop(updates, params):
        # Without gradients Adam never moves what is zero; a mask would take a byte a weight.
        return jax.tree.map(
            lambda flag, g, p: jnp.where(p != 0, g, jnp.zeros((), g.dtype)) if flag else g,
            flags,
            updates,
            params,
        )

    chain = [
        optax.stateless(drop),
        optax.adam(_linear_decay(learning_rate, steps), b2=b2),
    ]
    if max_grad_norm is not None:
        chain.insert(1, optax.clip_by_global_norm(max_grad_norm))
    who = "retrain"
    values = {"learning_rate": learning_rate, "max_grad_norm": max_grad_norm, "b2": b2}
    params, _, records = descend(
        who,
        loss_fn,
        optax.chain(*chain),
        params,
        batches,
        steps=steps,
        interval=min(32, steps),
        report=report,
        keep=_of(keep, who, **values),
    )
    return params, records


def _linear_decay(learning_rate, steps):
    return optax.linear_schedule(learning_rate, 0.0, steps)


def _of(keep: Keep | None, who: str, **values) -> Keep | None:
    """With what the run is, beside what the caller says."""
    if keep is None:
        return None
    return keep._replace(settings={**keep.settings, "procedure": who, **values})


def _zeros_of(state):
    """Where z is zero, eight entries a byte."""
    return [
        jnp.packbits((z == 0).reshape(-1))
        for z in jax.tree.leaves(dequantize_leaves(find_admm_state(state).z))
    ]


def _look(params, state, zeros):
    now = _zeros_of(state)
    changed = sum(
        jnp.sum(jax.lax.population_count(a ^ b), dtype=jnp.float32)
        for a, b in zip(now, zeros, strict=True)
    )
    total = sum(z.size for z in jax.tree.leaves(dequantize_leaves(find_admm_state(state).z)))
    return constraint_gap(params, state), changed / total, now

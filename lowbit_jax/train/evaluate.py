"""Validation loss."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lowbit_jax.train.step import LossFn


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
      loss: Mean over the tokens, nats per token.
      tokens: How many tokens were predicted.
      bits_per_byte: `loss / ln 2 * tokens per byte`; None where bytes are unknown.
    """

    loss: float
    tokens: int
    bits_per_byte: float | None


def make_evaluate(
    loss_fn: LossFn,
    micro_batches: int = 1,
    cut_batch: Callable[[PyTree], PyTree] = lambda parts: parts,
) -> Callable[..., Evaluation | None]:
    """Compiles the loss once; see the returned `evaluate`.

    Args:
      loss_fn: Mean loss of a batch.
      micro_batches: Parts into which each batch is cut, one after the other, so that validation
        needs no more memory than training. Their mean is that of the batch up to the order of sums,
        and to what a recipe takes of several tokens (a scale of the whole tensor) or draws.
      cut_batch: Places the parts `(micro_batches, b, t)` on the devices.
    """

    # Validation draws no new bits a step: a fixed key makes its losses comparable.
    @jax.jit
    def batch_loss(params, batch, key):
        if micro_batches == 1:
            return loss_fn(params, batch, key)

        def part_loss(numbered):
            index, part = numbered
            return loss_fn(params, part, None if key is None else jax.random.fold_in(key, index))

        parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
        return jax.lax.map(part_loss, (jnp.arange(micro_batches), cut_batch(parts))).mean()

    def evaluate(
        params: PyTree,
        batches: Iterable[Any],
        *,
        tokens_per_byte: float | None = None,
        needs_key: bool = False,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Evaluation | None:
        """Mean loss over `batches`, summed in float64 on the host.

        Args:
          params: Parameters of the model.
          batches: `(inputs, targets)`, each `(b, t)` int32, all of one shape; `b` is a multiple
            of `micro_batches`.
          tokens_per_byte: Of the validation text, to give bits per byte.
          needs_key: Whether the loss draws random bits; the same ones every time.
          should_stop: Asked before each batch; True gives up and returns None.

        Raises:
          ValueError: If there is no batch.
        """
        losses, sizes = [], []
        for batch in batches:
            if should_stop():
                return None
            key = jax.random.key(len(losses)) if needs_key else None
            losses.append(batch_loss(params, batch, key))
            sizes.append(int(np.size(batch[1])))
            if len(losses) > 2:
                losses[-3].block_until_ready()  # keep the queue short, the device busy
        if not losses:
            raise ValueError(
                "evaluate: got no validation batch; the validation split is shorter than one"
                " batch: lower batch_size or seq_len, or prepare the data with a larger split."
            )
        weighted = np.average(np.asarray(jax.device_get(losses), np.float64), weights=sizes)
        loss = float(weighted)
        bits = None if tokens_per_byte is None else loss / math.log(2) * tokens_per_byte
        return Evaluation(loss, sum(sizes), bits)

    return evaluate

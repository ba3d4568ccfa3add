"""Validation loss."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
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


def make_evaluate(loss_fn: LossFn) -> Callable[..., Evaluation | None]:
    """Compiles the loss once; see the returned `evaluate`."""
    # Validation draws no new bits a step: a fixed key makes its losses comparable.
    batch_loss = jax.jit(lambda params, batch, key: loss_fn(params, batch, key))

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
          batches: `(inputs, targets)`, each `(b, t)` int32, all of one shape.
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

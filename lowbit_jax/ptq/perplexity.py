"""Perplexity of a model on a text, with the window, the stride and the tokens that it is of."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree, Shaped

from lowbit_jax.models import Llama


@dataclass(frozen=True)
class Perplexity:
    """How well a text is predicted; numbers of another window or stride do not compare.

    Attributes:
      loss: Mean over the counted tokens, nats a token.
      tokens: How many were counted.
      window: Tokens that the model sees at once.
      stride: By which the window moves: each window after the first counts its last so many, which
        have at least `window - stride` tokens before them.
    """

    loss: float
    tokens: int
    window: int
    stride: int

    @property
    def perplexity(self) -> float:
        """`exp(loss)`."""
        return math.exp(self.loss)

    def __str__(self) -> str:
        """The number and what it is of."""
        return (
            f"perplexity {self.perplexity:.4f} (loss {self.loss:.4f}) on {self.tokens:,} tokens,"
            f" windows of {self.window} moved by {self.stride}"
        )


def perplexity(
    model: Llama,
    params: PyTree,
    tokens: Shaped[np.ndarray, "..."],
    *,
    window: int = 2048,
    stride: int | None = None,
    batch_size: int = 1,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Predicts each token from those before it in its window.

    What is compiled serves all calls of equal models, parameters of one tree structure, and windows
    of one shape: other weights do not compile anew.

    Args:
      model: With the recipes that it is to be evaluated with; none may need a key.
      params: Its parameters, float or `CodedWeight`s. NumPy arrays are copied to the device once.
      tokens: `(n,)` integers, a text. What is too short for one more window is left out.
      window: Tokens that the model sees at once.
      stride: 1 to `window`; None: `window`, so that every token is seen once.
      batch_size: Windows side by side.
      on_batch: Told how many windows are done, and how many there are.

    Raises:
      ValueError: If a number is out of range, tokens are no vector of integers, of another
        vocabulary, or fewer than `window + 1`.
    """
    stride = window if stride is None else stride
    if window < 1 or not 1 <= stride <= window or batch_size < 1:
        raise ValueError(
            "perplexity: window and batch_size must be at least 1, stride 1 to window, got"
            f" window={window}, stride={stride}, batch_size={batch_size}."
        )
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer) or len(tokens) <= window:
        raise ValueError(
            f"perplexity: tokens must be integers (n,), more than window = {window}, got"
            f" {tokens.dtype} {tokens.shape}; take a longer text or a shorter window."
        )
    vocab_size = model.config.vocab_size
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(
            f"perplexity: tokens must be 0 to {vocab_size - 1}, got {tokens.min()} to"
            f" {tokens.max()}; take the tokenizer that the model was trained with."
        )
    starts = np.arange(0, len(tokens) - window, stride)
    params = jax.tree.map(jnp.asarray, params)  # once, not in every call
    total, count, done = 0.0, 0, 0
    while done < len(starts):
        # All of the first window count, of the others the last.
        counted, size = (stride, batch_size) if done else (window, 1)
        places = starts[done : done + size, None] + np.arange(window + 1)
        batch = np.asarray(tokens[places], np.int32)
        total += float(_batch_loss(model, params, batch, counted)) * len(batch) * counted
        count += len(batch) * counted
        done += len(batch)
        on_batch(done, len(starts))
    return Perplexity(total / count, count, window, stride)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _batch_loss(model, params, batch, counted):
    """Mean over the last `counted` targets of each window of `batch` `(b, window + 1)`."""
    arguments = {"params": params}, batch[:, :-1], batch[:, 1:], counted
    return model.apply(*arguments, method="loss")

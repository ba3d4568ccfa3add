"""Windows of a text to train on, and the loss of a language model on them."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PyTree, Shaped

from lowbit_jax.models import Llama


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingWindows:
    """Batches of disjoint windows of a text, shuffled anew each time all have been seen.

    `windows[step]` `(batch_size, length + 1)` int32 depends on nothing but its arguments, so that a
    resumed run sees what an unbroken one saw. Iterating never ends. A window is `length` inputs and
    the token after each: its last token is the first of the next.

    Attributes:
      tokens: `(n,)` integers, the text.
      length: Tokens that are predicted in each window.
      batch_size: Windows of a batch.
      seed: Of the order.

    Raises:
      ValueError: If a number is out of range, or the text is too short for one window.
    """

    tokens: Integer[np.ndarray, " n"]
    length: int
    batch_size: int
    seed: int = 0

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"TrainingWindows: seed must be 0 or more, got {self.seed}.")
        if min(self.length, self.batch_size) < 1 or len(self.tokens) <= self.length:
            raise ValueError(
                "TrainingWindows: length and batch_size must be at least 1, and the text longer"
                f" than length, got length={self.length}, batch_size={self.batch_size} and"
                f" {len(self.tokens)} tokens; take a longer text or shorter windows."
            )

    @property
    def count(self) -> int:
        """Windows of the text. What is too short for one more is left out."""
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, step: int) -> Integer[np.ndarray, "b t"]:
        """The batch of a step, from 0."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, within = np.divmod(places, self.count)
        chosen = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(epochs):
            order = np.random.default_rng([self.seed, int(epoch)]).permutation(self.count)
            chosen[epochs == epoch] = order[within[epochs == epoch]]
        return self.tokens[chosen[:, None] * self.length + np.arange(self.length + 1)].astype(
            np.int32
        )

    def __iter__(self) -> Iterator[Integer[np.ndarray, "b t"]]:
        """All batches from step 0 on, without end."""
        return (self[step] for step in itertools.count())


def held_out(
    tokens: Integer[np.ndarray, " n"], windows: int, length: int, batch_size: int
) -> tuple[Integer[np.ndarray, " m"], list[Integer[np.ndarray, "b t"]]]:
    """A text without its last windows, and those in batches `(b, length + 1)`.

    Args:
      tokens: `(n,)` integers.
      windows: To hold out, whole batches of them and at least one.
      length: Tokens that are predicted in each.
      batch_size: Windows of a batch.

    Raises:
      ValueError: If less than half of the text would be left.
    """
    batches = max(windows // batch_size, 1)
    count = batches * batch_size * length + 1
    if 2 * count > len(tokens):
        raise ValueError(
            f"held_out: {batches * batch_size} windows of {length} tokens are to be held out of at"
            f" least twice as many, got {len(tokens)} tokens; take a longer text or shorter"
            " windows."
        )
    rest = np.asarray(tokens[-count:], np.int32)
    places = np.arange(batches * batch_size)[:, None] * length + np.arange(length + 1)
    return tokens[:-count], list(rest[places].reshape(batches, batch_size, -1))


def language_model_loss(model: Llama) -> Callable[[PyTree, Any], Float[Array, ""]]:
    """`(params, batch (b, t + 1)) -> ` mean cross-entropy of the next token, nats.

    Raises:
      ValueError: If a recipe of the model needs a key.
    """
    for path, recipe in model.config.recipe_rules:
        if recipe.needs_key:
            raise ValueError(
                f"language_model_loss: recipes must not need a key, got {recipe} for {path!r};"
                " round to nearest."
            )

    def loss_fn(params, batch) -> Any:
        batch = jnp.asarray(batch)
        return model.apply({"params": params}, batch[:, :-1], batch[:, 1:], method="loss")

    return loss_fn


def mean_loss(model: Llama, params: PyTree, batches: Iterable[Shaped[np.ndarray, "..."]]) -> float:
    """Mean of the losses of batches of one shape `(b, t + 1)`, nats a token.

    Raises:
      ValueError: If there is no batch.
    """
    losses = [_loss_of(model, params, batch) for batch in batches]
    if not losses:
        raise ValueError("mean_loss: needs at least one batch, got none; hold windows out.")
    return float(np.mean([float(loss) for loss in losses]))


@functools.partial(jax.jit, static_argnums=0)  # compiled once for all parameters of a model
def _loss_of(model, params, batch):
    return language_model_loss(model)(params, batch)

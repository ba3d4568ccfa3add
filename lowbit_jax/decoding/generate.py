"""Sampling from a causal language model."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped


def generate(
    apply_fn: Callable[[Any, Int[Array, "b w"]], Float[Array, "b w v"]],
    params: Any,
    prompt: Shaped[Array | np.ndarray, "..."],
    *,
    steps: int,
    temperature: float = 1.0,
    key: PRNGKeyArray | None = None,
    window: int | None = None,
) -> Int[Array, "b total"]:
    """Appends `steps` tokens, each drawn from `softmax(logits / temperature)` of the last position.

    Every step runs the model anew on the last `window` tokens: simple, and exact for any model, at
    the price of `steps` full forward passes (nothing is cached). While fewer than `window` tokens
    exist the rest is filled with token 0, which a causal model does not see from the positions
    before it. A recipe with one activation scale a tensor does see it, through that scale.

    One loop is compiled, for one `apply_fn` (pass the same function again to reuse it), shape of
    `prompt`, `steps` and `window`; temperatures above 0 share it.

    Args:
      apply_fn: `apply_fn(params, tokens)`: logits `(b, w, v)` of the token after each of `tokens`
        `(b, w)`; causal.
      params: Its first argument.
      prompt: `(b, t)` integers, `t >= 1`.
      steps: Tokens to append.
      temperature: 0 takes the likeliest token (the first of equals); draws nothing.
      key: For the draws; step `i` folds in `i`, so that more steps extend what fewer steps gave.
      window: Tokens that the model sees at once, as many as it was trained on; `None`:
        `t + steps`, everything.

    Returns:
      `(b, t + steps)`, the dtype of `prompt`: the prompt, then the new tokens.

    Raises:
      ValueError: If `prompt` is no such array, a number is out of range, or a positive
        temperature comes without a key.
    """
    if prompt.ndim != 2 or not jnp.issubdtype(prompt.dtype, jnp.integer) or not prompt.shape[1]:
        raise ValueError(
            f"generate: prompt must be integers (b, t) with t >= 1, got {prompt.dtype}"
            f" {prompt.shape}; begin with the tokenizer's first token if there is no prompt."
        )
    if steps < 0 or temperature < 0 or (window is not None and window < 1):
        raise ValueError(
            "generate: needs steps >= 0, temperature >= 0 and window >= 1, got"
            f" {steps}, {temperature} and {window}; temperature 0 is greedy."
        )
    if temperature > 0 and key is None:
        raise ValueError(
            f"generate: temperature {temperature} draws random numbers, got no key;"
            " pass key=jax.random.key(seed), or temperature=0."
        )
    window = prompt.shape[1] + steps if window is None else window
    key = None if temperature == 0 else key
    return _generate(apply_fn, steps, window, params, prompt, jnp.float32(temperature), key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(apply_fn, steps, window, params, prompt, temperature, key):
    """`generate`; without a key, greedy."""
    prompt_length = prompt.shape[1]
    total = prompt_length + steps
    tokens = jnp.pad(prompt, ((0, 0), (0, max(total, window) - prompt_length)))

    def body(i, tokens):
        length = prompt_length + i  # known so far
        start = jnp.maximum(length - window, 0)
        seen = lax.dynamic_slice_in_dim(tokens, start, window, axis=1)
        logits = apply_fn(params, seen)
        logits = lax.dynamic_index_in_dim(logits, length - 1 - start, axis=1, keepdims=False)
        if key is None:
            new = jnp.argmax(logits, axis=-1)
        else:
            new = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
        return lax.dynamic_update_slice_in_dim(
            tokens, new.astype(tokens.dtype)[:, None], length, axis=1
        )

    return lax.fori_loop(0, steps, body, tokens)[:, :total]

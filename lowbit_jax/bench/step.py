"""A whole training step of a Llama under each recipe."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import optax
from jaxtyping import PRNGKeyArray

from lowbit_jax.bench.layer import BASELINES, describe_paths, split_flops
from lowbit_jax.models import Llama, LlamaConfig, flops_per_token
from lowbit_jax.ops import explain
from lowbit_jax.optim import one_cycle_cosine
from lowbit_jax.train import StepPlan, TrainState, create_state, loss_function, make_train_step
from lowbit_jax.train.planning import program_memory
from lowbit_jax.train.setups import parse_rules, training_setup
from pallas_kernels.measure import Build, Case, Comparison, Program, tree_bytes

RECIPES = (*BASELINES, "quartet")
_STEPS = 1000  # of the learning rate's schedule


def comparison(
    group: str,
    work: str,
    model: LlamaConfig,
    *,
    batch_size: int,
    seq_len: int,
    recipes: tuple[str, ...] = RECIPES,
) -> Comparison:
    """Forward, backward and AdamW, as `scripts/pretrain.py` runs them, on random tokens.

    Memory is the device's peak while a step runs, if no step before needed more; otherwise what the
    compiler allots to it, arguments included.

    Args:
      group: Of the comparison.
      work: Its name.
      model: Shape of the model; recipes are added.
      batch_size: Sequences.
      seq_len: Tokens of each.
      recipes: Names in `lowbit_jax.ops.recipes`.
    """
    make = functools.partial(_inputs, model, batch_size, seq_len)
    cases = tuple(Case(name, functools.partial(_build, name, model, make)) for name in recipes)
    # A step is thousands of launches: three hide those of the first.
    return Comparison(group, work, make, cases, BASELINES, calls=3)


def _optimizer() -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW, the same for every recipe, so that they share a state; and its learning rate."""
    rate = one_cycle_cosine(1e-4, _STEPS)
    return training_setup(learning_rate=rate, steps=_STEPS, recipe="bf16").optimizer, rate


def _inputs(
    config: LlamaConfig, batch_size: int, seq_len: int, key: PRNGKeyArray
) -> dict[str, Any]:
    """Random tokens, and one state that all recipes train in turn: three would not fit."""
    key, tokens_key = jax.random.split(key)
    shape = (batch_size, seq_len + 1)
    tokens = jax.random.randint(tokens_key, shape, 0, config.vocab_size)
    batch = tokens[:, :-1], tokens[:, 1:]
    params = nn.meta.unbox(Llama(config).init(key, batch[0][:1])["params"])
    return {"batch": batch, "state": create_state(params, _optimizer()[0])}


def _build(recipe: str, config: LlamaConfig, make, shapes: dict[str, Any]) -> Build:
    rules = parse_rules(recipe)
    model = Llama(dataclasses.replace(config, recipe_rules=rules))
    optimizer, rate = _optimizer()
    # Clipped as runs are.
    plan = StepPlan(needs_key=any(r.needs_key for _, r in rules), clip_norm=1.0)
    step = make_train_step(loss_function(model), optimizer, plan, learning_rate=rate)
    explanation = explain(step, shapes["state"], shapes["batch"])
    batch_size, seq_len = shapes["batch"][0].shape
    tokens = batch_size * seq_len
    total = float(flops_per_token(config, seq_len) * tokens)

    def bind(compiled, inputs: dict[str, Any]) -> Program:
        if "state" not in inputs:  # a step that failed has taken it along
            inputs["state"] = jax.jit(make)(jax.random.key(0))["state"]
        before = _device_peak_bytes()

        def call():
            state: TrainState = inputs.pop("state")
            inputs["state"], metrics = compiled(state, inputs["batch"])
            return metrics.loss

        try:
            jax.block_until_ready(call())
        except Exception:
            inputs.pop("state", None)  # what a step that failed has left
            raise
        after = _device_peak_bytes()
        memory_bytes, source = after, "memory measured"
        if after is None or before is None or after <= before:
            memory_bytes = program_memory(compiled).total_bytes
            source = "memory by the compiler"
        return Program(
            call=call,
            flops=split_flops(total, explanation),
            bytes=2 * tree_bytes(shapes["state"]) + tree_bytes(shapes["batch"]),
            note=f"{describe_paths(explanation)}; {source}",
            tokens=tokens,
            memory_bytes=memory_bytes,
        )

    return Build(step.lower(shapes["state"], shapes["batch"]), bind)


def _device_peak_bytes() -> int | None:
    """Most memory that this process ever had of its first device; None where nobody counts."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")

"""A whole training step of a Llama under each recipe."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from lowbit_jax.bench.layer import BASELINES, describe_paths, split_flops
from lowbit_jax.models import Llama, LlamaConfig, flops_per_token
from lowbit_jax.ops import explain
from lowbit_jax.optim import one_cycle_cosine
from lowbit_jax.train import StepPlan, create_state, loss_function, make_train_step
from lowbit_jax.train.setups import parse_rules, training_setup
from pallas_kernels.measure import Case, Comparison, Program, tree_bytes

RECIPES = (*BASELINES, "quartet")
_STEPS = 1000  # of the learning rate's schedule


@dataclasses.dataclass
class Training:
    """One state that all recipes train in turn: three would not fit beside each other.

    Attributes:
      model: Shape of the model, without recipes.
      batch: Random inputs and targets, each `(b, t)` int32.
      state: Handed from step to step, its memory reused; None: to be drawn.
    """

    model: LlamaConfig
    batch: tuple[Any, Any]
    state: Any = None


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
    cases = tuple(Case(name, functools.partial(_build, name)) for name in recipes)
    make = functools.partial(_inputs, model, batch_size, seq_len)
    # A step is thousands of launches: three hide those of the first.
    return Comparison(group, work, make, cases, BASELINES, calls=3)


def _inputs(model: LlamaConfig, batch_size: int, seq_len: int) -> Training:
    shape = (batch_size, seq_len + 1)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, shape, dtype=np.int32)
    return Training(model, jax.device_put((tokens[:, :-1], tokens[:, 1:])))


def _build(recipe: str, training: Training) -> Program:
    rules = parse_rules(recipe)
    model = Llama(dataclasses.replace(training.model, recipe_rules=rules))
    rate = one_cycle_cosine(1e-4, _STEPS)
    # AdamW, the same for every recipe, so that they share a state.
    optimizer = training_setup(learning_rate=rate, steps=_STEPS, recipe="bf16").optimizer
    plan = StepPlan(needs_key=any(r.needs_key for _, r in rules))
    step = make_train_step(loss_function(model), optimizer, plan, learning_rate=rate)

    @jax.jit
    def create(key):
        params = nn.meta.unbox(model.init(key, training.batch[0][:1])["params"])
        return create_state(params, optimizer)

    if training.state is None:
        training.state = create(jax.random.key(0))
    explanation = explain(step, training.state, training.batch)
    compiled = step.lower(training.state, training.batch).compile()
    before = _device_peak_bytes()

    def call():
        state, training.state = training.state, None  # gone, if the step fails
        training.state, metrics = compiled(state, training.batch)
        return metrics.loss

    jax.block_until_ready(call())
    after = _device_peak_bytes()
    used = compiled.memory_analysis()
    memory_bytes, source = after, "memory measured"
    if after is None or before is None or after <= before:
        source = "memory by the compiler"
        memory_bytes = (
            used.argument_size_in_bytes
            + used.output_size_in_bytes
            - used.alias_size_in_bytes
            + used.temp_size_in_bytes
        )
    batch_size, seq_len = training.batch[0].shape
    tokens = batch_size * seq_len
    total = float(flops_per_token(training.model, seq_len) * tokens)
    return Program(
        call=call,
        flops=split_flops(total, explanation),
        bytes=2 * tree_bytes(training.state) + tree_bytes(training.batch),
        note=f"{describe_paths(explanation)}; {source}",
        tokens=tokens,
        memory_bytes=memory_bytes,
    )


def _device_peak_bytes() -> int | None:
    """Most memory that this process ever had of its first device; None where nobody counts."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")

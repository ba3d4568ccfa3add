"""One row of the table of scaling: some steps of one recipe on one mesh, in a process of its own.

`python -m lowbit_jax.bench.scaling_row` takes a `Row` as JSON and prints a `Measured` as JSON.
"""

import dataclasses
import functools
import json
import math
import re
import statistics
import sys
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax.bench.layer import describe_paths
from lowbit_jax.models import Llama, LlamaConfig, llama_config, logical_axes
from lowbit_jax.ops import explain
from lowbit_jax.optim import one_cycle_cosine
from lowbit_jax.parallel import make_mesh
from lowbit_jax.train import StepPlan, create_state, loss_function, make_train_step
from lowbit_jax.train.gradient_exchange import exchanged_loss, parse_exchange
from lowbit_jax.train.placement import Placement, make_placement
from lowbit_jax.train.setups import parse_rules, training_setup

TINY = "tiny"
_WARMUPS, _CHUNKS, _PERIOD = 3, 4, 1000  # steps, timed stretches, steps of the schedule
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all")
_BITS = {"pred": 8, "bf16": 16, "f16": 16} | {f"{k}{b}": b for k in "usf" for b in (8, 16, 32, 64)}


@dataclasses.dataclass(frozen=True)
class Row:
    """What is measured.

    Attributes:
      model: A size of `models.llama_config`, or "tiny".
      recipe: Name in `ops.RECIPES`.
      devices: As many as there are along data, for the first two stages of ZeRO, or fsdp.
      zero: Stage; of no meaning on one device.
      device_batch: Sequences a device.
      seq_len: Tokens of each.
      gradient_exchange: See `RunOptions`.
      steps: Of training, beside those that warm up: a multiple of 4.
    """

    model: str
    recipe: str
    devices: int
    zero: int = 1
    device_batch: int = 8
    seq_len: int = 2048
    gradient_exchange: str = "exact"
    steps: int = 20


@dataclasses.dataclass(frozen=True)
class Measured:
    """What came out.

    Attributes:
      row: What was measured.
      device: Its name.
      step_s: Median over stretches of a quarter of the steps, and all of them.
      losses: Of each step, those that warm up included.
      perturbed: The same from weights of which each is off by one unit in its last place; on one
        device.
      sent: Bytes that a device has after each kind of collective, by dtype; one in a loop counts
        once. Empty on one device.
      paths: Of the products.
      peak_bytes: Most memory of the first device; None where nobody counts.
    """

    row: Row
    device: str
    step_s: tuple[float, ...]
    losses: tuple[float, ...]
    perturbed: tuple[float, ...]
    sent: dict[str, dict[str, int]]
    paths: str
    peak_bytes: int | None

    @property
    def tokens_per_s(self) -> float:
        """Of all devices together."""
        row = self.row
        return row.devices * row.device_batch * row.seq_len / self.step_s[0]

    @classmethod
    def from_json(cls, text: str) -> "Measured":
        """The inverse of `json.dumps(dataclasses.asdict(...))`."""
        fields: dict[str, Any] = json.loads(text)
        for name in ("step_s", "losses", "perturbed"):
            fields[name] = tuple(fields[name])
        return cls(**{**fields, "row": Row(**fields["row"])})


def measure_row(row: Row) -> Measured:
    """Trains on random tokens, the same for every mesh and recipe of one global batch."""
    config = _model(row)
    model = Llama(config)
    rate = one_cycle_cosine(1e-4, _PERIOD)
    optimizer = training_setup(learning_rate=rate, steps=_PERIOD, recipe="bf16").optimizer
    create = functools.partial(_create, model, optimizer)
    shapes = jax.eval_shape(create, jax.random.key(0))
    placement = _place(row, model, shapes)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state_places, batch_place = jax.tree.map(lambda _: place, shapes), place
    loss_fn = loss_function(model, None if placement is None else placement.layout)
    if placement is not None:
        state_places, batch_place = placement.state, placement.batch
        if placement.exchange is not None:
            loss_fn = exchanged_loss(loss_function(model), placement.exchange, placement)
    rules = config.recipe_rules
    needs_key = row.gradient_exchange != "exact" or any(r.needs_key for _, r in rules)
    step = make_train_step(
        loss_fn, optimizer, StepPlan(needs_key=needs_key), learning_rate=rate, placement=placement
    )
    batch_size = row.devices * row.device_batch
    tokens = np.random.default_rng(0).integers(
        0, config.vocab_size, (batch_size, row.seq_len + 1), np.int32
    )
    batch = jax.device_put((tokens[:, :-1], tokens[:, 1:]), batch_place)
    draw = jax.jit(create, out_shardings=state_places)
    state = draw(jax.random.key(0))
    traced = step.trace(state, batch)
    paths = describe_paths(explain(traced))
    compiled = traced.lower().compile()
    losses, step_s = _train(compiled, state, batch, row.steps)
    del state
    perturbed: list[float] = []
    if placement is None:
        perturbed, _ = _train(compiled, _perturbed(draw(jax.random.key(0))), batch, row.steps)
    stats = jax.devices()[0].memory_stats() or {}
    return Measured(
        row,
        jax.devices()[0].device_kind,
        (statistics.median(step_s), *step_s),
        tuple(losses),
        tuple(perturbed),
        {} if placement is None else sent_bytes(compiled.as_text() or ""),
        paths,
        stats.get("peak_bytes_in_use"),
    )


def sent_bytes(program: str) -> dict[str, dict[str, int]]:
    """Bytes of the results of the collectives in the text of a compiled program, by dtype."""
    found: dict[str, dict[str, int]] = {}
    for line in program.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(_COLLECTIVES)})(-start|-done)?\(", line)
        if match is None or match[3] == "-done":
            continue
        results = match[1]
        if match[3] == "-start" and results.startswith("(("):  # operands, then results
            results = results.split("), ", 1)[1]
        elif match[3] == "-start" and match[2] != "all-reduce":
            results = results[results.index(", ") + 2 :]
        of_kind = found.setdefault(match[2], {})
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", results):
            if dtype in _BITS:
                size = math.prod(int(n) for n in sizes.split(",") if n)
                of_kind[dtype] = of_kind.get(dtype, 0) + size * _BITS[dtype] // 8
    return found


def _model(row: Row) -> LlamaConfig:
    # Cut weights are gathered again for the backward pass, as in a run.
    options: dict[str, Any] = {
        "recipe_rules": parse_rules(row.recipe),
        "recompute": "unnamed" if row.zero == 3 and row.devices > 1 else "none",
    }
    if row.model == TINY:
        return LlamaConfig(256, 128, 1, 2, d_ff=256, **options)
    return llama_config(row.model, **options)


def _create(model: Llama, optimizer, key):
    params = nn.meta.unbox(model.init(key, jnp.zeros((1, 8), jnp.int32))["params"])
    return create_state(params, optimizer)


def _place(row: Row, model: Llama, shapes) -> Placement | None:
    if row.devices == 1:
        return None
    mesh = make_mesh(1, row.devices) if row.zero == 3 else make_mesh(row.devices)
    return make_placement(
        shapes,
        logical_axes(model),
        mesh,
        row.zero,
        pieces={"heads": model.config.n_heads, "kv_heads": model.config.kv_heads},
        exchange=parse_exchange(row.gradient_exchange),
    )


def _perturbed(state):
    """Each weight off by a unit in its last place, 2**-24 to 2**-23 of it, up or down at random.

    The order of a sum moves it by as much, or more.
    """

    def off(index, p):
        is_up = jax.random.bernoulli(jax.random.key(index), shape=p.shape)
        return jnp.nextafter(p, jnp.where(is_up, jnp.inf, -jnp.inf))

    leaves, treedef = jax.tree.flatten(state.params)
    params = treedef.unflatten([jax.jit(off, static_argnums=0)(i, p) for i, p in enumerate(leaves)])
    return state._replace(params=params)


def _train(compiled, state, batch, steps: int) -> tuple[list[float], list[float]]:
    """The losses, and seconds a step in each stretch."""
    losses, seconds = [], []
    for count in (_WARMUPS, *(steps // _CHUNKS,) * _CHUNKS):
        start = time.perf_counter()
        for _ in range(count):
            state, metrics = compiled(state, batch)
            losses.append(metrics.loss)
        jax.block_until_ready(state)
        seconds.append((time.perf_counter() - start) / count)
    return [float(loss) for loss in losses], seconds[1:]


def _main() -> int:
    row = Row(**json.loads(sys.argv[1]))
    if row.model == TINY and jax.config.jax_platforms == "cpu":  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_num_cpu_devices", row.devices)
    print(json.dumps(dataclasses.asdict(measure_row(row))))
    return 0


if __name__ == "__main__":
    sys.exit(_main())

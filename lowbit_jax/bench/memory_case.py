"""Rows of the table of memory: what is measured, and what came out."""

import dataclasses
from typing import Any

from lowbit_jax.models import Llama, LlamaConfig, llama_config
from lowbit_jax.optim import one_cycle_cosine
from lowbit_jax.train.config import Config, RunOptions
from lowbit_jax.train.corpora import open_corpus
from lowbit_jax.train.memory_plan import MemoryPlan
from lowbit_jax.train.placement import open_mesh
from lowbit_jax.train.planning import run_planner
from lowbit_jax.train.setups import training_setup

_STEPS = 1000  # of the learning rate's schedule


@dataclasses.dataclass(frozen=True)
class Case:
    """What to measure.

    Attributes:
      name: Of the row.
      size: Of `models.llama_config`, or "tiny".
      baseline: Row against which the freed bytes are counted; "" for none.
      recipe: A name in `lowbit_jax.ops.recipes`.
      recompute: See `models.recompute`.
      loss_chunks: See `LlamaConfig`.
      offload: See `train.offload`.
      moments: How Adam's are stored.
      batch_size: Sequences.
      seq_len: Tokens of each.
      n_layers: Of the size; None: as many as it has.
      steps: Measured, after one to warm up.
    """

    name: str
    size: str
    baseline: str = ""
    recipe: str = "bf16"
    recompute: str = "none"
    loss_chunks: int | None = None
    offload: str = "none"
    moments: str = "bfloat16"
    batch_size: int = 4
    seq_len: int = 2048
    n_layers: int | None = None
    steps: int = 10


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """A case, measured or not; bytes are of the device unless they say otherwise.

    Attributes:
      case: What was measured.
      status: "measured", "skipped" or "failed".
      note: Why there are no numbers.
      device: Its kind.
      jax_version: Of JAX.
      predicted_bytes: By the memory plan.
      predicted_part: Of the step, that needs them.
      predicted_host_bytes: In the host's memory.
      state_bytes: Arguments and results by the compiler.
      temporary_bytes: Beside them, by the compiler.
      host_bytes: In the host's memory, by the compiler.
      peak_bytes: Most that the allocator had given out; None where nobody counts.
      limit_bytes: Most that it may; None likewise.
      card_bytes: All that is in use of the card, context included, by nvidia-smi.
      step_time_s: Median.
      tokens_per_s: From it.
      share_of_light: See `analysis.speed_of_light`.
      mfu: Likewise.
      compile_time_s: Tracing left out.
    """

    case: Case
    status: str
    note: str = ""
    device: str = ""
    jax_version: str = ""
    predicted_bytes: int | None = None
    predicted_part: str = ""
    predicted_host_bytes: int = 0
    state_bytes: int | None = None
    temporary_bytes: int | None = None
    host_bytes: int = 0
    peak_bytes: int | None = None
    limit_bytes: int | None = None
    card_bytes: int | None = None
    step_time_s: float | None = None
    tokens_per_s: float | None = None
    share_of_light: float | None = None
    mfu: float | None = None
    compile_time_s: float | None = None

    @property
    def compiled_bytes(self) -> int | None:
        """All that the compiler allots on the device."""
        if self.state_bytes is None or self.temporary_bytes is None:
            return None
        return self.state_bytes + self.temporary_bytes


def row_of(record: dict[str, Any]) -> MemoryRow:
    """The inverse of `dataclasses.asdict`."""
    return MemoryRow(**{**record, "case": Case(**record["case"])})


def case_config(case: Case) -> tuple[Config, RunOptions]:
    """The run of a case, on random tokens: bfloat16 weights, AdamW."""
    rate = one_cycle_cosine(1e-4, _STEPS)
    setup = training_setup(
        learning_rate=rate,
        steps=_STEPS,
        recipe=case.recipe,
        moments=case.moments,
        param_dtype="bfloat16",
    )
    fields: dict[str, Any] = {
        "recipe_rules": setup.recipe_rules,
        "recompute": case.recompute,
        "loss_chunks": case.loss_chunks,
    }
    if case.n_layers is not None:
        fields["n_layers"] = case.n_layers
    if case.size == "tiny":
        model = LlamaConfig(**{"vocab_size": 256, "d_model": 64, "n_layers": 4, "n_heads": 2,
                               "d_ff": 128, **fields})  # fmt: skip
    else:
        model = llama_config(case.size, **fields)
    config = Config(
        model=Llama(model),
        optimizer=setup.optimizer,
        learning_rate=rate,
        data=open_corpus("synthetic", vocab_size=model.vocab_size),
        steps=_STEPS,
        batch_size=case.batch_size,
        seq_len=case.seq_len,
        store=setup.store,
        clip_norm=setup.clip_norm,
    )
    return config, RunOptions(offload=case.offload)


def plan_case(case: Case) -> MemoryPlan:
    """The prediction for a case; compiles nothing."""
    config, options = case_config(case)
    model = config.model.config
    planner = run_planner(config, options, open_mesh(config, options))
    return planner(model.recompute, model.loss_chunks, options.offload)

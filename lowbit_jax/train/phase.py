"""The compiled functions of a stretch of the run under one set of recipe rules."""

import dataclasses

from lowbit_jax.analysis.speed_of_light import SpeedOfLight
from lowbit_jax.models import Llama
from lowbit_jax.train.config import Config
from lowbit_jax.train.evaluate import make_evaluate
from lowbit_jax.train.gradient_exchange import exchanged_loss
from lowbit_jax.train.offload import offloading_model
from lowbit_jax.train.placement import Placement
from lowbit_jax.train.step import loss_function, make_train_step, step_plan


class Phase:
    """Training step and validation of one model of `config.phases`; compiled when first called.

    Attributes:
      start: Steps done when it begins.
      model: With the recipe rules of this phase.
      plan: Of its steps.
      train_step: As from `make_train_step`.
      evaluate: As from `make_evaluate`.
      light: The limit of one device; None while the step has not been traced, and where the device
        has no data sheet.
    """

    def __init__(
        self, config: Config, start: int, model: Llama, placement: Placement | None = None
    ):
        if placement is not None and placement.layout.stage.parameters:
            model = _regathering(model)
        if placement is not None:
            model = offloading_model(model, placement.offload)
        self.start, self.model = start, model
        self.plan = step_plan(config, model)
        loss_fn = loss_function(model, None if placement is None else placement.layout)
        train_loss = loss_fn
        if placement is not None and placement.exchange is not None:
            train_loss = exchanged_loss(loss_function(model), placement.exchange, placement)
            self.plan = dataclasses.replace(self.plan, needs_key=True)
        self.train_step = make_train_step(
            train_loss,
            config.optimizer,
            self.plan,
            learning_rate=config.learning_rate,
            placement=placement,
        )
        cut = {} if placement is None else {"cut_batch": placement.cut_batch}
        self.evaluate = make_evaluate(loss_fn, config.micro_batches, **cut)
        self.light: SpeedOfLight | None = None

    @property
    def recipes(self) -> str:
        """`pattern=recipe` of each rule, as the configs take them."""
        rules = self.model.config.recipe_rules
        return ", ".join(f"{pattern}={recipe}" for pattern, recipe in rules)


def _regathering(model: Llama) -> Llama:
    """The model that gathers cut weights once more for its backward pass.

    Without recomputation a loop over layers would keep the gathered weights of all of them.
    """
    if model.config.recompute != "none":
        return model
    return Llama(dataclasses.replace(model.config, recompute="unnamed"))

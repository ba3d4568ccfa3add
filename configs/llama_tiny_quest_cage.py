"""Llama of 1M parameters on Moby-Dick, byte by byte: QuEST W4A4 with CAGE, for two CPU cores.

Run: python scripts/pretrain.py configs/llama_tiny_quest_cage.py

Expect: 1.81 nats per token, which is 2.61 bits per byte, on the validation split, where a trigram
model of bytes has 2.86; two minutes on two cores, compilation included.
"""

from lowbit_jax.models import Llama, LlamaConfig, flops_per_token
from lowbit_jax.optim import one_cycle_cosine
from lowbit_jax.train import Config, open_corpus
from lowbit_jax.train.setups import (
    Moments,
    OptimizerName,
    ParamDtype,
    WeightRounding,
    training_setup,
)


def get_config(
    recipe: str = "quest_w4a4",
    rules: tuple[str, ...] = (),
    recipe_schedule: tuple[str, ...] = (),
    optimizer: OptimizerName = "adamw",
    weights: str | None = None,
    weight_rounding: WeightRounding | None = None,
    quantize_once: bool = False,
    moments: Moments = "float32",
    param_dtype: ParamDtype = "float32",
    peak_lr: float = 4e-3,
    steps: int = 800,
    batch_size: int = 8,
    seq_len: int = 128,
    micro_batches: int = 1,
    d_model: int = 128,
    n_layers: int = 4,
    cage_total_strength: float = 2.7,
    weight_decay: float = 0.1,
    seed: int = 0,
) -> Config:
    """Settings of this experiment.

    Args:
      recipe: What the matrix products quantize, a name in lowbit_jax.ops.recipes, such as
        quest_w4a4, quartet, quartet2, nvfp4_nvidia, rtn_w4a4, fp8_tensorwise or bf16 (nothing). A
        product can follow another one: quartet:dx=bf16,dw=bf16 quantizes the forward product (y)
        alone.
      rules: Recipes of single matrices, as PATTERN=RECIPE. The pattern, a regular expression, must
        match a whole path of the table printed at the start; the first match wins, recipe is for
        the rest. For example layers/mlp/down_proj/weight=fp8_tensorwise.
      recipe_schedule: Later recipes, as STEP:RECIPE. Once that many steps are done RECIPE takes the
        place of recipe, rules stay: 2000:bf16 ends in high precision, 2000:quest_w4a4 starts
        quantizing there.
      optimizer: adamw updates float weights. eco keeps the seven matrices of each block as codes
        and no float copy: the momentum carries what rounding takes away (ECO, arXiv:2601.22101).
        naive drops it, for comparison. Both want a recipe that leaves weights alone, as bf16 does.
      weights: Format of these codes: fp8 (one scale a row), int4 (one for 32 weights), or a name in
        lowbit_jax.numerics.PRESETS. None takes fp8.
      weight_rounding: Of these codes: stochastic keeps updates below half a step on average,
        nearest loses them unless the momentum carries them. None takes stochastic.
      quantize_once: Quantize weights once a step and not in every layer's forward pass: the same
        values, less work with micro_batches or recomputation.
      moments: How Adam's two are stored, of 4 bytes a parameter each: bfloat16 takes 2, and e4m3
        takes 1 for the first, with a scale for 128, and 2 for the second. Rounded stochastically.
      param_dtype: How float parameters are stored. bfloat16 takes 2 bytes instead of 4; updates
        below its precision are rounded stochastically, so that none is lost on average.
      peak_lr: Highest learning rate, after a tenth of the steps.
      steps: Optimizer steps.
      batch_size: Sequences a step.
      seq_len: Bytes a sequence.
      micro_batches: Parts into which a batch is cut to save memory.
      d_model: Width, a multiple of 128.
      n_layers: Transformer blocks.
      cage_total_strength: Sum over the steps of learning rate times lambda, by which CAGE pulls
        the weights towards their grid in the last fifth of the run; 0 is plain AdamW.
      weight_decay: Of the quantized matrices.
      seed: Of initial weights and data order.
    """
    learning_rate = one_cycle_cosine(peak_lr, steps)
    setup = training_setup(
        learning_rate=learning_rate,
        steps=steps,
        recipe=recipe,
        rules=rules,
        recipe_schedule=recipe_schedule,
        optimizer=optimizer,
        weights=weights,
        weight_rounding=weight_rounding,
        cage_total_strength=cage_total_strength,
        weight_decay=weight_decay,
        moments=moments,
        param_dtype=param_dtype,
        seed=seed,
    )
    model = LlamaConfig(
        vocab_size=256,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=d_model // 64,
        d_ff=3 * d_model,
        dtype="float32",  # a CPU has no fast bfloat16
        recipe_rules=setup.recipe_rules,
    )
    return Config(
        model=Llama(model),
        optimizer=setup.optimizer,
        learning_rate=learning_rate,
        recipe_schedule=setup.recipe_schedule,
        quantize_once=quantize_once,
        store=setup.store,
        clip_norm=setup.clip_norm,
        data=open_corpus("moby-dick"),
        steps=steps,
        batch_size=batch_size,
        seq_len=seq_len,
        micro_batches=micro_batches,
        eval_interval=max(steps // 4, 1),
        checkpoint_interval=max(steps // 4, 1),
        seed=seed,
        sample_prompt="Call me Ishmael. ",
        flops_per_token=flops_per_token(model, seq_len),
    )

"""Llama with the sizes and settings of QuEST: Panferov et al., arXiv:2502.05003.

Data first, then training:
  python scripts/prepare_data.py --help
  python scripts/pretrain.py configs/llama.py --data prepared/NAME --size 30m

Speed only, without any data:
  python scripts/pretrain.py configs/llama.py --data synthetic --size 800m --steps 30
      --no-validate --no-save

Differences from the paper's runs: the data, and the tokenizer that comes with it. There, with 3
billion tokens of C4, the 30M model reached a validation loss of 3.207 nats per token unquantized
and 3.272 with quest_w4a4.
"""

from typing import Literal

from lowbit_jax.models import Llama, flops_per_token, llama_config
from lowbit_jax.optim import one_cycle_cosine
from lowbit_jax.train import Config, open_corpus
from lowbit_jax.train.setups import (
    Moments,
    OptimizerName,
    ParamDtype,
    WeightRounding,
    training_setup,
)

# Peak learning rate and training tokens of each size, as in the released training scripts of
# QuEST (about 100 tokens a parameter). "1b" is no size of theirs: both follow the others' rule,
# a learning rate inverse to the parameters.
PUBLISHED = {
    "30m": (1.2e-3, 3e9),
    "50m": (1.2e-3, 5e9),
    "100m": (6e-4, 10e9),
    "200m": (3e-4, 20e9),
    "430m": (1.5e-4, 43e9),
    "800m": (7.5e-5, 80e9),
    "1b": (6e-5, 97e9),
}


def get_config(
    size: Literal["30m", "50m", "100m", "200m", "430m", "800m", "1b"] = "30m",
    recipe: str = "quest_w4a4",
    rules: tuple[str, ...] = (),
    recipe_schedule: tuple[str, ...] = (),
    optimizer: OptimizerName = "adamw",
    weights: str | None = None,
    weight_rounding: WeightRounding | None = None,
    quantize_once: bool = False,
    moments: Moments = "float32",
    param_dtype: ParamDtype = "float32",
    data: str = "prepared",
    tokens: float | None = None,
    steps: int | None = None,
    batch_size: int = 512,
    micro_batches: int = 1,
    seq_len: int = 512,
    peak_lr: float | None = None,
    weight_decay: float = 0.1,
    cage_total_strength: float = 0.0,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    implementation: str | None = None,
    recompute: str = "none",
    scan_unroll: int = 1,
    eval_interval: int = 1000,
    eval_batches: int = 16,
    checkpoint_interval: int = 1000,
    seed: int = 0,
) -> Config:
    """Settings of this experiment; the defaults are those of the paper's runs.

    Args:
      size: Of the model, in parameters without embedding and head.
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
        values, less work with micro_batches or recompute.
      moments: How Adam's two are stored, of 4 bytes a parameter each: bfloat16 takes 2, and e4m3
        takes 1 for the first, with a scale for 128, and 2 for the second. Rounded stochastically.
      param_dtype: How float parameters are stored. bfloat16 takes 2 bytes instead of 4; updates
        below its precision are rounded stochastically, so that none is lost on average.
      data: Folder made by scripts/prepare_data.py; "moby-dick", the bundled book, byte by byte;
        or "synthetic", random tokens to measure speed, whose loss means nothing.
      tokens: Training tokens, 1e8 for example. None takes the paper's for this size.
      steps: Optimizer steps; overrides tokens.
      batch_size: Sequences a step.
      micro_batches: Parts into which a batch is cut to save memory.
      seq_len: Tokens a sequence.
      peak_lr: Highest learning rate, after a tenth of the steps. None takes the paper's.
      weight_decay: Of the seven matrices of each block.
      cage_total_strength: Sum over the steps of learning rate times lambda, by which CAGE pulls
        the weights towards their grid in the last fifth of the run; 0 is plain AdamW, published
        runs have 1.6 to 2.7.
      dtype: Of activations and operands.
      implementation: How quantized products are computed: dequantize, fp8, hopper, the kernels
        for H100 and H200, or hopper_bf16, which makes operands in NVFP4 by such a kernel; refused
        where a product is not covered. None chooses for each product.
      recompute: Activations that the backward pass computes anew instead of keeping: none, or
        flags joined by "+" of swiglu, norm, ffn, qkv, att and block (all of them).
      scan_unroll: Layers in one iteration of the loop over them; more compile longer, run faster.
      eval_interval: Steps between two validations.
      eval_batches: Batches of each, the last one included.
      checkpoint_interval: Steps between two checkpoints.
      seed: Of initial weights and data order.
    """
    published_lr, published_tokens = PUBLISHED[size]
    peak_lr = published_lr if peak_lr is None else peak_lr
    tokens = published_tokens if tokens is None else tokens
    if batch_size < 1 or seq_len < 1:  # divisors of the next line
        raise ValueError(f"batch_size and seq_len must be at least 1, got {batch_size}, {seq_len}.")
    steps = max(round(tokens / (batch_size * seq_len)), 1) if steps is None else steps
    dataset = open_corpus(data, vocab_size=32000)
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
    vocab_size = 32000 if data == "synthetic" else dataset.tokenizer.vocab_size
    model = llama_config(
        size,
        vocab_size=-(-vocab_size // 128) * 128,  # whole tiles for the head's products
        dtype=dtype,
        recipe_rules=setup.recipe_rules,
        implementation=implementation,
        recompute=recompute,
        scan_unroll=scan_unroll,
    )
    return Config(
        model=Llama(model),
        optimizer=setup.optimizer,
        learning_rate=learning_rate,
        recipe_schedule=setup.recipe_schedule,
        quantize_once=quantize_once,
        store=setup.store,
        clip_norm=setup.clip_norm,
        data=dataset,
        steps=steps,
        batch_size=batch_size,
        seq_len=seq_len,
        micro_batches=micro_batches,
        eval_interval=eval_interval,
        eval_batches=eval_batches,
        final_eval_batches=eval_batches,
        checkpoint_interval=checkpoint_interval,
        seed=seed,
        sample_prompt="" if data == "synthetic" else "The ",
        flops_per_token=flops_per_token(model, seq_len),
    )

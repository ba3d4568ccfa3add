"""Llama of 1M parameters on Moby-Dick, byte by byte: QuEST W4A4 with CAGE, for two CPU cores.

Run: python scripts/pretrain.py configs/llama_tiny_quest_cage.py

Expect: 1.74 nats per token, which is 2.51 bits per byte, on the validation split, where a trigram
model of bytes has 2.86; 2 minutes and 45 seconds on two cores, compilation included.
"""

from lowbit_jax.models import Llama, LlamaConfig, flops_per_token, llama_rules
from lowbit_jax.ops.recipes import get_recipe, weight_projection
from lowbit_jax.optim import cage, match_paths, one_cycle_cosine
from lowbit_jax.sparsity import identity
from lowbit_jax.train import Config, open_corpus


def get_config(
    recipe: str = "quest_w4a4",
    peak_lr: float = 4e-3,
    steps: int = 800,
    batch_size: int = 8,
    seq_len: int = 128,
    d_model: int = 128,
    n_layers: int = 4,
    cage_total_strength: float = 2.7,
    weight_decay: float = 0.1,
    seed: int = 0,
) -> Config:
    """Settings of this experiment.

    Args:
      recipe: What the matrix products quantize, a name in lowbit_jax.ops.recipes, such as
        quest_w4a4, quest_w2a2, rtn_w4a4 or bf16 (nothing).
      peak_lr: Highest learning rate, after a tenth of the steps.
      steps: Optimizer steps.
      batch_size: Sequences a step.
      seq_len: Bytes a sequence.
      d_model: Width, a multiple of 128.
      n_layers: Transformer blocks.
      cage_total_strength: Sum over the steps of learning rate times lambda, by which CAGE pulls
        the weights towards their grid in the last fifth of the run; 0 is plain AdamW.
      weight_decay: Of the quantized matrices.
      seed: Of initial weights and data order.
    """
    dot = get_recipe(recipe)
    model = LlamaConfig(
        vocab_size=256,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=d_model // 64,
        d_ff=3 * d_model,
        dtype="float32",  # a CPU has no fast bfloat16
        recipe_rules=llama_rules(dot),
    )
    matrices = match_paths("layers/.*_proj/weight")
    learning_rate = one_cycle_cosine(peak_lr, steps)
    return Config(
        model=Llama(model),
        optimizer=cage(
            learning_rate,
            weight_projection(dot) if cage_total_strength else identity,
            total_steps=steps,
            total_strength=cage_total_strength,
            mask=matrices,
            decay_mask=matrices,
            weight_decay=weight_decay,
            max_grad_norm=1.0,
        ),
        learning_rate=learning_rate,
        data=open_corpus("moby-dick"),
        steps=steps,
        batch_size=batch_size,
        seq_len=seq_len,
        eval_interval=max(steps // 4, 1),
        checkpoint_interval=max(steps // 4, 1),
        seed=seed,
        sample_prompt="Call me Ishmael. ",
        flops_per_token=flops_per_token(model, seq_len),
    )

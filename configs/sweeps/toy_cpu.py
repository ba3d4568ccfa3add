"""Byte-level toy: low-bit training methods side by side, at 2 bits, on two CPU cores.

Llama of 0.5M parameters on the bundled Moby-Dick, W2A2 for the integer methods: 300 steps of 8 x
128 bytes a run. At this peak learning rate the losses of three seeds of BF16 spread by 0.009 nats,
at 4e-3 by 0.03, which hides most of what is compared here; rows of one seed are worth no more.

  python scripts/sweep.py configs/sweeps/toy_cpu.py --runs runs/toy_cpu --out docs/results/toy_cpu
"""

from lowbit_jax.train import Row


def get_rows(steps: int = 300) -> list[Row]:
    """Rows of this sweep.

    Args:
      steps: Optimizer steps of each run.
    """
    common = {"n_layers": 2, "steps": steps, "peak_lr": 1e-3, "cage_total_strength": 0.0}

    def row(group, name, baseline: str | None = "bf16", seeds=1, **arguments):
        return Row(
            name=name,
            config="configs/llama_tiny_quest_cage.py",
            arguments={**common, "recipe": name, **arguments},
            seeds=tuple(range(seeds)),
            baseline=baseline,
            group=group,
        )

    forward, fp4 = "Quantized forward pass, W2A2", "4 bits in all three products"
    rows = [
        row(forward, "bf16", baseline=None, seeds=3),
        row(forward, "rtn_w2a2"),
        row(forward, "quest_w2a2_no_hadamard"),
        row(forward, "quest_w2a2", seeds=3),
        row(
            forward,
            "quest_w2a2_cage2.7",
            baseline="quest_w2a2",
            seeds=3,
            recipe="quest_w2a2",
            cage_total_strength=2.7,
        ),
        row(fp4, "quartet"),
        row(fp4, "quartet2"),
        row(fp4, "nvfp4_nvidia"),
    ]
    for weights in ("fp8", "int4"):
        group = f"{weights.upper()} weights with a master copy, without one, with ECO"
        master = f"{weights}_weights"
        seeds = 3 if weights == "int4" else 1  # FP8 loses nothing in so few steps, but to nearest
        rows.append(row(group, master, seeds=seeds))
        rows += [
            row(
                group,
                f"{optimizer}_{weights}_{suffix}",
                baseline=master,
                seeds=seeds if suffix == "sr" else 1,
                recipe="bf16",
                optimizer=optimizer,
                weights=weights,
                weight_rounding=rounding,
            )
            for optimizer in ("naive", "eco")
            for suffix, rounding in (("rtn", "nearest"), ("sr", "stochastic"))
        ]
    return rows

"""Llama 30M: what each low-bit method costs, in validation loss.

All runs have the same batches in the same order for a seed, and differ in what a row states.

  python scripts/prepare_data.py TEXT --out prepared --tokenizer bpe:16384
  python scripts/sweep.py configs/sweeps/llama_30m.py --data prepared --runs runs/llama_30m
      --out docs/results/llama_30m --gpus 0 1 --jobs-per-gpu 3

The rows whose differences are small, on four times the tokens:

  python scripts/sweep.py configs/sweeps/llama_30m.py --tokens 120e6 --decisive --data prepared
      --runs runs/llama_30m_120m --out docs/results/llama_30m_120m --gpus 0 1 --jobs-per-gpu 3

Published numbers are of 30M models on C4 with a 32,000-entry tokenizer, 0.75 or 3 billion tokens:
the training records of QuEST (Panferov et al., arXiv:2502.05003), Quartet (Castro et al.,
arXiv:2505.14669) and Quartet II (Panferov et al., arXiv:2601.22813), as gaps to BF16 within one
set of records. Those of Quartet II were trained with an emulation whose correction block is the
rotation's 128, where quartet2 has 16. CAGE (Tabesh et al., arXiv:2510.18784) and ECO (Nikdan et
al., arXiv:2601.22101) are quoted from their abstracts: CAGE's is of models up to 800M with 100
tokens a parameter, 3 billion for 30M; ECO's says no number of tokens, and its INT4 is the
fine-tuning of a trained model of 16B.
"""

from lowbit_jax.train import Row

_BATCH_SIZE, _SEQ_LEN = 64, 512
# CAGE is silent for this part of a run; what follows is all that its strengths differ in.
_CAGE_SILENCE = 0.8
_CAGE_STRENGTHS = (0.0, 1.6, 2.7, 5.0)
_CAGE_ANCHOR = ">10 % of QuEST's gap recovered (up to 800M, 100 tokens a parameter: 3B)"
_ECO_ANCHORS = {
    "fp8": "near-lossless (30M to 800M, tokens not stated)",
    "int4": "near-lossless (fine-tuning a 16B model)",
}
# Runs of more tokens, minutes on one GPU, are saved now and then: one that was stopped goes on.
_MOST_UNSAVED = 50e6


def get_rows(tokens: float = 30e6, seeds: int = 3, decisive: bool = False) -> list[Row]:
    """Rows of this sweep.

    Args:
      tokens: Training tokens of each run.
      seeds: Of the rows whose differences are small; the others have one.
      decisive: Only the rows whose differences are small.
    """
    common = {
        "size": "30m",
        "batch_size": _BATCH_SIZE,
        "seq_len": _SEQ_LEN,
        "tokens": tokens,
        "scan_unroll": 6,
        "eval_interval": 250,
    }
    rows = []

    def add(group, name, baseline, anchor="", is_close=False, arguments=None, **fields):
        if decisive and not is_close:
            return
        rows.append(
            Row(
                name=name,
                config="configs/llama.py",
                arguments={**common, "recipe": name, **(arguments or {})},
                seeds=tuple(range(seeds)) if is_close else (0,),
                baseline=baseline,
                group=group,
                anchor=anchor,
                save=tokens > _MOST_UNSAVED,
                **fields,
            )
        )

    group = "Formats"
    add(group, "bf16", None, "3.2071 (3B)", is_close=True)
    add(group, "fp8_tensorwise", "bf16")
    add(group, "fp8_tensorwise_e4m3", "bf16")
    add(group, "mxfp8", "bf16")

    group = "Integers: to nearest, QuEST without and with Hadamard"
    for bits, rtn, plain, quest in (
        (4, "+0.585", "+0.0965", "+0.0650"),
        (3, "+1.242", "+0.2189", "+0.1648"),
        (2, "+1.586", "+0.4701", "+0.3669"),
    ):
        width = f"w{bits}a{bits}"
        add(group, f"rtn_{width}", "bf16", f"{rtn} (3B)")
        add(group, f"quest_{width}_no_hadamard", "bf16", f"{plain} (3B)")
        add(group, f"quest_{width}", "bf16", f"{quest} (3B)", is_close=True)

    group = "CAGE on QuEST, total strength 0, 1.6, 2.7 and 5, branched off where it sets in"
    steps = round(tokens / (_BATCH_SIZE * _SEQ_LEN))
    for bits in (2, 3, 4):
        quest = f"quest_w{bits}a{bits}"
        recipe = {"recipe": quest}
        base = f"{quest}_base"
        stop = int(_CAGE_SILENCE * steps)
        add(group, base, None, is_close=True, arguments=recipe, stop_after=stop)
        for strength in _CAGE_STRENGTHS:
            add(
                group,
                f"{quest}_cage{strength:g}",
                # Strength 0 against a run in one piece: what the order of sums alone does.
                f"{quest}_cage0" if strength else quest,
                _CAGE_ANCHOR if strength and bits == 4 else "",
                is_close=True,
                arguments={**recipe, "cage_total_strength": strength},
                branch_of=base,
            )

    group = "Quartet, MXFP4: scale of the forward pass x rounding of the backward pass"
    add(group, "quartet", "bf16", is_close=True)
    add(group, "quartet_rtn", "bf16", is_close=True)
    add(group, "quartet_aligned", "bf16", is_close=True)
    add(group, "quartet_floor", "bf16", "+0.0846 (0.75B), +0.0909 (3B)", is_close=True)
    add(group, "quartet_floor_rtn", "bf16")
    for name, recipe, anchor, is_close in (
        ("quartet_floor_aligned", "quartet_floor:dx=quartet_aligned,dw=quartet_aligned", "", False),
        ("quartet_forward", "quartet:dx=bf16,dw=bf16", "", True),
        ("quartet_floor_forward", "quartet_floor:dx=bf16,dw=bf16", "", False),
        ("quartet_backward", "quartet:y=bf16", "+0.0150 (0.75B), +0.0122 (3B)", True),
        ("quartet_rtn_backward", "quartet_rtn:y=bf16", "+0.0067 (0.75B), +0.0060 (3B)", True),
        ("quartet_aligned_backward", "quartet_aligned:y=bf16", "", True),
    ):
        add(group, name, "bf16", anchor, is_close, {"recipe": recipe})

    group = "Quartet II, NVFP4: MS-EDEN or stochastic rounding, with four-over-six or without"
    published, of_128 = "+0.0430 (0.75B), +0.0591 (3B)", "; correction block 128"
    add(group, "quartet2", "bf16", published + of_128, is_close=True)
    no46 = "+0.0445 (0.75B), +0.0662 (3B)" + of_128
    add(group, "quartet2_no46", "bf16", no46, is_close=True)
    add(group, "quartet2_sr", "bf16", is_close=True)
    add(group, "quartet2_sr_no46", "bf16", is_close=True)
    add(group, "quartet2_eden128", "bf16", published)
    for name, recipe, anchor, is_close in (
        ("quartet2_forward", "quartet2:dx=bf16,dw=bf16", "+0.0558 (3B)", False),
        ("quartet2_no46_forward", "quartet2_no46:dx=bf16,dw=bf16", "+0.0610 (3B)", False),
        ("quartet2_backward", "quartet2:y=bf16", "+0.0065 (0.75B), +0.0045 (3B)" + of_128, True),
        ("quartet2_sr_backward", "quartet2_sr:y=bf16", "+0.0150 (0.75B), +0.0110 (3B)", True),
    ):
        add(group, name, "bf16", anchor, is_close, {"recipe": recipe})
    add(group, "nvfp4_nvidia", "bf16", "+0.0548 (0.75B), +0.0787 (3B)", is_close=True)
    add(group, "nvfp4_nvidia_46", "bf16", "+0.0566 (0.75B), +0.0749 (3B)")

    for weights in ("fp8", "int4"):
        group = f"ECO: {weights.upper()} weights with a master copy, without one, with ECO"
        master = f"{weights}_weights"
        add(group, master, "bf16", is_close=True)
        add(group, f"{master}_sr", "bf16")
        for optimizer, anchor in (("naive", ""), ("eco", _ECO_ANCHORS[weights])):
            for suffix, rounding in (("rtn", "nearest"), ("sr", "stochastic")):
                add(
                    group,
                    f"{optimizer}_{weights}_{suffix}",
                    master,
                    anchor,
                    is_close=suffix == "sr",
                    arguments={
                        "recipe": "bf16",
                        "optimizer": optimizer,
                        "weights": weights,
                        "weight_rounding": rounding,
                    },
                )
    return rows

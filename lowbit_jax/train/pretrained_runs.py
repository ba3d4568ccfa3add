"""Between runs and published models: a run's weights out, a model's weights in."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import tokenizers
from flax import traverse_util

from lowbit_jax.models import LlamaConfig
from lowbit_jax.models.linear import resolve_recipes
from lowbit_jax.models.llama import QUANTIZABLE_PATHS
from lowbit_jax.models.pretrained import Pretrained, load_pretrained, save_pretrained
from lowbit_jax.numerics import QTensor
from lowbit_jax.ops import quantize_weight
from lowbit_jax.ops.coded_weight import CodedWeight
from lowbit_jax.optim import dequantize_leaves
from lowbit_jax.train.checkpoint import restore_latest, save_checkpoint
from lowbit_jax.train.config import Config, UsageError, load_config_file
from lowbit_jax.train.run_directory import versions
from lowbit_jax.train.start import state_shapes
from lowbit_jax.train.state import TrainState, create_state

# Fields of LlamaConfig that decide what weights mean; the others say how to compute.
_MEANING = (
    *("vocab_size", "d_model", "n_layers", "n_heads", "kv_heads", "mlp_width", "head_dim"),
    *("rope_theta", "rope_scaling", "norm_eps", "tie_embeddings", "qkv_bias", "qk_norm"),
)


def load_run(run_dir: str | os.PathLike) -> tuple[Config, TrainState]:
    """Configuration and newest state of a run, on the first device.

    The data of the run must be where they were: its configuration opens them.

    Raises:
      UsageError: If `run_dir` is no folder of a run, or holds no undamaged checkpoint.
    """
    run_dir = pathlib.Path(run_dir)
    try:
        arguments = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["arguments"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"load_run: {run_dir} must be the folder of a run, got none with a run.json"
            f" ({error!r}); give the folder that scripts/pretrain.py printed."
        ) from error
    # A tuple came back from the file as a list.
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    try:
        config = load_config_file(run_dir / "config.py").get_config(**arguments)
        restored = restore_latest(run_dir / "checkpoints", state_shapes(config, None), warn=print)
    except (TypeError, ValueError, OSError) as error:
        raise UsageError(f"load_run: {run_dir}: {error}") from error
    if restored is None:
        raise UsageError(
            f"load_run: {run_dir} has no checkpoint; train it first, without --no-save."
        )
    return config, restored[0]


def export_run(
    run_dir: str | os.PathLike,
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    save_codes: Callable[..., Any] | None = None,
) -> tuple[Config, int]:
    """Writes the newest weights of a run as a Hugging Face directory, with its tokenizer.

    The weights are those that are stored, dequantized where a run stores codes. Recipes are not
    written: a model trained with one predicts as it did in training under that recipe only. With
    `save_codes` the weights are those of `coded_params`, which say how inputs are quantized, too.

    Args:
      run_dir: Folder of the run.
      path: Of the directory, see `save_pretrained`.
      dtype: Of the weights, see `save_pretrained`.
      save_codes: `ptq.export.save_quantized`, or another function that takes what it takes; None:
        float weights.

    Returns:
      The configuration of the run and the step of the weights.

    Raises:
      UsageError: As `load_run`, or as `coded_params`.
      ValueError: As `save_pretrained`.
    """
    config, state = load_run(run_dir)
    tokenizer = config.data.tokenizer
    text = tokenizer.to_json()
    if save_codes is None:
        save, params = save_pretrained, dequantize_leaves(state.params)
    else:
        save, params = save_codes, coded_params(config, state)
    save(
        path,
        config.model,
        params,
        tokenizer=None if text is None else tokenizers.Tokenizer.from_str(text),
        metadata={
            "max_position_embeddings": config.seq_len,
            "eos_token_id": tokenizer.end_of_text,
        },
        dtype=dtype,
    )
    return config, int(state.step)


def coded_params(config: Config, state: TrainState) -> dict[str, Any]:
    """The parameters of a run with a `CodedWeight` for each of the seven matrices.

    Codes are those that the products of the newest step multiplied by: of the recipe, in its
    basis, with the format of its inputs; or those that are stored, where no recipe quantizes.
    `Llama(config.model.config without rules)` then predicts as the run does.

    Args:
      config: Of the run.
      state: Its state; the step says which recipes hold.

    Raises:
      UsageError: If the weights of a matrix are not quantized, or at random.
    """
    done = max(int(state.step) - 1, 0)
    model = [model for start, model in config.phases if start <= done][-1]
    recipes = resolve_recipes(model.config.recipe_rules, QUANTIZABLE_PATHS)

    quantize = jax.jit(quantize_weight, static_argnums=1)
    flat: dict[str, Any] = traverse_util.flatten_dict(state.params, sep="/")
    for path, stored in flat.items():
        if path not in recipes:
            flat[path] = dequantize_leaves(stored)
            continue
        _, recipe = recipes[path]
        of_product = (recipe.y_w, recipe.y_x, recipe.rotation_of("y"))
        if recipe.is_identity and isinstance(stored, QTensor):
            coded = CodedWeight(stored)
        elif recipe.y_w is None or any(p is not None and p.needs_key for p in of_product):
            raise UsageError(
                "coded_params: the recipe must quantize the weights of each of the seven matrices,"
                f" and nothing of their product at random, got {recipe} for {path}; export float"
                " weights."
            )
        else:
            q = quantize(dequantize_leaves(stored), recipe)
            coded = CodedWeight(q, None, recipe.rotation_of("y"), recipe.y_x)
        flat[path] = coded
    return traverse_util.unflatten_dict(flat, sep="/")


def import_pretrained(path: str | os.PathLike, config: Config, run_dir: str | os.PathLike) -> None:
    """Writes the weights of a published model as the checkpoint of step 0 of a run of `config`.

    `scripts/pretrain.py CONFIG.py --branch-from RUN_DIR`, with the arguments that gave `config`,
    then trains on from it.

    Args:
      path: Hugging Face directory or GGUF file.
      config: Of the run to come.
      run_dir: Gets a folder `checkpoints`.

    Raises:
      UsageError: If the model of `config` has another shape.
      ValueError: As `load_pretrained`.
    """
    loaded: Pretrained = load_pretrained(path, config.model.config.dtype)
    wanted, found = config.model.config, loaded.model.config
    differing = [name for name in _MEANING if getattr(wanted, name) != getattr(found, name)]
    if differing:
        raise UsageError(
            f"import_pretrained: the model of the configuration must be that of {path}, got"
            f" {_values(wanted, differing)} where it has {_values(found, differing)}; change the"
            " configuration."
        )
    state = create_state(loaded.params, config.optimizer, config.store)
    save_checkpoint(pathlib.Path(run_dir) / "checkpoints", state, {"versions": versions()})


def _values(config: LlamaConfig, names: list[str]) -> str:
    return ", ".join(f"{name}={getattr(config, name)}" for name in names)

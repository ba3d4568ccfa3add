"""Between runs and published models: a run's weights out, a model's weights in."""

import json
import os
import pathlib

import tokenizers

from lowbit_jax.models import LlamaConfig
from lowbit_jax.models.pretrained import Pretrained, load_pretrained, save_pretrained
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
    run_dir: str | os.PathLike, path: str | os.PathLike, *, dtype: str | None = None
) -> tuple[Config, int]:
    """Writes the newest weights of a run as a Hugging Face directory, with its tokenizer.

    The weights are those that are stored, dequantized where a run stores codes. Recipes are not
    written: a model trained with one predicts as it did in training under that recipe only.

    Args:
      run_dir: Folder of the run.
      path: Of the directory, see `save_pretrained`.
      dtype: Of the weights, see `save_pretrained`.

    Returns:
      The configuration of the run and the step of the weights.

    Raises:
      UsageError: As `load_run`.
      ValueError: As `save_pretrained`.
    """
    config, state = load_run(run_dir)
    tokenizer = config.data.tokenizer
    text = tokenizer.to_json()
    save_pretrained(
        path,
        config.model,
        dequantize_leaves(state.params),
        tokenizer=None if text is None else tokenizers.Tokenizer.from_str(text),
        metadata={
            "max_position_embeddings": config.seq_len,
            "eos_token_id": tokenizer.end_of_text,
        },
        dtype=dtype,
    )
    return config, int(state.step)


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

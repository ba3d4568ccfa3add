"""From the tensors of a file, one a layer, to the parameters of `Llama`, one for all layers."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from lowbit_jax.models.llama import Llama


class Pretrained(NamedTuple):
    """A loaded model.

    Attributes:
      model: With the shape of the checkpoint.
      params: Its parameters, as `model.init` would give them.
      tokenizer_path: tokenizer.json, or else tokenizer.model, of the directory; None if there is
        neither. A GGUF file carries its own, see `gguf_tokenizer`.
      metadata: What the checkpoint says and the model does not need: the longest sequence and the
        numbers of special tokens. `save_pretrained` takes it.
    """

    model: Llama
    params: dict[str, Any]
    tokenizer_path: Path | None
    metadata: dict[str, Any]


class TensorSource(NamedTuple):
    """Tensors by name, each read when its turn comes.

    Attributes:
      path: For messages.
      shapes: Of each tensor.
      read: Gives a tensor in any floating dtype that casts to float32.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def parameter_shapes(model: Llama) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter by its path, layers first; computes nothing."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    tree: Any = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    flat: dict[str, Any] = traverse_util.flatten_dict(nn.meta.unbox(tree), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def tensors_of(path: str, template: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that make up the parameter at `path`."""
    if not path.startswith("layers/"):
        return {template: shape}
    return {template.format(layer): shape[1:] for layer in range(shape[0])}


def assemble(
    model: Llama,
    names: Mapping[str, str],
    source: TensorSource,
    *,
    ignored: Callable[[str], bool] = lambda name: False,
    param_dtype: str = "float32",
    on_host: bool = False,
    stack: Callable[[str, list[str]], Any] = lambda path, tensors: None,
) -> dict[str, Any]:
    """The parameters of `model` from tensors of other names.

    Names and shapes are checked before anything is read. Then parameter by parameter is put
    together in the host's memory and moved to the default device: beside the model there is never
    more than one parameter of all layers.

    Args:
      model: What to fill.
      names: Path of each parameter to the name of its tensors, `{}` in place of the layer.
      source: The tensors.
      ignored: Names that may be there and are not needed.
      param_dtype: `"float32"` or `"bfloat16"`.
      on_host: Leave the parameters as NumPy arrays.
      stack: Of the path of a parameter and the names of its tensors: NumPy arrays in a pytree to
        take its place, or None to read them here.

    Raises:
      ValueError: If a tensor is missing, not wanted, of another shape, or not finite.
    """
    if param_dtype not in ("float32", "bfloat16"):
        raise ValueError(
            f"load_pretrained: param_dtype must be 'float32' or 'bfloat16', got {param_dtype!r};"
            " quantize the loaded parameters for fewer bits."
        )
    shapes = parameter_shapes(model)
    wanted = {path: tensors_of(path, names[path], shape) for path, shape in shapes.items()}
    _check_tensors(source, {k: v for one in wanted.values() for k, v in one.items()}, ignored)

    flat = {}
    for path, tensors in wanted.items():
        if (stacked := stack(path, list(tensors))) is not None:
            flat[path] = stacked if on_host else jax.tree.map(jnp.asarray, stacked)
            continue
        parameter = np.empty((len(tensors), *next(iter(tensors.values()))), jnp.dtype(param_dtype))
        for row, name in zip(parameter, tensors, strict=True):
            with np.errstate(over="ignore"):  # reported below
                row[...] = source.read(name)
            if not np.isfinite(row).all():
                raise ValueError(
                    f"load_pretrained: every weight must be finite, got a NaN, an infinity or more"
                    f" than {param_dtype} holds in {name} of {source.path}; fetch the file again,"
                    " or train on from an earlier checkpoint."
                )
        parameter = parameter.reshape(shapes[path])
        flat[path] = parameter if on_host else jnp.asarray(parameter)
    return traverse_util.unflatten_dict(flat, sep="/")


def _check_tensors(
    source: TensorSource, wanted: Mapping[str, tuple[int, ...]], ignored: Callable[[str], bool]
) -> None:
    if missing := [name for name in wanted if name not in source.shapes]:
        raise ValueError(
            f"load_pretrained: {source.path} lacks {_some(missing)}; a file of the directory was"
            " not fetched, or its configuration (tied embeddings, layers) is that of another"
            " model."
        )
    if extra := [name for name in source.shapes if name not in wanted and not ignored(name)]:
        raise ValueError(
            f"load_pretrained: {source.path} has {_some(extra)}, which this architecture does not"
            " read; the configuration is that of another model."
        )
    for name, shape in wanted.items():
        if tuple(source.shapes[name]) != tuple(shape):
            raise ValueError(
                f"load_pretrained: {name} must be {tuple(shape)} by the configuration, got"
                f" {tuple(source.shapes[name])} in {source.path}; the configuration is that of"
                " another model."
            )


def _some(names: Iterable[str]) -> str:
    """The first names, and how many more."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

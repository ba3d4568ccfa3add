"""Compression block by block: each block is solved for inputs that come from compressed ones.

    states = the embedded tokens of every calibration batch, on the host
    for each block:
        run it on the states as it is: the Hessians of what its matrices take
        compress its matrices
        run it on the states once more, compressed: the states that the next block takes

The device holds one block, its Hessians and one batch, so that the model may be larger than the
device. Compressed blocks are written to a folder as they come; a run that was killed goes on there.

References:
  Frantar et al., GPTQ, arXiv:2210.17323, section 4: blocks one after another, for the inputs that
  the compressed model will give them. Within a block all matrices are solved for the inputs that
  its own uncompressed matrices make.
"""

import dataclasses
import functools
import hashlib
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, PyTree, Shaped

from lowbit_jax.models import Llama, QuantizedLinear
from lowbit_jax.models.layers import RMSNorm
from lowbit_jax.models.llama import QUANTIZABLE_PATHS, Block
from lowbit_jax.ptq.hessian import Hessian, add_inputs, empty_hessian
from lowbit_jax.ptq.info import Info, check_info
from lowbit_jax.ptq.kept_blocks import KeptBlocks

# What is recorded, by the module that takes or makes it: matrices that share an input share one.
_SOURCES = {
    "attention_norm": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "mlp_norm": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
_PATHS = tuple(path.removeprefix("layers/").removesuffix("/weight") for path in QUANTIZABLE_PATHS)


class Compression(NamedTuple):
    """How a matrix is compressed.

    Attributes:
      solve: Of the path of a matrix, such as "attention/q_proj", its weight `(n, k)` float32 and
        the Hessian of its inputs: what is kept of it, a pytree of arrays, and what to say of it.
        `jax.eval_shape` must be able to trace it.
      weight: Of the path and what was kept: the weight `(n, k)` that the block multiplies by.
    """

    solve: Callable[[str, Array, Hessian], tuple[PyTree, Info]]
    weight: Callable[[str, PyTree], Array]


@dataclasses.dataclass(frozen=True)
class MatrixReport:
    """A compressed matrix.

    Attributes:
      layer: Its block, from 0.
      path: Within the block.
      error: Relative error of its outputs on the calibration tokens, see `hessian.layer_error`.
      damping: See `Info`.
      failures: See `Info`.
      time_s: That its solver took, compilation included.
    """

    layer: int
    path: str
    error: float
    damping: float
    failures: int
    time_s: float


class CompressedBlock(NamedTuple):
    """Of each path what was kept, on the host, and its report."""

    kept: dict[str, PyTree]
    reports: tuple[MatrixReport, ...]


def compress_blocks(
    model: Llama,
    params: Mapping[str, Any],
    batches: Sequence[Shaped[np.ndarray, "..."]],
    compression: Compression,
    *,
    folder: pathlib.Path | None = None,
    settings: Mapping[str, Any] | None = None,
    place: Callable[[Array], Array] = jnp.asarray,
) -> Iterator[CompressedBlock]:
    """Compresses the seven matrices of each block; yields a block when it is done.

    Args:
      model: What the blocks are run as: with recipes that quantize activations, matrices are
        solved for the inputs, themselves not quantized, that quantized products before them give.
        No recipe may need a key.
      params: Its parameters, stacked over layers; of arrays on the host one layer at a time is
        copied to the device.
      batches: Calibration tokens, all of one shape `(b, t)`.
      compression: The method.
      folder: Where blocks are kept; those that are there already are not solved again.
      settings: What the result depends on beside model, parameters and batches, which are held
        against those of the folder anyway: the method above all. Plain data for JSON.
      place: Puts a batch of states on the device, or its rows on several: Hessians then sum over
        all of them.

    Raises:
      ValueError: If there are no batches, their shapes differ, a recipe needs a key, a matrix
        could not be solved, or the folder is that of other settings.
    """
    shapes = {np.shape(batch) for batch in batches}
    if len(shapes) != 1:
        raise ValueError(
            "compress_blocks: calibration batches must be of one shape, and at least one, got"
            f" {sorted(shapes) or 'none'}; cut the text into windows of one length."
        )
    config = model.config
    for path, recipe in config.recipe_rules:
        if recipe.needs_key:
            raise ValueError(
                f"compress_blocks: recipes must not need a key, got {recipe} for {path!r}; round"
                " activations to nearest."
            )
    kept_blocks = None
    if folder is not None:
        identity = _identity(model, params, batches)
        kept_blocks = KeptBlocks(folder, {**(settings or {}), **identity})
    block = Block(dataclasses.replace(config, recompute="none", offload_residuals=False))
    embed = jax.jit(lambda p, tokens: model.apply({"params": p}, tokens, method="first_block"))
    run = jax.jit(lambda layer, x, rotary: block.apply({"params": layer}, x, None, rotary)[0])
    record = jax.jit(
        lambda layer, x, rotary, found: _record(block, layer, x, rotary, found), donate_argnums=3
    )
    states, rotary = [], None
    table = jax.tree.map(jnp.asarray, params["embedding"])
    for batch in batches:
        x, rotary = embed({"embedding": table}, batch)
        states.append(np.asarray(x))
    del table
    for index in range(config.n_layers):
        layer = jax.tree.map(lambda leaf, i=index: jnp.asarray(leaf[i]), params["layers"])
        hessians = {
            source: empty_hessian(_matrix(layer, users[0]).shape[1])
            for source, users in _SOURCES.items()
        }
        if kept_blocks is not None and index in kept_blocks:
            done = _load(kept_blocks, index, layer, hessians, compression)
        else:
            for x in states:
                hessians = record(layer, place(x), rotary, hessians)
            done = _solve(index, layer, hessians, compression)
            if kept_blocks is not None:
                rows = [dataclasses.asdict(report) for report in done.reports]
                kept_blocks.save(index, done.kept, {"reports": rows})
        for path in _PATHS:
            weight = compression.weight(path, done.kept[path])
            layer = _with_matrix(layer, path, weight)
        if index + 1 < config.n_layers:
            for number, x in enumerate(states):
                states[number] = np.asarray(run(layer, place(x), rotary))
        yield done


def _identity(model: Llama, params: Mapping[str, Any], batches: Sequence[Any]) -> dict[str, str]:
    """What kept blocks are held against: the model, its tokens, and parts of its parameters."""
    tokens, weights = hashlib.sha256(), hashlib.sha256()
    for batch in batches:
        tokens.update(np.ascontiguousarray(batch).tobytes())
    for leaf in jax.tree.leaves(params):
        weights.update(np.asarray(leaf[-1]).tobytes())  # of stacked ones the last layer
    return {
        "model_config": repr(model.config),
        "tokens_sha256": tokens.hexdigest(),
        "params_sha256": weights.hexdigest(),
    }


def _record(block: Block, layer: PyTree, x: Array, rotary: Any, found: dict[str, Hessian]):
    """The Hessians with the inputs that the block's matrices get."""
    found = dict(found)

    def intercept(next_method, args, kwargs, context):
        module, is_call = context.module, context.method_name == "__call__"
        y = next_method(*args, **kwargs)
        if is_call and module.name in _SOURCES:
            if isinstance(module, RMSNorm):
                found[module.name] = add_inputs(found[module.name], y)
            elif isinstance(module, QuantizedLinear):
                found[module.name] = add_inputs(found[module.name], args[0])
        return y

    with nn.intercept_methods(intercept):
        block.apply({"params": layer}, x, None, rotary)
    return found


def _load(
    kept_blocks: KeptBlocks,
    index: int,
    layer: PyTree,
    hessians: dict[str, Hessian],
    compression: Compression,
) -> CompressedBlock:
    """A block that is done already."""

    def solve(path, weight, hessian):
        return compression.solve(path, weight, hessian)[0]

    like = {}
    for path, weight, hessian in _matrices(layer, hessians):
        like[path] = jax.eval_shape(functools.partial(solve, path), weight, hessian)
    kept, notes = kept_blocks.load(index, like)
    return CompressedBlock(kept, tuple(MatrixReport(**row) for row in notes["reports"]))


def _matrices(layer: PyTree, hessians: dict[str, Hessian]) -> Iterator[tuple[str, Array, Hessian]]:
    """Path, weight in float32, and Hessian of the inputs of each matrix."""
    source_of = {user: source for source, users in _SOURCES.items() for user in users}
    for path in _PATHS:
        name = path.rsplit("/", 1)[1]
        yield path, _matrix(layer, name).astype(jnp.float32), hessians[source_of[name]]


def _solve(
    index: int, layer: PyTree, hessians: dict[str, Hessian], compression: Compression
) -> CompressedBlock:
    kept, reports = {}, []
    for path, weight, hessian in _matrices(layer, hessians):
        start = time.perf_counter()
        result, info = compression.solve(path, weight, hessian)
        check_info(f"layer {index}, {path}", info)
        kept[path] = jax.tree.map(np.asarray, result)
        reports.append(
            MatrixReport(
                index, path, float(info.error), float(info.damping), int(info.failures),
                time.perf_counter() - start,
            )
        )  # fmt: skip
    return CompressedBlock(kept, tuple(reports))


def _matrix(layer: PyTree, name: str) -> Float[Array, "n k"]:
    part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "attention"
    return layer[part][name]["weight"]


def _with_matrix(layer: PyTree, path: str, weight: Any) -> PyTree:
    """The layer with another matrix, in the dtype of the old one."""
    part, name = path.split("/")
    old = layer[part][name]["weight"]
    new = {**layer[part][name], "weight": weight.astype(old.dtype)}
    return {**layer, part: {**layer[part], name: new}}

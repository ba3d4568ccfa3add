"""Compression block by block: each block is solved for inputs that come from compressed ones.

    states = the embedded tokens of every calibration batch, on the host
    for each block:
        run it on the states as it is: Hessians and largest magnitudes of what its matrices take
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
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree, Shaped

from lowbit_jax.models import Llama, QuantizedLinear
from lowbit_jax.models.layers import RMSNorm
from lowbit_jax.models.llama import QUANTIZABLE_PATHS, Block
from lowbit_jax.ops.coded_weight import CodedWeight
from lowbit_jax.ptq.hessian import Hessian, add_inputs, empty_hessian
from lowbit_jax.ptq.info import Info, check_info
from lowbit_jax.ptq.kept_blocks import KeptBlocks, digest_of
from lowbit_jax.ptq.statistics import code_statistics, input_statistics, weight_statistics

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
      weight: Of the path and what was kept: the weight `(n, k)` that the block multiplies by, or a
        `CodedWeight`, which may transform and round its inputs.
      solve_together: Of the weights of all matrices that take one input, by their paths, and its
        Hessian: what `solve` gives, for each; see `shared_scales`. None: one by one.
      transform_inputs: In which basis inputs are measured for `CompressedBlock.input_absmax`;
        None: as they are.
    """

    solve: Callable[[str, Array, Hessian], tuple[PyTree, Info]]
    weight: Callable[[str, PyTree], Array | CodedWeight]
    solve_together: Callable[[dict[str, Array], Hessian], dict[str, tuple[PyTree, Info]]] | None = (
        None
    )
    transform_inputs: Callable[[Array], Array] | None = None


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
      weight_kurtosis: See `statistics.weight_statistics`, of the weights as they were.
      weight_max_to_rms: Likewise.
      input_max_to_rms: See `statistics.input_statistics`; the largest input is that of
        `CompressedBlock.input_absmax`, in its basis.
      input_max_to_median: Likewise.
      scale_min: See `statistics.code_statistics`; None where no codes are kept.
      scale_median: Likewise.
      scale_max: Likewise.
      zero_codes: Likewise.
      limit_codes: Likewise.
    """

    layer: int
    path: str
    error: float
    damping: float
    failures: int
    time_s: float
    weight_kurtosis: float | None = None
    weight_max_to_rms: float | None = None
    input_max_to_rms: float | None = None
    input_max_to_median: float | None = None
    scale_min: float | None = None
    scale_median: float | None = None
    scale_max: float | None = None
    zero_codes: float | None = None
    limit_codes: float | None = None


class CompressedBlock(NamedTuple):
    """Of each path what was kept, on the host, its report, and the abs-max of its inputs."""

    kept: dict[str, PyTree]
    reports: tuple[MatrixReport, ...]
    input_absmax: Mapping[str, float] = {}


class _Inputs(NamedTuple):
    """What is recorded of the inputs of matrices that share them."""

    hessian: Hessian
    absmax: Array  # () float32


def over_devices(batch_size: int, devices: Sequence[Any] | None = None) -> Callable[[Array], Array]:
    """A `place` for `compress_blocks`: the rows of a batch over the devices of this process.

    Over all of them (`devices`: over these), or as many as divide the batch; every device holds the
    block that is run.
    """
    devices = jax.local_devices() if devices is None else devices
    count = math.gcd(batch_size, len(devices))
    if count == 1:
        return jnp.asarray
    mesh = Mesh(np.asarray(devices[:count]), ("data",))
    return functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data")))


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
        all of them; see `over_devices`.

    Raises:
      ValueError: If there are no batches, their shapes differ, they are no tokens of the model, a
        recipe needs a key, a matrix could not be solved, or the folder is that of other settings.
    """
    config = model.config
    _check_batches(batches, config.vocab_size)
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
    states, rotary = [], None
    table = jax.tree.map(jnp.asarray, params["embedding"])
    for batch in batches:
        x, rotary = _embed(model, {"embedding": table}, batch)
        states.append(np.asarray(x))
    del table
    for index in range(config.n_layers):
        # What is not needed any more is let go before the next is made: it may fill the device.
        layer = jax.tree.map(lambda leaf, i=index: jnp.asarray(leaf[i]), params["layers"])
        inputs = {
            source: _Inputs(empty_hessian(_matrix(layer, users[0]).shape[1]), jnp.float32(0))
            for source, users in _SOURCES.items()
        }
        digest = "" if kept_blocks is None else digest_of(layer)
        if kept_blocks is not None and index in kept_blocks:
            done = _load(kept_blocks, index, layer, inputs, compression, digest)
        else:
            for x in states:
                inputs = _record(
                    block, layer, place(x), rotary, inputs, compression.transform_inputs
                )
            done = _solve(index, layer, inputs, compression)
            if kept_blocks is not None:
                rows = [dataclasses.asdict(report) for report in done.reports]
                absmax = dict(done.input_absmax)
                notes = {"reports": rows, "input_absmax": absmax, "params_sha256": digest}
                kept_blocks.save(index, done.kept, notes)
        del inputs
        for path in _PATHS:
            layer = _with_matrix(layer, path, compression.weight(path, done.kept[path]))
        if index + 1 < config.n_layers:
            for number, x in enumerate(states):
                states[number] = np.asarray(_run(block, layer, place(x), rotary))
        del layer
        yield done


def _check_batches(batches: Sequence[Any], vocab_size: int) -> None:
    shapes = {np.shape(batch) for batch in batches}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2 or 0 in next(iter(shapes)):
        raise ValueError(
            "compress_blocks: calibration batches must be of one shape (b, t), and at least one,"
            f" got {sorted(shapes) or 'none'}; cut the text into windows of one length."
        )
    for batch in batches:
        is_integer = np.issubdtype(np.asarray(batch).dtype, np.integer)
        if not is_integer or np.min(batch) < 0 or np.max(batch) >= vocab_size:
            raise ValueError(
                f"compress_blocks: tokens must be integers from 0 to {vocab_size - 1}, got"
                f" {np.asarray(batch).dtype} from {np.min(batch)} to {np.max(batch)}; use the"
                " tokenizer of the model."
            )


def _identity(model: Llama, params: Mapping[str, Any], batches: Sequence[Any]) -> dict[str, str]:
    """What kept blocks are held against: the model, its tokens, and all but its layers.

    Each of these is held against what the file of the block says, when its turn comes.
    """
    return {
        "model_config": repr(model.config),
        "tokens_sha256": digest_of([np.asarray(batch, np.int32) for batch in batches]),
        "params_sha256": digest_of({name: params[name] for name in params if name != "layers"}),
    }


# Compiled once for equal models, however many methods are tried.
@functools.partial(jax.jit, static_argnums=0)
def _embed(model: Llama, params: PyTree, tokens: Array):
    return model.apply({"params": params}, tokens, method="first_block")


@functools.partial(jax.jit, static_argnums=0)
def _run(block: Block, layer: PyTree, x: Array, rotary: Any) -> Array:
    return block.apply({"params": layer}, x, None, rotary)[0]


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=4)
def _record(
    block: Block,
    layer: PyTree,
    x: Array,
    rotary: Any,
    found: dict[str, _Inputs],
    transform: Callable[[Array], Array] | None,
):
    """What was found, with the inputs that the block's matrices get."""
    found = dict(found)

    def add(source, x):
        hessian, absmax = found[source]
        moved = x if transform is None else transform(x)
        absmax = jnp.maximum(absmax, jnp.max(jnp.abs(moved)).astype(jnp.float32))
        found[source] = _Inputs(add_inputs(hessian, x), absmax)

    def intercept(next_method, args, kwargs, context):
        module, is_call = context.module, context.method_name == "__call__"
        y = next_method(*args, **kwargs)
        if is_call and module.name in _SOURCES:
            if isinstance(module, RMSNorm):
                add(module.name, y)
            elif isinstance(module, QuantizedLinear):
                add(module.name, args[0])
        return y

    with nn.intercept_methods(intercept):
        block.apply({"params": layer}, x, None, rotary)
    return found


def _load(
    kept_blocks: KeptBlocks,
    index: int,
    layer: PyTree,
    inputs: dict[str, _Inputs],
    compression: Compression,
    digest: str,
) -> CompressedBlock:
    """A block that is done already."""

    def solve(path, weight, hessian):
        return compression.solve(path, weight, hessian)[0]

    like = {}
    for weights, found in _matrices(layer, inputs):
        for path, weight in weights.items():
            like[path] = jax.eval_shape(functools.partial(solve, path), weight, found.hessian)
    kept, notes = kept_blocks.load(index, like)
    if notes.get("params_sha256") != digest:
        raise ValueError(
            f"compress_blocks: block {index} in {kept_blocks.folder} was made of other parameters;"
            " go on with those, or choose another folder."
        )
    reports = tuple(MatrixReport(**row) for row in notes["reports"])
    return CompressedBlock(kept, reports, notes.get("input_absmax", {}))


def _matrices(
    layer: PyTree, inputs: dict[str, _Inputs]
) -> Iterator[tuple[dict[str, Array], _Inputs]]:
    """The weights in float32, by their paths, of matrices that share inputs; and these."""
    for source, names in _SOURCES.items():
        paths = [path for path in _PATHS if path.rsplit("/", 1)[1] in names]
        weights = {p: _matrix(layer, p.rsplit("/", 1)[1]).astype(jnp.float32) for p in paths}
        yield weights, inputs[source]


def _solve(
    index: int, layer: PyTree, inputs: dict[str, _Inputs], compression: Compression
) -> CompressedBlock:
    kept, reports, input_absmax = {}, [], {}
    for weights, found in _matrices(layer, inputs):
        of_inputs = input_statistics(found.hessian.matrix, found.absmax)
        groups = [weights] if compression.solve_together else [{p: w} for p, w in weights.items()]
        for group in groups:
            start = time.perf_counter()
            if compression.solve_together is not None:
                solved = compression.solve_together(group, found.hessian)
            else:
                solved = {p: compression.solve(p, w, found.hessian) for p, w in group.items()}
            for path, (result, info) in solved.items():
                check_info(f"layer {index}, {path}", info)
                kept[path] = jax.tree.map(np.asarray, result)
                input_absmax[path] = float(found.absmax)
            time_s = (time.perf_counter() - start) / len(group)
            for path, (_, info) in solved.items():
                numbers = float(info.error), float(info.damping), int(info.failures)
                others = {**weight_statistics(group[path]), **code_statistics(kept[path])}
                report = MatrixReport(index, path, *numbers, time_s, **of_inputs, **others)
                reports.append(report)
    return CompressedBlock(kept, tuple(reports), input_absmax)


def _matrix(layer: PyTree, name: str) -> Float[Array, "n k"]:
    part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "attention"
    return layer[part][name]["weight"]


def _with_matrix(layer: PyTree, path: str, weight: Any) -> PyTree:
    """The layer with another matrix, in the dtype of the old one; codes as they are."""
    part, name = path.split("/")
    if not isinstance(weight, CodedWeight):
        weight = weight.astype(layer[part][name]["weight"].dtype)
    new = {**layer[part][name], "weight": weight}
    return {**layer, part: {**layer[part], name: new}}

"""Gradients that devices exchange as codes: a choice of format for each parameter.

Left to the compiler, gradients are summed over devices in float32. Here each device takes the
gradient of its own tokens, within `jax.shard_map`, rounds what it sends to others at random, and
adds up what it receives, in float32, for the part of the parameter whose optimizer state it has:

    g = sum_i Q(g_i / devices),     E[g] = sum_i g_i / devices

An entry is off by less than the sum, over the devices, of the distance between the two levels
round what each sends. Weights and gradients are whole on each device, as in the first stage of
ZeRO: the second would save nothing, for a device has all of its own gradients before it sends them.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from lowbit_jax.numerics import FP8_E4M3, INT8, MXFP4_FITTED_STOCHASTIC, QuantSpec
from lowbit_jax.parallel import BATCH_AXES, quantized_reduce_scatter
from lowbit_jax.parallel.sharding import path_text

# By the names of the command line. They never clip, so that rounding at random has no bias.
FORMATS: dict[str, QuantSpec | None] = {
    "exact": None,
    "int8": dataclasses.replace(INT8, block_size=None, rounding="stochastic"),
    "fp8": dataclasses.replace(FP8_E4M3, rounding="stochastic"),
    "mxfp4": MXFP4_FITTED_STOCHASTIC,
}
_MATRICES = ".*weight"
_SALT = 2**32 - 3  # a key that nothing else of a step has


@dataclasses.dataclass(frozen=True)
class GradientExchange:
    """What the gradient of each parameter is sent as.

    Attributes:
      rules: Pairs of a regular expression, which has to match a whole path as in
        "layers/mlp/up_proj/weight", and a spec, None for float32; the first that matches holds.
        Summed in float32 is what none matches, what no axis cuts, and where the last axis of a
        device's part is no multiple of the blocks of the spec, as that of a short bias.
    """

    rules: tuple[tuple[str, QuantSpec | None], ...]

    def spec(self, path: str) -> QuantSpec | None:
        """That of a parameter; None: float32."""
        return next((spec for pattern, spec in self.rules if re.fullmatch(pattern, path)), None)


def parse_exchange(text: str) -> GradientExchange | None:
    """`"int8"` for all matrices, or `"layers/.*=mxfp4,head/weight=int8"`; None for `"exact"`.

    Raises:
      ValueError: If the text names a format that is none of `FORMATS`, or a pattern is none.
    """
    rules = []
    for part in text.split(","):
        pattern, equals, name = part.rpartition("=")
        if name not in FORMATS or (equals and not pattern):
            raise ValueError(
                f"gradient_exchange: must be one of {', '.join(FORMATS)}, or PATTERN=FORMAT joined"
                f" by commas, got {part!r} in {text!r}."
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"gradient_exchange: {pattern!r} is no regular expression: {error}."
            ) from error
        rules.append((pattern or _MATRICES, FORMATS[name]))
    return None if all(spec is None for _, spec in rules) else GradientExchange(tuple(rules))


def exchanged_loss(loss_fn: Any, exchange: GradientExchange, placement: Any) -> Any:
    """`loss_fn` whose gradient devices exchange as `exchange` says.

    Random numbers of the loss are drawn apart on each device, and scales of a tensor are those of a
    device's tokens. Micro-batches are exchanged one by one.

    Args:
      loss_fn: Of `(params, batch, key)`, placing nothing; the mean over its tokens.
      exchange: The rules.
      placement: Of the run, a `Placement`, whose `updates` say which part each device gets.

    Returns:
      A loss of the same arguments for `make_train_step`; it needs a key, that of `loss_fn` or one
      for the rounding alone.

    Raises:
      ValueError: If the mesh cuts matrices, or ZeRO weights or gradients.
    """
    layout = placement.layout
    mesh = layout.mesh
    if mesh.shape["tensor"] > 1 or layout.stage.parameters or layout.stage.gradients:
        raise ValueError(
            "gradient_exchange: takes whole weights and gradients on each device, got"
            f" {mesh.shape['tensor']} devices along tensor, weights cut over"
            f" {layout.stage.parameters} and gradients over {layout.stage.gradients}; use --zero 1"
            " on a mesh DATAxFSDPx1."
        )
    specs = jax.tree.map(lambda place: place.spec, placement.updates)
    devices = tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)
    whole, rows = PartitionSpec(), PartitionSpec(devices)

    def send(path, g, spec, key):
        """This device's part of the sum over devices, float32."""
        cut = [(axis, names) for axis, names in enumerate(spec) if names is not None]
        if not cut:
            return lax.psum(g.astype(jnp.float32), devices)
        ((axis, names),) = cut  # over all devices, the part of each where its moments are
        quantization = exchange.spec(path_text(path))
        if quantization is None or not _has_whole_blocks(g.shape, axis, devices, quantization):
            g = g.astype(jnp.float32)
            return lax.psum_scatter(g, names, scatter_dimension=axis, tiled=True)
        return quantized_reduce_scatter(g, quantization, names, axis=axis, key=key)

    def of_part(params, batch, key):
        index = lax.axis_index(devices)
        # Else their gradient would be summed over the devices, in float32.
        own = jax.tree.map(lambda p: lax.pcast(p, devices, to="varying"), params)
        loss, grads = jax.value_and_grad(loss_fn)(own, batch, jax.random.fold_in(key, index))
        leaves, treedef = jax.tree_util.tree_flatten_with_path(grads)
        keys = jax.random.split(jax.random.fold_in(key, _SALT), len(leaves))
        parts = [
            send(path, g / lax.axis_size(devices), spec, key).astype(g.dtype)
            for (path, g), spec, key in zip(leaves, treedef.flatten_up_to(specs), keys, strict=True)
        ]
        return lax.pmean(loss, devices), treedef.unflatten(parts)

    value_and_gradient = jax.shard_map(
        of_part, mesh=mesh, in_specs=(whole, rows, whole), out_specs=(whole, specs)
    )

    def value(params, batch, key):
        return value_and_gradient(params, batch, key)[0]

    def backward(grads: PyTree, g):
        # The cotangent of a mean is 1, and XLA drops these products.
        return jax.tree.map(lambda leaf: (leaf * g).astype(leaf.dtype), grads), None, None

    loss = jax.custom_vjp(value)
    loss.defvjp(value_and_gradient, backward)
    return loss


def _has_whole_blocks(
    shape: tuple[int, ...], axis: int, devices: tuple[str, ...], spec: QuantSpec
) -> bool:
    """Whether each device's part, cut along `axis`, can be quantized by itself."""
    last = shape[-1] // (lax.axis_size(devices) if axis == len(shape) - 1 else 1)
    return not isinstance(spec.block_size, int) or last % spec.block_size == 0

"""Single layers of a BERT encoder, float32: what each method loses of their outputs.

For encoders there is no perplexity, and no Llama to calibrate block by block: each matrix is solved
for the inputs that the uncompressed encoder gives it, and measured on such inputs of other text,

    error = |Q(x T^T) (w T^-1)_hat^T - x w^T|^2 / |x w^T|^2,   T the method's transform, or none

with inputs quantized or not.

References:
  Devlin et al., BERT, arXiv:1810.04805.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jaxtyping import Array, Float, Integer, PyTree

from lowbit_jax.models.pretrained import open_safetensors
from lowbit_jax.numerics import QuantSpec, dequantize, fake_quantize
from lowbit_jax.ptq.hessian import Hessian, add_inputs, empty_hessian
from lowbit_jax.rotations import Rotation

# Matrices of a layer, by their input.
SOURCES = {
    "attention.self": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output": ("attention.output.dense",),
    "intermediate": ("intermediate.dense",),
    "output": ("output.dense",),
}
SOURCE_OF = {path: source for source, paths in SOURCES.items() for path in paths}


@dataclasses.dataclass(frozen=True)
class BertShape:
    """What `layer_inputs` must know beside the arrays."""

    n_layers: int
    n_heads: int
    norm_eps: float


@dataclasses.dataclass(frozen=True)
class Bert:
    """An encoder: its shape, its arrays by their names in the file, and its tokenizer."""

    shape: BertShape
    weights: Mapping[str, np.ndarray]
    tokenizer: tokenizers.Tokenizer

    def matrix(self, layer: int, path: str) -> Float[np.ndarray, "n k"]:
        """A weight `(n, k)`."""
        return self.weights[f"encoder.layer.{layer}.{path}.weight"]


def load_bert(folder: pathlib.Path) -> Bert:
    """Reads config.json, model.safetensors and tokenizer.json.

    Raises:
      ValueError: If it is another architecture, or its weights are not float32.
      OSError: If a file is missing.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config["model_type"], config["hidden_act"], config["position_embedding_type"]
    if kind != ("bert", "gelu", "absolute"):
        raise ValueError(
            f"load_bert: {folder} must be a BERT with gelu and absolute positions, got {kind}."
        )
    file = open_safetensors(folder / "model.safetensors")
    weights = {}
    for name, entry in file.entries.items():
        if name.endswith("position_ids"):
            continue
        if entry.dtype != np.float32:
            raise ValueError(f"load_bert: weights must be float32, got {entry.dtype} in {name}.")
        weights[name.removeprefix("bert.")] = file.read(name)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    shape = BertShape(
        config["num_hidden_layers"], config["num_attention_heads"], config["layer_norm_eps"]
    )
    return Bert(shape, weights, tokenizer)


def text_windows(
    tokenizer: tokenizers.Tokenizer, pieces: Sequence[bytes], length: int
) -> Integer[np.ndarray, "b t"]:
    """`(n, length)` windows `[CLS] text [SEP]` of pieces, one after another, without overlap."""
    texts = [piece.decode(errors="replace") for piece in pieces]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    tokens = np.concatenate([np.asarray(found.ids, np.int32) for found in encoded])
    count = len(tokens) // (length - 2)
    windows = tokens[: count * (length - 2)].reshape(count, length - 2)
    ends = [
        np.full((count, 1), tokenizer.token_to_id(name), np.int32) for name in ("[CLS]", "[SEP]")
    ]
    return np.concatenate([ends[0], windows, ends[1]], axis=1)


@functools.partial(jax.jit, static_argnames="shape")
def layer_inputs(
    weights: Mapping[str, Array], tokens: Integer[Array, "b t"], shape: BertShape
) -> tuple[tuple[dict[str, Float[Array, "n k"]], ...], Float[Array, "b t d"]]:
    """What the matrices of each layer take, by `SOURCES`, `(b t, k)`; and the last states.

    Float32 with products at the highest precision; no padding, one segment.
    """

    def dense(name, x):
        product = jnp.matmul(x, weights[f"{name}.weight"].T, precision="highest")
        return product + weights[f"{name}.bias"]

    def norm(name, x):
        mean = jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
        normalized = (x - mean) * jax.lax.rsqrt(variance + shape.norm_eps)
        return normalized * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    b, t = tokens.shape
    embedded = weights["embeddings.word_embeddings.weight"][tokens]
    embedded += weights["embeddings.position_embeddings.weight"][:t]
    embedded += weights["embeddings.token_type_embeddings.weight"][0]
    x = norm("embeddings.LayerNorm", embedded)
    found = []
    for layer in range(shape.n_layers):
        at = f"encoder.layer.{layer}"
        q, k, v = (
            dense(f"{at}.attention.self.{name}", x).reshape(b, t, shape.n_heads, -1)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") / q.shape[-1] ** 0.5
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v, precision="highest")
        mixed = mixed.reshape(x.shape)
        after = norm(
            f"{at}.attention.output.LayerNorm", x + dense(f"{at}.attention.output.dense", mixed)
        )
        wide = jax.nn.gelu(dense(f"{at}.intermediate.dense", after), approximate=False)
        of_layer = {
            "attention.self": x,
            "attention.output": mixed,
            "intermediate": after,
            "output": wide,
        }
        found.append({name: value.reshape(b * t, -1) for name, value in of_layer.items()})
        x = norm(f"{at}.output.LayerNorm", after + dense(f"{at}.output.dense", wide))
    return tuple(found), x


def layer_hessians(
    bert: Bert, weights: Mapping[str, Array], batches: Sequence[Integer[np.ndarray, "b t"]]
) -> list[dict[str, Hessian]]:
    """Those of the inputs of each layer, by `SOURCES`.

    Args:
      bert: For its shape.
      weights: Its arrays, on the device.
      batches: Of one shape.
    """
    found: list[dict[str, Hessian]] | None = None
    add = jax.jit(lambda sums, inputs: [
        {name: add_inputs(hessian, x[name]) for name, hessian in one.items()}
        for one, x in zip(sums, inputs, strict=True)
    ])  # fmt: skip
    for batch in batches:
        inputs, _ = layer_inputs(weights, jnp.asarray(batch), bert.shape)
        if found is None:
            found = [
                {name: empty_hessian(x.shape[-1]) for name, x in one.items()} for one in inputs
            ]
        found = add(found, list(inputs))
    if found is None:
        raise ValueError("layer_hessians: needs at least one batch, got none.")
    return found


@functools.partial(jax.jit, static_argnames=("activations", "rotation"))
def output_error(
    w: Float[Array, "n k"],
    x: Float[Array, "m k"],
    kept: PyTree,
    *,
    activations: QuantSpec | None = None,
    rotation: Rotation | None = None,
) -> Float[Array, ""]:
    """Relative squared error of `x w^T` by the compressed matrix; see the head of this file.

    Args:
      w: As it was.
      x: Inputs, not those of the calibration.
      kept: A `QTensor`, or that and a `BlockTransform`: see `Compression`.
      activations: Of the transformed inputs; None: not quantized.
      rotation: Of inputs, where the method rotates.
    """
    q, transform = kept if isinstance(kept, tuple) else (kept, None)
    turned = x
    if transform is not None:
        turned = transform.apply(x)
    elif rotation is not None:
        turned = rotation.apply(x)
    if activations is not None:
        turned = fake_quantize(turned, activations)
    y = jnp.matmul(x, w.T, precision="highest")
    error = jnp.matmul(turned, dequantize(q).T, precision="highest") - y
    return jnp.sum(jnp.square(error)) / jnp.sum(jnp.square(y))

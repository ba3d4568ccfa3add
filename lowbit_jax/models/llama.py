"""Llama: a decoder of pre-normalized attention and SwiGLU blocks, its seven matrices quantizable.

Parameters are float32, computation is `config.dtype`. The layers are one scanned block, so their
parameters carry a leading layer axis and share one recipe per matrix.

References:
  Touvron et al., LLaMA, arXiv:2302.13971.
  Panferov et al., QuEST, arXiv:2502.05003: the shapes and the initialization used here.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Shaped

from lowbit_jax.models.host_memory import OffloadedWeight, fetched
from lowbit_jax.models.layers import RMSNorm, logical_init, rotary_angles, rotate_positions, swiglu
from lowbit_jax.models.linear import (
    QuantizedLinear,
    RecipeRules,
    multiply_all,
    resolve_recipes,
)
from lowbit_jax.models.recompute import SAVED_AS, dropped_names, recomputing
from lowbit_jax.models.rope_scaling import RopeScaling
from lowbit_jax.ops.attention import attention
from lowbit_jax.ops.cross_entropy import linear_cross_entropy
from lowbit_jax.ops.dispatch import check_implementation
from lowbit_jax.ops.dot_recipe import DotRecipe

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
QUANTIZABLE_PATHS = (
    *(f"layers/attention/{name}/weight" for name in ATTENTION_PROJECTIONS),
    *(f"layers/mlp/{name}/weight" for name in MLP_PROJECTIONS),
)


def llama_rules(recipe: DotRecipe) -> RecipeRules:
    """Rules that give `recipe` to the seven matrices of a block; embedding and head stay float."""
    return ((r"layers/.*_proj/weight", recipe),)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and arithmetic of a `Llama`.

    Attributes:
      vocab_size: Rows of the embedding and of the head.
      d_model: Width `d` of the residual stream; a multiple of `n_heads`, or `d_head` says how wide
        a head is.
      n_layers: Blocks.
      n_heads: Query heads.
      n_kv_heads: Key and value heads, a divisor of `n_heads`; `None`: as many.
      d_ff: Width of the MLP; `None`: `8 d / 3`, rounded up to a multiple of 256.
      d_head: Width of a head, even; `None`: `d_model / n_heads`.
      rope_theta: Base of the rotary frequencies.
      rope_scaling: `LinearRopeScaling`, `Llama3RopeScaling` or `None`, see `models.rope_scaling`.
      norm_eps: Added to the mean square in every norm.
      tie_embeddings: Whether the embedding serves as the head.
      qkv_bias: Whether the query, key and value projections add a bias, as those of Qwen2.5 do.
      qk_norm: Whether queries and keys are normalized head by head, before they are turned, as
        those of Qwen3 are.
      attention_window: Most recent tokens that the published model sees at once; `None`: all. It
        only bounds the length of a sequence: up to it, a window and plain attention are the same.
      dtype: `"bfloat16"` or `"float32"`: of activations and of the operands of products. On a GPU
        float32 products of the blocks are TF32 unless `jax.default_matmul_precision` says else.
      recipe_rules: See `resolve_recipes`; a matrix that no rule matches is not quantized.
      implementation: Of the products of quantized matrices, see `ops.quantized_dot` and, where
        parameters are `CodedWeight`s, `ops.coded_dot`. `None`: chosen for each by format, shape and
        device.
      attention: `"cudnn"`, `"xla"` or `None`, see `ops.attention.attention`.
      scan_unroll: Layers in one iteration of the scan. `n_layers` leaves no loop: slower to
        compile, faster to run, since nothing is copied into and out of stacked buffers.
      recompute: What backward computes anew instead of keeping: "none", or flags joined by "+" of
        swiglu, norm, ffn, qkv, att and block, see `models.recompute`.
      loss_chunks: See `ops.cross_entropy.linear_cross_entropy`.
      offload_residuals: Whether the inputs of blocks wait for the backward pass in the host's
        memory; what else is kept stays on the device.

    Raises:
      ValueError: If the shape is impossible, a name is unknown, or a rule matches nothing.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None
    d_ff: int | None = None
    d_head: int | None = None
    rope_theta: float = 1e4
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    attention_window: int | None = None
    dtype: str = "bfloat16"
    recipe_rules: RecipeRules = ()
    implementation: str | None = None
    attention: str | None = None
    scan_unroll: int = 1
    recompute: str = "none"
    loss_chunks: int | None = None
    offload_residuals: bool = False

    def __post_init__(self):
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "kv_heads", "mlp_width")
        given = [name for name in ("d_head", "attention_window") if getattr(self, name) is not None]
        for name in (*sizes, *given):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"LlamaConfig: {name} must be at least 1, got {getattr(self, name)};"
                    " choose a positive size."
                )
        if self.d_head is None and self.d_model % self.n_heads:
            raise ValueError(
                "LlamaConfig: d_model must be a multiple of n_heads, got"
                f" {self.d_model} and {self.n_heads}; choose another number of heads, or set"
                " d_head."
            )
        if self.head_dim % 2:
            raise ValueError(
                "LlamaConfig: rotary embeddings turn pairs, so the width of a head, d_head or"
                f" d_model / n_heads, must be even, got {self.head_dim}; change either."
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                "LlamaConfig: n_kv_heads must divide n_heads, got"
                f" {self.kv_heads} and {self.n_heads}; leave it None for one each."
            )
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(
                f"LlamaConfig: dtype must be 'bfloat16' or 'float32', got {self.dtype!r};"
                " parameters are float32 either way."
            )
        check_implementation(self.implementation)
        if self.attention not in ("cudnn", "xla", None):
            raise ValueError(
                f"LlamaConfig: attention must be 'cudnn', 'xla' or None, got {self.attention!r};"
                " None picks the fastest that runs."
            )
        if self.scan_unroll < 1:
            raise ValueError(
                f"LlamaConfig: scan_unroll must be at least 1, got {self.scan_unroll};"
                f" n_layers = {self.n_layers} unrolls fully."
            )
        dropped_names(self.recompute)
        resolve_recipes(self.recipe_rules, QUANTIZABLE_PATHS)

    @property
    def head_dim(self) -> int:
        """`d_head` with its default resolved."""
        return self.d_model // self.n_heads if self.d_head is None else self.d_head

    @property
    def kv_heads(self) -> int:
        """`n_kv_heads` with its default resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def mlp_width(self) -> int:
        """`d_ff` with its default resolved."""
        return -(-(8 * self.d_model // 3) // 256) * 256 if self.d_ff is None else self.d_ff

    def linear(self, path: str, features: int, axes: tuple[str, str]) -> QuantizedLinear:
        """The layer for the matrix at `path`, with the recipe that the rules give it."""
        _, recipe = resolve_recipes(self.recipe_rules, QUANTIZABLE_PATHS)[f"{path}/weight"]
        # What adds to the residual stream starts smaller, so that its variance does not grow with
        # depth: each of the 2 * n_layers additions contributes 1 / (2 * n_layers).
        is_residual = path.endswith(("o_proj", "down_proj"))
        stddev = 0.02 / (2 * self.n_layers) ** 0.5 if is_residual else 0.02
        name = path.rsplit("/", 1)[1]
        implementation = None if recipe.is_identity else self.implementation
        has_bias = self.qkv_bias and name in ("q_proj", "k_proj", "v_proj")
        return QuantizedLinear(
            features,
            recipe,
            axes,
            stddev,
            implementation,
            has_bias,
            SAVED_AS[name],
            self.implementation,
            name=name,
        )


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions: q, k, v and o projections."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x, rotary, keys):
        """`(b, t, d)` to `(b, t, d)`; `keys`, of the first three projections and of the last."""
        config = self.config
        b, t, d = x.shape
        rows = x.reshape(b * t, d)
        counts = {"q_proj": config.n_heads, "k_proj": config.kv_heads, "v_proj": config.kv_heads}
        layers = []
        for name, count in counts.items():
            axes = ("heads" if name == "q_proj" else "kv_heads", "embed")
            layers.append(config.linear(f"layers/attention/{name}", count * config.head_dim, axes))
        q, k, v = (
            y.reshape(b, t, -1, config.head_dim) for y in multiply_all(rows, layers, key=keys[0])
        )
        if config.qk_norm:
            q, k = (RMSNorm(config.norm_eps, name=f"{n}_norm")(z) for n, z in (("q", q), ("k", k)))
        q, k = rotate_positions(q, *rotary), rotate_positions(k, *rotary)
        q, k, v = (checkpoint_name(z, "qkv") for z in (q, k, v))
        y = attention(q, k, v, implementation=config.attention)
        layer = config.linear("layers/attention/o_proj", d, ("embed", "heads"))
        return layer(y.reshape(b * t, -1), key=keys[1]).reshape(x.shape)


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x, keys):
        """`(b, t, d)` to `(b, t, d)`; `keys` of the first two projections and of the last."""
        config = self.config
        layers = [
            config.linear(f"layers/mlp/{name}", config.mlp_width, ("mlp", "embed"))
            for name in ("gate_proj", "up_proj")
        ]
        down = config.linear("layers/mlp/down_proj", config.d_model, ("embed", "mlp"))
        products = multiply_all(x.reshape(-1, x.shape[-1]), layers, key=keys[0])
        gate, up = (checkpoint_name(z, "mlp_up") for z in products)
        y = checkpoint_name(swiglu(gate, up), "swiglu")
        return down(y, key=keys[1]).reshape(x.shape)


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`; the body of the scan over layers.

    Activations have the names that `models.recompute` lists.
    """

    config: LlamaConfig

    @nn.compact
    def __call__(self, x, key, rotary):
        """Carry `(b, t, d)` to carry, and no output; `key` is this layer's or `None`."""
        keys = (None,) * 4 if key is None else jax.random.split(key, 4)
        eps = self.config.norm_eps
        x = checkpoint_name(x, "resid")
        normalized = checkpoint_name(RMSNorm(eps, name="attention_norm")(x), "ln1")
        x = x + Attention(self.config, name="attention")(normalized, rotary, keys[:2])
        x = checkpoint_name(x, "att_out")
        normalized = checkpoint_name(RMSNorm(eps, name="mlp_norm")(x), "ln2")
        return x + MLP(self.config, name="mlp")(normalized, keys[2:]), None


class Table(nn.Module):
    """A float32 `weight` `(v, d)`, `N(0, 0.02^2)` at first: embedding or head, never quantized."""

    vocab_size: int
    d_model: int

    @nn.compact
    def __call__(self):
        """The weight, from the host's memory if it is there."""
        weight = self.get_variable("params", "weight")
        if not isinstance(weight, OffloadedWeight):
            init = logical_init(nn.initializers.normal(0.02), ("vocab", "embed"))
            shape = (self.vocab_size, self.d_model)
            weight = self.param("weight", init, shape, jnp.float32)
        return fetched(weight)


class Llama(nn.Module):
    """Language model: `model.apply({"params": params}, tokens)` gives logits.

    `nn.meta.unbox(model.init(key, tokens)["params"])` are the parameters, a plain tree, in which
    the seven matrices may be `QuantizedWeight`s, or `CodedWeight`s for inference. Recipes that draw
    random numbers need a key: `model.apply(..., rngs={"quantize": key})`.
    """

    config: LlamaConfig

    def setup(self):
        """Declares embedding, scanned blocks, final norm and head."""
        config = self.config
        block = recomputing(
            Block,
            config.recompute,
            is_unrolled=config.scan_unroll > 1,
            offload_residuals=config.offload_residuals,
        )
        self.embedding = Table(config.vocab_size, config.d_model)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType] (one an argument)
            length=config.n_layers,
            unroll=min(config.scan_unroll, config.n_layers),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config)
        self.final_norm = RMSNorm(config.norm_eps)
        if not config.tie_embeddings:
            self.head = Table(config.vocab_size, config.d_model)

    def __call__(self, tokens: Shaped[Array | np.ndarray, "..."]) -> Float[Array, "b t v"]:
        """Logits `(b, t, v)`, float32, of the token after each of `tokens` `(b, t)`, integers.

        A token outside `[0, v)` gives NaN.

        Raises:
          ValueError: If `tokens` are no matrix of integers, or longer than `attention_window`, or a
            recipe needs a key and got none.
        """
        hidden, head = self._hidden_and_head(tokens)
        weight = head.astype(hidden.dtype)
        precision = "highest" if hidden.dtype == jnp.float32 else None
        return jnp.einsum(
            "btd,vd->btv", hidden, weight, precision=precision, preferred_element_type=jnp.float32
        )

    def loss(
        self,
        inputs: Shaped[Array | np.ndarray, "..."],
        targets: Shaped[Array | np.ndarray, "..."],
        counted: int | None = None,
    ) -> Float[Array, ""]:
        """Mean cross-entropy of `targets` `(b, t)` after `inputs` `(b, t)`: nats a token, float32.

        Call it as `model.apply({"params": params}, inputs, targets, method="loss")`. Of the targets
        of each sequence the last `counted` are in the mean, or all of them.

        Raises:
          ValueError: As `__call__`, if the shapes of `inputs` and `targets` differ, or `counted` is
            none of their lengths.
        """
        if inputs.shape != targets.shape:
            raise ValueError(
                "Llama.loss: inputs and targets must have one shape (b, t), got"
                f" {inputs.shape} and {targets.shape}; targets are inputs one token later."
            )
        if counted is not None and not 1 <= counted <= inputs.shape[1]:
            raise ValueError(
                f"Llama.loss: counted must be 1 to {inputs.shape[1]}, the length of a sequence, got"
                f" {counted}; None counts all."
            )
        hidden, head = self._hidden_and_head(inputs)
        first = 0 if counted is None else inputs.shape[1] - counted
        return linear_cross_entropy(
            hidden[:, first:].reshape(-1, hidden.shape[-1]),
            head,
            jnp.asarray(targets)[:, first:].reshape(-1),
            chunks=self.config.loss_chunks,
        )

    def hidden_states(self, tokens: Shaped[Array | np.ndarray, "..."]) -> Float[Array, "b t d"]:
        """Normalized outputs `(b, t, d)` of the last block, `config.dtype`: what the head sees.

        Raises:
          ValueError: As `__call__`.
        """
        return self._hidden_and_head(tokens)[0]

    def _hidden_and_head(self, tokens) -> tuple[Float[Array, "b t d"], Float[Array, "v d"]]:
        """What the head sees, and its weight: the very array that embeds, if they are tied.

        Fetched from the host's memory by itself it would have a gradient by itself, and their sum
        would be taken there.
        """
        x, rotary, table = self._embed(tokens)
        x, _ = self.layers(x, self._layer_keys(), rotary)
        return self.final_norm(x), table if self.config.tie_embeddings else self.head()

    def first_block(
        self, tokens: Shaped[Array | np.ndarray, "..."]
    ) -> tuple[Float[Array, "b t d"], Any]:
        """What the first block takes beside its key: embedded tokens, and the rotary angles of all.

        For those who run them one by one: `Block(config).apply({"params": layer}, x, key, rotary)`
        with one layer of the stacked parameters gives what the next one takes, and None.

        Raises:
          ValueError: As `__call__`.
        """
        x, rotary, _ = self._embed(tokens)
        return x, rotary

    def _embed(self, tokens) -> tuple[Float[Array, "b t d"], Any, Float[Array, "v d"]]:
        """Embedded tokens, rotary angles, and the table."""
        config = self.config
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                "Llama: tokens must be integers (b, t), got"
                f" {tokens.dtype} {tokens.shape}; add a batch axis or cast to int32."
            )
        if config.attention_window is not None and tokens.shape[1] > config.attention_window:
            raise ValueError(
                "Llama: a sequence must fit into attention_window ="
                f" {config.attention_window} tokens, got {tokens.shape[1]}; windowed attention is"
                " computed up to its window only: cut the text into shorter sequences."
            )
        table = self.embedding()
        x = jnp.take(table, tokens, axis=0).astype(config.dtype)
        length = tokens.shape[1]
        rotary = rotary_angles(length, config.head_dim, config.rope_theta, config.rope_scaling)
        return x, rotary, table

    def _layer_keys(self) -> Shaped[Array, "layers ..."] | None:
        """One key a layer if any recipe needs one: the same scanned, unrolled and recomputed."""
        resolved = resolve_recipes(self.config.recipe_rules, QUANTIZABLE_PATHS)
        needy = [path for path, (_, recipe) in resolved.items() if recipe.needs_key]
        if not needy:
            return None
        if not (self.has_rng("quantize") or self.is_initializing()):
            raise ValueError(
                f"Llama: the recipe of {needy[0]} draws random numbers, got no key;"
                ' pass apply(..., rngs={"quantize": key}).'
            )
        return jax.random.split(self.make_rng("quantize"), self.config.n_layers)


class RecipeRow(NamedTuple):
    """One matrix of a `RecipeTable`; `rule` and `recipe` are `None` where nothing can apply."""

    path: str
    shape: tuple[int, ...]
    rule: str | None
    recipe: DotRecipe | None


@dataclasses.dataclass(frozen=True)
class RecipeTable:
    """Which matrix multiplies by which recipe, and by which rule; `str()` aligns it for print."""

    rows: tuple[RecipeRow, ...]

    def __str__(self) -> str:
        """Four columns: path, shape (layers first), rule, recipe."""
        cells = [("path", "shape", "rule", "recipe")]
        for row in self.rows:
            recipe = "not quantizable" if row.recipe is None else str(row.recipe)
            shape = " x ".join(map(str, row.shape))
            cells.append((row.path, shape, row.rule or "-", recipe))
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        return "\n".join(
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]])
            for row in cells
        )


def recipe_table(model: Llama) -> RecipeTable:
    """The recipe of every matrix of `model`, embedding and head included, found from its shapes."""
    resolved = resolve_recipes(model.config.recipe_rules, QUANTIZABLE_PATHS)
    shapes: dict[str, Any] = traverse_util.flatten_dict(
        nn.meta.unbox(_boxed_shapes(model)), sep="/"
    )
    rows = [
        RecipeRow(path, leaf.shape, *resolved.get(path, (None, None)))
        for path, leaf in shapes.items()
        if path.endswith("/weight")
    ]
    order = ("embedding/weight", *QUANTIZABLE_PATHS, "head/weight")
    return RecipeTable(tuple(sorted(rows, key=lambda row: order.index(row.path))))


def logical_axes(model: Llama) -> dict:
    """The tree of parameters with, for each, a tuple of axis names in place of the array.

    Names: `"layers"`, `"vocab"`, `"embed"` (the residual stream), `"heads"`, `"kv_heads"` (heads
    times their width), `"mlp"`, `"norm"`. Tuples are trees themselves: map over the result with
    `is_leaf=lambda x: isinstance(x, tuple)`.
    """
    return jax.tree.map(
        lambda box: tuple(box.names),
        _boxed_shapes(model),
        is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata),
    )


def _boxed_shapes(model: Llama) -> dict:
    """Shapes of the parameters in the boxes that carry their logical axes; computes nothing."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]

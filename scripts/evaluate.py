"""Perplexity of a model on a text.

Example:
    python scripts/evaluate.py MODEL --text corpus.txt --window 512 --max-tokens 100000
    python scripts/evaluate.py MODEL --text corpus.txt --activations mxfp4 --rotation 32
    python scripts/evaluate.py QUANTIZED --text corpus.txt --activations none
"""

import dataclasses
import pathlib
import sys

import tyro

from lowbit_jax.models import Llama, llama_rules
from lowbit_jax.models.pretrained import load_pretrained
from lowbit_jax.numerics import PRESETS
from lowbit_jax.ops.dot_recipe import DotRecipe
from lowbit_jax.progress import Progress
from lowbit_jax.ptq.methods import with_activations
from lowbit_jax.ptq.perplexity import perplexity
from lowbit_jax.ptq.products import describe_products, kernel_obstacle, through_kernel
from lowbit_jax.ptq.quantized_directory import is_quantized_directory, load_quantized
from lowbit_jax.ptq.texts import read_tokens, text_warnings, tokenizer_of
from lowbit_jax.rotations import Hadamard


def main(
    model: tyro.conf.Positional[pathlib.Path],
    text: tuple[str, ...],
    tokenizer: str | None = None,
    window: int = 2048,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 1,
    dtype: str = "bfloat16",
    activations: str | None = None,
    rotation: int | None = None,
    implementation: str | None = None,
) -> int:
    """Predicts a text and prints the perplexity, with the window, stride and tokens that it is of.

    Args:
      model: Directory as Hugging Face lays it out, or a GGUF file. Codes of scripts/quantize.py are
        multiplied as codes, inputs transformed as they were when the model was quantized.
      text: Files or directories: text, JSON lines or parquet, compressed or not.
      tokenizer: Another one than the model's: a tokenizer.json, or "bytes".
      window: Tokens that the model sees at once.
      stride: By which the window moves; None: the window.
      max_tokens: Of the text; None: all.
      batch_size: Windows side by side.
      dtype: Of the computation, bfloat16 or float32.
      activations: Format of the inputs of the matrices of all blocks, a name in
        lowbit_jax.numerics.PRESETS in lower case; "none": not quantized; None: as a directory of
        codes says, else not quantized.
      rotation: Block of a Hadamard transform of inputs, and of weights, before that. Codes bring
        their own.
      implementation: Of the products with quantized operands; what was taken, and why, is printed.
        mixed_matmul: our kernel for codes of 4 bits and inputs that are not quantized, on a Hopper
        GPU; dequantize: decoded, then a dense product; or another name that
        lowbit_jax.ops.quantized_dot knows. None: mixed_matmul where it covers the model, else
        chosen for each product.
    """
    try:
        presets = {name.lower(): s for name, s in PRESETS.items() if not s.needs_key}
        is_coded = is_quantized_directory(model)
        if activations not in (None, "none", *presets):
            raise ValueError(
                f"--activations: must be none or one of {', '.join(presets)}, got {activations!r}."
            )
        spec = presets.get(activations or "none")
        if rotation is not None and is_coded:
            raise ValueError("--rotation: a directory of codes has its own; leave it out.")
        if rotation is not None and spec is None:
            raise ValueError("--rotation is that of quantized inputs; give --activations, too.")
        # What is rotated once more keeps its grid in float32 only.
        param_dtype = dtype if rotation is None else "float32"
        load = load_quantized if is_coded else load_pretrained
        loaded = load(model, dtype, param_dtype=param_dtype)
        llama, params = loaded.model, loaded.params
        if is_coded and activations is not None:
            params = with_activations(params, spec)
        elif spec is not None:
            hadamard = None if rotation is None else Hadamard(rotation)
            rules = llama_rules(DotRecipe(y_x=spec, rotation=hadamard))
            llama = Llama(dataclasses.replace(llama.config, recipe_rules=rules))
        obstacle = kernel_obstacle(llama, params) if implementation is None else None
        if implementation == "mixed_matmul" or (implementation, obstacle) == (None, None):
            llama, params = through_kernel(llama, params)
        elif implementation is not None:
            llama = Llama(dataclasses.replace(llama.config, implementation=implementation))
        tokens = read_tokens(text, tokenizer_of(model, loaded, tokenizer), max_tokens)
        for warning in text_warnings(loaded, window):
            print(f"warning: {warning}", file=sys.stderr)
        with Progress(transient=True) as bar:
            task = bar.add_task("windows", total=None)
            found = perplexity(
                llama, params, tokens, window=window, stride=stride, batch_size=batch_size,
                on_batch=lambda done, total: bar.update(task, completed=done, total=total),
            )  # fmt: skip
        products = describe_products(llama, params, window, batch_size)
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(found)
    if products:
        print(f"products: {products}" + (f"; mixed_matmul: {obstacle}" if obstacle else ""))
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))

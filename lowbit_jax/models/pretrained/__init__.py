"""Weights of published models: Hugging Face directories in and out, GGUF files in; no torch."""

from lowbit_jax.models.pretrained.assemble import Pretrained
from lowbit_jax.models.pretrained.families import config_from_json, config_to_json
from lowbit_jax.models.pretrained.gguf_file import gguf_tokenizer
from lowbit_jax.models.pretrained.huggingface import load_pretrained, save_pretrained
from lowbit_jax.models.pretrained.safetensors_file import (
    SafetensorsFile,
    TensorEntry,
    open_safetensors,
    write_safetensors,
)
from lowbit_jax.models.pretrained.sentencepiece_file import read_sentencepiece

__all__ = [
    "Pretrained",
    "SafetensorsFile",
    "TensorEntry",
    "config_from_json",
    "config_to_json",
    "gguf_tokenizer",
    "load_pretrained",
    "open_safetensors",
    "read_sentencepiece",
    "save_pretrained",
    "write_safetensors",
]

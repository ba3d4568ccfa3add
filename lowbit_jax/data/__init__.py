"""Text to batches: read documents, tokenize, write and open datasets, iterate.

Bits per byte of a model: the sum of its losses in nats over `count_bytes(targets) * ln 2`.
"""

from lowbit_jax.data.pipeline import Batch, batch_at, make_batches, validation_batches
from lowbit_jax.data.split import is_validation, sample_train
from lowbit_jax.data.text import Piece, bundled_text, find_files, read_documents
from lowbit_jax.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
    count_bytes,
    load_tokenizer,
    train_bpe,
)
from lowbit_jax.data.tokens import (
    TokenArray,
    TokenDataset,
    check_destination,
    dataset_from_text,
    open_dataset,
    write_dataset,
)

__all__ = [
    "BPETokenizer",
    "Batch",
    "ByteTokenizer",
    "Piece",
    "TokenArray",
    "TokenDataset",
    "Tokenizer",
    "batch_at",
    "bundled_text",
    "check_destination",
    "count_bytes",
    "dataset_from_text",
    "find_files",
    "is_validation",
    "load_tokenizer",
    "make_batches",
    "open_dataset",
    "read_documents",
    "sample_train",
    "train_bpe",
    "validation_batches",
    "write_dataset",
]

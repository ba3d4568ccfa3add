"""Turns text into a folder of token shards that training reads.

Examples:
    python scripts/prepare_data.py --out data/moby-dick
    python scripts/prepare_data.py corpus.txt.xz --out data/corpus --tokenizer bpe:16384
    python scripts/prepare_data.py texts/ more.jsonl.zst --out data/mix --tokenizer data/corpus
"""

import dataclasses
import sys
import time
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from lowbit_jax import data
from lowbit_jax.analysis import text_baselines

CONSOLE = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class Options:
    """Turn text into a folder of token shards that training reads.

    Files are streamed: memory stays the same for 1 MB and 100 GB. Documents keep their order, an
    end-of-text token follows each. Of every 1/fraction pieces (documents, or 32 KiB of longer ones)
    one is validation, chosen by a hash of its number.
    """

    # Text files, directories of them, .jsonl, .parquet; .gz, .xz and .zst are unpacked on the way.
    # None: the Moby-Dick that comes with the package.
    paths: tyro.conf.Positional[tuple[Path, ...]] = ()
    # Folder to write. A run that was interrupted leaves no dataset.json in it, and training refuses
    # it; just run again.
    out: Path = dataclasses.field(kw_only=True)
    # "bytes"; "bpe:16384", which first trains a byte-level BPE of that size on a sample; a
    # tokenizer.json; a folder with one (another dataset, say) or with GPT-2's encoder.json and
    # vocab.bpe.
    tokenizer: str = "bytes"
    # Share of the pieces held out for validation, 0 to 0.5.
    validation_fraction: float = 0.01
    # Key of a JSON line, or column of a parquet file, that holds the text.
    text_key: str = "text"
    # For "bpe:N": megabytes of train text, spread over all of it, to learn from.
    sample_mb: float = 64.0
    # Replace a finished dataset in that folder.
    overwrite: bool = False
    # Also print bits per byte of byte counts, trigrams and xz: what a model must beat. Takes
    # minutes for large texts.
    baselines: bool = False


def main(options: Options) -> None:
    kind, _, size = options.tokenizer.partition(":")
    # `train_bpe` would say so too, after all files were read for its sample.
    if kind == "bpe" and not (size.isdecimal() and int(size) >= 257):
        raise ValueError(
            "--tokenizer bpe:N needs a vocabulary of at least 257 (bytes, end of text), got"
            f" {options.tokenizer!r}; 16384 suits a small model."
        )
    data.check_destination(options.out, overwrite=options.overwrite)
    sources = list(options.paths) or [Path(data.__path__[0], "texts", "moby-dick.txt")]
    packed_bytes = sum(path.stat().st_size for path in data.find_files(sources))
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description:>10}"), *columns, console=CONSOLE) as progress:

        def read(description: str):
            task = progress.add_task(description, total=packed_bytes)
            return data.read_documents(
                sources,
                text_key=options.text_key,
                on_read=lambda count: progress.advance(task, count),
            )

        if kind == "bpe":
            sample_bytes = int(options.sample_mb * 1e6)
            sample = data.sample_train(read("sampling"), sample_bytes, options.validation_fraction)
            CONSOLE.print(f"learning a BPE from {sum(map(len, sample)) / 1e6:.1f} MB of text ...")
            chosen = data.train_bpe(sample, int(size))
        else:
            chosen = data.load_tokenizer(options.tokenizer)
        start = time.perf_counter()
        dataset = data.write_dataset(
            read("tokenizing"),
            chosen,
            options.out,
            validation_fraction=options.validation_fraction,
            overwrite=options.overwrite,
        )
        elapsed_s = time.perf_counter() - start
    text_bytes = dataset.train.text_bytes + dataset.validation.text_bytes
    print(f"{options.out}: tokenizer {chosen.name}, vocabulary {chosen.vocab_size}")
    print(f"  train       {dataset.train}, {dataset.train.bytes_per_token:.3f} bytes/token")
    print(f"  validation  {dataset.validation}, {dataset.validation.bytes_per_token:.3f}")
    print(f"  fingerprint {dataset.fingerprint}")
    print(f"  {text_bytes / 1e6:.1f} MB of text in {elapsed_s:.1f} s", end="")
    print(f" ({text_bytes / 1e6 / elapsed_s:.1f} MB/s)")
    if options.baselines:
        splits = (dataset.train[-(2**26) :], dataset.validation[: 2**22])
        values = text_baselines(*(chosen.decode_bytes(tokens) for tokens in splits))
        print("  bits/byte   " + ", ".join(f"{key} {value:.3f}" for key, value in values.items()))


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except (ValueError, OSError) as error:
        sys.exit(f"prepare_data: {error}")

"""From --data to token ids: text with a tokenizer trained on it, or ids that are ready beside a tokenizer.json."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.train import tokenizer as bpe
from bitnet_mlx.train.corpus import find_files, read_corpus
from bitnet_mlx.train.data import ID_SUFFIXES, read_ids
from bitnet_mlx.train.options import TrainOptions

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Dataset:
    """ids, held_out: uint16 [tokens]; held_out is None where nothing was held out. held_out_bytes: its UTF-8 text.

    vocab: tokens and their ids. keep: puts the tokenizer's files into a folder.
    """

    ids: np.ndarray
    held_out: np.ndarray | None
    held_out_bytes: int
    vocab: dict[str, int]
    facts: dict[str, int]
    keep: Callable[[Path], None]

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer gives."""
        return max(self.vocab.values()) + 1

    def digest(self) -> str:
        """What tells the training ids from others."""
        return hashlib.sha256(self.ids.tobytes()).hexdigest()


def vocabulary(folder: Path) -> dict[str, int]:
    """Tokens and ids of a tokenizer.json, read without the tokenizers library."""
    path = folder / "tokenizer.json"
    try:
        raw = json.loads(path.read_text("utf-8"))
        found = dict(raw["model"]["vocab"])
        found.update({token["content"]: token["id"] for token in raw["added_tokens"]})
    except FileNotFoundError:
        raise ConfigError(f"[train] token ids need their tokenizer.json: there is none at {path}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"[train] {path} is no tokenizer of the tokenizers library: {error!r}") from error
    return found


def byte_lengths(vocab: dict[str, int]) -> np.ndarray:
    """Bytes of text that each id stands for, int64 [ids]: byte-level BPE writes a byte as one character."""
    lengths = np.zeros(max(vocab.values()) + 1, np.int64)
    for token, index in vocab.items():
        lengths[index] = 0 if token == bpe.END_OF_TEXT else len(token)
    return lengths


def prepare(options: TrainOptions) -> Dataset:
    """Read or make ids and tokenizer; nothing is written.

    Raises ConfigError or FormatError where the data is missing, empty or does not fit the tokenizer.
    """
    if options.output.exists() and not options.output.is_dir():
        raise ConfigError(f"[train] --output {options.output} is a file; give a folder")
    if any(path.suffix in ID_SUFFIXES for path in options.data):
        return _ready_ids(options)
    return _text(options)


def _keep_tokenizer(source: Path, output: Path) -> None:
    """Copy the tokenizer's files of a folder to the output, if it is not the output itself."""
    if source.resolve() == output.resolve():
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)


def _ready_ids(options: TrainOptions) -> Dataset:
    if len(options.data) != 1:
        raise ConfigError(
            f"[train] {len(options.data)} data paths with token ids among them; give one file of ids alone"
        )
    [path] = options.data
    if not path.is_file():
        raise ConfigError(f"[train] no file at {path}; token ids are a .npy or .bin file of uint16")
    source = options.model or path.parent
    vocab = vocabulary(source)
    size = max(vocab.values()) + 1
    held = None
    if options.eval_data:
        if options.eval_data[0].suffix not in ID_SUFFIXES or len(options.eval_data) != 1:
            raise ConfigError("[train] --data gives token ids; --eval-data must then be one file of token ids too")
        held = read_ids(options.eval_data[0], size)
    elif options.eval_fraction:
        raise ConfigError("[train] --eval-fraction holds out whole documents of text; with token ids give --eval-data")
    ids = read_ids(path, size)
    held_bytes = int(byte_lengths(vocab)[held].sum()) if held is not None else 0
    keep = partial(_keep_tokenizer, source)
    return Dataset(ids, held, held_bytes, vocab, {"train_tokens": len(ids)}, keep)


def _text(options: TrainOptions) -> Dataset:
    held = None
    if options.eval_data:
        held = read_corpus(find_files(options.eval_data))
    corpus = read_corpus(find_files(options.data), {d.digest for d in held.documents} if held else ())
    if held is None and options.eval_fraction:
        corpus, held = corpus.split(options.eval_fraction)
        if not held.documents:
            raise ConfigError("[train] --eval-fraction needs at least two documents; give more files, or --eval-data")
    known = options.model or (options.output if options.resume else None)
    if known and (known / "tokenizer.json").is_file():
        tokenizer = bpe.load(known)
        keep = partial(_keep_tokenizer, known)
    else:
        tokenizer = bpe.train_bpe((d.text for d in corpus.documents), options.vocab_size)
        keep = partial(bpe.save, tokenizer, max_length=options.seq_length)
    ids = bpe.encode_documents(tokenizer, [d.text for d in corpus.documents])
    facts = {
        "train_files": len(corpus.documents),
        "train_bytes": corpus.nbytes,
        "train_tokens": len(ids),
        "duplicates_dropped": corpus.duplicates,
        "not_utf8": corpus.not_utf8,
    }
    held_ids = bpe.encode_documents(tokenizer, [d.text for d in held.documents]) if held else None
    return Dataset(ids, held_ids, held.nbytes if held else 0, tokenizer.get_vocab(), facts, keep)

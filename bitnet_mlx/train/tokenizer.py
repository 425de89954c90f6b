"""A byte-level BPE tokenizer, trained here.

Text is cut first, so that a token never joins what should stay apart: line ends with the indentation that follows,
words with at most one character before them, single digits, runs of punctuation, runs of spaces.
The same text gives the same tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bitnet_mlx.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"  # id 0; stands before every document, and so ends the one before
PATTERN = r"\n+[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[ \t]+(?!\S)|\s"
SMALLEST = 257  # 256 bytes and the end of text
LARGEST = 65535  # ids are stored as uint16


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train on `texts`. The vocabulary has at most `vocab_size` entries (fewer where the text holds no more pairs)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if not SMALLEST <= vocab_size <= LARGEST:
        raise ConfigError(f"[train] --vocab-size is {vocab_size}; {SMALLEST} to {LARGEST} are allowed")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Each document after an end-of-text token, in one run of ids: uint16 [tokens]."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        raise FormatError(f"[train] the tokenizer has no {END_OF_TEXT}; use one that `bitnet-mlx train` wrote")
    parts: list[np.ndarray] = []
    for at in range(0, len(texts), 256):
        for encoded in tokenizer.encode_batch(list(texts[at : at + 256]), add_special_tokens=False):
            parts.append(np.array([end, *encoded.ids], np.uint16))
    return np.concatenate(parts)


def save(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json (in one line: it ships) and tokenizer_config.json."""
    raw = json.loads(tokenizer.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False, separators=(",", ":")), "utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def load(folder: Path) -> Tokenizer:
    """Read tokenizer.json of a folder."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"[train] no tokenizer.json in {folder}; name a folder that `bitnet-mlx train` wrote")
    return Tokenizer.from_file(str(path))

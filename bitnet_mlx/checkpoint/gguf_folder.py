"""A GGUF file as the Hugging Face folder that it was made of, without its weights: config.json and the tokenizer's files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitnet_mlx.checkpoint.gguf_config import hf_config
from bitnet_mlx.checkpoint.gguf_file import GgufFile
from bitnet_mlx.tokenizer.gguf import hf_files, read_vocabulary


@contextmanager
def described(source: Path | GgufFile) -> Iterator[Path]:
    """A folder that tells what `source` is: itself, or for a GGUF file one that is there as long as the context is.

    Raises what reading the file's metadata raises.
    """
    if not isinstance(source, GgufFile):
        yield source
        return
    files = hf_files(read_vocabulary(source.metadata, source.path))
    config = hf_config(source, [])
    ends = json.loads(files["generation_config.json"])["eos_token_id"]
    config["eos_token_id"] = list(dict.fromkeys([*config["eos_token_id"], *ends]))
    with tempfile.TemporaryDirectory(prefix="bitnet-mlx-") as name:
        folder = Path(name)
        for file_name, content in {**files, "config.json": json.dumps(config).encode()}.items():
            (folder / file_name).write_bytes(content)
        yield folder

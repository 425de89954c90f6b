"""detect: what a checkpoint folder is, from its config.json and the names of its files; no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitnet_mlx.checkpoint.folder import TOKENIZER_FILES, checkpoint_folder, read_config, weight_files
from bitnet_mlx.checkpoint.gguf_file import GgufFile, is_gguf
from bitnet_mlx.checkpoint.read_gguf import GgufModel
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.hf_config import ModelConfig, parse_config
from bitnet_mlx.models.quantization import Quantization

STORAGE_NAMES = {
    "packed": "Hugging Face packed uint8, 4 weights a byte",
    "online": "float master weights, ternarised when read",
    "words2": "native words2, 16 weights a uint32",
    "trits5": "native trits5, 5 weights a byte",
    "mlx": "MLX 2-bit, 16 weights a uint32, scales and biases for groups",
    "unpacked": "floats that are ternary already",
    "dense": "floats, not ternary",
    "gguf": "GGUF",
}


@dataclass(frozen=True)
class CheckpointInfo:
    """files: the weight files by name; nbytes: their size. tokenizer_files: the names of those present.

    gguf: the open file, where it is one.
    """

    path: Path
    model: ModelConfig
    files: tuple[Path, ...]
    nbytes: int
    tokenizer_files: tuple[str, ...]
    gguf: GgufModel | None = None

    @property
    def config(self) -> DecoderConfig:
        return self.model.decoder

    @property
    def quantization(self) -> Quantization:
        return self.model.quantization

    @property
    def family(self) -> str:
        """config.json's model_type."""
        return self.config.model_type

    @property
    def storage(self) -> str:
        """packed, online, words2, trits5, mlx, unpacked, dense or gguf."""
        return self.quantization.storage

    @property
    def scale_direction(self) -> str | None:
        """multiply (w = t * weight_scale), divide (w = t / weight_scale), or None where the file has no scales."""
        if self.storage in ("online", "dense", "unpacked"):
            return None
        return "divide" if self.quantization.divide else "multiply"

    @property
    def activation_bits(self) -> int | None:
        """8 or 16 for the ternary layers' inputs; None where no layer is ternary."""
        return None if self.storage == "dense" else self.quantization.activation_bits


def detect(path: Path | str | GgufFile) -> CheckpointInfo:
    """Look at a folder or a GGUF file.

    Raises ConfigError where there is no such folder, UnsupportedModelError for what is not read (pickles, other families
    and methods), FormatError for a folder without config.json or weights, or with damaged ones.
    """
    if is_gguf(path):
        gguf = GgufModel(path)
        return CheckpointInfo(gguf.file.path, gguf.model, (gguf.file.path,), gguf.file.nbytes, (), gguf)
    folder = checkpoint_folder(path)
    model = parse_config(read_config(folder), str(folder / "config.json"))
    files = weight_files(folder)
    present = tuple(name for name in TOKENIZER_FILES if (folder / name).is_file())
    return CheckpointInfo(folder, model, files, sum(file.stat().st_size for file in files), present)

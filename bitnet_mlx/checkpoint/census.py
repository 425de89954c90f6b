"""What a checkpoint weighs: parameters, zeros, true bits a weight, and the bytes that decoding one token reads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from bitnet_mlx.checkpoint import masters, tensors
from bitnet_mlx.checkpoint.detect import CheckpointInfo, detect
from bitnet_mlx.checkpoint.folder import VOCABULARIES, TensorTable, read_json
from bitnet_mlx.checkpoint.layout import parts, plan
from bitnet_mlx.checkpoint.read import read_linear
from bitnet_mlx.formats import hf
from bitnet_mlx.models.weights import Matrix
from bitnet_mlx.ternary import CODES_PER_WORD, ZERO_WORD, TernaryTensor, padded

_WORDS_AT_ONCE = 1 << 16
LARGE = 1 << 20  # weights of a matrix from which on master weights are looked at in part


@dataclass
class Census:
    """Sums over a checkpoint. Parameters and bytes are counts; *_file_bytes as stored, *_read_bytes as one token reads.

    zeros: zero weights among ternary_parameters. layers: share of zeros by module name. granularity: what a scale
    covers. tokenizer: which kind, and where it lies. types: of a GGUF file's tensors.
    """

    info: CheckpointInfo
    tied: bool = False
    head_storage: str = ""
    parameters: int = 0
    ternary_parameters: int = 0
    zeros: int = 0
    layers: dict[str, float] = field(default_factory=dict)
    granularity: tuple[str, ...] = ()
    ternary_file_bytes: int = 0
    tensor_bytes: int = 0
    ternary_read_bytes: int = 0
    dense_read_bytes: int = 0
    head_read_bytes: int = 0
    norm_read_bytes: int = 0
    notices: tuple[str, ...] = ()
    tokenizer: str | None = None
    chat_template: bool = False
    eos_ids: tuple[int, ...] = ()
    types: tuple[str, ...] = ()

    @property
    def zeros_share(self) -> float | None:
        return self.zeros / self.ternary_parameters if self.ternary_parameters else None

    @property
    def bits_per_ternary_weight(self) -> float | None:
        """Bits in the file for each ternary weight, scales included."""
        return 8 * self.ternary_file_bytes / self.ternary_parameters if self.ternary_parameters else None

    @property
    def bits_per_weight(self) -> float:
        """Bits in the file for each parameter of the whole model."""
        return 8 * self.tensor_bytes / self.parameters

    def kv_read_bytes(self, context: int, value_bytes: int = 4) -> int:
        """Keys and values of `context` positions: 4 bytes a value on the CPU engines, 2 in half precision."""
        c = self.info.config
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * context * value_bytes


def count_zeros(w: TernaryTensor) -> int:
    """Zero weights of a tensor, without its padding: codes 1 counted by bits, in blocks."""
    n, k = w.shape
    width = w.words.shape[1]
    step = max(1, _WORDS_AT_ONCE // max(width, 1))
    ones = 0
    for start in range(0, n, step):
        block = w.words[start : start + step]
        # Code 1 has its low bit set and its high bit clear.
        ones += int(np.bitwise_count(block & ~(block >> np.uint32(1)) & ZERO_WORD).sum(dtype=np.int64))
    return ones - n * (width * CODES_PER_WORD - k)


def take_census(folder: Path | str) -> Census:
    """Read a checkpoint once, a tensor at a time. Raises what read_weights raises, but for values in the head."""
    info = detect(folder)
    if info.gguf is not None:
        from bitnet_mlx.checkpoint.gguf_census import gguf_census

        return gguf_census(info, info.gguf)
    table = TensorTable(info.path)
    layout = plan(info.model, table)
    info = replace(info, model=layout.model)
    config = info.config
    census = Census(
        info,
        tied=layout.embed == layout.head,
        notices=layout.notices,
        tokenizer=tokenizer_kind(info),
        chat_template=has_chat_template(info),
        eos_ids=stop_ids(info),
    )
    census.tensor_bytes = sum(_size(table, name) for name in layout.required)
    kinds: dict[str, None] = {}
    for layer in range(config.num_hidden_layers):
        for name, shape in config.linear_shapes().items():
            _linear(census, table, f"model.layers.{layer}.{name}", shape, kinds)
            if info.model.has_bias(name):
                census.parameters += shape[0]
                census.norm_read_bytes += 4 * shape[0]
    census.granularity = tuple(kinds)
    norms = sum(table.info(name).shape[0] for name in layout.required if name.endswith("norm.weight"))
    census.norm_read_bytes += 4 * norms
    rows = config.vocab_size * config.hidden_size
    census.parameters += norms + rows * (1 if census.tied else 2)
    head = [f"{layout.head}.{part}" for part in parts(info.quantization.storage, True)]
    census.head_read_bytes = sum(_size(table, name) for name in head if name in layout.required)
    bits = info.quantization.head_bits
    ternary = layout.head in info.model.ternary_tables
    census.head_storage = f"{bits} bits in groups of 64" if bits else table.info(head[0]).dtype
    census.head_storage = "ternary" if ternary else census.head_storage
    return census


def _size(table: TensorTable, name: str) -> int:
    info = table.info(name)
    return info.stop - info.start


def _linear(census: Census, table: TensorTable, module: str, shape: tuple[int, int], kinds: dict[str, None]) -> None:
    names = [f"{module}.{part}" for part in parts(census.info.quantization.storage, True)]
    size = sum(_size(table, name) for name in names if name in table)
    zeros = _quick_zeros(census, table, module, shape)
    if zeros is None:
        count_linear(census, module, read_linear(table, census.info.model, module, shape), size, kinds)
    else:
        count = shape[0] * shape[1]
        census.parameters += count
        count_ternary(census, module, count, zeros, shape[0] * padded(shape[1]) // 4 + 4, size)
        kinds["tensor"] = None
    table.release(f"{module}.weight")


def _quick_zeros(census: Census, table: TensorTable, module: str, shape: tuple[int, int]) -> int | None:
    """Zeros of one linear without converting it: of packed bytes as they lie, of large master weights from a sample."""
    quantization, count, name = census.info.quantization, shape[0] * shape[1], f"{module}.weight"
    if not quantization.converts(module):
        return None
    if quantization.storage == "packed" and table.info(name).dtype == "U8":
        if table.info(f"{module}.weight_scale").shape not in ((), (1,)):
            return None
        tensors.packed_scale(table, f"{module}.weight_scale", shape[0], quantization.divide)
        packed = tensors.expect(table, name, ("U8",), ((hf.packed_rows(shape[0]), shape[1]),))
        return hf.count_zeros(packed, f"{name} in {table.path(name)}")
    if quantization.storage == "online" and count >= LARGE:
        notice = "zeros of master weights are estimated from a sample of each matrix"
        census.notices = tuple(dict.fromkeys((*census.notices, notice)))
        return round(masters.sampled_zeros(table, module, shape) * count)
    return None


def count_linear(census: Census, module: str, weight: Matrix, file_bytes: int, kinds: dict[str, None]) -> None:
    """Add one linear. file_bytes: of its tensors. kinds: gets what its scale covers."""
    count = weight.shape[0] * weight.shape[1]
    census.parameters += count
    if isinstance(weight, TernaryTensor):
        count_ternary(census, module, count, count_zeros(weight), weight.nbytes, file_bytes)
        kinds["tensor" if weight.scale.ndim == 0 else "row" if weight.scale.ndim == 1 else "group of 128"] = None
    else:
        census.dense_read_bytes += weight.nbytes


def count_ternary(census: Census, module: str, count: int, zeros: int, read_bytes: int, file_bytes: int) -> None:
    """Add the weights of one ternary linear, which are parameters already."""
    census.ternary_parameters += count
    census.zeros += zeros
    census.layers[module] = zeros / count
    census.ternary_read_bytes += read_bytes
    census.ternary_file_bytes += file_bytes


def tokenizer_kind(info: CheckpointInfo) -> str | None:
    """Which of the tokenizer's files a reader would take."""
    for name, kind in VOCABULARIES.items():
        if name in info.tokenizer_files:
            return f"{kind} ({name})"
    return None


def has_chat_template(info: CheckpointInfo) -> bool:
    """Whether a chat template lies beside the tokenizer or in its config."""
    if any(name.startswith("chat_template") for name in info.tokenizer_files):
        return True
    if "tokenizer_config.json" not in info.tokenizer_files:
        return False
    table = read_json(info.path / "tokenizer_config.json")
    return isinstance(table, dict) and bool(table.get("chat_template"))


def stop_ids(info: CheckpointInfo) -> tuple[int, ...]:
    """Stop tokens of config.json and generation_config.json."""
    found = dict.fromkeys(info.config.eos_token_ids)
    if "generation_config.json" in info.tokenizer_files:
        table = read_json(info.path / "generation_config.json")
        value = table.get("eos_token_id") if isinstance(table, dict) else None
        items = value if isinstance(value, list) else [value]
        found.update(dict.fromkeys(item for item in items if isinstance(item, int) and not isinstance(item, bool)))
    return tuple(found)

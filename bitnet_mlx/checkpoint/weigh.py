"""The sizes of a checkpoint's tensors as they will be held, from its config and file headers; no weight is read."""

from __future__ import annotations

from pathlib import Path

from bitnet_mlx.checkpoint.detect import CheckpointInfo, detect
from bitnet_mlx.checkpoint.folder import TensorTable
from bitnet_mlx.checkpoint.read import plan
from bitnet_mlx.checkpoint.read_gguf import EMBED, HEAD, GgufModel
from bitnet_mlx.checkpoint.tensors import FLOATS
from bitnet_mlx.formats import ggml_floats
from bitnet_mlx.models.demand import MatrixSize, ModelSize

_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def model_size(path: Path | str, name: str | None = None) -> ModelSize:
    """Sizes of a folder's or a GGUF file's tensors. Raises what detect and read_weights raise about headers."""
    info = detect(path)
    name = name or info.path.name
    return _gguf(info.gguf, name) if info.gguf is not None else _folder(info, name)


def _folder(info: CheckpointInfo, name: str) -> ModelSize:
    table = TensorTable(info.path)
    layout = plan(info.model, table)
    model = layout.model
    config, quantization = model.decoder, model.quantization

    def scale_of(module: str, n: int) -> str:
        """What a scale covers; where only the values tell, the largest."""
        if quantization.storage in ("mlx", "unpacked"):
            return "group"
        if quantization.storage == "online" or f"{module}.weight_scale" not in table:
            return "tensor"
        dims = table.info(f"{module}.weight_scale").shape
        return "group" if len(dims) == 2 else "row" if dims == (n,) and n > 1 else "tensor"

    in_place = quantization.storage in ("words2", "mlx")

    def rows(module: str) -> MatrixSize:
        bits = quantization.head_bits
        shape = (config.vocab_size, config.hidden_size)
        if module in model.ternary_tables:
            return MatrixSize(*shape, "ternary", scale_of(module, shape[0]), mapped=in_place)
        if quantization.native and bits is not None:
            return MatrixSize(*shape, "grouped", bits=bits)
        return MatrixSize(*shape, FLOATS.get(table.info(f"{module}.weight").dtype, "float32"))

    def linear(module: str, inner: str, shape: tuple[int, int]) -> MatrixSize:
        bias = model.has_bias(inner)
        if not quantization.converts(module):
            return MatrixSize(*shape, FLOATS.get(table.info(f"{module}.weight").dtype, "float32"), bias=bias)
        norm = 0 if model.linear_norm is None else shape[1]
        return MatrixSize(*shape, "ternary", scale_of(module, shape[0]), bias=bias, mapped=in_place, norm=norm)

    layers = [
        {inner: linear(f"model.layers.{i}.{inner}", inner, shape) for inner, shape in config.linear_shapes().items()}
        for i in range(config.num_hidden_layers)
    ]
    head = None if layout.head == layout.embed else rows(layout.head)
    return ModelSize(name, config, rows(layout.embed), head, layers)


def _gguf(gguf: GgufModel, name: str) -> ModelSize:
    """Ternary types with a scale a block become one scale a tensor where all blocks agree, as those of bitnet models do."""
    config, there = gguf.config, gguf.file.tensors

    def matrix(full: str, shape: tuple[int, int], bias: bool) -> MatrixSize:
        kind = there[full].kind
        if kind in _PLAIN and (config.model_type != "bitnet" or full in (EMBED, HEAD)):
            return MatrixSize(*shape, _PLAIN[kind], bias=bias)
        if kind in ggml_floats.BLOCKS:
            return MatrixSize(*shape, "float32", mapped=False)
        whole = kind == "I2_S" or kind in _PLAIN or config.model_type == "bitnet"
        return MatrixSize(*shape, "ternary", "tensor" if whole else "group", bias=bias, mapped=False)

    layers = [
        {
            inner: matrix(gguf.tensor(i, inner), shape, gguf.tensor(i, inner, "bias") in there)
            for inner, shape in config.linear_shapes().items()
        }
        for i in range(config.num_hidden_layers)
    ]
    rows = (config.vocab_size, config.hidden_size)
    head = None if config.tie_word_embeddings else matrix(HEAD, rows, False)
    return ModelSize(name, config, matrix(EMBED, rows, False), head, layers)

"""read_weights: a checkpoint folder -> DecoderWeights, strictly, tensor by tensor.

Native words2 and float matrices are used in place from the file's map; packed and master weights are converted in
blocks and their pages given back, so reading takes the result's memory and little more.
"""

from __future__ import annotations

import logging
import re
from collections import UserDict
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from bitnet_mlx.checkpoint import masters, mlx_tensors, tensors, ternary_floats
from bitnet_mlx.checkpoint.folder import TensorTable, checkpoint_folder, read_config
from bitnet_mlx.checkpoint.gguf_file import GgufFile, is_gguf
from bitnet_mlx.checkpoint.layout import Layout, plan
from bitnet_mlx.checkpoint.read_gguf import GgufModel, read_gguf
from bitnet_mlx.checkpoint.settle import HEAD
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.formats.dense import DenseRows, GroupedRows
from bitnet_mlx.models.hf_config import ModelConfig, parse_config
from bitnet_mlx.models.weights import DecoderWeights, Linear, Matrix
from bitnet_mlx.ternary import TernaryTensor

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]  # bytes done, bytes in all


def opened_once(source: Path) -> Path | GgufFile:
    """A GGUF file opened, for all who read a part of it; a folder as it is.

    Raises what GgufFile raises, and FormatError for a folder without config.json: that it is no model is said before what
    else it lacks.
    """
    if is_gguf(source):
        return GgufFile(source)
    if not (checkpoint_folder(source) / "config.json").is_file():
        read_config(source)
    return source


def read_weights(
    folder: Path | str | GgufFile,
    *,
    head_bits: int | None = None,
    activations: int | None = None,
    ternarize: bool = False,
    i2s_layout: str | None = None,
    progress: Progress | None = None,
) -> DecoderWeights:
    """Read a Hugging Face folder (packed, master or float weights, or MLX's 2 bits), a native one, or a GGUF file.

    head_bits: 8, 6 or 4 quantise embedding and head in groups of 64 columns; 16 or None keep what the file has.
    activations: 8 or 16 bits for the ternary layers' inputs; None keeps the checkpoint's.
    ternarize: take a folder's float linears for master weights, whatever config.json says or leaves out.
    i2s_layout: "128", "64" or "rows", of a GGUF file's I2_S tensors; None finds it. progress: called with the bytes done
    and the bytes of all files.

    The arrays may be read-only views of the files. Raises ConfigError, UnsupportedModelError, or FormatError that names
    the tensor and the file; nothing unknown, missing or non-finite passes.
    """
    _check_options(head_bits, activations, ternarize, folder)
    if is_gguf(folder):
        return read_gguf(folder, head_bits=head_bits, activations=activations, i2s_layout=i2s_layout, progress=progress)
    if i2s_layout is not None:
        raise ConfigError(f"[checkpoint] i2s_layout was given, and {folder} is no GGUF file; leave it out")
    return _open(folder, head_bits, activations, progress, ternarize).read()


def open_weights(
    folder: Path | str | GgufFile,
    *,
    errors: dict[str, float] | None = None,
    activations: int | None = None,
    ternarize: bool = False,
    i2s_layout: str | None = None,
    keep: Collection[str] = (),
    floats: bool = False,
) -> DecoderWeights:
    """As read_weights, but each linear is read when it is asked for, and each time anew: for one pass over a model that
    need not fit in memory.

    errors: takes the relative error of each linear that is ternarised when read, by module name. keep: linears that stay
    floats where others are ternarised. floats: leave all of them floats, master weights too.
    """
    _check_options(None, activations, ternarize, folder)
    if (keep or floats) and is_gguf(folder):
        raise ConfigError(
            f"[checkpoint] {folder} is a GGUF file; linears are made ternary, or kept, from folders alone"
        )
    if is_gguf(folder):
        model, linears = GgufModel(folder, i2s_layout, activations), OnDemand()
        linears.data.update({module: partial(model.linear, *where) for module, where in model.modules().items()})
        weights = replace(model.weights(), linears=linears)
        model.finished()
        return weights
    if i2s_layout is not None:
        raise ConfigError(f"[checkpoint] i2s_layout was given, and {folder} is no GGUF file; leave it out")
    reader = _open(folder, None, activations, None, ternarize, quiet=floats)
    if keep:
        reader.model = _keeping(reader.model, keep)
    if floats:
        reader.model = _as_floats(reader.model)
    reader.errors, reader.table.one_pass = errors, True
    return reader.read(OnDemand())


def _check_options(
    head_bits: int | None, activations: int | None, ternarize: bool, folder: Path | str | GgufFile
) -> None:
    for option, value, allowed in (("head_bits", head_bits, (32, 16, 8, 6, 4)), ("activations", activations, (8, 16))):
        if value is not None and value not in allowed:
            raise ConfigError(f"[checkpoint] {option} is {value!r}; {', '.join(map(str, allowed))} are allowed")
    if ternarize and is_gguf(folder):
        raise ConfigError(f"[checkpoint] ternarize was given, and {folder} is a GGUF file; it is for folders")


class OnDemand(UserDict):
    """Linears by name; the values kept are functions that read them."""

    def __getitem__(self, name: str) -> Linear:
        return self.data[name]()


def _open(
    folder: Path | str | GgufFile,
    head_bits: int | None,
    activations: int | None,
    progress: Progress | None,
    ternarize: bool,
    quiet: bool = False,
) -> _Reader:
    folder = checkpoint_folder(folder)
    model = parse_config(read_config(folder), str(folder / "config.json"))
    if ternarize:
        model = _masters(model)
    table = TensorTable(folder)
    layout = plan(model, table)
    for notice in () if quiet else layout.notices:
        log.warning("%s: %s", folder, notice)
    model = layout.model if activations is None else _with_activations(layout.model, activations)
    return _Reader(table, model, layout, head_bits, progress)


def _masters(model: ModelConfig) -> ModelConfig:
    """The same with its float linears ternarised. Raises ConfigError where the linears are no floats."""
    storage = model.quantization.storage
    if storage not in ("dense", "packed", "online"):
        raise ConfigError(f"[checkpoint] ternarize was given and the weights are stored as {storage}, not as floats")
    return replace(model, quantization=replace(model.quantization, storage="online", divide=False), notices=())


def _keeping(model: ModelConfig, keep: Collection[str]) -> ModelConfig:
    """The same with these linears left as the floats that they are. Raises ConfigError where they are no floats."""
    quantization = model.quantization
    if quantization.storage != "online" or model.linear_norm is not None:
        kind = "are ternary already" if quantization.storage != "dense" else "stay floats anyway"
        reason = kind if model.linear_norm is None else "norm their own inputs, which float ones do not here"
        raise ConfigError(
            f"[checkpoint] layers can be kept where float weights are made ternary; this model's linears {reason}"
        )
    before = (HEAD,) if quantization.modules_to_not_convert is None else quantization.modules_to_not_convert
    kept = (*before, *map(re.escape, keep))
    return replace(model, quantization=replace(quantization, modules_to_not_convert=kept))


def _as_floats(model: ModelConfig) -> ModelConfig:
    """The same with no linear ternarised. Raises ConfigError where they are no floats."""
    storage = model.quantization.storage
    if storage not in ("dense", "online") or model.linear_norm is not None:
        reason = f"are stored as {storage}" if model.linear_norm is None else "norm their own inputs"
        raise ConfigError(f"[checkpoint] ternary weights are fitted to floats; this model's linears {reason}")
    return replace(model, quantization=replace(model.quantization, storage="dense"))


def _with_activations(model: ModelConfig, bits: int) -> ModelConfig:
    return replace(
        model,
        decoder=replace(model.decoder, activation_bits=bits),
        quantization=replace(model.quantization, activation_bits=bits),
    )


def read_linear(
    table: TensorTable, model: ModelConfig, module: str, shape: tuple[int, int], errors: dict[str, float] | None = None
) -> Matrix:
    """The weight of one linear layer, without its bias, in the storage that it keeps at run time.

    errors: takes the relative error of a weight that is ternarised here, by module name.
    """
    quantization = model.quantization
    if not quantization.converts(module):
        return tensors.dense(table, f"{module}.weight", shape)
    bits = quantization.activation_bits
    if quantization.native:
        return tensors.native(table, module, shape, bits, quantization.storage)
    if quantization.storage == "mlx":
        return mlx_tensors.affine(table, module, shape, quantization.group, bits)
    if quantization.storage == "unpacked":
        return ternary_floats.unpacked(table, module, shape, bits)
    if quantization.storage == "online":
        ternary, error = masters.online(table, module, shape)
        if errors is not None:
            errors[module] = error
    else:
        ternary = tensors.packed(table, module, shape, quantization.divide)
    return replace(ternary, activation_bits=bits)


def read_linear_norm(table: TensorTable, model: ModelConfig, module: str, width: int) -> np.ndarray | None:
    """The weight of the norm inside one linear layer, float32 [K], or None."""
    if model.linear_norm is None or not model.quantization.converts(module):
        return None
    if not model.linear_norm:
        return np.ones(width, np.float32)
    return tensors.vector(table, f"{module}.{model.linear_norm}.weight", width)


class _Reader:
    """Reads what a layout lists and tells how far it is."""

    def __init__(
        self, table: TensorTable, model: ModelConfig, layout: Layout, head_bits: int | None, progress: Progress | None
    ) -> None:
        self.table, self.model, self.layout = table, model, layout
        self.head_bits = head_bits
        self.errors: dict[str, float] | None = None
        self._progress = progress
        self._done = 0

    def read(self, on_demand: OnDemand | None = None) -> DecoderWeights:
        """All weights; with `on_demand` the linears are left there as functions."""
        config, layout, table = self.model.decoder, self.layout, self.table
        embed = self._table_rows(layout.embed)
        head = embed if layout.head == layout.embed else self._table_rows(layout.head)
        if head is not embed and config.tie_word_embeddings:
            config = replace(config, tie_word_embeddings=False)
        weights = DecoderWeights(config, embed, head, {} if on_demand is None else on_demand)
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            for name, size in config.norm_sizes().items():
                weights.norms[f"{prefix}.{name}"] = self._norm(f"{prefix}.{name}.weight", size)
            for name, shape in config.linear_shapes().items():
                module = f"{prefix}.{name}"
                if on_demand is None:
                    weights.linears[module] = self._linear(module, name, shape)
                else:
                    on_demand.data[module] = partial(self._linear, module, name, shape)
        weights.norms["model.norm"] = self._norm("model.norm.weight", config.hidden_size)
        if self._progress:
            self._progress(table.nbytes, table.nbytes)
        return weights

    def _norm(self, name: str, size: int) -> np.ndarray:
        """A norm's weight; ones where the layout does not ask for it."""
        if name not in self.layout.required:
            return np.ones(size, np.float32)
        self._advance(name)
        return tensors.vector(self.table, name, size)

    def _advance(self, *names: str) -> None:
        for name in names:
            info = self.table.info(name)
            self._done += info.stop - info.start
        if self._progress:
            self._progress(self._done, self.table.nbytes)

    def _linear(self, module: str, name: str, shape: tuple[int, int]) -> Linear:
        bias = tensors.vector(self.table, f"{module}.bias", shape[0]) if self.model.has_bias(name) else None
        weight = read_linear(self.table, self.model, module, shape, self.errors)
        quantization = self.model.quantization
        if bias is not None and isinstance(weight, TernaryTensor) and quantization.scales_bias:
            bias = bias * weight.scale
        self._advance(f"{module}.weight")
        return Linear(weight, bias, read_linear_norm(self.table, self.model, module, shape[1]))

    def _ternary_table(self, module: str, shape: tuple[int, int]) -> Matrix:
        """A ternary embedding or head, whose inputs are never quantised."""
        quantization = replace(self.model.quantization, modules_to_not_convert=())
        rows = read_linear(self.table, replace(self.model, quantization=quantization), module, shape)
        assert isinstance(rows, TernaryTensor)
        if self.head_bits is not None:
            log.warning("%s: %s.weight is ternary; it stays so, whatever head_bits says", self.table.folder, module)
        self._advance(f"{module}.weight")
        return replace(rows, activation_bits=16)

    def _table_rows(self, module: str) -> Matrix:
        """The embedding or the head, in the storage asked for."""
        config, bits = self.model.decoder, self.model.quantization.head_bits
        shape = (config.vocab_size, config.hidden_size)
        name = f"{module}.weight"
        if module in self.model.ternary_tables:
            return self._ternary_table(module, shape)
        rows: DenseRows | GroupedRows
        if bits is not None and self.model.quantization.native:
            rows = tensors.grouped(self.table, module, shape, bits)
        elif bits is not None:
            rows = mlx_tensors.grouped(self.table, module, shape, bits)
        else:
            rows = tensors.dense(self.table, name, shape)
        if self.head_bits in (None, 16, 32) or self.head_bits == getattr(rows, "bits", None):
            if isinstance(rows, GroupedRows) and self.head_bits is not None and self.head_bits >= 16:
                log.warning("%s: %s is stored in %d bits; it stays so", self.table.folder, name, rows.bits)
        else:
            info, before = self.table.info(name), self._done
            size = info.stop - info.start

            def advance(done: int) -> None:
                if self._progress:
                    self._progress(before + size * done // shape[0], self.table.nbytes)

            rows = tensors.quantize_in_blocks(rows, int(self.head_bits or 0), advance)
            self.table.release(name)
        self._advance(name)
        return rows

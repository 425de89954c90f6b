"""read_weights: a checkpoint folder -> DecoderWeights, strictly, tensor by tensor.

Native words2 and float matrices are used in place from the file's map; packed and master weights are converted in
blocks and their pages given back, so reading takes the result's memory and little more.
"""

from __future__ import annotations

import logging
import re
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from bitnet_mlx.checkpoint import masters, tensors
from bitnet_mlx.checkpoint.folder import TensorTable, checkpoint_folder, name_list, read_config
from bitnet_mlx.checkpoint.gguf_file import is_gguf
from bitnet_mlx.checkpoint.read_gguf import GgufModel, read_gguf
from bitnet_mlx.errors import ConfigError, FormatError, UnsupportedModelError
from bitnet_mlx.formats.dense import DenseRows, GroupedRows
from bitnet_mlx.models.hf_config import ModelConfig, parse_config
from bitnet_mlx.models.weights import DecoderWeights, Linear, Matrix
from bitnet_mlx.ternary import TernaryTensor

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]  # bytes done, bytes in all

EMBED, HEAD = "model.embed_tokens", "lm_head"
# Buffers of old checkpoints, which follow from the config.
_HARMLESS = re.compile(r"rotary_emb\.inv_freq$")


def read_weights(
    folder: Path | str,
    *,
    head_bits: int | None = None,
    activations: int | None = None,
    i2s_layout: str | None = None,
    progress: Progress | None = None,
) -> DecoderWeights:
    """Read a Hugging Face folder (packed, master or float weights), a native one, or a GGUF file.

    head_bits: 8, 6 or 4 quantise embedding and head in groups of 64 columns; 16 or None keep what the file has.
    activations: 8 or 16 bits for the ternary layers' inputs; None keeps the checkpoint's.
    i2s_layout: "128", "64" or "rows", of a GGUF file's I2_S tensors; None finds it. progress: called with the bytes done
    and the bytes of all files.

    The arrays may be read-only views of the files. Raises ConfigError, UnsupportedModelError, or FormatError that names
    the tensor and the file; nothing unknown, missing or non-finite passes.
    """
    for option, value, allowed in (("head_bits", head_bits, (32, 16, 8, 6, 4)), ("activations", activations, (8, 16))):
        if value is not None and value not in allowed:
            raise ConfigError(f"[checkpoint] {option} is {value!r}; {', '.join(map(str, allowed))} are allowed")
    if is_gguf(folder):
        return read_gguf(folder, head_bits=head_bits, activations=activations, i2s_layout=i2s_layout, progress=progress)
    if i2s_layout is not None:
        raise ConfigError(f"[checkpoint] i2s_layout was given, and {folder} is no GGUF file; leave it out")
    return _open(folder, head_bits, activations, progress).read()


def open_weights(
    folder: Path | str, *, errors: dict[str, float] | None = None, i2s_layout: str | None = None
) -> DecoderWeights:
    """As read_weights, but each linear is read when it is asked for, and each time anew: for one pass over a model that
    need not fit in memory.

    errors: takes the relative error of each linear that is ternarised when read, by module name.
    """
    if is_gguf(folder):
        model, linears = GgufModel(folder, i2s_layout), OnDemand()
        linears.data.update({module: partial(model.linear, *where) for module, where in model.modules().items()})
        return replace(model.weights(), linears=linears)
    if i2s_layout is not None:
        raise ConfigError(f"[checkpoint] i2s_layout was given, and {folder} is no GGUF file; leave it out")
    reader = _open(folder, None, None, None)
    reader.errors, reader.table.one_pass = errors, True
    return reader.read(OnDemand())


class OnDemand(UserDict):
    """Linears by name; the values kept are functions that read them."""

    def __getitem__(self, name: str) -> Linear:
        return self.data[name]()


def _open(folder: Path | str, head_bits: int | None, activations: int | None, progress: Progress | None) -> _Reader:
    folder = checkpoint_folder(folder)
    model = parse_config(read_config(folder), str(folder / "config.json"))
    if activations is not None:
        model = _with_activations(model, activations)
    table = TensorTable(folder)
    layout = plan(model, table)
    for notice in (*model.notices, *layout.notices):
        log.warning("%s: %s", folder, notice)
    return _Reader(table, model, layout, head_bits, progress)


def _with_activations(model: ModelConfig, bits: int) -> ModelConfig:
    return replace(
        model,
        decoder=replace(model.decoder, activation_bits=bits),
        quantization=replace(model.quantization, activation_bits=bits),
    )


@dataclass(frozen=True)
class Layout:
    """Which tensors a checkpoint must have, and where its embedding and head lie."""

    required: dict[str, None]  # in the order of reading
    embed: str
    head: str  # the same module as `embed` where they are tied
    notices: tuple[str, ...]


def plan(model: ModelConfig, table: TensorTable) -> Layout:
    """The tensors that config.json promises. FormatError lists all that are missing or unknown at once."""
    config, quantization = model.decoder, model.quantization
    embed, head, notices = _tie(model, table)
    required: dict[str, None] = {}

    def matrix(module: str, scaled: bool) -> None:
        required[f"{module}.weight"] = None
        if scaled:
            required[f"{module}.weight_scale"] = None

    small_head = quantization.native and quantization.head_bits is not None
    matrix(embed, small_head)
    for layer in range(config.num_hidden_layers):
        for name in config.norm_sizes():
            required[f"model.layers.{layer}.{name}.weight"] = None
        for name in config.linear_shapes():
            module = f"model.layers.{layer}.{name}"
            matrix(module, (quantization.storage == "packed" or quantization.native) and quantization.converts(module))
            if model.has_bias(name):
                required[f"{module}.bias"] = None
    required["model.norm.weight"] = None
    if head != embed:
        matrix(head, small_head)
    # What a tied head's own tensors hold has been compared already.
    spare = {f"{HEAD}.weight", f"{EMBED}.weight"} if head == embed else set()
    unknown = [name for name in table if name not in required and name not in spare and not _HARMLESS.search(name)]
    missing = [name for name in required if name not in table]
    if missing or unknown:
        raise _mismatch(model, table, missing, unknown)
    return Layout(required, embed, head, tuple(notices))


def _tie(model: ModelConfig, table: TensorTable) -> tuple[str, str, list[str]]:
    """Modules of the embedding and the head, as transformers ties them, and what is odd about it."""
    quantization, notices = model.quantization, []
    if quantization.storage in ("packed", "online") and quantization.converts(HEAD):
        if quantization.storage == "online" or f"{HEAD}.weight_scale" in table:
            raise UnsupportedModelError(
                f"[checkpoint] {table.folder}: modules_to_not_convert leaves out {HEAD}, so the head is ternary; "
                f'only float heads are supported. If the head is float, add "{HEAD}" to the list in config.json'
            )
        notices.append(f"modules_to_not_convert leaves out {HEAD}, but the head has no weight_scale; it runs as floats")
    if not model.decoder.tie_word_embeddings:
        return EMBED, HEAD, notices
    names = (f"{EMBED}.weight", f"{HEAD}.weight")
    if names[0] not in table and names[1] in table:
        return HEAD, HEAD, notices
    if names[1] in table and names[0] in table and not _same(table, *names):
        notices.append(
            f"tie_word_embeddings is true, but {names[1]} differs from {names[0]}; both are used, as transformers does"
        )
        return EMBED, HEAD, notices
    return EMBED, EMBED, notices


def _same(table: TensorTable, a: str, b: str) -> bool:
    """Whether two tensors hold the same bytes, compared in blocks."""
    if (table.info(a).dtype, table.info(a).shape) != (table.info(b).dtype, table.info(b).shape):
        return False
    x, y = table.array(a).reshape(-1).view(np.uint8), table.array(b).reshape(-1).view(np.uint8)
    step = 1 << 20
    return all(np.array_equal(x[at : at + step], y[at : at + step]) for at in range(0, x.size, step))


def _mismatch(model: ModelConfig, table: TensorTable, missing: list[str], unknown: list[str]) -> FormatError:
    parts = []
    if missing:
        parts.append(f"lacks {len(missing)} tensors: {name_list(missing)}")
    if unknown:
        parts.append(
            f"has {len(unknown)} tensors that a {model.decoder.model_type} model does not know: {name_list(unknown)}"
        )
    examples = ", ".join(f"{name} {table.info(name)}" for name in sorted(table)[:3])
    hint = ""
    if missing and all(name.endswith("weight_scale") for name in missing) and model.quantization.storage == "packed":
        hint = '; for master weights config.json says "linear_class": "autobitlinear", "quantization_mode": "online"'
    if f"{HEAD}.weight" in missing:
        hint = '; an output head that is the embedding needs "tie_word_embeddings": true in config.json'
    return FormatError(
        f"[checkpoint] {table.folder} {'; it '.join(parts)}; it has {len(table)}, such as {examples}{hint}"
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
    if quantization.native:
        return tensors.native(table, module, shape, quantization.activation_bits, quantization.storage)
    if quantization.storage == "online":
        ternary, error = masters.online(table, module, shape)
        if errors is not None:
            errors[module] = error
    else:
        ternary = tensors.packed(table, module, shape, quantization.divide)
    return replace(ternary, activation_bits=quantization.activation_bits)


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
                weights.norms[f"{prefix}.{name}"] = tensors.vector(table, f"{prefix}.{name}.weight", size)
                self._advance(f"{prefix}.{name}.weight")
            for name, shape in config.linear_shapes().items():
                module = f"{prefix}.{name}"
                if on_demand is None:
                    weights.linears[module] = self._linear(module, name, shape)
                else:
                    on_demand.data[module] = partial(self._linear, module, name, shape)
        weights.norms["model.norm"] = tensors.vector(table, "model.norm.weight", config.hidden_size)
        if self._progress:
            self._progress(table.nbytes, table.nbytes)
        return weights

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
        return Linear(weight, bias)

    def _table_rows(self, module: str) -> DenseRows | GroupedRows:
        """The embedding or the head, in the storage asked for."""
        config, bits = self.model.decoder, self.model.quantization.head_bits
        shape = (config.vocab_size, config.hidden_size)
        name = f"{module}.weight"
        rows: DenseRows | GroupedRows
        if bits is not None and self.model.quantization.native:
            rows = tensors.grouped(self.table, module, shape, bits)
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

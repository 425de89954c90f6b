"""A GGUF file -> DecoderWeights, strictly, tensor by tensor."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from bitnet_mlx.checkpoint import gguf_tensors as tensors
from bitnet_mlx.checkpoint import gguf_types, i2s_probe
from bitnet_mlx.checkpoint.folder import name_list
from bitnet_mlx.checkpoint.gguf_config import architecture, hf_config
from bitnet_mlx.checkpoint.gguf_file import GgufFile, opened
from bitnet_mlx.checkpoint.layout import refuse_rotated
from bitnet_mlx.checkpoint.tensors import quantize_in_blocks
from bitnet_mlx.errors import ConfigError, FormatError, UnsupportedModelError
from bitnet_mlx.formats import ggml_floats, i2s, q2, words2
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.formats.strict_json import shown
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.hf_config import ModelConfig, parse_config
from bitnet_mlx.models.quantization import Quantization
from bitnet_mlx.models.weights import DecoderWeights, Linear, Matrix
from bitnet_mlx.ternary import TernaryTensor, ternarize

log = logging.getLogger(__name__)

EMBED, HEAD, NORM = "token_embd.weight", "output.weight", "output_norm.weight"
# Names inside a layer, as Hugging Face has them and as GGUF has them.
LINEARS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
NORMS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.attn_sub_norm": "attn_sub_norm",
    "mlp.ffn_sub_norm": "ffn_sub_norm", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
_PERMUTED = ("self_attn.q_proj", "self_attn.k_proj")


def read_gguf(
    path: Path | str | GgufFile,
    *,
    head_bits: int | None = None,
    activations: int | None = None,
    i2s_layout: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DecoderWeights:
    """Read a file's weights. Options as in read.read_weights; i2s_layout: "128", "64" or "rows", None finds it.

    Raises ConfigError, UnsupportedModelError, or FormatError that names the tensor and the file.
    """
    model = GgufModel(path, i2s_layout, activations)
    weights = model.weights(head_bits, progress)
    for module, (layer, name) in model.modules().items():
        weights.linears[module] = model.linear(layer, name)
        model.advance(model.tensor(layer, name))
    model.finished()
    return weights


class GgufModel:
    """An open file whose tensors are what its metadata promises. `notices`: what is odd, in words.

    layout: the I2_S layout, None where no tensor has that type. bits: of the ternary layers' inputs.
    """

    def __init__(
        self, path: Path | str | GgufFile, i2s_layout: str | None = None, activations: int | None = None
    ) -> None:
        """path: of the file, or the open file. activations: 8 or 16 bits, as the user wants them. No weight is read but a sample.

        Raises ConfigError, FormatError or UnsupportedModelError.
        """
        if i2s_layout is not None and i2s_layout not in i2s.LAYOUTS:
            raise ConfigError(f"[gguf] i2s_layout is {i2s_layout!r}; {', '.join(i2s.LAYOUTS)} are allowed")
        self.file = opened(path)
        self.architecture = architecture(self.file)
        self.notices: list[str] = []
        where = str(self.file.path)
        self.hf_config = hf_config(self.file, self.notices)
        parsed = parse_config(self.hf_config, where)
        self.config: DecoderConfig = parsed.decoder
        _check_types(self.file)
        self._check_names()
        self._masters: set[str] = set()
        self._done, self._progress = 0, None
        self.layout: str | None = i2s_layout
        names = [name for name, info in self.file.tensors.items() if info.kind == "I2_S"]
        if names and i2s_layout is None:
            self.layout, evidence = i2s_probe.find(self.file, names)
            self.notices.append(evidence)
        self.bits = 8
        self.bits = activations or self._activation_bits()
        self.config = replace(self.config, activation_bits=self.bits)
        self.model: ModelConfig = replace(
            parsed, decoder=self.config, quantization=Quantization("gguf", activation_bits=self.bits), notices=()
        )

    def modules(self) -> dict[str, tuple[int, str]]:
        """(layer, name inside it) of every linear by its full module name."""
        layers = range(self.config.num_hidden_layers)
        return {f"model.layers.{i}.{name}": (i, name) for i in layers for name in self.config.linear_shapes()}

    def weights(
        self, head_bits: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> DecoderWeights:
        """All but the linears. progress: is called by `advance` from here on."""
        self._progress, config = progress, self.config
        embed = self.table(EMBED, head_bits)
        self.advance(EMBED)
        head = embed
        if not config.tie_word_embeddings:
            head = self.table(HEAD, head_bits)
            self.advance(HEAD)
        weights = DecoderWeights(config, embed, head)
        for layer in range(config.num_hidden_layers):
            for name in config.norm_sizes():
                weights.norms[f"model.layers.{layer}.{name}"] = self.norm(layer, name)
        weights.norms["model.norm"] = tensors.vector(self.file, NORM, config.hidden_size)
        return weights

    def advance(self, name: str) -> None:
        """A tensor has been read."""
        self._done += self.file.tensors[name].room
        if self._progress:
            self._progress(min(self._done, self.file.nbytes), self.file.nbytes)

    def finished(self) -> None:
        """All has been read: tell what was odd."""
        if self._progress:
            self._progress(self.file.nbytes, self.file.nbytes)
        for notice in self.all_notices():
            log.warning("%s: %s", self.file.path, notice)

    def all_notices(self) -> list[str]:
        """`notices`, and what only reading the layers shows."""
        if not self._masters:
            return self.notices
        text = f"{len(self._masters)} matrices hold floats that are not ternary; they were ternarised by their mean"
        return [*self.notices, text]

    @staticmethod
    def tensor(layer: int, name: str, what: str = "weight") -> str:
        """GGUF's name of a linear or a norm of a layer."""
        return f"blk.{layer}.{LINEARS.get(name) or NORMS[name]}.{what}"

    def _check_names(self) -> None:
        """FormatError lists all tensors that are missing or unknown at once."""
        config, there = self.config, self.file.tensors
        layers = range(config.num_hidden_layers)
        required = {EMBED, NORM}
        required |= {self.tensor(i, name) for i in layers for name in (*config.norm_sizes(), *config.linear_shapes())}
        allowed = required | {HEAD, "rope_freqs.weight"}
        allowed |= {self.tensor(i, name, what) for i in layers for name in LINEARS for what in ("bias", "scale")}
        missing = [name for name in required if name not in there]
        unknown = [name for name in there if name not in allowed]
        refuse_rotated(self.file.path, unknown)
        parts = [f"lacks {len(missing)} tensors: {name_list(missing)}"] if missing else []
        if unknown:
            kind = self.file.metadata["general.architecture"]
            parts.append(f"has {len(unknown)} tensors that a {kind} model does not know: {name_list(unknown)}")
        if parts:
            raise FormatError(
                f"[gguf] {self.file.path} {'; it '.join(parts)}. It is damaged, or of another kind of model"
            )

    def norm(self, layer: int, name: str) -> np.ndarray:
        """Weight of a norm of a layer, float32."""
        return tensors.vector(self.file, self.tensor(layer, name), self.config.norm_sizes()[name])

    def linear(self, layer: int, name: str) -> Linear:
        """A linear of a layer, its rows in Hugging Face's order."""
        shape, full = self.config.linear_shapes()[name], self.tensor(layer, name)
        weight: Matrix = tensors.rows(self.file, full, shape, self.layout)
        if isinstance(weight, DenseRows) and self.config.model_type == "bitnet":
            weight = self._ternary_floats(weight, full)
        bias = self._optional(self.tensor(layer, name, "bias"), shape[0])
        factor = self._optional(self.tensor(layer, name, "scale"), 1)
        if factor is not None:
            weight = self._scaled(weight, factor, self.tensor(layer, name, "scale"))
        if self.architecture.permuted and name in _PERMUTED:
            dim = self.config.head_dim
            weight = tensors.unpermuted_rows(weight, dim)
            bias = None if bias is None else tensors.unpermuted(bias, dim)
        if isinstance(weight, TernaryTensor):
            weight = replace(weight, activation_bits=self.bits)
        return Linear(weight, bias)

    def _optional(self, name: str, size: int) -> np.ndarray | None:
        return tensors.vector(self.file, name, size) if name in self.file.tensors else None

    def _scaled(self, weight: Matrix, factor: np.ndarray, name: str) -> TernaryTensor:
        if not isinstance(weight, TernaryTensor) or factor[0] <= 0:
            raise tensors.damaged(self.file, name, f"is {factor[0]:g}; a factor above 0 of a ternary tensor is allowed")
        return tensors.scaled(weight, factor[0])

    def _ternary_floats(self, weight: DenseRows, name: str) -> TernaryTensor:
        """Floats of a BitNet model: -s, 0 and s as they stand; anything else is a master weight."""
        values = weight.rows(slice(None))
        scale = np.abs(values).max()
        t = np.sign(values).astype(np.int8)
        if scale == 0 or not np.array_equal(t * scale, values):
            t, scale = ternarize(values)
            self._masters.add(name)
        return TernaryTensor(words2.pack(t), np.asarray(scale, np.float32), weight.shape)

    def table(self, name: str, head_bits: int | None = None) -> Matrix:
        """The embedding or the head. head_bits: 8, 6 or 4 quantise it; ternary ones stay ternary."""
        shape, kind = (self.config.vocab_size, self.config.hidden_size), self.file.tensors[name].kind
        if head_bits in (8, 6, 4) and kind not in gguf_types.TERNARY:
            source = tensors.BlockRows(self.file, name, shape) if kind in ggml_floats.BLOCKS else None
            rows = source or tensors.rows(self.file, name, shape)
            found = quantize_in_blocks(rows, head_bits)
            self.file.release(name)
            return found
        found = tensors.rows(self.file, name, shape, self.layout)
        if head_bits is not None and isinstance(found, TernaryTensor):
            self.notices.append(f"{name} is ternary ({kind}); it stays so, whatever head_bits says")
        return replace(found, activation_bits=16) if isinstance(found, TernaryTensor) else found

    def _activation_bits(self) -> int:
        """Bits of the ternary layers' inputs, which no key of the file tells: see the notices for what was taken."""
        names = {name: self.tensor(0, name) for name in self.config.linear_shapes()}
        kinds = {self.file.tensors[name].kind for name in names.values()}
        if self.config.model_type == "bitnet":
            return 8
        if not kinds & set(gguf_types.TERNARY):
            self.notices.append("layers are not ternary; they run as floats")
            return 8
        # A model whose matrices have several scales shows it in every layer.
        first = [self.linear(0, name).weight for name in names]
        whole = all(weight.scale.ndim == 0 for weight in first if isinstance(weight, TernaryTensor))
        bits = 8 if "I2_S" in kinds or (whole and self.config.model_type == "llama" and "Q2_0" not in kinds) else 16
        reason = "each matrix has one scale, as BitNet's have" if whole else "scales differ inside a matrix"
        self.notices.append(
            f"the file does not tell whether layers quantise their inputs; {bits} bits are taken ({reason}); "
            f"--activations {24 - bits} takes the other"
        )
        return bits

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor, without padding."""
        info = self.file.tensors[name]
        if info.stop is None:  # Q2_0, the only type of unknown size that passed
            return q2.nbytes(int(np.prod(info.shape[:-1])), info.shape[-1], tensors.q2_group(self.file))
        return info.stop - info.start

    @property
    def types(self) -> tuple[str, ...]:
        """Types of the tensors by their share of the file, largest first; of I2_S and Q2_0 with the layout taken."""
        sums: dict[str, int] = {}
        for name, info in self.file.tensors.items():
            sums[info.kind] = sums.get(info.kind, 0) + self.nbytes(name)
        details = {"I2_S": f" (layout {self.layout})"}
        if "Q2_0" in sums:
            details["Q2_0"] = f" (groups of {tensors.q2_group(self.file)})"
        return tuple(kind + details.get(kind, "") for kind in sorted(sums, key=lambda kind: -sums[kind]))


def _check_types(file: GgufFile) -> None:
    """Refuse types that are not read where they stand, all at once, each with the reason."""
    faults: dict[tuple[str, str], list[str]] = {}
    for name, info in file.tensors.items():
        if re.fullmatch(r"blk\.\d+\.(" + "|".join(LINEARS.values()) + r")\.weight", name):
            allowed = (*gguf_types.TERNARY, *ggml_floats.PLAIN)
        elif name in (EMBED, HEAD):
            allowed = (*gguf_types.TERNARY, *gguf_types.DENSE)
        else:
            allowed = tuple(ggml_floats.PLAIN)
        if info.kind not in allowed:
            reason = gguf_types.REASONS.get(info.kind, f"{', '.join(allowed)} are read there")
            faults.setdefault((info.kind, reason), []).append(name)
    if faults:
        parts = [
            f"{len(names)} tensors of {kind if kind.startswith('type ') else f'type {kind}'} ({name_list(names)}): {reason}"
            for (kind, reason), names in faults.items()
        ]
        raise UnsupportedModelError(
            f"[gguf] {file.path} has {'; and '.join(parts)}. Take a file of another type, or the model's "
            f"{shown('safetensors')} repository"
        )

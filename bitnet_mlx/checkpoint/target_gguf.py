"""GGUF files of TQ1_0 or TQ2_0 with their tokenizer, in the architectures that gguf_config.py reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_mlx.checkpoint import target as common
from bitnet_mlx.checkpoint.gguf_config import ARCHITECTURES
from bitnet_mlx.checkpoint.gguf_file import GgufFile
from bitnet_mlx.checkpoint.gguf_writer import GgufPending, GgufStream
from bitnet_mlx.checkpoint.read import OnDemand
from bitnet_mlx.checkpoint.read_gguf import LINEARS, GgufModel
from bitnet_mlx.checkpoint.safetensors_writer import Pending
from bitnet_mlx.errors import ConfigError, FormatError, UnsupportedModelError
from bitnet_mlx.formats import tq
from bitnet_mlx.formats.block_scales import collapse
from bitnet_mlx.formats.dense import HEAD_GROUP, DenseRows
from bitnet_mlx.models.config import DecoderConfig, RopeConfig
from bitnet_mlx.models.rope import scaled_frequencies
from bitnet_mlx.models.weights import DecoderWeights, Linear, Matrix
from bitnet_mlx.ternary import TernaryTensor

TYPES = {"gguf-tq1_0": "TQ1_0", "gguf-tq2_0": "TQ2_0"}
_FILE_TYPES = {"TQ1_0": 36, "TQ2_0": 37}  # llama.cpp's general.file_type
_FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_TABLES = {8: "Q8_0", 4: "Q4_0"}
_PERMUTED = ("self_attn.q_proj", "self_attn.k_proj")


class GgufTarget:
    """Ternary layers with a float16 scale for each 256 weights, norms as float32, embedding and head as Q8_0 or floats."""

    whole = True

    def __init__(
        self,
        weights: DecoderWeights,
        tokenizer: Callable[[list[str]], dict[str, Any]],
        format: str,  # noqa: A002
        file: str,
        head_bits: int | None = None,
        dtype: str | None = None,
    ) -> None:
        """tokenizer: gives the vocabulary's keys, and notices to the list. file: the file's name.

        Raises UnsupportedModelError and FormatError for models that the format does not tell.
        """
        self.format, self.file, self.notices = format, file, list[str]()
        self.weights, self._kind = weights, TYPES[format]
        self._dtype = dtype and common.check_dtype(dtype, weights.config)
        if head_bits not in (None, 32, 16, 8, 4):
            raise ConfigError(f"[convert] head_bits is {head_bits}; GGUF is written with 16, 8 or 4")
        self._head_bits = head_bits
        self._architecture = _architecture(weights.config)
        for name, (_, k) in weights.config.linear_shapes().items():
            tq.row_bytes(self._kind, k, name)
        self._biased = [name for name in LINEARS if weights.layer_linear(0, name).bias is not None]
        self._metadata = {**metadata(weights.config, self._architecture, self._kind), **tokenizer(self.notices)}
        tables = (weights.embed_tokens, weights.lm_head)
        if head_bits is None and all(isinstance(rows, DenseRows) for rows in tables):
            self.notices.append(
                "embedding and head are written in 8 bits (Q8_0); --head-bits 16 keeps them as they are"
            )
        if weights.config.activation_bits == 8:
            self.notices.append(
                "GGUF does not tell how activations are quantised: llama.cpp does so for each 256 of them, this package "
                "for each token"
            )

    def stream(self, path: Path, seen: Callable[[str, np.ndarray], None]) -> GgufStream:
        c, shapes = self.weights.config, [("output_norm.weight", (self.weights.config.hidden_size,))]
        tables = ["token_embd.weight"] if self._tied else ["token_embd.weight", "output.weight"]
        shapes += [(name, (c.vocab_size, c.hidden_size)) for name in tables]
        for layer in range(c.num_hidden_layers):
            shapes += [(GgufModel.tensor(layer, name), (size,)) for name, size in c.norm_sizes().items()]
            for name, shape in c.linear_shapes().items():
                shapes.append((GgufModel.tensor(layer, name), shape))
                if name in self._biased:
                    shapes.append((GgufModel.tensor(layer, name, "bias"), shape[:1]))
        if c.rope.rope_type == "llama3":
            shapes.append(("rope_freqs.weight", (c.head_dim // 2,)))
        return GgufStream(path, self._metadata, shapes, seen)

    @property
    def _tied(self) -> bool:
        return self.weights.lm_head is self.weights.embed_tokens

    def linear(self, module: str, linear: Linear) -> tuple[list[Pending], Linear]:
        _, _, layer, name = module.split(".", 3)
        w, bias, order = linear.weight, linear.bias, self._order(name)
        if linear.norm is not None:
            raise FormatError(
                f"[convert] {module} has a norm of its own, which GGUF does not know. Give --format words2"
            )
        if (bias is not None) != (name in self._biased):
            raise FormatError(f"[convert] {module} and the same linear of layer 0 differ in having a bias")
        tensors: list[Pending] = []
        if isinstance(w, TernaryTensor):
            tensor, held = self._ternary(GgufModel.tensor(int(layer), name), w, order)
            tensors, linear = [tensor], Linear(held, bias)
        elif self.weights.config.model_type == "bitnet":
            raise FormatError(
                f"[convert] {module} is float, and float linears of this family's GGUF files are read as master weights. "
                "Give --format words2"
            )
        else:
            dtype = self._dtype or (w.dtype if isinstance(w, DenseRows) else "float32")
            linear = common.recast(linear, dtype)
            data = common.cast(w.rows(order), dtype)
            tensors = [GgufPending(GgufModel.tensor(int(layer), name), _FLOATS[dtype], w.shape, lambda: [data])]
        if bias is not None:
            values = bias[order]
            tensors.append(GgufPending(GgufModel.tensor(int(layer), name, "bias"), "F32", bias.shape, lambda: [values]))
        return tensors, linear

    def _order(self, name: str) -> Any:
        """Rows as llama.cpp has them: q and k of the llama architecture with both halves of a head interleaved."""
        if not ARCHITECTURES[self._architecture].permuted or name not in _PERMUTED:
            return slice(None)
        n, dim = self.weights.config.linear_shapes()[name][0], self.weights.config.head_dim
        return np.arange(n).reshape(-1, 2, dim // 2).swapaxes(1, 2).reshape(-1)

    def _ternary(self, name: str, w: TernaryTensor, order: Any = slice(None)) -> tuple[Pending, TernaryTensor]:
        n, k = w.shape
        scale = common.uncast(common.narrowed(np.atleast_1d(w.scale), "float16", f"{name} scale")).reshape(
            w.scale.shape
        )
        placed = scale if scale.ndim == 0 else scale[order]
        data = tq.from_words2(w.words[order], placed, k, self._kind, name)
        blocks = np.repeat(scale[:, ::2], 1, axis=1) if scale.ndim == 2 else scale.reshape(-1, 1)
        blocks = np.ascontiguousarray(np.broadcast_to(blocks, (n, k // tq.BLOCK)))
        held = TernaryTensor(w.words, collapse(blocks, w.words, tq.BLOCK, name), w.shape)
        return GgufPending(name, self._kind, w.shape, lambda: [data]), held

    def table(self, module: str, rows: Matrix) -> Iterator[Pending]:
        name = "token_embd.weight" if module == common.EMBED else "output.weight"
        bits = common.head_choice(rows, self._head_bits, 8)
        if isinstance(rows, TernaryTensor):
            yield self._ternary(name, rows)[0]
        elif bits in _TABLES:
            yield GgufPending(name, _TABLES[bits], rows.shape, partial(_table_blocks, rows, bits, name))
        elif bits >= 16:
            floats = common.dense_rows(name, rows, self._dtype)
            yield GgufPending(name, floats.dtype, floats.shape, floats.blocks)
        else:
            raise ConfigError(f"[convert] the head is stored in {bits} bits; give --head-bits 16, 8 or 4 for GGUF")

    def norm(self, module: str, norm: np.ndarray) -> Pending:
        if module == "model.norm":
            return GgufPending("output_norm.weight", "F32", norm.shape, lambda: [norm])
        _, _, layer, name = module.split(".", 3)
        return GgufPending(GgufModel.tensor(int(layer), name), "F32", norm.shape, lambda: [norm])

    def extra(self) -> list[Pending]:
        """Llama 3's frequency factors, which divide the frequencies."""
        c = self.weights.config
        if c.rope.rope_type != "llama3":
            return []
        plain, _ = scaled_frequencies(RopeConfig(rope_theta=c.rope.rope_theta), c.head_dim, 0)
        scaled, _ = scaled_frequencies(c.rope, c.head_dim, c.max_position_embeddings)
        factors = (plain / scaled).astype(np.float32)
        return [GgufPending("rope_freqs.weight", "F32", factors.shape, lambda: [factors])]

    def finish(self, folder: Path, kept: list[str], activation_bits: int) -> None:
        """Nothing lies beside the file."""

    def opened(self, path: Path) -> GgufFile:
        return GgufFile(path)

    def reopen(self, folder: Path) -> Mapping[str, Linear]:
        model = GgufModel(folder / self.file)
        # Of a model with sub-norms the file knows one family, whatever config.json called it.
        wanted, found = self.weights.config, model.config
        rope = _in_float32(wanted.rope, found.rope)
        common.check_config(found, replace(wanted, model_type=found.model_type, rope=rope))
        linears = OnDemand()
        for module in self.weights.linears:
            _, _, layer, name = module.split(".", 3)
            linears.data[module] = partial(model.linear, int(layer), name)
        return linears


def _architecture(c: DecoderConfig) -> str:
    """The name under which llama.cpp and bitnet.cpp know the graph."""
    if c.model_type in ("bitnet", "llama") and c.sub_norms:
        return "bitnet-b1.58" if c.hidden_act == "relu2" else "bitnet"
    if c.model_type in ("llama", "qwen3") and not c.sub_norms and c.hidden_act == "silu":
        return c.model_type
    raise UnsupportedModelError(
        f"[convert] a {c.model_type} model with {c.hidden_act}{' and sub-norms' if c.sub_norms else ''} has no "
        f"architecture in GGUF that is written here ({', '.join(ARCHITECTURES)}). Give --format words2"
    )


def metadata(c: DecoderConfig, architecture: str, kind: str) -> dict[str, Any]:
    """The keys of the model itself, as the formats' own converters name them."""
    keys: dict[str, Any] = {
        "vocab_size": c.vocab_size,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "rope.dimension_count": c.head_dim,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": c.rope.rope_theta,
        **_rope(c.rope),
    }
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.quantization_version": 2,
        "general.file_type": _FILE_TYPES[kind],
        **{f"{architecture}.{key}": value for key, value in keys.items()},
    }


def _in_float32(wanted: RopeConfig, found: RopeConfig) -> RopeConfig:
    """`wanted` with those numbers of `found` that are the same in float32, which is what the file holds."""
    pairs = {key: (value, getattr(found, key)) for key, value in vars(wanted).items()}
    same = {
        key: b
        for key, (a, b) in pairs.items()
        if isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=2**-22)
    }
    return replace(wanted, **same)


def _rope(rope: RopeConfig) -> dict[str, Any]:
    if rope.rope_type in ("default", "llama3"):
        return {}
    keys = {"rope.scaling.type": rope.rope_type, "rope.scaling.factor": rope.factor}
    if rope.rope_type == "yarn":
        if rope.mscale or rope.mscale_all_dim or not rope.truncate:
            raise FormatError("[convert] mscale and truncate of YaRN have no place in GGUF. Give --format words2")
        keys |= {
            "rope.scaling.original_context_length": rope.original_max_position_embeddings,
            "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
            "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
        }
        if rope.attention_factor is not None:
            keys["rope.scaling.attn_factor"] = rope.attention_factor / (1 + 0.1 * math.log(rope.factor))
    return keys


def _table_blocks(rows: Matrix, bits: int, name: str) -> Iterator[np.ndarray]:
    """Groups of 64 as two blocks of 32 with the same codes and their scale as float16: Q8_0, or Q4_0."""
    for _, codes, scales in common.grouped_rows(rows, bits):
        d = common.narrowed(np.repeat(scales, HEAD_GROUP // 32, axis=1), "float16", f"{name} scale")
        halves = codes.reshape(-1, 32)
        if bits == 4:
            unsigned = (halves + np.int8(8)).view(np.uint8)
            halves = unsigned[:, :16] | unsigned[:, 16:] << 4
        yield np.concatenate([d.reshape(-1, 1).view(np.uint8), halves.view(np.uint8)], axis=1)

"""What a decoder takes on each engine, from the sizes of its tensors: the formulas behind memory/plan.py.

Weights and caches are counted exactly. Activations: the cpu engine's are its own buffers, exactly; MLX's were fitted to
its counter on the CPU device (five models of 2 to 8 layers, 16 to 512 rows, up to 2428 positions): a bound elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bitnet_mlx.backends import ON_MLX
from bitnet_mlx.backends.low_rank import LowRank
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.formats.dense import HEAD_GROUP
from bitnet_mlx.memory.plan import Demand
from bitnet_mlx.models.cache import capacity
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.models.parts import PIECE
from bitnet_mlx.models.parts import passes as shared_passes
from bitnet_mlx.ternary import GROUP, padded

_Bytes = Callable[[int, int], int]  # of (context, batch)
_RECENT = 64  # positions of the MLX cache's second array
_FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Interpreter and libraries beside a model's own bytes, measured on Linux with the embedded model.
PROCESS = {"numpy": 48 << 20, "cpu": 160 << 20, "mlx": 80 << 20, "metal": 80 << 20, "cuda": 700 << 20}
_JOINED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


@dataclass(frozen=True)
class MatrixSize:
    """A matrix [n, k]. storage: ternary, grouped, float32, bfloat16 or float16. scale: "tensor", "row" or "group", of a
    ternary one. bits: of a grouped one. mapped: used where it lies in its file, so loading makes no copy of it. rank: of
    the adapter beside it, 0 for none; gains: whether that has one for each row (DoRA).
    """

    n: int
    k: int
    storage: str
    scale: str = "tensor"
    bits: int = 8
    bias: bool = False
    mapped: bool = True
    norm: int = 0
    rank: int = 0
    gains: bool = False

    @property
    def scales(self) -> int:
        """How many scales a ternary matrix has."""
        return {"tensor": 1, "row": self.n, "group": self.n * (padded(self.k) // GROUP)}[self.scale]

    @property
    def adapter(self) -> int:
        """Bytes of A, B and gains."""
        return 4 * self.rank * (self.n + self.k) + (4 * self.n if self.gains else 0)

    def host(self) -> int:
        """Bytes as the reader holds it: DecoderWeights.nbytes."""
        small = (4 * self.n if self.bias else 0) + 4 * self.norm + self.adapter
        if self.storage == "ternary":
            return self.n * padded(self.k) // 4 + 4 * self.scales + small
        if self.storage == "grouped":
            return self.n * self.k + 4 * self.n * -(-self.k // HEAD_GROUP) + small
        return self.n * self.k * _FLOAT_BYTES[self.storage] + small

    def cpu(self) -> int:
        """With the copies that the cpu engine makes of what it cannot use as it is."""
        copied = 4 * self.n * self.k if self.storage == "float16" else 0
        return self.host() + copied + low_rank_copies(self.n, self.k, self.rank)

    def mlx(self) -> int:
        """As MLX arrays; grouped codes are packed there, and have a bias beside each scale."""
        if self.storage != "grouped":
            return self.host()
        groups = -(-self.k // HEAD_GROUP)
        return self.n * groups * HEAD_GROUP * self.bits // 8 + 8 * self.n * groups + (4 * self.n if self.bias else 0)


@dataclass(frozen=True)
class ModelSize:
    """linears: by name inside the layer, one dictionary a layer. head: None where it is the embedding."""

    name: str
    config: DecoderConfig
    embed: MatrixSize
    head: MatrixSize | None
    layers: list[dict[str, MatrixSize]] = field(default_factory=list)

    @property
    def linears(self) -> Iterable[MatrixSize]:
        """Of all layers."""
        return (matrix for layer in self.layers for matrix in layer.values())

    @property
    def tables(self) -> list[MatrixSize]:
        """Embedding, and head where it is another."""
        return [self.embed] if self.head is None else [self.embed, self.head]

    @property
    def norms(self) -> int:
        """Bytes of the norms, float32."""
        c = self.config
        return 4 * (c.num_hidden_layers * sum(c.norm_sizes().values()) + c.hidden_size)

    def with_adapter(self, parts: Mapping[str, LowRank]) -> ModelSize:
        """With an adapter beside the linears; parts: as checkpoint.adapter.read_parts gives them."""

        def beside(name: str, matrix: MatrixSize) -> MatrixSize:
            part = parts.get(name)
            return matrix if part is None else replace(matrix, rank=part.rank, gains=part.m is not None)

        layers = [
            {inner: beside(f"model.layers.{i}.{inner}", matrix) for inner, matrix in layer.items()}
            for i, layer in enumerate(self.layers)
        ]
        return replace(self, layers=layers)

    def with_head_bits(self, bits: int | None) -> ModelSize:
        """With embedding and head as read_weights(head_bits=) makes them."""
        if bits not in (8, 6, 4):
            return self

        def quantized(matrix: MatrixSize) -> MatrixSize:
            kept = matrix.storage == "ternary" or (matrix.storage == "grouped" and matrix.bits == bits)
            return matrix if kept else replace(matrix, storage="grouped", bits=bits, mapped=False)

        head = None if self.head is None else quantized(self.head)
        return replace(self, embed=quantized(self.embed), head=head)


def demand(
    size: ModelSize,
    engine: str,
    *,
    head_bits: int | None = None,
    kv_bits: int | None = None,
    dtype: str = "float32",
    threads: int | None = None,
) -> Demand:
    """What a model takes on an engine. dtype: of what passes between layers. kv_bits: of the cache; None is dtype's."""
    size = size.with_head_bits(head_bits)
    on_mlx = engine in ("mlx", "metal", "cuda")
    how = MatrixSize.mlx if on_mlx else MatrixSize.cpu if engine == "cpu" else MatrixSize.host
    weights = sum(map(how, size.linears)) + size.norms + (joined(size) if on_mlx else 0)
    head = sum(map(how, size.tables))
    copies = sum(m.host() for m in (*size.linears, *size.tables) if not m.mapped) if on_mlx else 0
    if on_mlx:
        kv = _kv_mlx(size.config, kv_bits or _FLOAT_BYTES[dtype] * 8, engine != "mlx" and kv_bits is None)
        activations = _activations_mlx(size.config, kv, engine == "mlx", kv_bits is not None, *_beside(size))
    else:
        kv = _kv_host(size.config)
        normed, rank = any(m.norm for m in size.linears), max((m.rank for m in size.linears), default=0)
        count = threads or os.cpu_count() or 1
        activations = (
            _activations_cpu(size.config, count, normed, rank) if engine == "cpu" else _activations_numpy(size.config)
        )
    longest = size.config.max_position_embeddings
    measured = engine == "cpu" or (engine == "mlx" and not any(m.gains for m in size.linears))
    return Demand(size.name, engine, weights, head, kv, activations, PROCESS[engine], copies, longest, measured)


def low_rank_copies(n: int, k: int, rank: int) -> int:
    """Bytes of the A and B that the cpu engine lays out for itself (cpu_tables.WeightTables)."""
    if not rank:
        return 0
    from bitnet_mlx.models.cpu_tables import lanes

    return 4 * (rank * k + n * lanes(rank))


def joined(size: ModelSize) -> int:
    """Bytes of the second scales and biases that MLX's joined products have (nn/joined.py); words are held once."""
    extra = 0
    for layer in size.layers:
        for names in _JOINED:
            parts = [layer[name] for name in names]
            alike = len({(m.scale == "group", m.bias) for m in parts}) == 1
            if not alike or any(m.storage != "ternary" or m.norm or m.rank for m in parts):
                continue
            extra += 4 * sum((m.scales if m.scale == "group" else m.n) + (m.n if m.bias else 0) for m in parts)
    return extra


def kv_of(decoder: Decoder) -> _Bytes:
    """Bytes of the caches that a loaded decoder makes, of (context, batch)."""
    if decoder.name not in ON_MLX:
        return _kv_host(decoder.config)
    model: Any = decoder
    return _kv_mlx(
        decoder.config, model.kv_bits or _FLOAT_BYTES[model.dtype] * 8, model.ops.compiles and not model.kv_bits
    )


def _kv_host(config: DecoderConfig) -> _Bytes:
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    return lambda context, batch: row * context * batch


def kv_row_bytes(dim: int, bits: int) -> int:
    """Bytes of one head's keys or values of one position: floats, or codes with a float32 scale and bias a group."""
    if bits >= 16:
        return dim * bits // 8
    return dim * bits // 8 + 8 * (dim // kv_group(dim))


def kv_group(dim: int) -> int:
    """Values of a head that share a scale. Raises ConfigError where no group of MLX's divides them."""
    for group in (64, 32):
        if dim % group == 0:
            return group
    raise ConfigError(f"[kv] heads have {dim} values; keys and values in 8 or 4 bits need a multiple of 32")


def _kv_mlx(config: DecoderConfig, bits: int, recent: bool) -> _Bytes:
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    row = heads * kv_row_bytes(config.head_dim, bits)
    more = _RECENT if recent else 0
    return lambda context, batch: row * (context + more) * batch


def _beside(size: ModelSize) -> tuple[bool, int]:
    """Of an adapter, on MLX: whether it is beside the feed-forward's first linears, and bytes of a layer's W where each step
    widens it for the norms of its rows (DoRA), which is a bound."""
    wide = [sum(4 * m.n * m.k for m in layer.values() if m.gains) for layer in size.layers]
    return any(layer[name].rank for layer in size.layers for name in _JOINED[1]), 2 * max(wide, default=0)


def _activations_mlx(
    config: DecoderConfig, kv: _Bytes, scores: bool, widened: bool, beside: bool = False, norms: int = 0
) -> _Bytes:
    """What the passes of prompts need beside the filled caches, at the pass that needs most.

    Floats a row: 8 F + 4 H around the feed-forward; around attention 10 q + 6 kv + 2 H and, where its scores are written
    out (the CPU device), one for each position of each head and a byte of the mask. Where a cache grows, a layer's new
    array stands beside its old one. An adapter's parts of gate and up come to 4 F more. beside, norms: see _beside.
    """
    c = config
    queries, values = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    base = 4 * (10 * queries + 6 * values + 2 * c.hidden_size)
    feed_forward = 4 * ((12 if beside else 8) * c.intermediate_size + 4 * c.hidden_size)
    score = 4 * c.num_attention_heads + 1 if scores else 0

    def count(context: int, batch: int) -> int:
        most, rooms = 0, [0] * batch
        for start, end in passes(context):
            for parts in shared_passes([range(start, end)] * batch, PIECE):
                attention = rows = new = wide = 0
                for part in parts:
                    at, before = part.ids[-1] + 1, rooms[part.sequence]
                    room = rooms[part.sequence] = capacity(at, context)
                    new = max(new, kv(room, 1) // c.num_hidden_layers) if 0 < before < room else new
                    rows += len(part.ids)
                    attention += len(part.ids) * (base + score * at)
                    wide = max(wide, 4 * 2 * values * at) if widened else 0  # of a small cache, in floats again
                held = sum(kv(room, 1) for room in rooms if room) - kv(context, batch)
                most = max(most, held + wide + max(rows * feed_forward, attention + new))
        return most + norms + _rotary(c, context, 1024) + 4 * batch * c.vocab_size

    return count


def _rotary(config: DecoderConfig, positions: int, step: int) -> int:
    return 4 * config.head_dim * (-(-positions // step) * step)


def _activations_cpu(config: DecoderConfig, threads: int, normed: bool, rank: int) -> _Bytes:
    """The buffers' block as it has grown by the end, the tables of cosines and sines, and the logits."""

    def count(context: int, batch: int) -> int:
        from bitnet_mlx.models.cpu_tables import Buffers

        buffers, block, tables = Buffers(config, normed, rank), 0, 0
        for start, end in passes(context):
            if end > tables:
                tables = max(end, 2 * tables, 256)
            for rows, positions in _chunks(start, end, batch):
                block = buffers.resize(rows, positions, threads) or block
        return block + 4 * config.head_dim * tables + 4 * batch * config.vocab_size

    return count


def passes(context: int) -> Iterator[tuple[int, int]]:
    """Positions of each pass: a prompt of all but one in pieces, and one token more."""
    prompt = max(context - 1, 1)
    for start in range(0, prompt, PIECE):
        yield start, min(start + PIECE, prompt)
    if context > prompt:
        yield prompt, context


def _chunks(start: int, end: int, batch: int) -> Iterator[tuple[int, int]]:
    """(rows, positions reached) of each call that the cpu engine makes for one pass: sequences follow one another."""
    from bitnet_mlx.backends.cpu_jit.layout import CHUNK

    length = end - start
    for first in range(0, batch * length, CHUNK):
        last = min(first + CHUNK, batch * length) - 1
        ends = first // length < (last + 1) // length  # the last row of a sequence is among them
        yield last + 1 - first, end if ends else start + last % length + 1


def activations_of(decoder: Decoder) -> _Bytes:
    """Bytes that a loaded decoder needs beside weights and caches, of (context, batch)."""
    config, model = decoder.config, decoder
    if decoder.name == "numpy":
        return _activations_numpy(config)
    if decoder.name == "cpu":
        from bitnet_mlx.backends.cpu_jit.threads import get_threads

        linears: Any = model.weights.linears.values()  # type: ignore[attr-defined]
        rank = max((linear.adapter.rank for linear in linears if linear.adapter is not None), default=0)
        return _activations_cpu(config, get_threads(), any(linear.norm is not None for linear in linears), rank)
    on_mlx: Any = model
    beside = any("lora_a" in getattr(layer.mlp, name[4:]) for layer in on_mlx.layers for name in _JOINED[1])
    return _activations_mlx(config, kv_of(decoder), decoder.name == "mlx", on_mlx.kv_bits is not None, beside)


def _activations_numpy(config: DecoderConfig) -> _Bytes:
    """Seven arrays of the feed-forward's width, or the scores of one row at a time, and 512 unpacked rows: a bound."""
    c = config
    unpacked = 6 * 512 * max(c.hidden_size, c.intermediate_size)

    def count(context: int, batch: int) -> int:
        rows = min(PIECE, context)
        scores = 4 * c.num_attention_heads * context * c.head_dim
        work = max(4 * rows * (7 * c.intermediate_size + 3 * c.hidden_size), scores)
        return unpacked + work + 4 * batch * c.vocab_size

    return count

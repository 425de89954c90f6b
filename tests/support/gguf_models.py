"""Whole models as GGUF files: what converters write, told here without the package's codecs and readers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants

from bitnet_mlx.formats import words2
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.weights import DecoderWeights, Matrix
from bitnet_mlx.ternary import GROUP, TernaryTensor
from tests.support import gguf_files
from tests.support.random_model import random_weights, tiny_config

LINEARS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
NORMS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.attn_sub_norm": "attn_sub_norm",
    "mlp.ffn_sub_norm": "ffn_sub_norm", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
NUMBERS = {"I2_S": 36, "Q2_0": 42}  # that the owner's package does not write
Tensors = dict[str, tuple[tuple[int, ...], int, bytes]]  # name -> (shape, type number, bytes)


def metadata(config: DecoderConfig, architecture: str, **changes: Any) -> dict[str, Any]:
    """The keys that converters write. changes: by the key behind the architecture's name, dots as underscores."""
    c = config
    keys: dict[str, Any] = {
        "vocab_size": c.vocab_size, "context_length": c.max_position_embeddings, "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers, "feed_forward_length": c.intermediate_size,
        "rope.dimension_count": c.head_dim, "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads, "rope.freq_base": c.rope.rope_theta,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
    }  # fmt: skip
    if c.head_dim * c.num_attention_heads != c.hidden_size:
        keys |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    keys |= changes
    found = {f"{architecture}.{key}": value for key, value in keys.items() if value is not None}
    return {"general.architecture": architecture, **found}


def small() -> tuple[dict[str, Any], Tensors]:
    """Keys and tensors of a model of two layers, without a vocabulary."""
    config = tiny_config(hidden_size=64, intermediate_size=128, head_dim=16)
    return metadata(config, "bitnet-b1.58"), tensors(random_weights(config, head="float32"), "I2_S")


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """q or k as llama.cpp's converter orders its rows: both halves of a head become neighbours."""
    out = np.empty_like(array)
    size = len(array) // heads
    for head in range(heads):
        for i in range(size):
            # One head of 8 is stored as 0 4 1 5 2 6 3 7.
            out[head * size + i] = array[head * size + (i % 2) * (size // 2) + i // 2]
    return out


def encode(values: np.ndarray, kind: str, layout: str = "128") -> bytes:
    """float32 [N, K], ternary for the ternary types, as the file's bytes."""
    if kind == "I2_S":
        return i2_s(np.sign(values), float(np.abs(values).max()), layout)
    if kind == "Q2_0":
        return q2_0(values, int(layout))
    if kind in ("Q6_K", "Q4_K"):
        return k_blocks(values, kind)
    return quants.quantize(values, Type[kind]).tobytes()


def i2_s(t: np.ndarray, scale: float, layout: str) -> bytes:
    """bitnet.cpp's: chunks of W bytes, the first quarter of a chunk's codes in the highest bits."""
    width = {"128": 32, "64": 16, "rows": t.shape[1]}[layout]
    codes = (t + 1).astype(np.uint8).reshape(-1, 4, width)
    packed = codes[:, 0] << 6 | codes[:, 1] << 4 | codes[:, 2] << 2 | codes[:, 3]
    return packed.tobytes() + np.array([scale], "<f4").tobytes() + b"\xcc" * 28


def q2_0(values: np.ndarray, group: int) -> bytes:
    """Groups along K: a float16 scale and codes, four a byte, the first in the lowest bits."""
    groups = values.reshape(-1, group)
    d = np.abs(groups).max(axis=1)
    codes = (np.sign(groups) + 1).astype(np.uint8).reshape(len(groups), -1, 4)
    packed = codes[..., 0] | codes[..., 1] << 2 | codes[..., 2] << 4 | codes[..., 3] << 6
    return b"".join(np.float16(s).tobytes() + row.tobytes() for s, row in zip(d, packed, strict=True))


def k_blocks(values: np.ndarray, kind: str) -> bytes:
    """Any valid blocks: random codes seeded by the values; what they stand for is the owner's to say."""
    size, scales = {"Q6_K": (210, 208), "Q4_K": (144, 0)}[kind]
    rng = np.random.default_rng(values.view(np.uint32).reshape(-1)[:8])
    raw = rng.integers(0, 256, (values.size // 256, size)).astype(np.uint8)
    raw[:, scales : scales + 2] = np.array([0.01], "<f2").view(np.uint8)
    if kind == "Q4_K":
        raw[:, 2:4] = np.array([0.02], "<f2").view(np.uint8)
    return raw.tobytes()


def tensors(
    weights: DecoderWeights, kind: str, head: str = "F16", layout: str = "128", permute: bool = False
) -> Tensors:
    """kind: of the linears. head: of embedding and head. layout: of I2_S, or the group of Q2_0."""
    c, out = weights.config, Tensors()

    def put(name: str, values: np.ndarray, kind: str) -> None:
        number = NUMBERS.get(kind) or int(Type[kind])
        out[name] = (values.shape, number, encode(np.ascontiguousarray(values, np.float32), kind, layout))

    put("token_embd.weight", weights.embed_tokens.rows(slice(None)), head)
    if not c.tie_word_embeddings:
        put("output.weight", weights.lm_head.rows(slice(None)), head)
    put("output_norm.weight", weights.norms["model.norm"], "F32")
    for layer in range(c.num_hidden_layers):
        for name in c.norm_sizes():
            put(f"blk.{layer}.{NORMS[name]}.weight", weights.layer_norm(layer, name), "F32")
        for name in c.linear_shapes():
            linear = weights.layer_linear(layer, name)
            heads = {"self_attn.q_proj": c.num_attention_heads, "self_attn.k_proj": c.num_key_value_heads}.get(name, 0)
            ordered = (lambda a, n=heads: permuted(a, n)) if permute and heads else (lambda a: a)
            put(f"blk.{layer}.{LINEARS[name]}.weight", ordered(dense(linear.weight)), kind)
            if linear.bias is not None:
                put(f"blk.{layer}.{LINEARS[name]}.bias", ordered(linear.bias), "F32")
    return out


def dense(weight: Matrix) -> np.ndarray:
    """float32 [N, K]."""
    if not isinstance(weight, TernaryTensor):
        return weight.rows(slice(None))
    t = words2.unpack(weight.words, weight.shape[1]).astype(np.float32)
    if weight.scale.ndim < 2:
        return t * weight.scale.reshape(-1, 1)
    return t * np.repeat(weight.scale, GROUP, axis=1)[:, : weight.shape[1]]


def write(path: Path, keys: dict[str, Any], content: Tensors) -> Path:
    """By the owner's package where it knows all types, else by hand."""
    if any(number in NUMBERS.values() for _, number, _ in content.values()):
        table = [(name, shape, number, raw) for name, (shape, number, raw) in content.items()]
        path.write_bytes(gguf_files.by_hand(keys, table))
        return path
    rest = {key: value for key, value in keys.items() if key != "general.architecture"}
    arrays: list[gguf_files.Tensor] = []
    for name, (shape, number, raw) in content.items():
        rows = np.frombuffer(raw, np.uint8).reshape(*shape[:-1], -1)
        arrays.append((name, rows, Type(number)))
    return gguf_files.write(path, keys["general.architecture"], rest, arrays)

"""Random decoders at the shapes of a preset or of any configuration: what benchmarks run, without a checkpoint to fetch."""

from __future__ import annotations

import numpy as np

from bitnet_mlx.formats import words2
from bitnet_mlx.formats.dense import HEAD_GROUP, DenseRows, GroupedRows
from bitnet_mlx.models.config import DecoderConfig, RopeConfig
from bitnet_mlx.models.weights import DecoderWeights, Linear
from bitnet_mlx.ternary import CODES_PER_WORD, GROUP, TernaryTensor, padded

# Every byte of four codes 0, 1 or 2.
_BYTES = np.array([sum(c << 2 * i for i, c in enumerate(codes)) for codes in np.ndindex(3, 3, 3, 3)], np.uint8)
HEAD_ROWS_DRAWN = (
    1024  # a large head repeats this many random rows: drawing 300 million numbers takes longer than the run
)


def config_2b(layers: int = 30, vocab_size: int = 128256, **changes: object) -> DecoderConfig:
    """hidden 2560, feed-forward 6912, 20 heads over 5, head_dim 128, as config.json of bitnet-b1.58-2B-4T says."""
    fields: dict[str, object] = dict(
        model_type="bitnet", vocab_size=vocab_size, hidden_size=2560, intermediate_size=6912, num_hidden_layers=layers,
        num_attention_heads=20, num_key_value_heads=5, head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=4096,
        hidden_act="relu2", sub_norms=True, tie_word_embeddings=True, rope=RopeConfig(rope_theta=500000.0),
    )  # fmt: skip
    fields.update(changes)
    return DecoderConfig(**fields)  # type: ignore[arg-type]


def preset(name: str) -> DecoderConfig:
    """small: a few layers for any machine. 2b4t: bitnet-b1.58-2B-4T's 30 layers."""
    if name == "2b4t":
        return config_2b()
    return config_2b(4, 4096, hidden_size=512, intermediate_size=1408, num_attention_heads=8, num_key_value_heads=2,
                     head_dim=64)  # fmt: skip


def aligned(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Uninitialised memory on a 64-byte boundary."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + size].view(dtype).reshape(shape)


def random_words(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    """uint32 words of a ternary [n, k] with every code equally likely."""
    if k != padded(k):
        return words2.pack(rng.integers(-1, 2, (n, k), np.int8))
    words = aligned((n, padded(k) // CODES_PER_WORD), np.uint32)
    words.view(np.uint8)[:] = _BYTES[rng.integers(0, len(_BYTES), (n, padded(k) // 4), np.uint8)]
    return words


def random_head(rng: np.random.Generator, n: int, k: int, bits: int) -> DenseRows | GroupedRows:
    """8 bits in groups of 64, or 16: bfloat16."""
    pick = np.arange(n) % HEAD_ROWS_DRAWN
    if bits == 16:
        data = aligned((n, k), np.uint16)
        rows = rng.standard_normal((HEAD_ROWS_DRAWN, k)).astype(np.float32)
        data[:] = (rows.view(np.uint32) >> 16).astype(np.uint16)[pick]
        return DenseRows(data, "bfloat16")
    codes = aligned((n, k), np.int8)
    codes[:] = rng.integers(-127, 128, (HEAD_ROWS_DRAWN, k), np.int8)[pick]
    scales = aligned((n, -(-k // HEAD_GROUP)), np.float32)
    scales[:] = rng.uniform(0.001, 0.02, scales.shape)
    return GroupedRows(codes, scales, 8)


def random_decoder(
    config: DecoderConfig, head_bits: int = 8, seed: int = 0, scale: str = "tensor", activation_bits: int = 8
) -> DecoderWeights:
    """Weights of every layer drawn separately, so that a step reads as many bytes as the real model's.

    scale: "tensor", "row" or "group" of 128.
    """
    rng = np.random.default_rng(seed)
    head = random_head(rng, config.vocab_size, config.hidden_size, head_bits)
    weights = DecoderWeights(config, head, head)
    for layer in range(config.num_hidden_layers):
        for name, (n, k) in config.linear_shapes().items():
            shape = {"tensor": (), "row": (n,), "group": (n, padded(k) // GROUP)}[scale]
            values = np.full(shape, 0.02, np.float32)
            w = TernaryTensor(random_words(rng, n, k), values, (n, k), activation_bits)
            weights.linears[f"model.layers.{layer}.{name}"] = Linear(w)
        for name, size in config.norm_sizes().items():
            weights.norms[f"model.layers.{layer}.{name}"] = np.ones(size, np.float32)
    weights.norms["model.norm"] = np.ones(config.hidden_size, np.float32)
    return weights


def ternary_weights(config: DecoderConfig) -> int:
    """How many ternary weights a step multiplies with."""
    return config.num_hidden_layers * sum(n * k for n, k in config.linear_shapes().values())

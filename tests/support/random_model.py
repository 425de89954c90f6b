"""A random decoder, small and awkward: sizes that fall on no boundary, scales far from 1."""

from __future__ import annotations

import numpy as np

from bitnet_mlx.formats import words2
from bitnet_mlx.formats.dense import DenseRows, GroupedRows, float32_to_bfloat16, quantize_rows
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.weights import DecoderWeights, Linear, Matrix
from bitnet_mlx.ternary import GROUP, TernaryTensor, padded


def random_ternary(rng: np.random.Generator, n: int, k: int, scale: str = "tensor", bits: int = 8) -> TernaryTensor:
    """scale: "tensor", "row" or "group"."""
    shape = {"tensor": (), "row": (n,), "group": (n, padded(k) // GROUP)}[scale]
    t = rng.integers(-1, 2, (n, k)).astype(np.int8)
    values = np.asarray(rng.uniform(0.02, 3.0, shape), np.float32)
    return TernaryTensor(words2.pack(t), values, (n, k), bits)


def random_rows(rng: np.random.Generator, n: int, k: int, storage: str) -> DenseRows | GroupedRows:
    """storage: "float32", "bfloat16", "8", "6" or "4"."""
    w = rng.standard_normal((n, k)).astype(np.float32)
    if storage == "float32":
        return DenseRows(w, "float32")
    if storage == "bfloat16":
        return DenseRows(float32_to_bfloat16(w), "bfloat16")
    return quantize_rows(w, int(storage))


def random_weights(
    config: DecoderConfig,
    seed: int = 0,
    scale: str = "tensor",
    head: str = "bfloat16",
    bias: bool = False,
    dense: tuple[str, ...] = (),
    normed: tuple[str, ...] = (),
) -> DecoderWeights:
    """dense: names inside a layer ("mlp.up_proj") whose linears stay float32. normed: of those with a norm of their own.

    Activations have the config's bits.
    """
    rng = np.random.default_rng(seed)
    embed = _table(rng, config, head)
    top: Matrix = embed if config.tie_word_embeddings else _table(rng, config, head)
    weights = DecoderWeights(config, embed, top)
    for layer in range(config.num_hidden_layers):
        for name, (n, k) in config.linear_shapes().items():
            b = rng.standard_normal(n).astype(np.float32) * np.float32(0.1) if bias else None
            w = (
                random_rows(rng, n, k, "float32")
                if name in dense
                else random_ternary(rng, n, k, scale, config.activation_bits)
            )
            norm = _norm(rng, k) if name in normed else None
            weights.linears[f"model.layers.{layer}.{name}"] = Linear(w, b, norm)
        for name, size in config.norm_sizes().items():
            weights.norms[f"model.layers.{layer}.{name}"] = _norm(rng, size)
    weights.norms["model.norm"] = _norm(rng, config.hidden_size)
    return weights


def _table(rng: np.random.Generator, config: DecoderConfig, head: str) -> Matrix:
    """head: as storage of random_rows, or "ternary": in groups of 128."""
    if head == "ternary":
        return random_ternary(rng, config.vocab_size, config.hidden_size, "group", 16)
    return random_rows(rng, config.vocab_size, config.hidden_size, head)


def _norm(rng: np.random.Generator, size: int) -> np.ndarray:
    return (1 + 0.1 * rng.standard_normal(size)).astype(np.float32)


def tiny_config(**changes: object) -> DecoderConfig:
    """Grouped heads, three different widths, none a multiple of 128."""
    base: dict[str, object] = dict(
        model_type="bitnet", vocab_size=67, hidden_size=72, intermediate_size=100, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=18, hidden_act="relu2", sub_norms=True,
        tie_word_embeddings=True, max_position_embeddings=256, eos_token_ids=(2,),
    )  # fmt: skip
    base.update(changes)
    return DecoderConfig(**base)  # type: ignore[arg-type]

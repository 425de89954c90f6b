"""What a loaded decoder holds, counted from its own arrays: bytes by owner, as memory trackers want them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from bitnet_mlx.backends import ON_MLX
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.models.demand import low_rank_copies
from bitnet_mlx.models.weights import DecoderWeights, Linear, Matrix


def parts(decoder: Decoder) -> Callable[[Decoder], dict[str, int]]:
    """For a tracker: weights and head are counted now, once; working memory each time it asks."""
    fixed = holdings(decoder)
    return lambda now: {**fixed, "activations": _working(now)}


def holdings(decoder: Decoder) -> dict[str, int]:
    """Bytes of "weights" (with norms), "head" (embedding and head) and "activations" (a cpu engine's buffers).

    On MLX activations are not among them: a tracker takes what MLX has beside them.
    """
    if decoder.name in ON_MLX:
        return _mlx(decoder)
    weights: DecoderWeights = decoder.weights  # type: ignore[attr-defined]
    found = {"head": _tables(weights), "activations": 0}
    found["weights"] = weights.nbytes - found["head"]
    if decoder.name == "cpu":
        found["head"] += sum(_copied(m) for m in _distinct(weights.embed_tokens, weights.lm_head))
        found["weights"] += sum(_copied(linear.weight) + _laid_out(linear) for linear in weights.linears.values())
        found["activations"] = _working(decoder)
    return found


def _working(decoder: Any) -> int:
    """The cpu engine's buffers and tables."""
    if decoder.name != "cpu":
        return 0
    return decoder._buffers.block.nbytes + decoder._cos.nbytes + decoder._sin.nbytes


def _distinct(*matrices: Matrix) -> list[Matrix]:
    return list({id(m): m for m in matrices}.values())


def _tables(weights: DecoderWeights) -> int:
    return sum(m.nbytes for m in _distinct(weights.embed_tokens, weights.lm_head))


def _copied(matrix: Matrix) -> int:
    """Bytes of the float32 copy that the cpu engine makes of float16 rows (cpu_tables.WeightTables)."""
    return 4 * matrix.data.size if getattr(matrix, "dtype", "") == "float16" else 0  # type: ignore[union-attr]


def _laid_out(linear: Linear) -> int:
    """Bytes of an adapter's arrays as the cpu engine lays them out."""
    return 0 if linear.adapter is None else low_rank_copies(*linear.weight.shape, linear.adapter.rank)


def _mlx(model: Any) -> dict[str, int]:
    """Parameters are views of one array where linears are joined, so their bytes add up; joined scales are counted too."""
    tables = [model.model.embed_tokens, *([model.lm_head] if "lm_head" in model else [])]
    head = sum(sum(_arrays(table).values()) for table in tables)
    everything = _arrays(model)
    joined = 0
    for layer in model.layers:
        for packed in _joined(layer):
            joined += sum(array.nbytes for array in packed[1:] if array is not None)
    return {"weights": sum(everything.values()) - head + joined, "head": head}


def _arrays(module: Any) -> dict[int, int]:
    """Bytes of each parameter array, by the array's identity: a tied table counts once."""
    from mlx.utils import tree_flatten

    pairs: Any = tree_flatten(module.parameters())
    return {id(array): array.nbytes for _, array in pairs}


def _joined(layer: Any) -> Iterable[tuple[Any, ...]]:
    """The products of a layer that are made of several linears."""
    for join in (layer.self_attn._qkv, layer.mlp._gate_up):
        if join._packed is not None:
            yield join._packed


def cache_bytes(caches: Iterable[Any]) -> int:
    """Bytes of several sequences' caches."""
    return int(np.sum([cache.nbytes for cache in caches], dtype=np.int64))

"""Two models, array by array."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.ternary import TernaryTensor


def arrays(weights: DecoderWeights) -> dict[str, np.ndarray]:
    """Every array of a model by a name of its own."""
    out: dict[str, np.ndarray] = {f"norm {name}": value for name, value in weights.norms.items()}
    matrices: dict[str, Any] = {name: linear.weight for name, linear in weights.linears.items()}
    matrices |= {"embed": weights.embed_tokens, "head": weights.lm_head}
    for name, w in matrices.items():
        keys = ("words", "scale") if isinstance(w, TernaryTensor) else ("codes", "scales")
        keys = ("data",) if isinstance(w, DenseRows) else keys
        out |= {f"{name} {key}": getattr(w, key) for key in keys}
    biases = {f"{name} bias": linear.bias for name, linear in weights.linears.items()}
    return out | {name: bias for name, bias in biases.items() if bias is not None}


def assert_same(a: DecoderWeights, b: DecoderWeights) -> None:
    x, y = arrays(a), arrays(b)
    assert x.keys() == y.keys()
    assert [name for name in x if x[name].dtype != y[name].dtype or not np.array_equal(x[name], y[name])] == []

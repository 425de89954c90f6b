"""Whole models through our Metal kernels on the emulated grid: the bits of stock operations on MLX's CPU device."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.api import embedded_model
from bitnet_mlx.backends.kernels import attention
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.ops import KernelOps
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.models.weights import DecoderWeights
from tests.emulator import runner
from tests.mlx_engine.test_mlx_decoder import CASES, build, ids


class Counted:
    """The emulated grid, and how often each kernel was launched."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, launch: Launch) -> list[mx.array]:
        self.names.append(launch.source.name)
        return runner(launch)


def compare(weights: DecoderWeights, dtype: str, prompt: list[int], steps: int) -> list[str]:
    """Logits of a prompt and of single tokens behind it; the kernels launched in the last step."""
    counted = Counted()
    stock, ours = MlxModel(weights, dtype), MlxModel(weights, dtype, KernelOps("metal", counted))
    caches = stock.make_cache(), ours.make_cache()
    tokens, kind = prompt, "all"
    for _ in range(steps + 1):
        counted.names.clear()
        expected, found = (m.step([tokens], [c], kind)[0] for m, c in zip((stock, ours), caches, strict=True))
        np.testing.assert_array_equal(found, expected)
        tokens, kind = [int(expected.reshape(-1, expected.shape[-1])[-1].argmax())], "last"
    return counted.names


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_tiny_models(case: str, dtype: str) -> None:
    names = compare(build(case), dtype, ids(0, 11), 2)
    if "dense" in case:
        return
    assert len(names) == 2 * 9  # two layers; the cache write and attention are MLX's
    assert names[2] == "rope_kv"


def test_float_activations() -> None:
    """Sums of floats have no order in common: near, not equal."""
    weights = build("bitnet, row scales, 8-bit head", activation_bits=16)
    stock, ours = MlxModel(weights), MlxModel(weights, ops=KernelOps("metal", runner))
    a, b = (m.step([ids(0, 5)], [m.make_cache()], "all")[0] for m in (stock, ours))
    assert np.abs(a - b).max() < 1e-4 * np.ptp(a)


def test_the_embedded_model() -> None:
    weights = read_weights(embedded_model())
    names = compare(weights, "float32", ids(0, 9), 2)
    assert len(names) == 9 * weights.config.num_hidden_layers


def test_a_whole_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph that is compiled on a GPU, with attention by our kernel, in one launch and in two."""
    monkeypatch.setattr(attention, "_SHORT", 256)  # a prompt of a thousand tokens would take long here
    weights = build("bitnet", max_position_embeddings=1024)
    ops = KernelOps("metal", counted := Counted())
    ops.compiles = True  # but for the compilation: the emulated grid wants values
    stock, ours = MlxModel(weights), MlxModel(weights, ops=ops)
    caches = stock.make_cache(), ours.make_cache()
    mx.disable_compile()
    try:
        for tokens in (ids(0, 5), [3], [4], ids(1, 290), [5]):
            counted.names.clear()
            a, b = (m.step([tokens], [c])[0] for m, c in zip((stock, ours), caches, strict=True))
            assert np.abs(a - b).max() < 2e-5 * np.abs(a).max()
            attentions = [name for name in counted.names if "attention" in name]
            launches = 0 if len(tokens) > 1 else 2 if caches[0].offset > 256 else 1
            assert len(attentions) == launches * len(ours.layers)
    finally:
        mx.enable_compile()

"""The MLX decoder against the numpy decoder, which is the specification, and against itself."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.backends import numpy_ref
from bitnet_mlx.backends.mlx_affine import Codes, StockOps
from bitnet_mlx.errors import ConfigError, MemoryLimitError
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models import decoder_mlx
from bitnet_mlx.models.config import DecoderConfig, RopeConfig, inverse_frequencies
from bitnet_mlx.models.decoder_mlx import MlxModel, model_dtype
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.models.rope import cos_sin
from bitnet_mlx.models.rope_mlx import Rotary
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.ternary import TernaryTensor, quantize_activations
from tests.support.random_model import random_weights, tiny_config

LLAMA: dict[str, Any] = {"model_type": "llama", "hidden_act": "silu", "sub_norms": False, "tie_word_embeddings": False}
YARN = RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LLAMA3 = RopeConfig(rope_theta=5e5, rope_type="llama3", factor=8.0, original_max_position_embeddings=32)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bitnet": ({}, {}),
    "bitnet, row scales, 8-bit head": ({}, {"scale": "row", "head": "8"}),
    "bitnet, two dense linears, 4-bit head": ({}, {"head": "4", "dense": ("mlp.up_proj", "self_attn.q_proj")}),
    "llama, group scales, biases, 6-bit head": (LLAMA, {"scale": "group", "head": "6", "bias": True}),
    "llama, no grouped heads": (dict(LLAMA, num_key_value_heads=4), {"head": "float32"}),
    "llama3 rope": (dict(LLAMA, rope=LLAMA3), {"head": "float32"}),
    "yarn rope": ({"rope": YARN}, {}),
    "linear rope": ({"rope": RopeConfig(rope_type="linear", factor=3.0)}, {}),
}


def ids(seed: int, length: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 67, length)]


def build(case: str, seed: int = 0, activation_bits: int = 8, **changes: Any) -> DecoderWeights:
    """Random weights with soft attention: a softmax over scores in the hundreds turns 1e-7 into 1e-3 in any engine."""
    config, choices = CASES[case]
    weights = random_weights(tiny_config(**(config | changes)), seed, **choices)
    for name, linear in weights.linears.items():
        w = linear.weight
        soft = np.float32(0.05 if name.endswith(("q_proj", "k_proj")) else 1)
        if isinstance(w, TernaryTensor):
            w = replace(w, scale=w.scale * soft, activation_bits=activation_bits)
        elif isinstance(w, DenseRows):
            w = replace(w, data=w.data * soft)
        weights.linears[name] = replace(linear, weight=w)
    return weights


class RecordingOps(StockOps):
    """Keeps the codes of every product, in order; those of several products in a row once."""

    def __init__(self) -> None:
        self.codes: list[np.ndarray] = []
        self._last: mx.array | None = None

    def linear(self, codes: Codes, *args: Any, **kwargs: Any) -> mx.array:
        if codes.q is not self._last:
            self.codes.append(np.array(codes.q).reshape(-1, codes.q.shape[-1]))
        self._last = codes.q
        return super().linear(codes, *args, **kwargs)


class RecordingNumpy(NumpyDecoder):
    """The same for the reference."""

    def __init__(self, weights: DecoderWeights) -> None:
        super().__init__(weights)
        self.codes: list[np.ndarray] = []

    def _linears(self, layer: int, names: Any, x: np.ndarray, norm: np.ndarray | None) -> list[np.ndarray]:
        if any(isinstance(self.weights.layer_linear(layer, name).weight, TernaryTensor) for name in names):
            eps = self.config.rms_norm_eps
            codes = quantize_activations(x) if norm is None else numpy_ref.norm_quantize(x, norm, eps)
            self.codes.append(codes[0])
        return super()._linears(layer, names, x, norm)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_references_wherever_all_codes_agree(case: str) -> None:
    """A float difference of 1e-7 may flip a code at a tie; from that position on nothing is promised, so flips are counted."""
    flips = total = 0
    compared = []
    for seed in range(3):
        weights, tokens = build(case, seed), ids(seed, 48)
        reference, ops = RecordingNumpy(weights), RecordingOps()
        model = MlxModel.from_weights(weights, ops=ops)
        expected = reference.step([tokens], [reference.make_cache()], "all")[0]
        actual = model.step([tokens], [model.make_cache()], "all")[0]
        assert actual.dtype == np.float32 and actual.shape == expected.shape
        assert len(ops.codes) == len(reference.codes) > 0
        differ = [(a != b) for a, b in zip(ops.codes, reference.codes, strict=True)]
        clean = np.cumsum([d.any(axis=1) for d in differ], axis=1).sum(axis=0) == 0
        flips += sum(int(d.sum()) for d in differ)
        total += sum(d.size for d in differ)
        assert np.abs(actual - expected)[clean].max(initial=0) < 1e-4
        compared.append(clean.mean())
    assert np.mean(compared) > 0.5
    assert flips < 0.01 * total, f"{flips} of {total} codes differ"


def test_float_activations_match_the_reference() -> None:
    weights = build("bitnet, row scales, 8-bit head", activation_bits=16)
    reference, model = NumpyDecoder(weights), MlxModel(weights)
    expected = reference.step([ids(0, 30)], [reference.make_cache()], "all")[0]
    actual = model.step([ids(0, 30)], [model.make_cache()], "all")[0]
    assert np.abs(actual - expected).max() < 1e-4


@pytest.mark.parametrize("case", ["bitnet", "llama, group scales, biases, 6-bit head", "yarn rope"])
def test_cache_and_chunks_change_rounding_only(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = MlxModel(build(case)), ids(1, 40)
    whole = model.step([tokens], [model.make_cache()], "all")[0]
    uncached = np.array(model(mx.array([tokens])))[0]
    np.testing.assert_array_equal(uncached, whole)
    cache = model.make_cache()
    single = np.stack([model.step([[t]], [cache])[0] for t in tokens])
    monkeypatch.setattr(decoder_mlx, "PIECE", 7)
    chunks = model.step([tokens], [model.make_cache()], "all")[0]
    last = model.step([tokens], [model.make_cache()], "last")[0]
    assert last.shape == (67,)
    for other in (single, chunks):
        assert np.abs(other - whole).max() < 1e-4
    assert np.abs(last - whole[-1]).max() < 1e-4


def test_memory_of_a_long_prompt_is_that_of_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MlxModel(random_weights(tiny_config(max_position_embeddings=1024)))

    def peak(piece: int) -> int:
        monkeypatch.setattr(decoder_mlx, "PIECE", piece)
        cache = model.make_cache()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        model.step([ids(0, 1024)], [cache])
        return mx.get_peak_memory() - before

    assert peak(64) < peak(1024) / 8  # measured: 2.0 MB, and 23 MB; 4.6 MB where pieces are left lazy


def test_batches_ragged_and_rectangular() -> None:
    model = MlxModel(build("bitnet"))
    a, b = ids(1, 9), ids(2, 5)
    caches = [model.make_cache(), model.make_cache()]
    out = model.step([a, b], caches, "all")
    assert [o.shape for o in out] == [(9, 67), (5, 67)] and [c.offset for c in caches] == [9, 5]
    np.testing.assert_array_equal(out[1], model.step([b], [model.make_cache()], "all")[0])
    both = np.array(model(mx.array([a[:5], b])))
    assert np.abs(both[0] - out[0][:5]).max() < 1e-4 and np.abs(both[1] - out[1]).max() < 1e-4


def test_trimmed_cache_goes_on_as_if_never_fed() -> None:
    model = MlxModel(build("bitnet"))
    cache = model.make_cache()
    model.step([ids(1, 20)], [cache])
    cache.trim(12)
    assert cache.offset == 12
    cache.trim(15)  # already shorter
    assert cache.offset == 12
    again = model.step([ids(1, 20)[12:]], [cache], "all")[0]
    whole = model.step([ids(1, 20)], [model.make_cache()], "all")[0]
    assert np.abs(again - whole[12:]).max() < 1e-4


def test_cache_grows_in_steps_up_to_its_limit_and_says_when_it_is_full() -> None:
    model = MlxModel(build("bitnet"))
    cache = model.make_cache(300)
    model.step([ids(0, 250)], [cache])
    assert cache[0].keys.shape == (1, 2, 256, 18)
    model.step([ids(0, 10)], [cache])
    assert cache[0].keys.shape == (1, 2, 300, 18) and cache.offset == 260
    assert cache.nbytes == 2 * 2 * (2 * 300 * 18 * 4)
    with pytest.raises(MemoryLimitError, match="301 positions are needed and 300 are allowed"):
        model.step([ids(0, 41)], [cache])
    assert cache.offset == 260  # nothing was fed
    model.step([ids(0, 40)], [cache])
    with pytest.raises(MemoryLimitError):
        model(mx.array([[1]]), cache)
    assert model.make_cache()[0].limit == 256
    with pytest.raises(ConfigError, match="no tokens"):
        model.step([[]], [model.make_cache()])


def test_threads_may_take_turns() -> None:
    """A lazy array belongs to the thread that made it; after each call nothing is lazy."""
    weights, tokens = build("llama, group scales, biases, 6-bit head"), ids(1, 12)
    expected = MlxModel(weights).step([tokens], [MlxModel(weights).make_cache()], "all")[0]
    held: dict[str, Any] = {}

    def in_thread(work: Callable[[], None]) -> None:
        with ThreadPoolExecutor(1) as fresh:
            fresh.submit(work).result()

    def make() -> None:
        held["model"] = MlxModel(weights)
        held["cache"] = held["model"].make_cache()

    def feed(start: int, stop: int) -> None:
        held[f"{start}"] = held["model"].step([tokens[start:stop]], [held["cache"]], "all")[0]

    in_thread(make)
    in_thread(lambda: feed(0, 5))
    feed(5, 9)
    in_thread(lambda: feed(9, 12))
    assert np.abs(np.concatenate([held["0"], held["5"], held["9"]]) - expected).max() < 1e-4


@pytest.mark.parametrize("rope", [RopeConfig(), RopeConfig(rope_theta=5e5), YARN, LLAMA3], ids=lambda r: r.rope_type)
@pytest.mark.parametrize("dim", [18, 64, 128])
def test_rotation_has_the_references_bits_far_into_the_context(rope: RopeConfig, dim: int) -> None:
    config = tiny_config(head_dim=dim, rope=rope, max_position_embeddings=8192)
    qkv = np.random.default_rng(0).standard_normal((1, 3, 4 * dim)).astype(np.float32)
    heads = qkv[0].reshape(3, 4, dim)
    rotary = Rotary(config)
    for start in (0, 1022, 8000, 2000):
        rotation = cos_sin(*inverse_frequencies(config), start, 3)
        expected = numpy_ref.rope(heads[:, :3], *rotation)
        for offset in (start, mx.array([start]), mx.array(start)):
            q, kv = StockOps().rope_kv(mx.array(qkv), *rotary.at(SimpleNamespace(offset=offset), 3), 2, 1)
            assert np.array_equal(np.array(q)[0].transpose(1, 0, 2), expected[:, :2])
            assert np.array_equal(np.array(kv)[0, 0, 0], expected[:, 2]) and np.array_equal(kv[1, 0, 0], heads[:, 3])


def test_sequences_of_a_batch_have_positions_of_their_own() -> None:
    config = tiny_config()
    rotary = Rotary(config)
    cos, sin = rotary.at(SimpleNamespace(offset=mx.array([-2, 1500, 7])), 4)
    assert cos.shape == sin.shape == (3, 4, config.head_dim // 2)
    for i, start in ((1, 1500), (2, 7)):
        for found, expected in zip((cos, sin), cos_sin(*inverse_frequencies(config), start, 4), strict=True):
            assert np.array_equal(np.array(found[i]), expected)
    assert np.array_equal(cos[0, 2:], rotary.at(None, 2)[0][0])  # before position 0 there is only padding


def test_dtype_is_chosen_and_float16_refused_for_squared_relu() -> None:
    relu2, silu = tiny_config(dtype="float16"), tiny_config(**LLAMA, dtype="float16")
    assert model_dtype(relu2) == model_dtype(silu) == "float32"  # MLX's CPU device
    with pytest.raises(ConfigError, match="65504"):
        model_dtype(relu2, "float16")
    assert model_dtype(silu, "float16") == "float16" and model_dtype(relu2, "bfloat16") == "bfloat16"
    with pytest.raises(ConfigError, match="'int8' was asked for"):
        model_dtype(silu, "int8")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_models_run_and_stay_near_the_wide_one(dtype: str) -> None:
    weights = build("llama, group scales, biases, 6-bit head")
    wide, narrow = MlxModel(weights), MlxModel(weights, dtype=dtype)
    cache = narrow.make_cache()
    a = wide.step([ids(0, 30)], [wide.make_cache()], "all")[0]
    b = narrow.step([ids(0, 30)], [cache], "all")[0]
    assert cache[0].keys.dtype == getattr(mx, dtype)
    assert b.dtype == np.float32
    correlation = np.corrcoef(a.ravel(), b.ravel())[0, 1]
    assert correlation > 0.98


def test_module_names_are_hugging_faces_and_nothing_is_trainable() -> None:
    model = MlxModel(build("bitnet"))
    from mlx.utils import tree_flatten

    names = {name for name, _ in tree_flatten(model.parameters())}
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"} <= names
    assert {"model.layers.0.self_attn.attn_sub_norm.weight", "model.layers.0.mlp.ffn_sub_norm.weight"} <= names
    assert "lm_head.weight" not in names
    assert tree_flatten(model.trainable_parameters()) == []
    model.unfreeze()
    assert not [n for n, _ in tree_flatten(model.trainable_parameters()) if "_proj" in n]
    assert (model.name, model.model_type, len(model.layers)) == ("mlx", "bitnet", 2)
    assert isinstance(model.config, DecoderConfig)

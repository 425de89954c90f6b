"""The goldens are worth something: each planted fault is caught by at least one case, and no case cries without one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from bitnet_mlx import ternary
from bitnet_mlx.backends import numpy_ref
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.formats import words2
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models import decoder_numpy
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.models.weights import DecoderWeights, Linear
from bitnet_mlx.ternary import TernaryTensor
from tests.golden import by_hand, check, recipe
from tests.golden.cases import CASES

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Fault = Callable[[TernaryTensor], TernaryTensor]


def caught(weights: DecoderWeights, name: str) -> bool:
    return check.problem(check.trace(NumpyDecoder(weights), name), name) is not None


def with_fault(name: str, suffixes: Iterable[str], fault: Fault) -> DecoderWeights:
    """The case's weights with `fault` in every ternary linear whose name ends in one of `suffixes`."""
    weights = by_hand.weights(CASES[name])
    for key, linear in weights.linears.items():
        if key.endswith(tuple(suffixes)) and isinstance(linear.weight, TernaryTensor):
            weights.linears[key] = Linear(fault(linear.weight), linear.bias)
    return weights


def with_config(name: str, **changes: object) -> DecoderWeights:
    """The case's weights under another config; `rope` takes a dict of RopeConfig's fields."""
    weights = by_hand.weights(CASES[name])
    rope = changes.pop("rope", None)
    config = dataclasses.replace(weights.config, **changes)  # type: ignore[arg-type]
    if isinstance(rope, dict):
        config = dataclasses.replace(config, rope=dataclasses.replace(config.rope, **rope))
    return dataclasses.replace(weights, config=config)


def inverted(w: TernaryTensor) -> TernaryTensor:
    return dataclasses.replace(w, scale=np.asarray(np.float32(1) / w.scale))


def read_as_consecutive_rows(w: TernaryTensor) -> TernaryTensor:
    """Four rows of a byte taken for neighbours: row 4 r + i then holds what belongs in row r + i * N / 4."""
    t = words2.unpack(w.words, w.shape[1])
    return dataclasses.replace(
        w, words=words2.pack(np.ascontiguousarray(t.reshape(4, -1, w.shape[1]).swapaxes(0, 1)).reshape(t.shape))
    )


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_inverted_scale(projection: str) -> None:
    assert caught(with_fault("llama-inverse", [projection], inverted), "llama-inverse")


@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "o_proj", "down_proj"])
def test_inverted_scale_in_a_model_with_sub_norms(projection: str) -> None:
    """v, gate and up are left out: a sub-norm takes a constant factor away again, so no logit can show theirs."""
    assert caught(with_fault("bitnet-packed", [projection], inverted), "bitnet-packed")


@pytest.mark.parametrize("name", ["bitnet-packed", "llama-inverse"])
def test_rows_unpacked_as_neighbours(name: str) -> None:
    assert caught(with_fault(name, PROJECTIONS, read_as_consecutive_rows), name)


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("bitnet-online", {"rope_theta": 10000.0}),
        ("bitnet-odd", {"rope_theta": 10000.0}),
        ("bitnet-long", {"rope_theta": 500020.0}),
        ("llama-odd-llama3", {"rope_type": "default"}),
        ("llama-odd-llama3", {"original_max_position_embeddings": 128}),
        ("llama-auto-yarn", {"rope_type": "default"}),
        ("llama-auto-yarn", {"attention_factor": 1.0}),
        ("llama-auto-yarn", {"truncate": False}),
        ("llama-online-linear", {"rope_type": "default"}),
    ],
)
def test_wrong_rope(name: str, rope: dict[str, object]) -> None:
    assert caught(with_config(name, rope=rope), name)


def test_missing_sub_norms() -> None:
    assert caught(with_config("bitnet-online", sub_norms=False), "bitnet-online")


@pytest.mark.parametrize("norm", ["self_attn.attn_sub_norm", "mlp.ffn_sub_norm"])
def test_sub_norm_without_its_weight(norm: str) -> None:
    weights = by_hand.weights(CASES["bitnet-online"])
    weights.norms[f"model.layers.1.{norm}"] = np.ones_like(weights.norms[f"model.layers.1.{norm}"])
    assert caught(weights, "bitnet-online")


def test_the_other_activation() -> None:
    assert caught(with_config("bitnet-online", hidden_act="silu"), "bitnet-online")


def test_no_activation_quantisation() -> None:
    plain = with_fault("bitnet-online", PROJECTIONS, lambda w: dataclasses.replace(w, activation_bits=16))
    decoder = NumpyDecoder(plain)
    found = check.trace(decoder, "bitnet-online")
    assert not found.codes
    assert np.abs(found.logits - check.reference("bitnet-online").logits).max() > 0.1


def test_bias_of_a_packed_model_left_unscaled() -> None:
    """transformers' offline AutoBitLinear multiplies the bias by weight_scale together with the product."""
    weights = by_hand.weights(CASES["llama-auto-yarn"])
    for key, linear in weights.linears.items():
        if linear.bias is not None:
            weights.linears[key] = Linear(linear.weight, linear.bias / linear.weight.scale)  # type: ignore[union-attr]
    assert caught(weights, "llama-auto-yarn")


def test_half_up_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only exact ties tell it from half to even; bitnet-ties has them by construction."""

    def half_up(v: np.ndarray) -> np.ndarray:
        return np.floor(v + np.float32(0.5))

    def quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        s = np.float32(127) / np.maximum(np.abs(x).max(axis=-1), ternary.MIN_SCALE)
        return np.clip(half_up(x * s[..., None]), -128, 127).astype(np.int8), s

    def norm_quantize(x: np.ndarray, weight: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
        return quantize(numpy_ref.rms_norm(x, weight, eps))

    monkeypatch.setattr(decoder_numpy, "quantize_activations", quantize)
    monkeypatch.setattr(numpy_ref, "norm_quantize", norm_quantize)
    assert caught(by_hand.weights(CASES["bitnet-ties"]), "bitnet-ties")


def test_a_window_that_forgets_the_oldest_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = numpy_ref.attend
    monkeypatch.setattr(numpy_ref, "attend", lambda q, k, v: plain(q, k[:, -40:], v[:, -40:]))
    assert caught(by_hand.weights(CASES["llama-odd-llama3"]), "llama-odd-llama3")


def test_query_heads_that_read_the_wrong_key_value_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Head h mod kv heads in place of h div (heads / kv heads)."""
    plain = numpy_ref.attend

    def interleaved(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        heads, dim = q.shape
        swapped = q.reshape(-1, len(keys), dim).swapaxes(0, 1).reshape(heads, dim)
        return plain(swapped, keys, values).reshape(len(keys), -1, dim).swapaxes(0, 1).reshape(heads, dim)

    monkeypatch.setattr(numpy_ref, "attend", interleaved)
    assert caught(by_hand.weights(CASES["llama-odd-llama3"]), "llama-odd-llama3")


def test_pairs_rotated_as_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """RoPE on columns 2 i and 2 i + 1, GGUF's other convention, in place of i and i + half."""
    plain = numpy_ref.rope

    def neighbours(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        half = plain(np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1), cos, sin)
        return np.stack(np.split(half, 2, axis=-1), axis=-1).reshape(x.shape)

    monkeypatch.setattr(numpy_ref, "rope", neighbours)
    assert caught(by_hand.weights(CASES["bitnet-online"]), "bitnet-online")


@pytest.mark.parametrize("name", ["llama-odd-llama3", "bitnet-odd"])
def test_an_untied_head_taken_for_a_tied_one(name: str) -> None:
    weights = by_hand.weights(CASES[name])
    weights.lm_head = weights.embed_tokens
    assert caught(weights, name)


@pytest.mark.parametrize("name", ["llama-odd-llama3", "llama-online-linear", "bitnet-odd"])
def test_lost_biases(name: str) -> None:
    weights = by_hand.weights(CASES[name])
    for key, linear in weights.linears.items():
        weights.linears[key] = Linear(linear.weight)
    assert caught(weights, name)


def test_a_dense_linear_ternarised() -> None:
    """modules_to_not_convert ignored for one linear."""
    weights = by_hand.weights(CASES["llama-some-dense"])
    key = "model.layers.1.mlp.down_proj"
    w = weights.linears[key].weight
    assert isinstance(w, DenseRows)
    t, m = ternary.ternarize(w.rows(slice(None)))
    weights.linears[key] = Linear(TernaryTensor(words2.pack(t), np.asarray(m), w.shape))
    found = check.trace(NumpyDecoder(weights), "llama-some-dense")
    assert key in found.codes and check.problem(found, "llama-some-dense") is not None


def test_scale_direction_taken_from_the_wrong_linear_class(tmp_path: Path) -> None:
    """Through the reader: without linear_class a scale divides, so the same bytes mean another model."""
    name = "bitnet-packed"
    recipe.write(CASES[name], tmp_path)
    assert not caught(read_weights(tmp_path), name)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["linear_class"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert caught(read_weights(tmp_path), name)


@pytest.mark.parametrize("norm", ["self_attn.q_norm", "self_attn.k_norm"])
def test_norms_of_heads_without_their_weight(norm: str) -> None:
    weights = by_hand.weights(CASES["qwen3-online"])
    weights.norms[f"model.layers.1.{norm}"] = np.ones_like(weights.norms[f"model.layers.1.{norm}"])
    assert caught(weights, "qwen3-online")


def test_no_norms_of_heads() -> None:
    assert caught(with_config("qwen3-online", qk_norms=False), "qwen3-online")


@pytest.mark.parametrize("name", ["llama-rms-norm", "bitnet-rms-norm-online"])
def test_norms_inside_linears_forgotten_or_given_to_another(name: str) -> None:
    weights = by_hand.weights(CASES[name])
    q, k = (f"model.layers.0.self_attn.{p}_proj" for p in "qk")
    weights.linears[q] = dataclasses.replace(weights.linears[q], norm=weights.linears[k].norm)
    assert caught(weights, name)
    weights.linears[q] = dataclasses.replace(weights.linears[q], norm=None)
    assert caught(weights, name)


def test_a_group_scale_of_the_next_group() -> None:
    def shifted(w: TernaryTensor) -> TernaryTensor:
        return dataclasses.replace(w, scale=np.roll(w.scale, 1, axis=1))

    assert caught(with_fault("qwen3-groups", ("mlp.down_proj",), shifted), "qwen3-groups")


def test_one_magnitude_for_all_shards() -> None:
    def one(w: TernaryTensor) -> TernaryTensor:
        return dataclasses.replace(w, scale=np.asarray(w.scale.mean(), np.float32))

    assert caught(with_fault("llama-shards", ("mlp.up_proj",), one), "llama-shards")

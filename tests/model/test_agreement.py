"""How flips are counted, and how far they reach."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.quality.agreement import Trace, compare, record
from tests.support.random_model import random_weights, tiny_config
from tests.support.tiny_chat_model import RecordingDecoder

LENGTH, LAYERS = 8, 2
INPUTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
NAMES = [f"model.layers.{layer}.{name}" for layer in range(LAYERS) for name in INPUTS]


def trace(**logits: float) -> Trace:
    """Codes all 0; logits 0 but for a best token 3 with 4 and a second, 5, with 1."""
    y = np.zeros((LENGTH, 10), np.float32)
    y[:, 3], y[:, 5] = 4, 1
    return Trace(y, np.arange(LENGTH), {name: np.zeros((LENGTH, 6), np.int8) for name in NAMES}, LAYERS)


def flipped(*places: tuple[str, int, int]) -> Trace:
    """The same with codes changed at (name, position, column), and logits off by 0.5 at and after each position."""
    found = trace()
    for name, position, column in places:
        found.codes[name][position, column] = 1
    return found


@pytest.mark.parametrize(
    ("name", "untouched"),
    [
        ("model.layers.0.self_attn.q_proj", [0, 1, 2]),  # through layer 0's own keys
        ("model.layers.0.mlp.down_proj", [0, 1, 2]),  # through layer 1's keys
        ("model.layers.1.self_attn.q_proj", [0, 1, 2]),
        ("model.layers.1.self_attn.o_proj", [0, 1, 2, 4, 5, 6, 7]),  # after the last attention: its own position alone
        ("model.layers.1.mlp.down_proj", [0, 1, 2, 4, 5, 6, 7]),
    ],
)
def test_how_far_a_flip_reaches(name: str, untouched: list[int]) -> None:
    other = flipped((name, 3, 2))
    other.logits[:] += np.float32(0.5)
    other.logits[untouched] -= np.float32(0.25)
    result = compare(trace(), other, 2.0)
    assert (result.flips, result.roots, result.flipped, result.untouched) == (1, 1, 1, len(untouched))
    assert (result.max_difference_where_codes_agree, result.max_difference) == (0.25, 0.5)


def test_a_flip_after_another_is_not_a_root() -> None:
    first, second = ("model.layers.0.mlp.gate_proj", 2, 0), ("model.layers.1.self_attn.o_proj", 5, 0)
    assert compare(trace(), flipped(first, second), 2.0).roots == 1
    before = ("model.layers.1.self_attn.o_proj", 1, 0)
    result = compare(trace(), flipped(first, before), 2.0)
    assert (result.flips, result.roots, result.untouched) == (2, 2, 1)
    # In the same layer before attention's outputs are read, positions do not touch each other.
    assert (
        compare(
            trace(), flipped(("model.layers.0.mlp.gate_proj", 2, 0), ("model.layers.0.mlp.down_proj", 3, 1)), 2.0
        ).roots
        == 2
    )


def test_best_tokens_count_above_the_margin_only() -> None:
    other = trace()
    other.logits[4, 5] = 9
    assert compare(trace(), other, 2.9).disagreements == 1
    result = compare(trace(), other, 3.0)
    assert result.decided == 0 and result.greedy_equal_above_margin


def test_only_the_references_positions_are_compared() -> None:
    whole = flipped(("model.layers.1.self_attn.o_proj", 3, 2))
    few = np.array([0, 6])
    reference = Trace(trace().logits[few], few, trace().codes, LAYERS)
    whole.logits[3] = 100
    result = compare(reference, whole, 1.0)
    assert (result.positions, result.flips, result.flipped, result.untouched, result.max_difference) == (2, 1, 0, 2, 0)


def test_traces_that_do_not_fit() -> None:
    short = Trace(trace().logits[:4], np.arange(4), trace().codes, LAYERS)
    with pytest.raises(ConfigError, match="lacks positions"):
        compare(trace(), short, 1.0)
    with pytest.raises(ConfigError, match="lacks the codes of model.layers.0.mlp.down_proj"):
        compare(trace(), Trace(trace().logits, np.arange(LENGTH), {}, LAYERS), 1.0)
    narrow = {name: codes[:, :3] for name, codes in trace().codes.items()}
    with pytest.raises(ConfigError, match=r"are \(8, 3\); the reference has \(8, 6\)"):
        compare(trace(), Trace(trace().logits, np.arange(LENGTH), narrow, LAYERS), 1.0)


def test_record_keeps_each_input_once_and_the_observer_as_it_was() -> None:
    weights = random_weights(tiny_config(), dense=("self_attn.q_proj",))
    decoder = NumpyDecoder(weights)
    seen: list[str] = []
    decoder.observe = lambda name, q: seen.append(name)
    found = record(decoder, [1, 2, 3, 4, 5], chunk=2)
    assert found.logits.shape == (5, 67) and not seen and decoder.observe is not None
    assert set(found.codes) == {n.replace("q_proj", "k_proj") for n in NAMES}
    assert {c.shape for c in found.codes.values()} == {(5, 72), (5, 100)}


def test_a_flip_reaches_what_comes_later_through_a_layer_without_codes() -> None:
    """Through its keys and values: a last layer that is not quantised reads them all the same."""
    logits, same = np.zeros((4, 5), np.float32), np.zeros((4, 3), np.int8)
    flipped = same.copy()
    flipped[1, 0] = 1
    for layers, untouched in ((1, 3), (2, 1)):
        a, b = (Trace(logits, np.arange(4), {"model.layers.0.mlp.down_proj": q}, layers) for q in (same, flipped))
        assert compare(a, b, 0.1).untouched == untouched


def test_a_recording_is_fed_in_chunks() -> None:
    decoder = RecordingDecoder(50)
    whole, parts = record(decoder, range(7)), record(decoder, range(7), chunk=3)
    assert [len(part) for part in decoder.fed] == [7, 3, 3, 1]
    assert np.array_equal(whole.logits, parts.logits) and np.array_equal(parts.positions, np.arange(7))

"""The filters keep what mlx-lm's keep; draws follow the probabilities and repeat with the seed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.errors import BackendError, ConfigError
from bitnet_mlx.generation.sampling import Sampler, SamplingConfig, _draw, log_softmax, min_p_ids, top_k_ids, top_p_ids


def logprobs_of(seed: int, size: int, spread: float) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal(size).astype(np.float32) * np.float32(spread)
    return log_softmax(x)


def kept_by(function: Any, logprobs: np.ndarray, *arguments: Any) -> list[int]:
    """Ids that an mlx-lm filter leaves finite."""
    import mlx.core as mx

    return np.flatnonzero(np.isfinite(np.array(function(mx.array(logprobs[None]), *arguments))[0])).tolist()


# 1: nothing to choose; 67: below the first partial sort of top-p; 256, 257: at its border; 5000: several rounds.
@pytest.mark.parametrize("size", [2, 67, 256, 257, 5000])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_each_filter_keeps_what_mlx_lm_keeps(size: int, spread: float) -> None:
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

    x = logprobs_of(size, size, spread)
    for value in (0.01, 0.3, 0.9, 0.99):
        assert top_p_ids(x, value).tolist() == kept_by(apply_top_p, x, value), value
        assert min_p_ids(x, value).tolist() == kept_by(apply_min_p, x, value), value
    for count in (1, 5, 40, size - 1):
        if count < size:
            assert top_k_ids(x, count).tolist() == kept_by(apply_top_k, x, count), count
    assert top_k_ids(x, size + 1).tolist() == list(range(size))


@pytest.mark.parametrize("seed", range(5))
def test_the_filters_follow_one_another_as_in_mlx_lm(seed: int) -> None:
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

    def chain(x: Any) -> Any:
        return apply_top_k(apply_min_p(apply_top_p(x, 0.95), 0.05), 7)

    x = logprobs_of(seed, 800, 2.0)
    kept = Sampler(SamplingConfig(temp=1.0, top_p=0.95, min_p=0.05, top_k=7)).kept(x)
    assert kept is not None and kept.tolist() == kept_by(chain, x)
    assert Sampler(SamplingConfig(temp=1.0, top_p=0.0)).kept(x) is None


def test_bias_and_penalty_equal_mlx_lm() -> None:
    import mlx.core as mx
    from mlx_lm.sample_utils import make_logits_processors

    rng = np.random.default_rng(8)
    logits = rng.standard_normal(50).astype(np.float32)
    bias = {3: 2.5, 40: -1.25}
    history = [int(i) for i in rng.integers(0, 50, 30)] + [3, 3, 40]
    want = mx.array(logits[None])
    for process in make_logits_processors(bias, 1.3, 20):
        want = process(mx.array(history), want)
    want = np.array(want - mx.logsumexp(want, axis=-1, keepdims=True))[0]
    before = logits.copy()
    got = log_softmax(Sampler(SamplingConfig(logit_bias=bias, repetition_penalty=1.3)).scores(logits, history))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
    assert np.array_equal(logits, before)
    short = Sampler(SamplingConfig(repetition_penalty=1.3, repetition_context_size=2)).scores(logits, history)
    assert set(np.flatnonzero(short != logits).tolist()) == {3, 40}


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = np.array([1, 5, 5, 2, 5], np.float32)
    token, logprob = Sampler(SamplingConfig()).sample(logits)
    assert token == 1
    assert Sampler(SamplingConfig(temp=1e-30)).sample(logits)[0] == 1
    assert logprob == pytest.approx(5 - math.log(3 * math.exp(5) + math.exp(1) + math.exp(2)), abs=1e-6)


def test_equals_at_the_border() -> None:
    """top-k keeps the lowest ids and exactly k; top-p and min-p keep all equals."""
    x = np.log(np.array([0.1, 0.3, 0.1, 0.3, 0.1, 0.1], np.float32))
    assert top_k_ids(x, 3).tolist() == [0, 1, 3]
    assert top_p_ids(x, 0.31).tolist() == [1, 3]
    assert top_p_ids(x, 0.65).tolist() == [0, 1, 2, 3, 4, 5]
    assert min_p_ids(x, 1.0).tolist() == [1, 3]


@pytest.mark.parametrize("temp", [0.5, 1.0, 2.0])
def test_draws_follow_the_probabilities(temp: float) -> None:
    logits = np.array([0.0, 1.0, 2.0, 3.0, -1.0], np.float32)
    want = np.exp(logits / temp)
    want[[0, 4]] = 0  # top_k 3
    want /= want.sum()
    sampler = Sampler(SamplingConfig(temp=temp, top_k=3, seed=123))
    draws = 5000
    counts = np.bincount([sampler.sample(logits)[0] for _ in range(draws)], minlength=5)
    assert counts[0] == counts[4] == 0
    error = np.abs(counts / draws - want)
    assert (error < 4.5 * np.sqrt(want * (1 - want) / draws) + 1e-12).all()


def test_a_draw_is_the_inverse_of_the_running_sum() -> None:
    """Across blocks, at their borders, and never a weight of 0."""
    rng = np.random.default_rng(4)
    for size in (1, 2, 511, 512, 513, 1024, 3000):
        weights = rng.random(size).astype(np.float32) * (rng.random(size) < 0.5)
        weights[rng.integers(size)] = 1.0
        total = np.cumsum(weights, dtype=np.float64)
        for u in [0.0, 0.5, 1 - 2**-53, *rng.random(50)]:
            at = _draw(weights, u)
            assert weights[at] > 0
            assert total[at] - weights[at] - 1e-4 <= u * total[-1] <= total[at] + 1e-4


def test_a_seed_repeats_and_another_does_not() -> None:
    logits = np.random.default_rng(0).standard_normal(300).astype(np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingConfig(temp=1.0, seed=seed))
        return [sampler.sample(logits)[0] for _ in range(20)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_the_stream_of_a_seed_is_fixed() -> None:
    """Golden: NumPy guarantees PCG64's stream, so these ids hold on every platform."""
    logits = np.linspace(0, 3, 11).astype(np.float32)
    sampler = Sampler(SamplingConfig(temp=1.0, seed=2024))
    uniform = np.random.Generator(np.random.PCG64(2024)).random(12)
    share = np.cumsum(np.exp(logits.astype(np.float64)))
    want = [int(np.argmax(share > u * share[-1])) for u in uniform]
    assert [sampler.sample(logits)[0] for _ in range(12)] == want


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("temp", -0.1, "at least 0"),
        ("temp", math.nan, "at least 0"),
        ("temp", "hot", "at least 0"),
        ("top_p", 1.5, "from 0 to 1"),
        ("top_p", True, "from 0 to 1"),
        ("top_k", -1, "integer of at least 0"),
        ("top_k", 2.5, "integer of at least 0"),
        ("min_p", -0.01, "from 0 to 1"),
        ("repetition_penalty", 0, "above 0"),
        ("repetition_penalty", math.inf, "above 0"),
        ("repetition_context_size", -1, "integer of at least 0"),
        ("presence_penalty", -2.5, "from -2 to 2"),
        ("frequency_penalty", 2.5, "from -2 to 2"),
        ("seed", -1, "integer of at least 0"),
        ("logit_bias", {-1: 1.0}, "token id"),
        ("logit_bias", {1: math.nan}, "token id"),
        ("logit_bias", {1: math.inf}, "token id"),
    ],
)
def test_a_bad_setting_names_its_field_and_range(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError, match=rf"\[sampling\] {field} .*{allowed}"):
        SamplingConfig(**{field: value})


def test_a_bias_can_forbid_a_token_and_must_name_one() -> None:
    logits = np.array([1.0, 2.0], np.float32)
    assert Sampler(SamplingConfig(logit_bias={1: -math.inf})).sample(logits)[0] == 0
    with pytest.raises(ConfigError, match="names token 2; this model has the ids 0 to 1"):
        Sampler(SamplingConfig(logit_bias={2: 1.0})).sample(logits)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    logits = np.zeros(9, np.float32)
    logits[4] = bad
    with pytest.raises(BackendError, match="finite numbers are needed"):
        Sampler(SamplingConfig()).sample(logits)


def test_defaults_from_generation_config() -> None:
    read = SamplingConfig.from_generation_config
    assert read({}) == SamplingConfig()
    assert read({"temperature": 0.6, "top_p": 0.9}).temp == 0, "do_sample is off by default"
    full = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": None, "repetition_penalty": 1.1}
    assert read(full) == SamplingConfig(temp=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1)
    assert read({"do_sample": True, "min_p": 0.05}) == SamplingConfig(temp=1.0, min_p=0.05)
    with pytest.raises(ConfigError, match=r"top_p is 9.*generation_config.json"):
        read({"do_sample": True, "top_p": 9})
    assert read(full).replaced(temp=0.0, top_p=None) == SamplingConfig(top_p=0.9, top_k=20, repetition_penalty=1.1)


def test_presence_and_frequency_penalties_by_hand() -> None:
    """OpenAI's formula: logit -= count * frequency + (count > 0) * presence, counted over what was generated."""
    logits = np.array([1, 2, 3, 4], np.float32)
    sampler = Sampler(SamplingConfig(presence_penalty=0.5, frequency_penalty=0.25))
    history = [0, 0, 1, 2, 2, 2, 1]  # the first three are the prompt
    assert sampler.scores(logits, history, 3).tolist() == [1, 2 - 0.5 - 0.25, 3 - 0.5 - 0.75, 4]
    assert sampler.scores(logits, history[:3], 3) is logits
    assert logits.tolist() == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match="presence_penalty is 2.5"):
        SamplingConfig(presence_penalty=2.5)

"""Guesses change the speed alone: the same tokens, the same draws, the same cache, whatever is guessed."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.api import make_decoder
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.generation import ChatSession, GenerationResponse, Sampler, SamplingConfig, Speculation, stream_generate
from bitnet_mlx.generation.drafting import DraftModel, PromptLookup
from bitnet_mlx.generation.row_times import RowTimes
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.tokenizer import Tokenizer, load_tokenizer
from tests.support import tiny_tokenizers as tiny
from tests.support.random_model import random_weights, tiny_config

PROMPT = "hello world def return hello world def"
SAMPLINGS = {
    "greedy": SamplingConfig(),
    "drawn": SamplingConfig(temp=0.8, seed=11),
    "filtered": SamplingConfig(temp=1.3, top_p=0.9, top_k=12, min_p=0.02, repetition_penalty=1.2, frequency_penalty=0.5, seed=3),
}  # fmt: skip


class Guesses:
    """Guesses a known text, every `wrong`-th guess spoilt."""

    name = "an oracle"
    free = True

    def __init__(self, text: Sequence[int], wrong: int) -> None:
        self.text, self.wrong = list(text), wrong

    def begin(self, ids: Sequence[int]) -> None:
        self.start = len(ids)

    def kind(self, history: Sequence[int]) -> Hashable | None:
        return "known"

    def draft(self, history: Sequence[int], count: int, prompt_tokens: int, sampler: Sampler) -> list[int]:
        at = len(history) - self.start
        spoilt = [(t + 1) % 60 if i % self.wrong == self.wrong - 1 else t for i, t in enumerate(self.text)]
        return spoilt[at : at + count] or [0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tiny.byte_level(tmp_path_factory.mktemp("tokenizer"), settings={"eos_token": None}))


def decoder_of(tokenizer: Tokenizer, backend: str = "numpy", seed: int = 1, **changes: Any) -> Any:
    config = tiny_config(vocab_size=tokenizer.vocab_size, eos_token_ids=(), **{"num_hidden_layers": 1, **changes})
    weights = random_weights(config, seed=seed)
    weights.norms["model.norm"] = weights.norms["model.norm"] * np.float32(0.15)  # else one token takes it all
    return make_decoder(backend, weights)


def run(
    decoder: Any, tokenizer: Tokenizer, count: int = 40, sampling: Any = None, **options: Any
) -> tuple[list[GenerationResponse], Any]:
    cache = decoder.make_cache()
    return list(stream_generate(decoder, tokenizer, PROMPT, count, sampling=sampling, cache=cache, **options)), cache


def drafters(decoder: Any, tokenizer: Tokenizer, tokens: Sequence[int]) -> Iterator[tuple[str, Speculation]]:
    smaller = decoder_of(tokenizer, seed=9)
    for number in (1, 8):
        yield f"look-up {number}", Speculation.by_lookup(decoder, number)
        yield f"itself {number}", Speculation.by_model(decoder, tokenizer, decoder, tokenizer, number)
        yield f"another {number}", Speculation.by_model(decoder, tokenizer, smaller, tokenizer, number)
        yield f"oracle {number}", Speculation(decoder, Guesses(tokens, 5), number)
    yield "right to the end", Speculation(decoder, Guesses(tokens, 10**6), 64)


@pytest.mark.parametrize(("name", "backend"), [("filtered", "numpy"), *((name, "cpu") for name in SAMPLINGS)])
def test_the_same_tokens_scores_and_cache(name: str, backend: str, tokenizer: Tokenizer) -> None:
    """To the last bit, drawn texts too: a seed means the same text with guesses and without."""
    decoder = decoder_of(tokenizer, backend)
    plain, held = run(decoder, tokenizer, sampling=SAMPLINGS[name])
    tokens = [r.token for r in plain]
    assert len(set(tokens)) > 3
    accepted = {}
    for what, speculation in drafters(decoder, tokenizer, tokens):
        responses, cache = run(decoder, tokenizer, sampling=SAMPLINGS[name], speculation=speculation)
        assert [r.token for r in responses] == tokens, what
        assert all(np.array_equal(a.scores, b.scores) for a, b in zip(plain, responses, strict=True)), what
        assert [(r.text, r.finish_reason) for r in responses] == [(r.text, r.finish_reason) for r in plain]
        assert cache.offset == held.offset, what
        for ours, theirs in zip(cache.keys + cache.values, held.keys + held.values, strict=True):
            assert np.array_equal(ours[:, : cache.offset], theirs[:, : cache.offset]), what
        report = responses[-1].speculation
        assert report is not None and report.accepted == sum(r.from_draft for r in responses) <= report.drafted
        accepted[what] = report.acceptance
    assert accepted["itself 8"] == accepted["right to the end"] == 1.0, "it looks at the draws that come"
    assert 0 < accepted["oracle 8"] < 1 and accepted["another 8"] < 0.9


def test_mlx_gives_the_same_greedy_tokens(tokenizer: Tokenizer) -> None:
    pytest.importorskip("mlx.core")
    decoder = decoder_of(tokenizer, "mlx")
    plain, held = run(decoder, tokenizer, 24)
    for number in (1, 4):
        responses, cache = run(decoder, tokenizer, 24, speculation=Speculation.by_lookup(decoder, number))
        assert [r.token for r in responses] == [r.token for r in plain]
        assert cache.offset == held.offset
    for bits in (16, 8):
        small = make_decoder("mlx", random_weights(tiny_config(
            vocab_size=tokenizer.vocab_size, eos_token_ids=(), head_dim=64, num_hidden_layers=1
        )), None, None, bits)  # fmt: skip
        tokens = [r.token for r in run(small, tokenizer, 16)[0]]
        guessed = run(small, tokenizer, 16, speculation=Speculation.by_lookup(small, 3))[0]
        assert [r.token for r in guessed] == tokens, bits


def test_a_text_that_ends_within_its_guesses(tokenizer: Tokenizer) -> None:
    """By a stop string, by an end token, by being closed: text and cache are those of a run without guesses."""
    decoder = decoder_of(tokenizer)
    plain, _ = run(decoder, tokenizer, sampling=SAMPLINGS["drawn"])
    tokens, text = [r.token for r in plain], "".join(r.text for r in plain)
    oracle = Speculation(decoder, Guesses(tokens, 10**6), 12)
    stop = text[20:24]
    for options in ({"stop": [stop]}, {"max_kv_size": plain[0].prompt_tokens + 17}):
        a, held = run(decoder, tokenizer, sampling=SAMPLINGS["drawn"], **options)
        b, cache = run(decoder, tokenizer, sampling=SAMPLINGS["drawn"], speculation=oracle, **options)
        assert [(r.token, r.text, r.finish_reason) for r in a] == [(r.token, r.text, r.finish_reason) for r in b]
        assert cache.offset == held.offset and len(a) < 40
    short = decoder_of(tokenizer, max_position_embeddings=plain[0].prompt_tokens + 17)
    a, _ = run(short, tokenizer)
    b, _ = run(short, tokenizer, speculation=Speculation(short, Guesses([r.token for r in a], 10**6), 12))
    assert [r.token for r in a] == [r.token for r in b] and len(b) == 18, "no guess goes past the model's context"
    cache = decoder.make_cache()
    stream = stream_generate(
        decoder, tokenizer, PROMPT, 40, sampling=SAMPLINGS["drawn"], cache=cache, speculation=oracle
    )
    taken = [next(stream) for _ in range(6)]
    assert cache.offset > taken[0].prompt_tokens + 5, "guesses are ahead of the text"
    stream.close()  # type: ignore[attr-defined]
    assert cache.offset == taken[0].prompt_tokens + 5


def test_guesses_that_were_not_made_are_learned_from(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows cost 1.9 of one here: guessing pays where nine in ten are right, which plain steps must find out."""
    times = RowTimes({rows: 0.1 + 0.9 * rows for rows in (1, 2, 16)})
    monkeypatch.setattr("bitnet_mlx.generation.speculation.row_times", lambda _: times)
    decoder = decoder_of(tokenizer)
    tokens = [r.token for r in run(decoder, tokenizer)[0]]
    for wrong, pays in ((10**6, True), (1, False)):
        responses, _ = run(decoder, tokenizer, speculation=Speculation(decoder, Guesses(tokens, wrong)))
        report = responses[-1].speculation
        assert report is not None and (report.drafted > 0) == pays and not any(r.from_draft for r in responses[:5])


def test_only_a_draft_models_guesses_cost_time(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    free: list[bool] = []
    monkeypatch.setattr("bitnet_mlx.generation.speculation.DraftLength", lambda *given: free.append(given[2]))
    decoder = decoder_of(tokenizer)
    for speculation in (
        Speculation.by_lookup(decoder, 2), Speculation.by_model(decoder, tokenizer, decoder_of(tokenizer), tokenizer, 2)
    ):  # fmt: skip
        speculation.steps(decoder.make_cache(), Sampler(SamplingConfig()), [5, 6], 9)
    assert free == [True, False]


def test_the_end_of_guessing_is_told_once(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    times = RowTimes({rows: 2.0 * rows - 1 for rows in (1, 2, 16)})
    monkeypatch.setattr("bitnet_mlx.generation.speculation.row_times", lambda _: times)
    decoder = decoder_of(tokenizer)
    with caplog.at_level("INFO", "bitnet_mlx"):
        told, silent = (Speculation(decoder, Guesses([0] * 60, 10**6)) for _ in range(2))
        responses, _ = run(decoder, tokenizer, speculation=told)
        silent.tell = False  # as a server has it
        run(decoder, tokenizer, speculation=silent)
    report = responses[-1].speculation
    assert report is not None and report.off is not None and report.drafted == 0
    assert [r.getMessage() for r in caplog.records] == [f"[speculate] an oracle is off from here on: {report.off}"]


def test_draws_with_guesses_follow_the_models_probabilities(tokenizer: Tokenizer) -> None:
    """The pair of tokens after the first, of 800 seeded texts, against probabilities from separate forward passes."""
    decoder, draft = decoder_of(tokenizer, "cpu"), decoder_of(tokenizer, "cpu", seed=5)
    ids = tokenizer.encode("def")
    config = SamplingConfig(temp=1.0, top_k=3)
    speculation = Speculation.by_model(decoder, tokenizer, draft, tokenizer, 2)
    count, seen = 800, {}
    cache = decoder.make_cache()
    for seed in range(count):
        cache.trim(len(ids) - 1 if seed else 0)
        stream = stream_generate(
            decoder, tokenizer, ids, 3, sampling=config.replaced(seed=seed), cache=cache, speculation=speculation
        )
        drawn = tuple(r.token for r in stream)
        seen[drawn] = seen.get(drawn, 0) + 1

    def shares(prefix: tuple[int, ...]) -> dict[int, float]:
        logits = decoder.step([[*ids, *prefix]], [decoder.make_cache()])[0].astype(np.float64)
        best = np.argsort(-logits)[:3]
        weights = np.exp(logits[best] - logits[best].max())
        return dict(zip(best.tolist(), (weights / weights.sum()).tolist(), strict=True))

    chi = cells = 0.0
    for a, p in shares(()).items():
        for b, q in shares((a,)).items():
            for c, r in shares((a, b)).items():
                want = count * p * q * r
                if want >= 5:
                    chi, cells = chi + (seen.get((a, b, c), 0) - want) ** 2 / want, cells + 1
    assert cells >= 8 and chi < cells + 4 * (2 * cells) ** 0.5, (chi, cells)


def test_look_up_finds_the_longest_and_latest(tokenizer: Tokenizer) -> None:
    lookup, sampler = PromptLookup(), Sampler(SamplingConfig())
    history = [1, 2, 3, 4, 50, 9, 3, 4, 60, 9, 8, 1, 2, 3, 4]
    lookup.begin(history)
    assert lookup.kind(history) == 4 and lookup.draft(history, 3, 0, sampler) == [50, 9, 3]
    history += [60, 9, 3, 4]
    assert lookup.kind(history) == 3 and lookup.draft(history, 2, 0, sampler) == [60, 9], "9 3 4 was followed by 60"
    assert lookup.kind([*history, 77]) is None
    lookup.begin([8, 1, 2])
    assert lookup.kind([8, 1, 2]) is None, "nothing is left of the text before"
    pattern = [5, 6, 7, 5, 6]
    lookup.begin(pattern)
    assert lookup.kind(pattern) == 2 and lookup.draft(pattern, 7, 0, sampler) == [7, 5, 6, 7, 5, 6, 7]


def test_a_draft_of_another_vocabulary_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    decoder = decoder_of(tokenizer)
    other = load_tokenizer(tiny.byte_level(tmp_path / "more", bos=True, settings={"chat_template": tiny.CHAT}))
    tokens = [other.id_to_token(i) for i in range(other.vocab_size)]
    same = [tokenizer.id_to_token(i) for i in range(tokenizer.vocab_size)] == tokens
    if not same:
        with pytest.raises(ConfigError, match="draft model"):
            Speculation.by_model(decoder, tokenizer, decoder, other)
    renamed = load_tokenizer(tiny.byte_level(tmp_path / "renamed", settings={"eos_token": None}))
    renamed.id_to_token = lambda i: "odd" if i == 40 else tokenizer.id_to_token(i)  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"token 40 is 'odd' to the draft model and .*own family"):
        Speculation.by_model(decoder, tokenizer, decoder, renamed)
    for number in (0, 65):
        with pytest.raises(ConfigError, match=rf"num_draft_tokens is {number}; 1 to 64"):
            Speculation.by_lookup(decoder, number)


def test_a_draft_with_a_padded_table_and_a_shorter_context(tokenizer: Tokenizer) -> None:
    decoder = decoder_of(tokenizer)
    tokens = [r.token for r in run(decoder, tokenizer, 60)[0]]
    for size in (tokenizer.vocab_size + 7, tokenizer.vocab_size - 3):
        draft = NumpyDecoder(
            random_weights(tiny_config(vocab_size=size, eos_token_ids=(), max_position_embeddings=48), seed=2)
        )
        speculation = Speculation.by_model(decoder, tokenizer, draft, tokenizer, 4)
        responses, _ = run(decoder, tokenizer, 60, speculation=speculation)
        assert [r.token for r in responses] == tokens
        assert not any(r.from_draft for r in responses[48:])
        fitted = DraftModel(draft, tokenizer, decoder, tokenizer)._fitted(np.zeros(size, np.float32))
        assert len(fitted) == tokenizer.vocab_size and np.isneginf(fitted[size:]).all(), (
            "what it lacks is never guessed"
        )


def test_a_conversation_with_guesses(tokenizer: Tokenizer) -> None:
    """Turn after turn the caches of both models are cut back to what the turns have in common."""
    decoder, draft = decoder_of(tokenizer), decoder_of(tokenizer, seed=5)
    replies = []
    for speculation in (None, *(s for _, s in drafters(decoder, tokenizer, ())), Speculation.by_model(
        decoder, tokenizer, draft, tokenizer, 5
    )):  # fmt: skip
        talk = ChatSession(
            decoder, tokenizer, sampling=SAMPLINGS["drawn"], max_tokens=12, raw=True, speculation=speculation
        )
        replies.append([[r.token for r in talk.reply(text)] for text in ("hello", " def return", " hello hello")])
        talk.reset()
    assert len(replies) > 5 and all(reply == replies[0] for reply in replies)

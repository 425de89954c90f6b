"""bench decode: its record, its loop's tokens, and the plain models it compares with."""

from __future__ import annotations

import json
from itertools import count
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.bench import decode
from bitnet_mlx.bench.decode import DecodeOptions, StepContender, lines, measure
from bitnet_mlx.bench.decode_mlx import MlxContender
from bitnet_mlx.bench.plain_mlx import KINDS, PlainModel
from bitnet_mlx.bench.random_decoder import preset, random_words
from bitnet_mlx.cli.main import main
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from tests.mlx_engine.test_mlx_decoder import build
from tests.support.random_model import random_weights, tiny_config

SHORT: dict[str, Any] = dict(prompt=6, tokens=3, repeats=1, layers=1)


def test_the_record_and_its_lines() -> None:
    record = measure(DecodeOptions(backend="mlx", against=("stock", "bf16"), **SHORT))
    assert set(record["results"]) == {"ours", "stock", "bf16"} and set(record["ratios"]) == {"stock", "bf16"}
    for result in record["results"].values():
        assert min(result.values()) > 0
    assert (record["backend"], record["dtype"], record["layers"]) == ("mlx", "float32", 1)
    assert record["launches_per_layer"]["plain 2-bit"] == record["launches_per_layer"]["mlx-lm's bitnet"] == 21
    json.dumps(record)
    text = "\n".join(lines(record))
    assert "tokens/s" in text and "times as long as ours" in text and "kernel launches a layer: ours" in text


def test_figures_from_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of 10 ms, a prompt of half a second; another takes twice as long."""
    made: list[Any] = []
    make = decode.make_decoder
    monkeypatch.setattr(decode, "make_decoder", lambda *given: made.append(given) or make(*given))
    monkeypatch.setattr(decode, "_launches", lambda *_: {})
    monkeypatch.setattr(decode, "_turns", lambda *_: {"ours": (0.01, 0.5), "stock": (0.02, 0.25)})
    record = measure(DecodeOptions(backend="cpu", threads=1, **SHORT))
    assert record["results"]["ours"] == {"decode_tps": 100.0, "decode_ms": 10.0, "prefill_tps": 12.0}
    assert record["results"]["stock"] == {"decode_tps": 50.0, "decode_ms": 20.0, "prefill_tps": 24.0}
    assert record["ratios"] == {"stock": 2.0}
    assert made[0][0] == "cpu" and made[0][3] == 1
    told = "\n".join(lines(record))
    assert "ours       100.0 tokens/s (10.000 ms)   prefill        12 tokens/s" in told and "2.00 times as long" in told


def test_the_first_turn_warms_up_and_medians_count() -> None:
    class Clock:
        def __init__(self) -> None:
            self.prompts, self.tokens = iter((900, 3, 1, 2)), iter((900, 6, 4, 5))

        def prefill(self, tokens: list[int]) -> float:
            assert tokens == [0, 1, 2, 0]
            return next(self.prompts)

        def decode(self, count: int) -> float:
            assert count == 7
            return next(self.tokens)

    options = DecodeOptions(prompt=4, tokens=7, repeats=3)
    assert decode._turns({"a": Clock(), "b": Clock()}, options, 3) == {"a": (5, 2), "b": (5, 2)}


def test_a_steps_time_is_of_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    contender = StepContender(NumpyDecoder(random_weights(tiny_config())))
    monkeypatch.setattr(decode, "time", SimpleNamespace(perf_counter=count(0, 8).__next__))
    assert contender.prefill([1, 2, 3]) == 8 and contender.decode(4) == 2


def test_options_change_the_model() -> None:
    small, wide = (decode.subject_weights(DecodeOptions(head_bits=bits, **SHORT)) for bits in (8, 16))
    assert small.config.num_hidden_layers == 1 and small.nbytes < wide.nbytes


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = "bench decode --backend cpu --prompt 6 --tokens 3 --repeats 1 --layers 1"
    assert main([*command.split(), "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["backend"] == "cpu" and record["launches_per_layer"]["ours"] == 9
    assert main([*command.split(), "--against", "stock"]) == 2
    assert "the backend is cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"preset": "9b"}, "small, 2b4t are known"),
        ({"against": ("stock", "gguf")}, "names gguf"),
        ({"prompt": 4096}, "positions of 4096"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measure(DecodeOptions(**({"backend": "numpy"} | changes)))


def test_both_loops_feed_the_likeliest_token_on() -> None:
    """The pipelined loop and the plain one end at the token of a greedy loop."""
    weights, prompt = build("bitnet"), [1, 2, 3, 4]
    decoder = NumpyDecoder(weights)
    cache, tokens, token = decoder.make_cache(), prompt, 0
    for _ in range(6):
        token = int(decoder.step([tokens], [cache])[0].argmax())
        tokens = [token]
    for contender in (MlxContender(MlxModel(weights)), StepContender(decoder)):
        for _ in range(2):  # a second turn starts anew
            assert contender.prefill(prompt) > 0 and contender.decode(2) > 0
            assert contender.decode(3) > 0
            assert int(contender._next) == token


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_model_continues_what_its_cache_holds(kind: Any) -> None:
    model = PlainModel(preset("small"), kind)
    whole = model(mx.array([[5, 6, 7, 8]]), model.make_cache())
    cache = model.make_cache()
    model(mx.array([[5, 6, 7]]), cache)
    last = model(mx.array([[8]]), cache)
    assert last.shape == whole.shape == (1, 1, 4096) and last.dtype == mx.bfloat16
    assert (
        np.corrcoef(np.array(whole.astype(mx.float32)).ravel(), np.array(last.astype(mx.float32)).ravel())[0, 1] > 0.98
    )


@pytest.mark.parametrize("k", [128, 100])
def test_random_words_hold_no_code_3_and_pad_with_0(k: int) -> None:
    words = random_words(np.random.default_rng(0), 64, k)
    codes = (words[..., None] >> np.arange(0, 32, 2, dtype=np.uint32) & 3).reshape(64, -1)
    assert codes.shape == (64, 128) and set(np.unique(codes[:, :k])) == {0, 1, 2} and (codes[:, k:] == 1).all()

"""The engine through HTTP: texts that join, leave, wait, fail and are left by their clients."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from bitnet_mlx.generation import generate
from bitnet_mlx.models.decoder_cpu import CpuDecoder
from bitnet_mlx.serve.engine import Engine, Limits
from bitnet_mlx.serve.schedule import share
from bitnet_mlx.serve.work import Task, Work
from tests.serve.running import Running, WatchedDecoder, model, serving, until


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    decoder, tokenizer = model(tmp_path)
    decoder.gate = threading.Semaphore(0)
    with serving(decoder, tokenizer, running=3, waiting=2) as running:
        yield running


def ask(server: Running, prompt: Any, count: int, **options: Any) -> str:
    with server.client() as client:
        return client.completions.create(model="test/model", prompt=prompt, max_tokens=count, **options).choices[0].text


def health(server: Running) -> tuple[int, int]:
    """(running, waiting)."""
    told = httpx.get(f"{server.url}/health").json()
    assert told["status"] == "ok"
    return told["running"], told["waiting"]


def steps(server: Running, count: int) -> list[list[int]]:
    """Let the model take steps; the new rows of its log."""
    before = len(server.decoder.steps)
    assert server.decoder.gate is not None
    server.decoder.gate.release(count)
    until(lambda: len(server.decoder.steps) == before + count, f"{count} steps")
    return server.decoder.steps[before:]


def test_texts_join_and_leave_between_steps(server: Running) -> None:
    decoder, tokenizer = server.decoder, server.tokenizer
    prompts = ["hello world", "def f(x):", "return 345"]
    gate, decoder.gate = decoder.gate, None
    want = [generate(decoder, tokenizer, p, c) for p, c in zip(prompts, (6, 4, 5), strict=True)]
    decoder.gate, decoder.steps = gate, []
    lengths = [len(tokenizer.encode(p)) for p in prompts]
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask, server, prompts[0], 6)
        until(lambda: health(server) == (1, 0), "the first runs")
        assert steps(server, 2) == [[lengths[0]], [1]]
        second = pool.submit(ask, server, prompts[1], 4)
        until(lambda: health(server) == (2, 0) or health(server) == (1, 1), "the second has come")
        log = steps(server, 3)
        assert [1, lengths[1]] in log and log[-1] == [1, 1], log
        third = pool.submit(ask, server, prompts[2], 5)
        decoder.gate.release(1000)  # type: ignore[union-attr]
        assert [first.result(60), second.result(60), third.result(60)] == want


def test_the_queue_has_a_bound(server: Running) -> None:
    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(ask, server, "hello 0", 3)]
        until(lambda: health(server) == (1, 0), "one runs")
        running += [pool.submit(ask, server, f"hello {i}", 3) for i in (1, 2)]
        until(lambda: health(server) == (1, 2), "two come while a step is in progress")
        steps(server, 1)
        until(lambda: health(server) == (3, 0), "three run")
        waiting = [pool.submit(ask, server, f"world {i}", 3) for i in range(2)]
        until(lambda: health(server) == (3, 2), "two wait")
        with server.client() as client, pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="test/model", prompt="one more", max_tokens=3)
        assert caught.value.code == "queue_full" and 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        server.decoder.gate.release(1000)  # type: ignore[union-attr]
        assert all(future.result(60) for future in running + waiting)
    assert health(server) == (0, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_work_within_a_step(server: Running, stream: bool) -> None:
    body = {"model": "test/model", "prompt": "hello world", "max_tokens": 200, "stream": stream}
    with httpx.Client() as client:
        request = client.build_request("POST", f"{server.url}/v1/completions", json=body, timeout=0.5)
        if stream:
            with client.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
                steps(server, 3)
                assert next(response.iter_lines()).startswith("data: {")
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.send(request)
    until(
        lambda: "texts_cancelled_total 0" not in httpx.get(f"{server.url}/metrics").text or release_one(server),
        "it ends",
    )
    done = len(server.decoder.steps)
    until(lambda: health(server) == (0, 0), "nothing runs")
    server.decoder.gate.release(50)  # type: ignore[union-attr]
    assert ask(server, "hello", 1) is not None
    assert len(server.decoder.steps) <= done + 2


def release_one(server: Running) -> bool:
    """Let the step in progress end, once the server has seen the client leave."""
    assert server.decoder.gate is not None
    if not getattr(server, "released", False):
        threading.Event().wait(0.3)
        server.decoder.gate.release(1)
        server.released = True  # type: ignore[attr-defined]
    return False


def test_one_that_fails_harms_no_other(server: Running) -> None:
    decoder, tokenizer = server.decoder, server.tokenizer
    gate, decoder.gate = decoder.gate, None
    want = generate(decoder, tokenizer, "hello world", 8)
    poison = tokenizer.encode("zebra")[-1]
    decoder.poison, decoder.gate = poison, gate
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(ask, server, "hello world", 8)
        steps(server, 2)
        bad = pool.submit(ask, server, [5, poison, 6], 8)
        until(lambda: sum(health(server)) == 2, "both are there")
        decoder.gate.release(1000)  # type: ignore[union-attr]
        assert good.result(60) == want
        with pytest.raises(openai.InternalServerError, match="The engine failed: unexpected RuntimeError"):
            bad.result(60)
    with server.client() as client:
        stream = client.completions.create(model="test/model", prompt=[poison], max_tokens=3, stream=True)
        with pytest.raises(openai.APIError, match="The engine failed"):
            list(stream)
    assert ask(server, "hello world", 8) == want


def waiting(length: int, fed: int, decoder: WatchedDecoder, tokenizer: Any) -> Work:
    work = Work(Task(range(length), 4, None), 0, tokenizer, frozenset(), print)  # type: ignore[arg-type]
    work.cache = decoder.make_cache()
    work.cache.offset = fed
    return work


@pytest.mark.parametrize(
    ("texts", "room", "want"),
    [
        ([(10, 0), (1000, 0)], 100, [10, 90]),
        ([(1000, 0), (1000, 500), (30, 10)], 100, [40, 40, 20]),
        ([(5, 4), (9, 8), (300, 0)], 100, [1, 1, 98]),
        ([(5, 4)] * 90 + [(300, 0)], 100, [1] * 90 + [32]),
        ([(50, 0)] * 40, 20, [1] * 32),
    ],
)
def test_what_a_step_takes(texts: list[tuple[int, int]], room: int, want: list[int], tmp_path: Path) -> None:
    decoder, tokenizer = model(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitnet_mlx.serve.work.Sampler", lambda *_: None)
        works = [waiting(length, fed, decoder, tokenizer) for length, fed in texts]
    parts = share(works, room)
    assert sorted(len(tokens) for _, tokens in parts) == sorted(want)
    for work, tokens in parts:
        assert tokens == list(range(work.cache.offset, work.cache.offset + len(tokens)))


def test_a_long_prompt_delays_a_short_one_by_a_step(tmp_path: Path) -> None:
    decoder, tokenizer = model(tmp_path)
    decoder.gate = threading.Semaphore(0)
    engine = Engine(decoder, tokenizer, Limits(step_tokens=64))
    told: list[int] = []
    first = engine.submit([Task(list(range(200)), 2, sampling())], lambda work, piece: told.append(0))
    engine.start()
    until(lambda: engine.counts.running == 1, "the long one runs")
    engine.submit([Task([1, 2, 3], 2, sampling())], lambda work, piece: told.append(1))
    decoder.gate.release(100)
    until(lambda: len(told) == 4, "both end")
    engine.stop()
    assert told[:2] == [1, 1] and decoder.steps[:3] == [[64], [3, 61], [1, 63]]
    assert first[0].cache is None, "its keys and values are let go of"


def sampling() -> Any:
    from bitnet_mlx.generation import SamplingConfig

    return SamplingConfig()


def test_memory_for_keys_and_values_is_a_limit(tmp_path: Path) -> None:
    """First come, first served; what can never fit is refused."""
    decoder, tokenizer = model(tmp_path)
    engine = Engine(decoder, tokenizer, Limits(kv_bytes=20 * 2 * 2 * 2 * 18 * 4))
    ended: list[Any] = []
    works = []
    for count in (11, 11, 3):  # 10 + 2 + 11 - 1 positions do not fit twice
        works += engine.submit([Task([1, 2], count, sampling())], lambda work, piece: ended.append((work, piece)))
    with pytest.raises(Exception, match="21 positions of cache would take"):
        engine.submit([Task([1, 2], 20, sampling())], print)
    engine.start()
    until(lambda: engine.counts.finished == 3, "all end")
    engine.stop()
    assert max(len(step) for step in decoder.steps) == 2
    assert [work for work, piece in ended if piece.finish_reason].index(works[0]) == 0


def test_many_on_the_cpu_engine_equal_one_at_a_time(tmp_path: Path) -> None:
    """A soak in small: mixed lengths, a third of them left by their clients; greedy texts are those of single runs."""
    small, tokenizer = model(tmp_path)
    decoder = CpuDecoder(small.weights)
    rng = np.random.default_rng(4)
    jobs = [([int(i) for i in rng.integers(4, 400, rng.integers(1, 90))], int(rng.integers(1, 20))) for _ in range(36)]
    want = [generate(decoder, tokenizer, ids, count) for ids, count in jobs]
    with serving(decoder, tokenizer, running=8, waiting=64) as server:

        def one(number: int) -> str | None:
            ids, count = jobs[number]
            with server.client() as client:
                if number % 3:
                    return client.completions.create(model="test/model", prompt=ids, max_tokens=count).choices[0].text
                stream = client.completions.create(model="test/model", prompt=ids, max_tokens=100, stream=True)
                next(iter(stream))
                stream.close()
                return None

        with ThreadPoolExecutor(12) as pool:
            got = list(pool.map(one, range(len(jobs))))
        until(lambda: health(server) == (0, 0), "nothing is left")
        text = httpx.get(f"{server.url}/metrics").text
    assert [g for g in got if g is not None] == [w for i, w in enumerate(want) if i % 3]
    assert "kv_cache_bytes 0" in text and "texts_failed_total 0" in text


def test_what_takes_too_long_is_ended(tmp_path: Path) -> None:
    """Whether it runs or waits; others go on."""
    decoder, tokenizer = model(tmp_path)
    decoder.gate = threading.Semaphore(0)
    engine = Engine(decoder, tokenizer, Limits(running=1, seconds=1000))
    told: dict[int, list[Any]] = {}
    works = []
    for number in range(3):
        here = told[number] = []
        works += engine.submit([Task([1, 2], 3, sampling())], lambda _, event, here=here: here.append(event))
    assert all(work.deadline == work.arrived + 1000 > 1000 for work in works)
    engine.start()
    until(lambda: engine.counts.running == 1, "the first runs")
    works[0].deadline = works[1].deadline = 0.0
    decoder.gate.release(100)
    until(lambda: engine.counts.finished == 1, "the last ends")
    engine.stop()
    assert engine.counts.timed_out == 2 and len(told[2]) == 3
    assert [told[i][-1].status for i in (0, 1)] == [504, 504]


def test_a_client_is_told_that_it_took_too_long(tmp_path: Path) -> None:
    with serving(*model(tmp_path), seconds=1e-9) as server:
        with pytest.raises(openai.APIStatusError, match="not complete after 1e-09 s") as caught:
            ask(server, "hello", 3)
        assert caught.value.status_code == 504 and caught.value.code == "timeout"
        assert "texts_timed_out_total 1" in httpx.get(f"{server.url}/metrics").text


@pytest.mark.parametrize("where", ["share", "kv"])
def test_a_fault_of_the_engine_fails_what_runs_and_no_more(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, tokenizer = model(tmp_path)
    want = generate(decoder, tokenizer, "hello", 3)

    def broken(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with serving(decoder, tokenizer) as server:
        with monkeypatch.context() as planted:
            if where == "share":
                planted.setattr("bitnet_mlx.serve.engine.share", broken)
            else:
                planted.setattr(decoder, "make_cache", broken)
            with pytest.raises(openai.InternalServerError, match="The engine failed: unexpected MemoryError"):
                ask(server, "hello", 3)
        assert ask(server, "hello", 3) == want
        assert "texts_failed_total 1" in httpx.get(f"{server.url}/metrics").text

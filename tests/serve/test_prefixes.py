"""Beginnings of prompts that are kept: equal answers, an exact count of bytes, a cap that holds, and what clients are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from bitnet_mlx.generation import SamplingConfig, generate
from bitnet_mlx.models.cache import KVCache
from bitnet_mlx.models.decoder_cpu import CpuDecoder
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.serve.engine import Engine, Limits
from bitnet_mlx.serve.prefixes import BLOCK, Prefixes
from bitnet_mlx.serve.schedule import Queue, leaders
from bitnet_mlx.serve.work import Task, Work
from tests.serve.running import model, serving, until
from tests.support.random_model import random_weights, tiny_config

CONFIG = tiny_config(vocab_size=300)
BYTES = BLOCK * (2 * 2 * 2 * 18 * 4 + 4)  # of a block: keys and values of 2 layers and 2 heads, and its tokens


def filled(ids: list[int]) -> KVCache:
    """A cache whose position p of any head holds p + ids[p] / 1000 everywhere."""
    cache = KVCache(CONFIG, limit=4096)
    cache.reserve(len(ids))
    column = (np.arange(len(ids)) + np.asarray(ids) / 1000)[:, None]
    for layer in range(2):
        cache.keys[layer][:, : len(ids)] = column
        cache.values[layer][:, : len(ids)] = -column
    cache.offset = len(ids)
    return cache


def test_the_longest_common_beginning_in_whole_blocks() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 300, 100).tolist()
    second = [*first[:70], *rng.integers(0, 300, 60).tolist()]
    kept = Prefixes(1 << 20)
    kept.keep(first, filled(first))
    kept.keep(second, filled(second))
    assert len(kept) == 3 + 2 and kept.nbytes == 5 * BYTES  # two blocks are shared
    for ids, want in (
        ([*first, 1], 96),
        (second, 128),
        (first[:97], 96),
        (first[:96], 64),
        (first[:32], 0),
        ([7] * 99, 0),
    ):
        cache = KVCache(CONFIG, limit=4096)
        assert kept.restore(ids, cache) == want == cache.offset
        source = filled(ids)
        for layer in range(2):
            np.testing.assert_array_equal(cache.keys[layer][:, :want], source.keys[layer][:, :want])
            np.testing.assert_array_equal(cache.values[layer][:, :want], source.values[layer][:, :want])
    half = filled(second[:40])
    assert kept.restore(second, half) == 128 - 40


def test_the_cap_holds_and_the_least_used_goes_first() -> None:
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 300, 3 * BLOCK + 1).tolist() for _ in range(4)]
    kept = Prefixes(7 * BYTES + 1)
    for ids in texts[:2]:
        kept.keep(ids, filled(ids))
    assert kept.restore(texts[0], KVCache(CONFIG, limit=4096)) == 3 * BLOCK  # the first is the younger one now
    kept.keep(texts[2], filled(texts[2]))
    assert kept.nbytes == 7 * BYTES and kept.evicted == 2
    found = [kept.restore(ids, KVCache(CONFIG, limit=4096)) // BLOCK for ids in texts]
    assert found == [3, 1, 3, 0]
    long = rng.integers(0, 300, 20 * BLOCK).tolist()
    kept.keep(long, filled(long))  # longer than all there is room for: its beginning stays
    assert kept.nbytes == 7 * BYTES and kept.restore(long, KVCache(CONFIG, limit=4096)) == 7 * BLOCK


def test_random_use_against_a_plain_list() -> None:
    """Whatever is restored is what was computed, and bytes are what the blocks sum to."""
    rng = np.random.default_rng(2)
    stems = [rng.integers(0, 300, 96).tolist() for _ in range(3)]
    kept, hits = Prefixes(12 * BYTES), 0
    for _ in range(200):
        ids = [*stems[rng.integers(3)][: rng.integers(1, 97)], *rng.integers(0, 300, rng.integers(1, 70)).tolist()]
        cache = KVCache(CONFIG, limit=4096)
        got = kept.restore(ids, cache)
        hits += bool(got)
        assert got % BLOCK == 0 and got < len(ids)
        np.testing.assert_array_equal(cache.keys[1][:, :got], filled(ids).keys[1][:, :got])
        kept.keep(ids, filled(ids))
        assert kept.nbytes == len(kept) * BYTES <= kept.limit
    assert hits > 50 and kept.evicted > 50


def test_nothing_is_kept_without_room() -> None:
    for limit in (0, BYTES - 1):
        kept = Prefixes(limit)
        kept.keep([1] * 99, filled([1] * 99))
        assert (kept.nbytes, len(kept)) == (0, 0) and kept.restore([1] * 99, KVCache(CONFIG)) == 0


def work(history: list[int], offset: int, decoder: NumpyDecoder) -> Work:
    made = Work.__new__(Work)
    made.history, made.cache = history, decoder.make_cache()
    made.cache.offset = offset
    return made


def test_one_of_those_that_go_on_alike_is_fed() -> None:
    decoder = NumpyDecoder(random_weights(CONFIG, seed=1))
    same, other = list(range(100)), [*range(40), *range(200, 260)]
    a, b, c, d = (work(h, o, decoder) for h, o in ((same, 32), (same, 40), (other, 64), (same, 98)))
    assert leaders([a, b, c, d]) == [d, c, b]  # a waits for b, which is further in the same block
    e, f = work(other, 0, decoder), work(same, 0, decoder)
    assert leaders([e, f]) == [e], "their first blocks are the same"


def test_a_request_of_many_texts_lets_others_in_between() -> None:
    queue = Queue()
    made = {name: [Work.__new__(Work) for _ in range(count)] for name, count in (("many", 5), ("b", 1), ("c", 2))}
    names = {id(w): f"{name}{i}" for name, works in made.items() for i, w in enumerate(works)}
    for works in made.values():
        queue.add(works)
    order = [names[id(w)] for w in queue]
    assert order == ["many0", "many1", "b0", "many2", "c0", "many3", "c1", "many4"]
    gone = queue.take_out(lambda w: names[id(w)].startswith("many"))
    assert len(gone) == 5 and [names[id(queue.pop())] for _ in range(3)] == ["b0", "c0", "c1"] and not len(queue)


def run(engine: Engine, tasks: list[Task], finished: Callable[[], bool]) -> None:
    engine.start()
    until(finished, "all end")
    engine.stop()


def test_texts_of_one_prompt_compute_it_once(tmp_path: Path) -> None:
    decoder, tokenizer = model(tmp_path)
    task = Task(np.random.default_rng(3).integers(0, 400, 150).tolist(), 3, SamplingConfig())
    engine, told = Engine(decoder, tokenizer, Limits(prefix_bytes=1 << 22, step_tokens=64)), []

    def listen(work: Work, piece: Any) -> None:
        told.append((work.index, piece.token))

    works = engine.submit([task] * 4, listen)
    run(engine, [task], lambda: len(told) == 12)
    assert [w.cached for w in works] == [0, 128, 128, 128]
    assert engine.counts.prompt_tokens == 150 + 3 * 22 and engine.counts.cached_tokens == 3 * 128
    texts = [[token for i, token in told if i == index] for index in range(4)]
    assert texts[0] == texts[1] == texts[2] == texts[3]


@pytest.mark.parametrize("room", [1 << 24, 40 * BYTES])
def test_answers_are_equal_to_the_last_bit_with_and_without(room: int, tmp_path: Path) -> None:
    """Log probabilities of the cpu engine, of prompts that share beginnings, asked twice; also where the cap evicts."""
    small, tokenizer = model(tmp_path)
    decoder = CpuDecoder(small.weights)
    rng = np.random.default_rng(5)
    stem = rng.integers(0, 400, 120).tolist()
    prompts = [[*stem[: int(rng.integers(1, 121))], *rng.integers(0, 400, 9).tolist()] for _ in range(24)]
    found = []
    for limit in (0, room):
        engine = Engine(decoder, tokenizer, Limits(running=4, waiting=99, prefix_bytes=limit))
        told: dict[tuple[int, int], list[Any]] = {}
        count = 0
        for turn in range(2):
            for i, ids in enumerate(prompts):
                task = Task(ids, 5, SamplingConfig(), top=3)
                here = told[turn, i] = []
                engine.submit([task], lambda work, piece, here=here: here.append(piece))
                count += 1
        run(engine, [], lambda engine=engine, count=count: engine.counts.finished == count)
        assert engine.counts.prefix_bytes <= limit
        assert bool(engine.counts.cached_tokens) == bool(limit)
        found.append(told)
    assert found[0] == found[1] and len(found[0]) == 48


def test_what_clients_are_told(tmp_path: Path) -> None:
    decoder, tokenizer = model(tmp_path)
    ids = np.random.default_rng(6).integers(0, 400, 100).tolist()
    want = generate(decoder, tokenizer, ids, 4)
    with serving(decoder, tokenizer, prefix_bytes=1 << 20) as server, server.client() as client:
        ask: dict[str, Any] = {"model": "test/model", "prompt": ids, "max_tokens": 4}
        for told in (0, 96):
            done = client.completions.create(**ask)
            assert done.usage is not None and done.usage.prompt_tokens_details is not None
            assert done.usage.prompt_tokens_details.cached_tokens == told and done.choices[0].text == want
        *_, last = client.completions.create(**ask, stream=True, stream_options={"include_usage": True})
        assert last.usage is not None and last.usage.prompt_tokens_details is not None
        assert last.usage.prompt_tokens_details.cached_tokens == 96
        text = httpx.get(f"{server.url}/metrics").text
    assert "prompt_cached_tokens_total 192" in text and f"prompt_cache_bytes {3 * BYTES}" in text
    assert "prompt_cache_blocks 3" in text and "kv_cache_bytes 0" in text

"""A memory tracker in use is told of loading and of every stream; without one nothing is."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest

from bitnet_mlx import MemoryTracker, generate, load, stream_generate
from bitnet_mlx.errors import MemoryLimitError
from bitnet_mlx.models.cache import KVCache
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from tests.support.random_model import random_weights, tiny_config


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_scopes_and_owners(backend: str) -> None:
    with MemoryTracker(interval_s=0) as tracker:
        model, tokenizer = load(backend=backend)
        generate(model, tokenizer, "import ", max_tokens=4)
        owners = tracker.owners()
    names = [scope.name for scope in tracker.scopes]
    assert names == ["load/tokenizer", "load", "generate/prefill", "generate"]
    assert owners["weights"] > 3 << 20
    assert owners["head"] > 1 << 20
    assert owners["activations"] > 0
    assert owners["kv_cache"] == 0
    whole = tracker.scopes[-1]
    assert whole.owner_peaks["kv_cache"] >= 64 * 2 * 8 * 2 * 64 * 4  # 64 positions of 8 layers with 2 heads of 64
    assert tracker.leaks() == []
    assert len(tracker.timeline) >= 4 + 2 * 4


def test_a_stream_that_is_kept_keeps_its_cache_and_is_named() -> None:
    model, tokenizer = load(backend="numpy")
    with MemoryTracker() as tracker:
        caches = []
        make = model.make_cache
        model.make_cache = lambda limit=None: caches.append(make(limit)) or caches[-1]  # type: ignore[method-assign]
        generate(model, tokenizer, "x", max_tokens=1)
    (leak,) = tracker.leaks()
    assert (leak.scope, leak.owner, leak.label) == ("generate", "kv_cache", "the stream's cache")
    assert any("'caches'" in text or "in a list" in text for text in leak.held_by)


def test_a_cache_that_the_caller_gave_is_no_leak() -> None:
    model, tokenizer = load(backend="numpy")
    cache = model.make_cache()
    with MemoryTracker() as tracker:
        list(stream_generate(model, tokenizer, "x", 1, cache=cache))
    assert tracker.leaks() == []
    assert tracker.owners()["kv_cache"] == cache.nbytes


def test_a_stream_may_be_closed_by_another_thread() -> None:
    model, tokenizer = load(backend="numpy")
    with MemoryTracker() as tracker:
        stream = stream_generate(model, tokenizer, "x", 5)
        next(stream)
        thread = threading.Thread(target=stream.close)  # type: ignore[attr-defined]
        thread.start()
        thread.join()
        assert tracker.sample().scope == ""
    assert [scope.name for scope in tracker.scopes] == ["generate/prefill", "generate"]


def test_a_full_machine_takes_no_new_prompt() -> None:
    model, tokenizer = load(backend="numpy")
    with MemoryTracker(limit=1 << 20, act=True), pytest.raises(MemoryLimitError, match="a prompt is refused"):
        stream_generate(model, tokenizer, "x", 1)


def test_without_a_tracker_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: MemoryTracker) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr(MemoryTracker, "sample", fail)
    model, tokenizer = load(backend="numpy")
    generate(model, tokenizer, "x", max_tokens=2)


def test_a_cache_shrinks_and_goes_on_with_the_same_numbers() -> None:
    decoder = NumpyDecoder(random_weights(tiny_config()))
    shrunk, whole = decoder.make_cache(), decoder.make_cache()
    for cache in (shrunk, whole):
        decoder.step([[1, 2, 3]], [cache])
    assert isinstance(shrunk, KVCache)
    before = shrunk.nbytes
    assert shrunk.shrink() == before - shrunk.nbytes == before * 61 // 64
    assert shrunk.capacity == 3
    assert shrunk.shrink() == 0
    assert np.array_equal(decoder.step([[4]], [shrunk])[0], decoder.step([[4]], [whole])[0])


def test_a_peak_is_told_in_bytes() -> None:
    """A process whose memory only grows is at its peak: what psutil counts at that moment."""
    program = (
        "import numpy as np, psutil\n"
        "from bitnet_mlx.generation.measure import peak_memory_bytes\n"
        "held = np.ones(40_000_000)\n"
        "print(peak_memory_bytes(), psutil.Process().memory_info().rss)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    peak, now = map(int, done.stdout.split())
    assert now > 320_000_000 and abs(peak - now) < 0.01 * now

#!/usr/bin/env python
"""What batching gives a server on the cpu engine: tokens/s at 1, 4, 8 and 16 streams against one at a time, and the time to
the first token of a short request while a prompt of 2,000 tokens is computed.

PYTHONPATH=. .venv/bin/python benchmarks/bench_serve.py --record benchmarks/results/serve.jsonl

Models: the embedded one, and 6 layers of bitnet-b1.58-2B-4T's shapes with random weights and an 8-bit head of a fifth of its
128,256 rows, as 6 layers are a fifth of its 30. Requests go through HTTP on 127.0.0.1 as streams of fixed length; the numbers of
streams are taken in turns within one run, so that a busy machine slows all of them. Each line gives the prediction: a step
of M rows by the engine alone, without the server.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bitnet_mlx.api import embedded_model, load
from bitnet_mlx.bench.random_decoder import config_2b, random_decoder
from bitnet_mlx.bench.samples import Spread, take_turns
from bitnet_mlx.bench.stamp import append, stamp
from bitnet_mlx.models.decoder_cpu import CpuDecoder
from bitnet_mlx.serve.engine import STEP_TOKENS
from bitnet_mlx.serve.server import Server, listen
from bitnet_mlx.serve.service import open_service
from bitnet_mlx.tokenizer import load_tokenizer

STREAMS = (1, 4, 8, 16)
LAYERS, ROWS = 6, 128256 // 5
PROMPT, LONG = 32, 2000


@contextmanager
def serving(decoder: Any) -> Any:
    """The url of a server over a decoder, with the embedded model's tokenizer and no beginnings kept."""
    tokenizer = load_tokenizer(embedded_model())
    service = open_service(decoder, tokenizer, "bench/model", kv_bytes=4 << 30, prefix_bytes=0)
    with listen("127.0.0.1", 0) as listening:
        server = Server(service.app, listening)
        thread = threading.Thread(target=server.serve_until_told)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def stream(url: str, length: int, tokens: int, seed: int = 0) -> list[float]:
    """Seconds of perf_counter: the start, and each token's line, for a random prompt of ids that all models here have."""
    # Log probabilities are asked for because every token then has a line; an end of text would make a stream shorter.
    body = {
        "model": "bench/model", "prompt": np.random.default_rng(seed).integers(300, 1000, length).tolist(),
        "max_tokens": tokens, "stream": True, "temperature": 0, "logprobs": 0, "logit_bias": {str(i): -100 for i in range(4)},
    }  # fmt: skip
    times = [time.perf_counter()]
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=600) as response:
        if response.status_code != 200:
            raise SystemExit(f"[bench] the server answered {response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    return times


def rate(url: str, streams: int, tokens: int) -> float:
    """Tokens a second of so many streams at once, each from its first token on, added up."""
    with ThreadPoolExecutor(streams) as pool:
        times = list(pool.map(lambda seed: stream(url, PROMPT, tokens, seed), range(streams)))
    return sum((tokens - 1) / (t[-1] - t[1]) for t in times)


def first_token_behind(url: str) -> tuple[float, float]:
    """(seconds to the first token of a short request that comes while a long prompt is computed, seconds of the long
    prompt)."""
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(stream, url, LONG, 2)
        while httpx.get(f"{url}/health").json()["running"] == 0:
            time.sleep(0.001)
        time.sleep(0.05)
        times = stream(url, 8, 1)
        whole = long.result()
    assert times[1] < whole[1], "the long prompt was through before"
    return times[1] - times[0], whole[1] - whole[0]


def step_seconds(decoder: Any, rows: int, count: int) -> Callable[[], float]:
    """Seconds of a step of one token of each of `rows` texts, the engine alone."""
    caches = [decoder.make_cache(PROMPT + 8) for _ in range(rows)]
    decoder.step([[i % 60 for i in range(PROMPT)]] * rows, caches)

    def run() -> float:
        start = time.perf_counter()
        for i in range(count):
            for cache in caches:
                cache.trim(PROMPT)
            decoder.step([[i + 5]] * rows, caches)
        return (time.perf_counter() - start) / count

    return run


def chunk_seconds(decoder: Any) -> Callable[[], float]:
    """Seconds of one step of a long prompt, in the middle of it."""
    cache = decoder.make_cache(LONG)
    decoder.step([[i % 60 for i in range(LONG // 2)]], [cache])

    def run() -> float:
        cache.trim(LONG // 2)
        start = time.perf_counter()
        decoder.step([[i % 60 for i in range(STEP_TOKENS)]], [cache])
        return time.perf_counter() - start

    return run


def measure(name: str, decoder: Any, tokens: int, repeats: int, long: bool) -> dict[str, Any]:
    """One model's record, and its lines."""
    engine = take_turns({str(m): step_seconds(decoder, m, 4) for m in STREAMS}, repeats)
    steps = {m: statistics.median(engine[str(m)]) for m in STREAMS}
    # The clients are a process of their own, as they would be: here they would take the server's interpreter in turns.
    with serving(decoder) as url, ProcessPoolExecutor(1, get_context("spawn")) as clients:
        rates = take_turns(
            {str(m): lambda m=m: clients.submit(rate, url, m, tokens).result() for m in STREAMS}, repeats
        )
        found: dict[str, Any] = {"model": name, "tokens": tokens, "streams": {}}
        one = statistics.median(rates["1"])
        for m in STREAMS:
            got = Spread.of(rates[str(m)])
            ratio, foreseen = got.p50 / one, m * steps[1] / steps[m]
            found["streams"][m] = {
                "tokens_s": vars(got), "ratio": ratio, "engine_step_s": steps[m], "engine_ratio": foreseen,
            }  # fmt: skip
            print(
                f"{name:>9}  {m:2} streams  {got.p50:8.1f} tokens/s ({got.p20:.1f} to {got.p80:.1f})  {ratio:5.2f} times one  "
                f"engine alone {foreseen:5.2f}", flush=True,
            )  # fmt: skip
        if long:
            turns = take_turns({"chunk": chunk_seconds(decoder)}, repeats)
            pairs = [clients.submit(first_token_behind, url).result() for _ in range(repeats)]
            first, chunk = statistics.median(p[0] for p in pairs), statistics.median(turns["chunk"])
            # The chunk's time as it was while these requests ran: the long prompt's, divided by its number of steps.
            beside = statistics.median(p[1] for p in pairs) / -(-LONG // STEP_TOKENS)
            found |= {
                "first_token_s": first,
                "chunk_s": chunk,
                "chunk_beside_s": beside,
                "first_token_chunks": first / beside,
            }
            print(
                f"{name:>9}  first token beside a prompt of {LONG}: {first * 1e3:.0f} ms, {first / beside:.2f} chunks of "
                f"{beside * 1e3:.0f} ms ({chunk * 1e3:.0f} ms alone)", flush=True,
            )  # fmt: skip
    return found


def main() -> None:
    """Both models, a record at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=24, help="of each stream (default: 24)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--record", type=Path, help="add the record to this file")
    args = parser.parse_args()
    small, _ = load(backend="cpu")
    models = [measure("embedded", small, 4 * args.tokens, args.repeats, long=False)]
    large = CpuDecoder(random_decoder(config_2b(args.layers, ROWS)))
    models.append(measure(f"{args.layers} layers", large, args.tokens, args.repeats, long=True))
    record = {"bench": "serve", "head_rows": ROWS, "prompt": PROMPT, "models": models, **stamp("cpu")}
    if args.record:
        append(record, args.record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()

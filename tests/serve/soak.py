"""A soak: many requests of mixed kinds at once, a third of them malformed or left by their clients.

    python -m tests.serve.soak --requests 1000 --at-once 32

starts `bitnet-mlx serve` with the embedded model on the cpu engine, on 127.0.0.1, and checks each answer against a single
run of the same text: equal to the last token. The last line is a JSON record; exit 1 where anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bitnet_mlx.generation import SamplingConfig, generate

COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
PATTERN = "[a-z]{3,8}=[0-9]{1,4}"
GREEDY, SAMPLED = {"temperature": 0}, {"temperature": 0.8, "top_p": 0.95}
# Bodies that are refused, by what is wrong with them: (changes, status).
MALFORMED: dict[str, tuple[dict[str, Any], int]] = {
    "a wrong type": ({"max_tokens": "5"}, 400),
    "a huge number": ({"max_tokens": 10**40}, 400),
    "an unknown field": ({"speed": "fast"}, 400),
    "an unknown model": ({"model": "somebody/else"}, 404),
    "an unknown token": ({"prompt": [10**7]}, 400),
    "too long a prompt": ({"prompt": [1] * 100_000}, 400),
    "too many stops": ({"stop": ["x"] * 99}, 400),
    "a temperature below zero": ({"temperature": -1}, 400),
}


@dataclass
class Result:
    """counts: requests by kind. wrong: what should not have been. rss: bytes of the server's process, in the course of it."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    compared: int = 0
    seconds: float = 0.0

    @property
    def growth(self) -> int:
        """From the first third to the end."""
        return self.rss[-1] - max(self.rss[: max(1, len(self.rss) // 3)])


class Soak:
    """reference: (ids, tokens, sampling) -> the text of a single run."""

    def __init__(
        self, url: str, name: str, prompts: Sequence[list[int]], reference: Callable[..., str], rss: Callable[[], int]
    ) -> None:
        self.url, self.name, self.prompts, self.reference, self.rss = url, name, prompts, reference, rss
        self.result = Result()
        self._known: dict[tuple[int, int, int | None], str] = {}
        self._first: dict[Any, str] = {}

    def run(self, requests: int, at_once: int, seed: int = 0) -> Result:
        """Ask, and check what is left in the server afterwards."""
        began = time.monotonic()
        asyncio.run(self._all(requests, at_once, np.random.default_rng(seed)))
        self.result.seconds = time.monotonic() - began
        self._check_rest()
        return self.result

    async def _all(self, requests: int, at_once: int, rng: np.random.Generator) -> None:
        turns = iter(range(requests))
        limits = httpx.Limits(max_connections=2 * at_once, max_keepalive_connections=at_once)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as client:

            async def worker() -> None:
                for number in turns:
                    kind, ask = self._choose(number, rng)
                    self.result.counts[kind] += 1
                    try:
                        await ask(client)
                    except (AssertionError, KeyError, ValueError, OSError, httpx.HTTPError) as error:  # a lost answer
                        self.result.wrong.append(f"{number} {kind}: {type(error).__name__}: {error}")
                    if number % max(1, requests // 30) == 0:
                        self.result.rss.append(self.rss())

            await asyncio.gather(*(worker() for _ in range(at_once)))
        self.result.rss.append(self.rss())

    def _choose(
        self, number: int, rng: np.random.Generator
    ) -> tuple[str, Callable[[httpx.AsyncClient], Awaitable[None]]]:
        which, count = int(rng.integers(len(self.prompts))), int(rng.integers(1, 24))
        seed = None if rng.random() < 0.7 else int(rng.integers(4))
        body = self._body(which, count, seed)
        if number % 6 == 2:
            kind = list(MALFORMED)[int(rng.integers(len(MALFORMED)))]
            changes, status = MALFORMED[kind]
            return kind, lambda client: self._refused(client, json.dumps({**body, **changes}), status)
        if number % 6 == 5:
            style = int(rng.integers(4))
            if style == 0:
                return "broken JSON", lambda client: self._refused(client, json.dumps(body)[:-1], 400)
            if style == 1:
                return "left while sending", lambda client: self._half(json.dumps(body).encode())
            if style == 2:
                return "left while waiting", lambda client: self._leave(client, {**body, "max_tokens": 400})
            lines = int(rng.integers(1, 4))
            return "left while reading", lambda client: self._leave_stream(client, {**body, "max_tokens": 400}, lines)
        form = rng.random()
        if form < 0.1:
            asked = {"model": self.name, "input": self.prompts[which], "encoding_format": "base64"}
            return "embedding", lambda client: self._embedding(client, asked, which)
        if form < 0.2:
            asked = {**body, "max_tokens": 30, "structured_outputs": {"regex": PATTERN}}
            return "of a pattern", lambda client: self._pattern(client, asked, (which, seed))
        if form < 0.5:
            return "streamed", lambda client: self._streamed(client, body, which, count, seed)
        n = int(rng.integers(1, 3))
        return f"whole, n {n}", lambda client: self._whole(client, {**body, "n": n}, which, count, seed)

    def _body(self, which: int, count: int, seed: int | None) -> dict[str, Any]:
        how = GREEDY if seed is None else {**SAMPLED, "seed": seed}
        return {"model": self.name, "prompt": self.prompts[which], "max_tokens": count, **how}

    def _want(self, which: int, count: int, seed: int | None) -> str:
        self.result.compared += 1
        key = which, count, seed
        if key not in self._known:
            how = SamplingConfig() if seed is None else SamplingConfig(temp=0.8, top_p=0.95, seed=seed)
            self._known[key] = self.reference(self.prompts[which], count, how)
        return self._known[key]

    async def _same(self, text: str, which: int, count: int, seed: int | None) -> None:
        want = await asyncio.to_thread(self._want, which, count, seed)
        assert text == want, f"prompt {which}, {count} tokens, seed {seed}: {text!r}, alone {want!r}"

    async def _embedding(self, client: httpx.AsyncClient, body: dict, which: int) -> None:
        response = await self._post(client, json.dumps(body), EMBEDDINGS)
        assert response.status_code == 200, response.text
        self._again("embedding", which, response.json()["data"][0]["embedding"])

    async def _pattern(self, client: httpx.AsyncClient, body: dict, key: tuple[int, int | None]) -> None:
        response = await self._post(client, json.dumps(body))
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        assert choice["finish_reason"] == "stop" and re.fullmatch(PATTERN, choice["text"]), choice
        self._again("pattern", key, choice["text"])

    def _again(self, kind: str, key: Any, value: str) -> None:
        """The same question has the same answer, whatever else was in the batch."""
        assert self._first.setdefault((kind, key), value) == value
        self.result.compared += 1

    async def _post(self, client: httpx.AsyncClient, content: str, path: str = COMPLETIONS) -> httpx.Response:
        """Where the queue is full the client comes again, as it is told to."""
        for _ in range(100):
            response = await client.post(path, content=content, headers={"Content-Type": "application/json"})
            if response.status_code != 429:
                break
            self.result.counts["told to come again"] += 1
            await asyncio.sleep(int(response.headers["retry-after"]))
        return response

    async def _whole(self, client: httpx.AsyncClient, body: dict, which: int, count: int, seed: int | None) -> None:
        response = await self._post(client, json.dumps(body))
        assert response.status_code == 200, response.text
        answer = response.json()
        assert len(answer["choices"]) == body["n"]
        assert answer["usage"]["prompt_tokens"] == len(self.prompts[which])
        for index, choice in enumerate(answer["choices"]):
            assert choice["finish_reason"] in ("stop", "length")
            await self._same(choice["text"], which, count, None if seed is None else seed + index)

    async def _streamed(self, client: httpx.AsyncClient, body: dict, which: int, count: int, seed: int | None) -> None:
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        text, finish, lines = "", None, []
        async with client.stream("POST", COMPLETIONS, json=body) as response:
            if response.status_code == 429:
                await response.aread()
                self.result.counts["told to come again"] += 1
                await asyncio.sleep(int(response.headers["retry-after"]))
                return await self._streamed(client, body, which, count, seed)
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line:
                    lines.append(line.removeprefix("data: "))
        assert lines[-1] == "[DONE]", lines[-1]
        for chunk in map(json.loads, lines[:-1]):
            for choice in chunk["choices"]:
                text, finish = text + choice["text"], choice["finish_reason"]
        assert finish in ("stop", "length") and chunk["usage"]["completion_tokens"] <= count
        await self._same(text, which, count, seed)
        return None

    async def _refused(self, client: httpx.AsyncClient, content: str, status: int) -> None:
        response = await self._post(client, content)
        assert response.status_code == status, (response.status_code, response.text[:200])
        assert response.json()["error"]["message"]

    async def _half(self, content: bytes) -> None:
        host, port = self.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content[: len(content) // 2])
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def _leave(self, client: httpx.AsyncClient, body: dict) -> None:
        asked = asyncio.ensure_future(client.post(COMPLETIONS, json=body))
        await asyncio.wait((asked,), timeout=0.05)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)

    async def _leave_stream(self, client: httpx.AsyncClient, body: dict, lines: int) -> None:
        async with client.stream("POST", COMPLETIONS, json={**body, "stream": True}) as response:
            if response.status_code == 429:
                return
            assert response.status_code == 200
            async for _ in response.aiter_lines():
                lines -= 1
                if lines <= 0:
                    break

    def _check_rest(self) -> None:
        """Once the last texts that were left have been noticed, nothing runs, waits or is held."""
        with httpx.Client(base_url=self.url, timeout=60) as client:
            for _ in range(600):
                told = client.get("/health").json()
                if (told["running"], told["waiting"]) == (0, 0):
                    break
                time.sleep(0.05)
            else:
                self.result.wrong.append(f"still at work: {told}")
            text = client.get("/metrics").text
        for line in (
            "bitnet_mlx_kv_cache_bytes 0",
            "bitnet_mlx_texts_failed_total 0",
            "bitnet_mlx_texts_timed_out_total 0",
        ):
            if line not in text.splitlines():
                self.result.wrong.append(f"/metrics does not say {line!r}")


def make_prompts(vocabulary: int, longest: int, count: int, seed: int = 7) -> list[list[int]]:
    """Random ids, of which many begin alike."""
    rng = np.random.default_rng(seed)
    stems = [rng.integers(4, vocabulary, longest).tolist() for _ in range(4)]
    made = []
    for i in range(count):
        stem, new = stems[i % 4][: int(rng.integers(0, longest))], rng.integers(4, vocabulary, int(rng.integers(1, 20)))
        made.append([*stem, *new.tolist()])
    return made


def main() -> int:
    """The whole soak, on a process of its own."""
    import psutil

    from bitnet_mlx import load
    from bitnet_mlx.bench.stamp import append, stamp
    from tests.serve.test_command import started

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="add the record to this file")
    args = parser.parse_args()
    model, tokenizer = load(backend="cpu")
    prompts = make_prompts(model.config.vocab_size, 300, 40)
    cap = 16_000_000
    with started("--backend", "cpu", "--pooling", "mean", "--prompt-cache-bytes", str(cap)) as (process, url):
        soak = Soak(
            url, "embedded", prompts, lambda ids, count, how: generate(model, tokenizer, ids, count, sampling=how),
            lambda: psutil.Process(process.pid).memory_info().rss,
        )  # fmt: skip
        result = soak.run(args.requests, args.at_once, args.seed)
        metrics = httpx.get(f"{url}/metrics").text
    told = {
        line.split()[0].removeprefix("bitnet_mlx_"): float(line.split()[1])
        for line in metrics.splitlines()
        if line.startswith(("bitnet_mlx_prompt", "bitnet_mlx_texts", "bitnet_mlx_steps", "bitnet_mlx_generated"))
    }
    if told["prompt_cache_bytes"] > cap:
        result.wrong.append(f"{told['prompt_cache_bytes']} bytes of beginnings are kept; {cap} are allowed")
    record = {
        "bench": "soak", "requests": args.requests, "at_once": args.at_once, "seed": args.seed,
        "seconds": round(result.seconds, 1), "kinds": dict(sorted(result.counts.items())), "compared": result.compared,
        "wrong": result.wrong[:20], "rss_bytes": result.rss, "rss_growth_bytes": result.growth, "metrics": told,
        **stamp("cpu"),
    }  # fmt: skip
    if args.record:
        append(record, args.record)
    print(json.dumps(record))
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

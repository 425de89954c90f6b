"""Prompt look-up in the server: the same answers in fewer steps, for a text that is alone."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.serve.running import Running, model, serving, until

PROMPT = [5, 6, 7, 8, 5, 6, 7, 8, 5, 6]
WAYS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.1, "seed": 3, "top_p": 0.9, "frequency_penalty": 0.3},
    {"temperature": 0, "logprobs": 2, "echo": True},
    {"temperature": 0.9, "seed": 4, "n": 2},
]


def answers(server: Running, **more: Any) -> list[Any]:
    """What each way of asking gives, one after another; then one that is stopped by a string."""
    found = []
    with server.client() as client:
        for way in WAYS:
            done = client.completions.create(model="test/model", prompt=PROMPT, max_tokens=40, **way, **more)
            found.append([(c.text, c.finish_reason, c.logprobs) for c in done.choices])
        stop = found[0][0][0][10:14]
        done = client.completions.create(model="test/model", prompt=PROMPT, max_tokens=40, temperature=0, stop=stop)
        found.append((done.choices[0].text, done.choices[0].finish_reason))
    return found


def metric(server: Running, name: str) -> int:
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    return next(int(float(line.split()[1])) for line in lines if line.startswith(f"bitnet_mlx_{name} "))


def repeating(folder: Path) -> Any:
    """A model whose next token hangs on the last one alone, so that its greedy text runs in a circle."""
    decoder, tokenizer = model(folder, template=None, num_hidden_layers=1)
    for name, linear in decoder.weights.linears.items():
        if name.endswith(("o_proj", "down_proj")):
            linear.weight.scale[...] = np.float32(1e-6)
    return decoder, tokenizer


def test_the_same_answers_in_fewer_steps(tmp_path: Path) -> None:
    for make in (model, repeating):
        decoder, tokenizer = make(tmp_path / make.__name__)
        with serving(decoder, tokenizer) as server:
            want, steps = answers(server), len(decoder.steps)
        decoder, tokenizer = make(tmp_path / make.__name__)
        with serving(decoder, tokenizer, prompt_lookup=True, num_draft_tokens=4) as server:
            assert answers(server) == want
            assert httpx.get(server.url + "/health").json()["running"] == 0
            drafted, accepted = metric(server, "drafted_tokens_total"), metric(server, "accepted_tokens_total")
            assert metric(server, "generated_tokens_total") >= 4 * 40
        assert drafted == sum(n - 1 for (n,) in (s for s in decoder.steps if len(s) == 1) if 1 < n <= 5) > 0
        assert accepted <= drafted and len(decoder.steps) <= steps
    assert accepted > 40 and len(decoder.steps) < 0.8 * steps, "in a circle nearly all guesses are right"


def test_beside_another_text_nothing_is_guessed(tmp_path: Path) -> None:
    decoder, tokenizer = repeating(tmp_path)
    with serving(decoder, tokenizer, prompt_lookup=True, num_draft_tokens=4) as server, server.client() as client:

        def ask() -> str:
            return (
                client.completions.create(model="test/model", prompt=PROMPT, max_tokens=60, temperature=0)
                .choices[0]
                .text
            )

        alone = ask()
        decoder.gate = threading.Semaphore(3)
        texts: list[str] = []
        threads = [threading.Thread(target=lambda: texts.append(ask())) for _ in range(2)]
        threads[0].start()
        until(lambda: metric(server, "texts_running") == 1, "the first one runs")
        threads[1].start()
        until(lambda: metric(server, "texts_running") + metric(server, "texts_waiting") == 2, "the second one has come")
        decoder.steps.clear()
        decoder.gate.release(100_000)
        for thread in threads:
            thread.join()
        assert texts == [alone, alone]
        assert all(n == 1 or len(PROMPT) in step for step in decoder.steps if len(step) == 2 for n in step)
        assert any(step == [1, 1] for step in decoder.steps)


def test_a_number_without_guesses_is_refused() -> None:
    command = [sys.executable, "-m", "bitnet_mlx", "serve", "--num-draft-tokens", "3", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--num-draft-tokens was given and nothing guesses" in done.stderr

"""Models beside the first: loaded when a request names one that is listed, one at a time, and never another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.testclient import TestClient

from bitnet_mlx.api import embedded_model
from bitnet_mlx.errors import ConfigError, FormatError, MemoryLimitError
from bitnet_mlx.generation import generate
from bitnet_mlx.memory.plan import Machine
from bitnet_mlx.serve import budget
from bitnet_mlx.serve.app import make_app
from bitnet_mlx.serve.failures import ApiError
from bitnet_mlx.serve.fleet import Fleet, Served
from bitnet_mlx.serve.service import loaders, open_service, serve_model
from tests.serve.running import Running, model, serving, until


class Others:
    """What may be loaded: "b" and "c", which load, and "broken". `asked` tells what was; loading waits for `gate`."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.models = {name: model(folder / name, num_hidden_layers=layers) for name, layers in (("b", 1), ("c", 3))}
        self.loaders = {name: self._loader(name) for name in ("b", "c", "broken")}

    def _loader(self, name: str) -> Callable[[], Any]:
        def load() -> Any:
            self.asked.append(name)
            assert self.gate.wait(30)
            if name == "broken":
                raise FormatError("[read] the file is cut short")
            return self.models[name]

        return load


@pytest.fixture
def others(tmp_path: Path) -> Others:
    return Others(tmp_path)


@pytest.fixture
def server(tmp_path: Path, others: Others) -> Iterator[Running]:
    with serving(*model(tmp_path / "a"), others=others.loaders) as running:
        yield running


def ask(server: Running, name: str, **more: Any) -> str:
    with server.client() as client:
        return client.completions.create(**{"model": name, "prompt": "hello", "max_tokens": 4, **more}).choices[0].text


def test_listed_models_are_loaded_when_they_are_named(server: Running, others: Others) -> None:
    want = {name: generate(*made, "hello", 4) for name, made in others.models.items()}
    want["test/model"] = generate(server.decoder, server.tokenizer, "hello", 4)
    assert len(set(want.values())) == 3
    for name in ("test/model", "b", "b", "c", "test/model", "c", "b"):
        assert ask(server, name) == want[name]
    assert others.asked == ["b", "c", "b"], "one beside the first is held"
    with server.client() as client:
        listed = {m.id: m.loaded for m in client.models.list()}  # type: ignore[attr-defined]
        assert listed == {"test/model": True, "b": True, "c": False, "broken": False}
        assert client.models.retrieve("c").loaded is False  # type: ignore[attr-defined]
    text = httpx.get(f"{server.url}/metrics").text
    assert "texts_finished_total 7" in text and "generated_tokens_total 28" in text


def test_no_other_is_ever_loaded(server: Running, others: Others) -> None:
    for name in ("microsoft/bitnet-b1.58-2B-4T", "../b", "B", ""):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(server, name)
        assert caught.value.code == "model_not_found"
    assert httpx.get(f"{server.url}/v1/models/other").status_code == 404
    assert others.asked == []


def test_the_first_model_answers_while_another_loads(server: Running, others: Others) -> None:
    others.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ask, server, "b") for _ in range(2)]
        until(lambda: others.asked == ["b"], "it loads")
        assert ask(server, "test/model")
        others.gate.set()
        assert waiting[0].result(60) == waiting[1].result(60)
    assert others.asked == ["b"]


def test_one_that_is_in_use_is_not_taken_away(server: Running, others: Others) -> None:
    decoder = others.models["b"][0]
    decoder.gate = threading.Semaphore(1)
    with server.client() as client:
        stream = client.completions.create(model="b", prompt="hello", max_tokens=50, stream=True)
        next(stream)
        with pytest.raises(openai.InternalServerError) as caught:
            ask(server, "c")
        assert caught.value.status_code == 503 and caught.value.code == "model_busy"
        assert caught.value.response.headers["retry-after"] == "5"
        assert ask(server, "test/model")
        stream.close()  # its client leaves
    decoder.gate.release(100)
    until(lambda: free(server, "c"), "its place is free")
    assert others.asked == ["b", "c"]


def free(server: Running, name: str) -> bool:
    body = {"model": name, "prompt": "hello", "max_tokens": 1}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).status_code == 200


def test_one_that_cannot_be_loaded(server: Running, others: Others) -> None:
    for _ in range(2):
        with pytest.raises(openai.InternalServerError, match="broken could not be loaded: .* cut short") as caught:
            ask(server, "broken")
        assert caught.value.status_code == 503 and caught.value.code == "model_load_failed"
    assert ask(server, "b") and ask(server, "test/model")
    for _ in range(3):  # what is refused holds no model
        with pytest.raises(openai.BadRequestError):
            ask(server, "b", logit_bias={"999999": 1})
    assert ask(server, "c")


def test_engines_end_with_their_models(tmp_path: Path, others: Others) -> None:
    """One that gives its place to another ends its thread, and nothing is loaded once the server is ending."""

    def running() -> int:
        return sum(thread.name == "bitnet-mlx engine" for thread in threading.enumerate())

    before = running()

    def load(name: str) -> Served:
        decoder, tokenizer = others.loaders[name]()
        return serve_model(decoder, tokenizer, name)

    fleet = Fleet(serve_model(*model(tmp_path / "a"), "a"), ("b", "c"), load)
    fleet.start()
    for name in ("b", "c", "b"):
        fleet.release(fleet.take(name))
        assert running() == before + 2
    fleet.stop()
    assert running() == before
    with pytest.raises(ApiError, match="shutting down"):
        fleet.take("c")
    assert others.asked == ["b", "c", "b"]


def test_a_fault_of_ours_tells_its_kind_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(serve_model(*model(tmp_path / "a"), "a"))

    def take(_: str) -> Served:
        raise RuntimeError("/home/somebody/secret")

    monkeypatch.setattr(fleet, "take", take)
    with TestClient(make_app(fleet)) as client:
        answer = client.post("/v1/completions", json={"model": "a", "prompt": "x"})
    assert answer.status_code == 500 and "RuntimeError" in answer.text and "secret" not in answer.text


def test_embeddings_hold_their_model_no_longer_than_they_take(tmp_path: Path, others: Others) -> None:
    with serving(*model(tmp_path / "a"), others=others.loaders, pooling="mean") as server:
        body = {"model": "b", "input": "hello"}
        for wrong, status in (({}, 200), ({"dimensions": 10**6}, 400)):
            assert httpx.post(f"{server.url}/v1/embeddings", json={**body, **wrong}, timeout=30).status_code == status
            assert ask(server, "c")
        assert "\nbitnet_mlx_generated_tokens_total 8\n" in httpx.get(f"{server.url}/metrics").text, (
            "of two texts alone"
        )


def test_folders_are_listed_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(embedded_model())
    found = loaders([folder], "numpy")
    decoder, tokenizer = found["tiny"]()
    assert generate(decoder, tokenizer, "import ", 2)
    with pytest.raises(ConfigError, match="'tiny' twice"):
        loaders([folder, folder], "numpy")
    with pytest.raises(ConfigError, match="'tiny', which is served already"):
        open_service(decoder, tokenizer, folder, others=found)
    monkeypatch.setattr(budget, "this_machine", lambda _: Machine(1 << 34, 1 << 20))
    with pytest.raises(MemoryLimitError, match="takes .* and 1.0 MiB are free"):
        found["tiny"]()

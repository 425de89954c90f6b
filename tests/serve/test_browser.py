"""The page in a real Chromium: typed to, streamed to, stopped, looked at."""

from __future__ import annotations

import re
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bitnet_mlx.serve.app import Options
from bitnet_mlx.tokenizer import load_tokenizer
from tests.serve.browser import PROGRAM, Page, browsing
from tests.serve.running import Running, model, serving, until
from tests.support import tiny_tokenizers as tiny
from tests.support.scripted_model import ScriptedDecoder

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed")
ANSWERS = "[...document.querySelectorAll('.turn:not(.mine):not(.told)')].map(turn => turn.textContent)"
LAST = f"{ANSWERS}.at(-1) || ''"
TOLD = "[...document.querySelectorAll('.told')].map(turn => turn.textContent).at(-1) || ''"
ENTER, ESCAPE = ("Enter", 13), ("Escape", 27)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def visit(page: Page, server: Running, about: str = "context of") -> None:
    page.asked.clear()
    page.problems.clear()
    page.open(server.url + "/")
    page.until(f"document.getElementById('about').textContent.includes({about!r})")
    page.value("document.getElementById('most').value = 30, document.getElementById('temperature').value = 0")


def check_stayed(page: Page, server: Running) -> None:
    """No request went anywhere else, and nothing was complained of."""
    assert page.asked and all(url.startswith(server.url + "/") for url in page.asked), page.asked
    assert page.problems == []


def idle(server: Running) -> bool:
    return httpx.get(server.url + "/health").json()["running"] == 0


def test_a_conversation_that_is_streamed_and_stopped(page: Page, tmp_path: Path) -> None:
    decoder, tokenizer = model(tmp_path, max_position_embeddings=2048)
    with serving(decoder, tokenizer) as server:
        visit(page, server)
        page.type("hello")
        page.press(*ENTER, shift=True)
        page.type("world")
        page.press(*ENTER)
        told = page.until(TOLD)
        assert re.fullmatch(r"\d+ \+ 30 tokens, first after .* s, .* tokens/s \(length\)", told)
        first = page.value(LAST)
        assert page.value("document.querySelector('.mine').textContent") == "hello\nworld"
        messages = [{"role": "user", "content": "hello\nworld"}]
        with server.client() as client:
            options: Any = {"model": "test/model", "temperature": 0, "max_tokens": 30}
            assert client.chat.completions.create(messages=messages, **options).choices[0].message.content == first

            decoder.gate = threading.Semaphore(6)  # the second answer comes to a stand
            page.type("again")
            page.press(*ENTER)
            page.until(f"{ANSWERS}.length == 2 && {LAST}")
            assert page.value("document.getElementById('send').textContent") == "Stop"
            page.value("document.getElementById('send').click()")
            assert page.until(TOLD, lambda text: text != told) == "stopped"
            decoder.gate.release(1)  # the step in progress ends; there is no other
            until(lambda: idle(server), "the stopped answer left the engine")
            decoder.gate = None
            part = page.value(LAST)
            messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "again"}]
            whole = client.chat.completions.create(messages=messages, **options).choices[0].message.content or ""
            assert part and whole.startswith(part) and part != whole

        decoder.gate = threading.Semaphore(5)
        page.type("once more")
        page.press(*ENTER)
        page.until(f"{ANSWERS}.length == 3 && {LAST}")
        page.press(*ESCAPE)
        page.until(f"{TOLD} == 'stopped' && document.getElementById('send').textContent == 'Send'")
        decoder.gate.release(1000)
        page.value("document.getElementById('clear').click()")
        assert page.value("document.getElementById('turns').children.length") == 0
        check_stayed(page, server)


def test_a_base_model_goes_on_with_its_text(page: Page, tmp_path: Path) -> None:
    decoder, tokenizer = model(tmp_path, template=None)
    with serving(decoder, tokenizer) as server:
        visit(page, server, "a base model")
        assert page.value("document.getElementById('send').textContent") == "Continue"
        page.press(*ENTER)  # nothing to go on with yet
        page.type("def read")
        page.press(*ENTER)
        page.until(TOLD)
        first = page.value(LAST)
        page.press(*ENTER)
        page.until(f"{ANSWERS}.length == 2 && document.querySelectorAll('.told').length == 2 && {TOLD}")
        with server.client() as client:
            options: Any = {"model": "test/model", "temperature": 0, "max_tokens": 30}
            assert client.completions.create(prompt="def read", **options).choices[0].text == first
            assert client.completions.create(prompt="def read" + first, **options).choices[0].text == page.value(LAST)
        check_stayed(page, server)


def test_thoughts_are_folded_and_not_sent_back(page: Page, tmp_path: Path) -> None:
    """Open while the model thinks, closed once it answers."""
    told = "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m['content'] | trim }}"
    template = tiny.CHAT.replace("{{ m['content'] | trim }}", told) + "{# </think> #}"
    tokenizer = load_tokenizer(tiny.byte_level(tmp_path, settings={"chat_template": template}))
    decoder = ScriptedDecoder(tokenizer, "<think>\nI <b>see</b>.\n</think>\n\nAye.", max_position_embeddings=2048)
    fold = "document.querySelector('details')"
    with serving(decoder, tokenizer, prefix_bytes=0) as server:
        visit(page, server)
        page.value("document.getElementById('most').value = 12")
        page.type("hello")
        page.press(*ENTER)
        page.until(f"{TOLD}.includes('(length)') && {fold}.open")
        assert page.value(LAST) == "" and "ThoughtsI <b>see".startswith(page.value(f"{fold}.textContent"))
        page.value("document.getElementById('clear').click(), document.getElementById('most').value = 60")
        page.type("hello")
        page.press(*ENTER)
        page.until(f"{TOLD}.includes('(stop)')")
        assert page.value(LAST) == "Aye." and page.value(f"{fold}.open") is False
        assert page.value(f"{fold}.textContent") == "ThoughtsI <b>see</b>."
        page.type("more")
        page.press(*ENTER)
        told = page.until(
            TOLD, lambda text: "stop" in text and page.value("document.querySelectorAll('.told').length") == 2
        )
        turns = ["user hello", "assistant Aye.", "user more"]
        messages = [dict(zip(("role", "content"), turn.split(), strict=True)) for turn in turns]
        assert told.startswith(f"{len(tokenizer.apply_chat_template(messages))} + ")
        check_stayed(page, server)


def test_dark_light_and_narrow(page: Page, tmp_path: Path) -> None:
    """Sizes and colours; the text is readable on its ground in both schemes, and nothing is wider than a phone."""
    with serving(*model(tmp_path)) as server:
        seen = {}
        for scheme, width in (("light", 1000), ("dark", 1000), ("dark", 360)):
            page.look(width, 640, scheme)
            visit(page, server)
            page.type("hello " * 40)
            page.press(*ENTER)
            page.until(TOLD)
            data = page.picture(tmp_path / f"{scheme}-{width}.png")
            assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (width, 640)
            assert page.value("document.documentElement.scrollWidth") <= width
            for place in ("name", "text", "send", "turns", "clear"):
                box = page.value(
                    f"JSON.parse(JSON.stringify(document.getElementById('{place}').getBoundingClientRect()))"
                )
                assert 0 <= box["left"] < box["right"] <= width and 0 <= box["top"] < box["bottom"] <= 640, (place, box)
            assert page.value("document.getElementById('name').getBoundingClientRect().height") < 40, "one line"
            style = "getComputedStyle(document.body)"
            ground, ink = (brightness(page.value(f"{style}.{part}")) for part in ("backgroundColor", "color"))
            assert abs(ground - ink) > 150
            seen[scheme] = ground
        assert seen["light"] > 200 and seen["dark"] < 60
        page.look(1000, 640, "light")


def brightness(colour: str) -> float:
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    return 0.3 * red + 0.6 * green + 0.1 * blue


def test_a_key_is_asked_for(page: Page, tmp_path: Path) -> None:
    with serving(*model(tmp_path), Options(api_key="secret")) as server:
        page.open(server.url + "/")
        page.until("!document.getElementById('keylabel').hidden && document.activeElement.id == 'key'")
        page.type("secret")
        page.press(*ENTER)
        page.until("document.getElementById('about').textContent.includes('context of')")

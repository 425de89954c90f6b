"""The page at /: one file that asks nobody but this server."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import httpx

from bitnet_mlx.serve.app import Options
from tests.serve.running import model, serving


class Loaded(HTMLParser):
    """What a page makes a browser load, and the labels of what a person can use."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.addresses += [str(found[name]) for name in ("src", "href", "action", "data") if name in found]
        self.ids |= {str(found["id"])} if "id" in found else set()


def test_the_page_is_served_to_all_and_needs_nothing_else(tmp_path: Path) -> None:
    with serving(*model(tmp_path), Options(api_key="secret")) as server:
        page = httpx.get(server.url + "/")
        assert httpx.get(server.url + "/v1/models").status_code == httpx.get(server.url + "/metrics").status_code == 401
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"].startswith("default-src 'none'; connect-src 'self';")
    loaded = Loaded(page.text)
    assert loaded.addresses == [] and not re.search(r"https?:|//\w|@import|url\(", page.text)
    used = set(re.findall(r'\bat\("(\w+)"\)', page.text))
    assert used <= loaded.ids, used - loaded.ids
    asked = set(re.findall(r'"(v1/[\w/]+)"', page.text))
    assert asked == {"v1/models", "v1/chat/completions", "v1/completions"}
    assert "prefers-color-scheme: dark" in page.text

"""Stop strings against the plain definition: the text before the first occurrence in the whole."""

from __future__ import annotations

import random

import pytest

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.generation.stops import StopStrings


def pieces_of(text: str, rng: random.Random) -> list[str]:
    pieces = []
    while text:
        size = rng.randrange(1, 5)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool, int]:
    """(text shown, stopped, most characters held back)."""
    checker, shown, fed, held = StopStrings(stops), "", "", 0
    for piece in pieces:
        text, met = checker.feed(piece)
        shown, fed = shown + text, fed + piece
        if met:
            return shown, True, held
        held = max(held, len(fed) - len(shown))
    return shown + checker.flush(), False, held


def test_against_the_definition() -> None:
    rng = random.Random(1)
    met = 0
    for _ in range(3000):
        text = "".join(rng.choices("ab\n", k=rng.randrange(14)))
        stops = ["".join(rng.choices("ab\n", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 3))]
        pieces = pieces_of(text, rng)
        shown, stopped, held = run(stops, pieces)
        # The piece that completes any stop string decides; of those within it, the earliest cuts.
        seen = ""
        for piece in pieces:
            seen += piece
            found = [seen.find(s) for s in stops if s in seen]
            if found:
                assert stopped and shown == seen[: min(found)], (stops, pieces)
                break
        else:
            assert not stopped and shown == text, (stops, pieces)
        met += stopped
        assert held <= max(map(len, stops)) - 1
    assert 500 < met < 2900


def test_text_that_cannot_be_a_stop_is_shown_at_once() -> None:
    checker = StopStrings(["</s>"])
    assert checker.feed("hello <") == ("hello ", False)
    assert checker.feed("/") == ("", False)
    assert checker.feed("b>") == ("</b>", False)
    assert checker.feed("x</s>y") == ("x", True)
    assert StopStrings().feed("any") == ("any", False)


def test_one_string_is_one_stop() -> None:
    assert StopStrings("ab").feed("xa") == ("x", False)


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ConfigError, match="stop is ''"):
        StopStrings(["a", ""])

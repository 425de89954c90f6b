"""Pictures: what a kind draws, and colours that read on white and on black."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.profile.plots import COLOURS, DRAWERS, INK, check_path, draw

BAND = {"p20": 0.9, "p50": 1.0, "p80": 1.2}
RECORDS: dict[str, dict[str, Any]] = {
    "profile": {
        "bench": "profile", "copy_bandwidth": 9e9,
        "decode": {
            "token_s": 0.01,
            "parts": {
                "qkv": {"seconds": 0.004, "share": 0.4, "bytes": 10**7, "bandwidth": 2.5e9},
                "host": {"seconds": 0.006, "share": 0.6, "bytes": 0, "bandwidth": 0.0},
            },
        },
    },
    "scaling": {
        "bench": "scaling", "backend": "cpu", "context": [{"positions": n, "tokens": 1, **BAND} for n in (8, 64)],
        "rows": [{"m": m, "tokens": m, **BAND} for m in (1, 8)],
    },
    "memory": {
        "bench": "memory", "run": [{"tokens": n, "live_bytes": n, "cache_bytes": n} for n in (1, 2)],
        "rounds": [{"tokens": n, "live_bytes": n, "peak_rss_bytes": None} for n in (1, 2)],
    },
    "tracker": {
        "bench": "tracker", "scopes": [{"name": "load", "start_s": 0.0}, {"name": "load/tokenizer", "start_s": 0.1}],
        "timeline": [{"time_s": t, "used": 9, "owners": {"weights": t, "kv_cache": 1, "other": 5}} for t in (0, 1)],
    },
    "calibration": {
        "kind": "calibration", "backend": "numpy",
        "inputs": [
            {
                "name": f"model.layers.{i}.mlp.down_proj", "min": -1.0, "max": 3.0, "rms": 0.5,
                "clips": {"absmax": 3.0, "percentile": 2.0, "mse": 2.9, "kl": 1.5},
                "histogram": {"bins": 128, "exponent": 2, "first": 60, "counts": [1, 0, 3, 4, 9, 5, 2], "count": 24},
            }
            for i in range(2)
        ],
    },
}  # fmt: skip
LOG = [{"step": i, "loss": 9 / i, "kl": 1 / i, "grad_norm": 1.0, "learning_rate": 1e-3} for i in range(1, 31)]
LOG[29]["valid_loss"] = 0.5
RECORDS.update({kind: {"bench": kind, "log": LOG} for kind in ("train", "qat", "lora")})


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", [INK, *COLOURS])
def test_contrast_on_white_and_on_black(colour: str) -> None:
    least = 4.5 if colour == INK else 3.0
    light = luminance(colour)
    assert 1.05 / (light + 0.05) >= least and (light + 0.05) / 0.05 >= least


@pytest.mark.parametrize("kind", DRAWERS)
def test_a_picture_of_each_kind(kind: str, tmp_path: Path) -> None:
    draw(RECORDS[kind], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    draw(RECORDS[kind], tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert page.count("<svg") == 1 and "color-scheme:light dark" in page and f"bitnet-mlx {kind}" in page


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no picture of 'decode'"):
        draw({"bench": "decode"}, tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"\.png or \.html is needed"):
        check_path("a.pdf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'bitnet-mlx\[plot\]'"):
        check_path("a.png")


def test_what_is_drawn_is_what_was_measured() -> None:
    """Tokens a second, megabytes, running means and shares, read off the pictures' own data."""

    def axes(kind: str, **changes: Any) -> list[Any]:
        figure = Figure()
        DRAWERS[kind](figure, {**RECORDS[kind], **changes})
        return figure.axes

    rows = axes("scaling")[1].lines[0]
    assert list(rows.get_xdata()) == [1, 8] and list(rows.get_ydata()) == [1.0, 8.0]
    points = [{"tokens": n, "live_bytes": n * 10**6, "cache_bytes": n * 10**5} for n in (1, 2)]
    live, held = axes("memory", run=points)[0].lines
    assert list(live.get_ydata()) == [1.0, 2.0] and list(held.get_ydata()) == [0.1, 0.2]
    mean = next(line for line in axes("train")[0].lines if line.get_label() == "loss")
    assert mean.get_ydata()[0] == 9 and mean.get_ydata()[29] == pytest.approx((9 / 29 + 9 / 30) / 2)
    one = RECORDS["calibration"]["inputs"][0]
    spread = {**one, "histogram": {**one["histogram"], "first": 32, "counts": [18, 6], "count": 24}}
    stairs = axes("calibration", inputs=[spread])[1].patches[0].get_data()
    assert list(stairs.values) == [1.0, 0.0] and list(stairs.edges) == [0.0, 2.0, 4.0], (
        "bins 32 and 33 lie 31 and 30 from 0"
    )

"""doctor: right on a sound machine, and it says so when an engine is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bitnet_mlx import api
from bitnet_mlx.cli.main import main
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.models.weights import DecoderWeights, Linear
from bitnet_mlx.ternary import TernaryTensor


def record(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_every_engine_is_right_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = record(capsys)
    engines = {engine["name"]: engine for engine in found["engines"]}
    assert set(engines) == {"numpy", "cpu", "mlx"}
    assert engines["cpu"]["exact"] and engines["cpu"]["details"]["threading_layer"] in ("tbb", "omp", "workqueue")
    # Its attention rounds its own way, and one code that flips for it moves logits by some percent of their spread.
    assert engines["mlx"]["same_tokens"] and engines["mlx"]["worst"] < 0.1
    assert found["ok"] and found["packages"]["mlx"]


def test_the_table_names_the_threading_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "threading_layer" in capsys.readouterr().out


def test_a_wrong_engine_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The cpu engine's place is taken by one whose first projection has another scale."""
    sound = api._decoder

    def broken(backend: str, weights: DecoderWeights, *rest: Any) -> Any:
        if backend != "cpu":
            return sound(backend, weights, *rest)
        name = "model.layers.0.self_attn.q_proj"
        w = weights.linears[name].weight
        assert isinstance(w, TernaryTensor)
        weights.linears[name] = Linear(replace(w, scale=np.asarray(w.scale * np.float32(1.01), np.float32)))
        return NumpyDecoder(weights)

    monkeypatch.setattr(api, "_decoder", broken)
    assert main(["doctor", "--json"]) == 1
    found = record(capsys)
    assert not found["ok"] and [e["ok"] for e in found["engines"]] == [True, False, True]

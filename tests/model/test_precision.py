"""Presets: what they set, what each engine makes of them, and that a flag goes before."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from bitnet_mlx import load
from bitnet_mlx.api import embedded_model
from bitnet_mlx.bench import precision
from bitnet_mlx.bench.precision import lines, measure
from bitnet_mlx.cli.main import main
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.formats.dense import GroupedRows
from bitnet_mlx.models.precision import PRESETS, check_kv_bits, for_engine, policy
from bitnet_mlx.tokenizer import load_tokenizer
from tests.support.random_model import tiny_config


def test_presets() -> None:
    assert {name: (p.head_bits, p.kv_bits, p.dtype) for name, p in PRESETS.items()} == {
        "memory": (4, 8, None), "balanced": (8, 16, None), "accuracy": (None, None, "float32")
    }  # fmt: skip
    assert policy(None).record() == {**policy("accuracy").record(), "name": "custom", "dtype": None}
    with pytest.raises(ConfigError, match="memory, balanced, accuracy are known"):
        policy("fast")


def test_an_engine_takes_what_it_has() -> None:
    used, notes = for_engine(PRESETS["memory"], "cpu")
    assert (used.head_bits, used.kv_bits) == (8, None)
    assert len(notes) == 2
    assert for_engine(PRESETS["memory"], "metal") == (PRESETS["memory"], ())
    assert for_engine(PRESETS["accuracy"], "numpy")[1] == ()


def test_bits_of_a_cache_that_cannot_be() -> None:
    check_kv_bits(None, "cpu")
    check_kv_bits(8, "mlx", tiny_config(head_dim=96))
    check_kv_bits(16, "metal", tiny_config(head_dim=20))
    for bits, engine, dim, message in (
        (5, "mlx", 64, "kv_bits is 5; 16, 8, 4 are allowed"), (8, "cpu", 64, "the backend is cpu, which keeps"),
        (8, "mlx", 20, "heads have 20 values; keys and values in 8 or 4 bits need a multiple of 32"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            check_kv_bits(bits, engine, tiny_config(head_dim=dim))


def test_loading_with_a_preset(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bitnet_mlx"):
        model, _ = load(backend="numpy", precision="memory")
    assert "keeps keys and values in float32" in caplog.text
    assert model.weights.lm_head.bits == 8  # type: ignore[attr-defined]
    model, _ = load(backend="numpy", precision="memory", head_bits=6)
    assert isinstance(model.weights.lm_head, GroupedRows)  # type: ignore[attr-defined]
    assert model.weights.lm_head.bits == 6  # type: ignore[attr-defined]
    model, _ = load(backend="mlx", precision="memory", kv_bits=4)
    assert (model.kv_bits, model.model.embed_tokens.bits) == (4, 4)  # type: ignore[attr-defined]
    assert model.make_cache(8)[0].small == 4


def test_generate_takes_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--prompt", "import ", "--max-tokens", "3", "--json"]
    assert main([*command, "--backend", "mlx", "--precision", "memory"]) == 0
    assert json.loads(capsys.readouterr().out)["generation_tokens"] == 3
    assert main([*command, "--backend", "cpu", "--kv-bits", "8"]) == 2
    assert "keeps keys and values in float32" in capsys.readouterr().err


def test_the_benchmark_measures_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, float] = {}
    speeds = precision._speeds
    monkeypatch.setattr(precision, "_speeds", lambda *given: taken.update(speeds(*given)) or taken)
    lengths: list[int] = []
    bits = precision.bits_per_byte
    monkeypatch.setattr(precision, "bits_per_byte", lambda nats, size: lengths.append(size) or bits(nats, size))
    text = tmp_path / "text.py"
    text.write_text("import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n" * 3)
    record = measure("mlx", text=str(text), tokens=2, scored=48, repeats=1)
    presets = json.loads(json.dumps(record))["presets"]
    assert list(presets) == list(PRESETS)
    one, two, three = presets.values()
    assert one["head_bytes"] < two["head_bytes"] == three["head_bytes"]
    assert one["kv_bytes"] < two["kv_bytes"] < three["kv_bytes"]
    assert all(p["kv_bytes"] == p["predicted_kv_bytes"] and p["decode_ms"] > 0 for p in presets.values())
    tokenizer = load_tokenizer(embedded_model())
    scored = tokenizer.decode(tokenizer.encode(text.read_text())[1:48])
    assert lengths == [len(scored.encode())] * 3, "of the text that is scored: the first token is not"
    assert {name: p["decode_ms"] for name, p in presets.items()} == {n: 1e3 * seconds for n, seconds in taken.items()}
    assert all(0.1 < p["bits_per_byte"] < 4 for p in presets.values())
    assert one["bits_per_byte"] != three["bits_per_byte"]
    assert "4 bits in groups of 64" in "\n".join(lines(record))


@pytest.mark.parametrize(("option", "value"), [("tokens", 0), ("scored", 1), ("repeats", 0), ("text", "/nowhere")])
def test_what_the_benchmark_refuses(option: str, value: object) -> None:
    with pytest.raises(ConfigError):
        measure("numpy", **{option: value})  # type: ignore[arg-type]

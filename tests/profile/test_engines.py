"""A profile of each engine: the same tokens, every part of every layer, and a sleep that is found where it was put."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bitnet_mlx import load, profile_generation
from bitnet_mlx.api import make_decoder
from bitnet_mlx.backends import numpy_ref
from bitnet_mlx.bench.profiled import replay, timed_mlx
from bitnet_mlx.bench.profiled.engine import timed
from bitnet_mlx.cli.main import main
from bitnet_mlx.errors import BackendError, ConfigError
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.profile.spans import LAYER_PARTS
from bitnet_mlx.profile.summary import Profile
from tests.emulator import runner
from tests.support.random_model import random_weights, tiny_config

ENGINES = ["numpy", "cpu", "mlx"]
SLEEP = 0.02


def profiled(engine: str, **changes: Any) -> Profile:
    decoder = make_decoder(engine, random_weights(tiny_config(), seed=3, **changes))
    return replay(decoder, [5, 6, 7, 8, 9], [11, 12, 13, 14], copy=1e9)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_logits_and_every_part_of_every_layer(engine: str) -> None:
    made = profiled(engine)
    assert made.same and len(made.decode) == 3 and made.prefill.tokens == 5
    layers = made.layers()
    assert len(layers) == 2
    for layer in layers:
        assert set(layer) == set(LAYER_PARTS)
    assert {"head", "sampling"} < set(made.parts())
    spans = made.decode[0].spans
    assert all(a.end <= b.start for a, b in pairwise(spans))
    assert made.record()["decode"]["launches"] > 2 * 5


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_are_counted_once(engine: str) -> None:
    weights = random_weights(tiny_config(), head="float32")
    traffic = timed(make_decoder(engine, weights)).traffic(1, 9)
    kv = 2 * 2 * 18 * 4 * 2 * (9 + 1)
    assert traffic.pop("attention") == kv
    assert traffic.pop("embedding", 72 * 4) == 72 * 4
    assert sum(traffic.values()) == weights.nbytes


@pytest.mark.parametrize("engine", ENGINES)
def test_linears_with_norms_of_their_own(engine: str) -> None:
    names = ("self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    weights = random_weights(tiny_config(qk_norms=True, max_position_embeddings=600), normed=names, head="float32")
    decoder = make_decoder(engine, weights)
    made = replay(decoder, [5] * 300 if engine == "cpu" else [5] * 9, [11, 12], copy=1e9)
    assert made.same and all(set(layer) == set(LAYER_PARTS) for layer in made.layers())
    traffic = timed(decoder).traffic(1, 0)
    assert sum(traffic.values()) - traffic["attention"] - traffic.get("embedding", 0) == weights.nbytes


@pytest.mark.parametrize("engine", ENGINES)
def test_linears_that_are_not_packed(engine: str) -> None:
    made = profiled(engine, dense=("mlp.up_proj", "self_attn.o_proj"))
    assert made.same and {"o", "gate_up"} < set(made.layers()[1])


def test_our_kernels_on_the_emulated_grid() -> None:
    """The quantisers' own launches are cut off as on stock MLX, and the bits stay."""
    from bitnet_mlx.backends.kernels.ops import KernelOps
    from bitnet_mlx.models.decoder_mlx import MlxModel

    model = MlxModel(random_weights(tiny_config(), head="8"), "float32", KernelOps("metal", runner))
    made = replay(model, [5, 6, 7], [11, 12], copy=1e9)
    assert made.same and made.backend == "metal"
    assert all(set(layer) == set(LAYER_PARTS) for layer in made.layers())
    assert made.decode[0].launches < 2 * 12 + 20  # about a dozen a layer by our kernels; a hundred by stock operations


def test_the_cpu_engine_notes_every_job_of_a_long_prompt_and_then_none() -> None:
    decoder: Any = make_decoder("cpu", random_weights(tiny_config(max_position_embeddings=600)))
    engine = timed(decoder)
    engine.recorder.begin()
    engine.step([3] * 300, decoder.make_cache())
    assert engine.launches() == 2 * 10 * 2 + 2  # two chunks of rows; the head once
    decoder.step([[3]], [decoder.make_cache()])
    assert decoder.jobs_marked == 0


def sleepy(call: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(SLEEP)
        return call(*arguments, **named)

    return slow


@pytest.mark.parametrize(
    ("engine", "owner", "name", "part"),
    [
        ("numpy", numpy_ref, "attend", "attention"),
        ("numpy", numpy_ref, "gated", "gate_up"),
        ("numpy", numpy_ref, "norm_quantize", "norm"),
        ("mlx", timed_mlx, "attend", "attention"),
        ("cpu", DenseRows, "rows", "host"),
    ],
)
def test_a_sleep_is_found_where_it_was_put(
    engine: str, owner: Any, name: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, sleepy(getattr(owner, name)))
    made = profiled(engine)
    times = 1 if part == "host" else 2
    assert made.parts()[part].seconds >= times * SLEEP * 0.99
    others = [span.part for span in made.decode[0].spans if span.seconds >= SLEEP]
    assert part in others


def test_the_recorded_parts_sum_to_the_uninstrumented_run() -> None:
    """Within 10 %, on each engine, on the machine that the records name."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "profile.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert {record["backend"] for record in records} == set(ENGINES)
    for record in records:
        assert 0.9 <= record["decode"]["parts_over_plain"] <= 1.1 and record["decode"]["same_logits"]


def test_from_python_with_the_embedded_model() -> None:
    model, tokenizer = load(backend="cpu")
    made = profile_generation(model, tokenizer, "def f(x):", 4)
    assert made.same and len(made.decode) == 3 and made.text and made.first_token_s > 0
    assert made.copy > 0 and made.machine["version"] and "part" in made._repr_html_()
    with pytest.raises(ConfigError, match="prompt is empty"):
        replay(model, [], [1, 2])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "p.json", tmp_path / "p.html"
    flags = ["--prompt", "def f(x):", "--max-tokens", "4", "--temp", "0", "--backend", "cpu", "--json"]
    assert main(["generate", *flags]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main(["generate", *flags, "--profile", str(out), "--plot", str(picture)]) == 0
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert told["text"] == plain["text"]
    assert "of the plain run" in shown.err and "gate_up" in shown.err
    written = json.loads(out.read_text())
    assert written["profile"]["decode"]["tokens"] == 3 and written["profile"]["decode"]["same_logits"]
    assert (written["profile"]["load_s"], written["profile"]["first_token_s"]) == (told["load_s"], told["ttft_s"])
    assert written["profile"]["model"] == "embedded" and written["displayTimeUnit"] == "ms"
    assert {e["ph"] for e in written["traceEvents"]} == {"M", "X"}
    assert picture.read_text().count("<svg") == 1


@pytest.mark.parametrize(
    ("flags", "message", "code"),
    [
        (["--plot", "p.png"], "give --profile", 2),
        (["--profile", "p.json", "--plot", "p.jpg"], ".png or .html", 2),
        (["--profile", "no/such/p.json"], "make the folder first", 2),
    ],
)
def test_flags_that_cannot_be(flags: list[str], message: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "x", *flags]) == code
    assert message in capsys.readouterr().err


def test_a_metal_capture_needs_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitnet_mlx.bench.profiled import capture

    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(BackendError, match="needs a Mac"):
        capture.check_capture("a.gputrace")
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(ConfigError, match="ends in .gputrace"):
        capture.check_capture("a.trace")
    monkeypatch.delenv("MTL_CAPTURE_ENABLED", raising=False)
    with pytest.raises(ConfigError, match="MTL_CAPTURE_ENABLED=1"):
        capture.check_capture("a.gputrace")
    with pytest.raises(BackendError, match="backend is numpy"):
        capture.capture(make_decoder("numpy", random_weights(tiny_config())), [1], "a.gputrace")

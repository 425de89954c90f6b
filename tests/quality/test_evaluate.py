"""`bitnet-mlx evaluate` on master weights, with the float model that they were made from as the teacher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.api import load
from bitnet_mlx.cli.main import main
from bitnet_mlx.quality import evaluate
from bitnet_mlx.quality.linears import sensitivity
from bitnet_mlx.quality.score import Score, score
from bitnet_mlx.quality.table import table
from tests.support import hf_folder, tiny_tokenizers
from tests.support.random_model import random_weights, tiny_config

TEXT = "the quick brown fox jumps over a lazy dog. hello world, naïve café!\n" * 3
SHAPES = dict(vocab_size=420, num_hidden_layers=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """student: ternary from float masters; teacher: the same tensors as a float model; text.txt."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name, storage in (("student", "online"), ("teacher", "dense")):
        hf_folder.write(folder / name, "llama", storage, seed=4, **SHAPES)
        tiny_tokenizers.byte_level(folder / name)
    (folder / "text.txt").write_text(TEXT, "utf-8")
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["evaluate", *map(str, words), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_against_the_float_parent(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", place / "student", "--teacher", place / "teacher", "--data", place / "text.txt"]
    record = run(capsys, *flags, "--backend", "numpy", "--limit", 40, "--length", 32, "--sensitivity")
    assert record["tokens"] == 40 and record["kl"] > 0 and 0 <= record["top1_agreement"] < 1
    parent = hf_folder.write(place / "again", "llama", "dense", seed=4, **SHAPES)
    assert len(record["linears"]) == 14
    for entry in record["linears"]:
        w = parent.floats[f"{entry['name']}.weight"].astype(np.float64)
        m = np.abs(w).mean()
        t = np.clip(np.rint(w / m), -1, 1)
        error = np.square(w - t * m)
        assert entry["zeros"] == pytest.approx((t == 0).mean(), abs=2 / w.size)
        assert entry["positive"] == pytest.approx((t > 0).mean(), abs=2 / w.size)
        assert entry["mse"] == pytest.approx(error.mean(), rel=1e-3)
        assert entry["sqnr_db"] == pytest.approx(10 * np.log10(np.square(w).sum() / error.sum()), abs=0.01)
        cosine = (w * t).sum() / np.linalg.norm(w) / np.linalg.norm(t)
        assert entry["cosine"] == pytest.approx(cosine, abs=1e-4)
    falls = [entry["nats_per_token"] for entry in record["sensitivity"]]
    assert sorted(entry["layer"] for entry in record["sensitivity"]) == [0, 1] and falls == sorted(falls, reverse=True)


def test_windows_are_those_asked_for_and_fit_both_models(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--model", place / "student", "--data", place / "text.txt", "--backend", "numpy", "--limit", 40]
    record = run(capsys, *flags, "--length", 32, "--stride", 5)
    decoder, tokenizer = load(place / "student", backend="numpy")
    alone = score(decoder, tokenizer.encode(TEXT)[:41], 1, 32, 5)
    assert (record["length"], record["stride"], record["nats_per_token"]) == (32, 5, pytest.approx(alone.nats / 40))
    hf_folder.write(place / "short", "llama", "dense", seed=4, max_position_embeddings=16, **SHAPES)
    tiny_tokenizers.byte_level(place / "short")
    asked: list[Any] = []
    monkeypatch.setattr(evaluate, "load", lambda path, **given: asked.append(given) or load(path, **given))
    assert run(capsys, *flags, "--teacher", place / "short")["length"] == 16
    assert asked[1] == {"backend": "numpy", "dtype": None}, "the teacher runs where the model does"
    assert main(["evaluate", *map(str, flags), "--teacher", str(place / "short"), "--length", "17"]) == 2
    assert "the context holds 16 tokens" in capsys.readouterr().err


def test_each_line_of_the_table_shows_its_own_figure() -> None:
    names = ("perplexity", "bits_per_byte", "nats_per_token", "teacher_perplexity", "teacher_bits_per_byte", "kl")
    figures = {name: 1.5 + i for i, name in enumerate(names)}
    about = {"model": "m", "backend": "cpu", "teacher": "t", "tokens": 9, "bytes": 30, "length": 8, "stride": 4}
    first, *rest = table({**about, **figures, "top1_agreement": 0.25}).splitlines()
    assert first == "m on cpu against t: 9 tokens, 30 bytes, windows of 8 moved by 4"
    titles = ("perplexity", "bits a byte", "nats a token", "teacher's perplexity", "teacher's bits a byte",
              "KL from the teacher, nats a token")  # fmt: skip
    assert rest == [f"  {t:<34} {1.5 + i:.4f}" for i, t in enumerate(titles)] + [
        "  best token is the teacher's        25.00%"
    ]


def test_layers_are_ranked_by_the_loss_that_they_cost() -> None:
    weights = random_weights(tiny_config(num_hidden_layers=3))
    nats = iter((9.0, 5.0, 7.0))
    found = sensitivity(weights, weights, lambda w: w, lambda _: Score(1, 1, next(nats)), Score(1, 1, 10.0))  # type: ignore[arg-type, return-value]
    assert found == [(1, 5.0), (2, 3.0), (0, 1.0)]


def test_a_model_is_its_own_best_teacher(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", place / "student", "--teacher", place / "student", "--data", place / "text.txt"]
    record = run(capsys, *flags, "--backend", "numpy", "--layers", "--limit", 40)
    assert record["kl"] == 0 and record["top1_agreement"] == 1 and record["perplexity"] == record["teacher_perplexity"]
    assert all(entry["mse"] == 0 and entry["sqnr_db"] is None for entry in record["linears"])


def test_engines_agree_and_bytes_are_the_files(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", place / "student", "--data", place / "text.txt", "--length", 64]
    found = [run(capsys, *flags, "--backend", backend) for backend in ("numpy", "cpu", "mlx")]
    assert found[0]["perplexity"] == pytest.approx(found[1]["perplexity"], rel=1e-9)
    assert found[0]["perplexity"] == pytest.approx(found[2]["perplexity"], rel=1e-2)  # an int8 code may flip
    assert found[0]["bytes"] == len(TEXT.encode()) and found[2]["backend"] == "mlx"
    cut = run(capsys, *flags, "--backend", "numpy", "--limit", 10)
    assert cut["tokens"] == 10 and 10 <= cut["bytes"] < 100


def test_a_table_for_people(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", place / "student", "--teacher", place / "teacher", "--data", place / "text.txt"]
    assert main(["evaluate", *map(str, flags), "--backend", "numpy", "--limit", "20", "--sensitivity"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "perplexity",
        "bits a byte",
        "KL from the teacher",
        "SQNR dB",
        "model.layers.1.mlp.down_proj",
        "layer 0",
    ):
        assert word in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere.txt"], "no file nowhere.txt"),
        (["--data", "{place}/latin.txt"], "is not UTF-8"),
        (["--data", "{place}/empty.txt"], "at least 2 are needed"),
        (["--data", "{place}/text.txt", "--sensitivity"], "give --teacher"),
        (["--data", "{place}/text.txt", "--length", "99999"], "the context holds"),
        (["--data", "{place}/text.txt", "--teacher", "x", "--sensitivity", "--kv-bits", "8"], "leave out --kv-bits"),
        (["--data", "{place}/text.txt", "--limit", "0"], "1 or more"),
        (["--data", "{place}/text.txt", "--teacher", "{place}/other", "--layers"], "teacher of the same shape"),
        (["--data", "{place}/text.txt", "--teacher", "{place}/words"], "a teacher of the same vocabulary is needed"),
    ],
)
def test_one_clear_message(place: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "latin.txt").write_bytes(b"caf\xe9 caf\xe9")
    (place / "empty.txt").write_text("")
    if not (place / "other").exists():
        hf_folder.write(place / "other", "llama", "dense", **{**SHAPES, "num_hidden_layers": 3})
        tiny_tokenizers.byte_level(place / "other")
        hf_folder.write(place / "words", "llama", "dense", **SHAPES)
        tiny_tokenizers.byte_level(place / "words", vocab_size=400)
    words = ["--model", str(place / "student"), "--backend", "numpy", *(flag.format(place=place) for flag in flags)]
    assert main(["evaluate", *words]) in (1, 2)
    assert message in capsys.readouterr().err


def test_as_a_command_it_needs_no_mlx(place: Path, tmp_path: Path) -> None:
    (tmp_path / "mlx.py").write_text("raise ImportError('mlx is not here')\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from bitnet_mlx.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["evaluate", "--model", place / "student", "--data", place / "text.txt", "--limit", 8, "--backend", "numpy"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *map(str, words)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "perplexity" in done.stdout, done.stderr


def test_with_an_adapter(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Figures are of base and adapter: the same on cpu and numpy, and its linears are the sums."""
    parent = hf_folder.write(tmp_path / "again", "llama", "dense", seed=4, **SHAPES)
    module, rng = "model.layers.1.mlp.up_proj", np.random.default_rng(0)
    n, k = parent.floats[f"{module}.weight"].shape
    a, b = rng.standard_normal((k, 2)).astype(np.float32) / 8, rng.standard_normal((2, n)).astype(np.float32) / 8
    adapter = tmp_path / "ad"
    adapter.mkdir()
    tensors = {f"{module}.lora_a": mx.array(a), f"{module}.lora_b": mx.array(b)}
    mx.save_safetensors(str(adapter / "adapters.safetensors"), tensors)
    parameters = {"rank": 2, "scale": 3.0, "dropout": 0.0, "keys": ["mlp.up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps({"num_layers": 1, "lora_parameters": parameters}))
    flags = ["--model", place / "student", "--data", place / "text.txt", "--limit", 20]
    more = ["--teacher", place / "teacher", "--layers", "--adapter-path", adapter]
    base, own, cpu = (run(capsys, *flags, *x) for x in (["--backend", "cpu"], [*more, "--backend", "numpy"], more))
    assert own["nats_per_token"] == cpu["nats_per_token"] != base["nats_per_token"]
    w = parent.floats[f"{module}.weight"].astype(np.float64)
    m = np.abs(w).mean()
    error = np.square(np.clip(np.rint(w / m), -1, 1) * m + 3 * (a.astype(np.float64) @ b).T - w).mean()
    [entry] = [x for x in own["linears"] if x["name"] == module]
    assert entry["mse"] == pytest.approx(error, rel=1e-3) and entry["zeros"] is None
    assert sum(x["zeros"] is None for x in own["linears"]) == 1


def test_a_number_of_hundreds_of_digits_is_shown_by_its_power_of_ten() -> None:
    numbers = {"perplexity": 8.2e307, "nats_per_token": 708.9}
    shown = table({"model": "m", "backend": "cpu", "teacher": None, **numbers}).splitlines()
    assert shown[1].split() == ["perplexity", "8.200e+307"]
    assert shown[2].split()[-1] == "708.9000"

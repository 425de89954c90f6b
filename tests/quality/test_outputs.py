"""`evaluate --outputs`: activations of a ternary model against its float parent's, by numpy alone from weights and inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.api import make_decoder
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.cli.main import main
from bitnet_mlx.quality.observed import tapped
from bitnet_mlx.quality.outputs import OCTAVES, magnitudes
from bitnet_mlx.ternary import quantize_activations
from bitnet_mlx.tokenizer import load_tokenizer
from tests.support import hf_folder, tiny_tokenizers


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    for name, storage in (("student", "online"), ("teacher", "dense")):
        hf_folder.write(folder / name, "llama", storage, seed=4, vocab_size=420)
        tiny_tokenizers.byte_level(folder / name)
    (folder / "text.txt").write_text(
        "the quick brown fox jumps over a lazy dog. hello world, naïve café!\n" * 4, "utf-8"
    )
    return folder


def run(place: Path, capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    flags = ["--data", place / "text.txt", "--length", 16, "--limit", 31, "--outputs", *words]
    assert main(["evaluate", *map(str, flags), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def seen(folder: Path, ids: list[int]) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    decoder: Any = make_decoder("numpy", read_weights(folder))
    decoder.hooks.tap = lambda name, x, y: found.setdefault(name, []).append((x, y))
    for at in (0, 16):
        decoder.step([ids[at : at + 16]], [decoder.make_cache()], "all")
    return found


def figures(own: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    w, r = own.astype(np.float64).reshape(-1), reference.astype(np.float64).reshape(-1)
    error = np.square(w - r)
    return error.mean(), 10 * np.log10(np.square(r).sum() / error.sum()), w @ r / np.linalg.norm(w) / np.linalg.norm(r)


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_against_the_float_parent(place: Path, backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = run(place, capsys, "--model", place / "student", "--teacher", place / "teacher", "--backend", backend)[
        "outputs"
    ]
    ids = list(load_tokenizer(place / "student").encode((place / "text.txt").read_text("utf-8"))[:32])
    parent, child = seen(place / "teacher", ids), seen(place / "student", ids)
    assert record["tokens"] == 32 and len(record["linears"]) == 14 and len(record["layers"]) == 2
    weights = read_weights(place / "student")
    for entry in [*record["linears"], *record["layers"]]:
        name = entry["name"]
        wanted, own = (np.concatenate([y for _, y in found[name]]) for found in (parent, child))
        running = [entry[f"running_{key}"] for key in ("mse", "sqnr_db", "cosine")]
        assert running == pytest.approx(figures(own, wanted), rel=0.05, abs=0.02)  # codes may flip on MLX
        if name in weights.linears:
            q, s = quantize_activations(np.concatenate([x for x, _ in parent[name]]))
            alone = (q / s[:, None]) @ weights.linears[name].weight.rows(slice(None)).T
            assert [entry[k] for k in ("mse", "sqnr_db", "cosine")] == pytest.approx(figures(alone, wanted), rel=1e-3)
            codes = quantize_activations(np.concatenate([x for x, _ in child[name]]))[0]
            assert entry["input_zeros"] == pytest.approx((codes == 0).mean(), abs=2e-3)
            assert (
                sum(entry["input_codes"].values()) == pytest.approx(1)
                and entry["input_zeros"] == entry["input_codes"]["0"]
            )
            assert entry["input_codes"]["64-128"] == pytest.approx((np.abs(codes.astype(int)) >= 64).mean(), abs=2e-3)
    first, last = record["layers"]
    # The first layer's inputs are the teacher's in the running model too; a later one's are not.
    assert (
        first["sqnr_db"] == pytest.approx(first["running_sqnr_db"], abs=0.1)
        and last["sqnr_db"] > last["running_sqnr_db"]
    )


def test_a_model_is_its_own_best_teacher(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", place / "student", "--teacher", place / "student", "--backend", "numpy"]
    record = run(place, capsys, *words)["outputs"]
    for entry in record["linears"]:
        assert (
            entry["running_mse"] == 0
            and entry["running_sqnr_db"] is None
            and entry["cosine"] == pytest.approx(1, abs=1e-6)
        )
    assert (
        main(
            ["evaluate", *map(str, words), "--data", str(place / "text.txt"), "--limit", "20", "--outputs", "--layers"]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "running dB" not in shown and "model.layers.1.mlp.down_proj" in shown and "codes 0" in shown
    assert main(["evaluate", "--model", str(place / "student"), "--data", str(place / "text.txt"), "--outputs"]) == 2
    assert "give --teacher" in capsys.readouterr().err


def test_magnitudes_of_codes() -> None:
    q = np.arange(-128, 128).astype(np.int8)
    assert dict(zip(OCTAVES, magnitudes(q).tolist(), strict=True)) == {
        "0": 1, "1": 2, "2-3": 4, "4-7": 8, "8-15": 16, "16-31": 32, "32-63": 64, "64-128": 129,
    }  # fmt: skip


def test_a_model_is_looked_at_as_it_was_asked_to_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without codes where its inputs stay floats."""
    flags = ["--model", place / "student", "--teacher", place / "teacher", "--backend", "numpy"]
    for more, coded in (([], True), (["--activations", 16], False)):
        linears = run(place, capsys, *flags, *more)["outputs"]["linears"]
        assert all(("input_codes" in entry) == coded for entry in linears)


def test_a_tap_is_taken_out_whatever_happens(place: Path) -> None:
    decoder: Any = make_decoder("numpy", read_weights(place / "student"))
    with pytest.raises(ZeroDivisionError), tapped(decoder, lambda name, x, y: None):
        assert decoder.hooks.tap is not None
        raise ZeroDivisionError
    assert decoder.hooks.tap is None

"""`bitnet-mlx train` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitnet_mlx.train import tokenizer as bpe
from tests.train.support import write_texts

SMALL = (
    "--iters 3 --batch-size 1 --seq-length 16 --vocab-size 300 --hidden-size 32 --num-layers 1 --num-heads 2".split()
)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "bitnet_mlx", "train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_from_text_to_a_model_that_generates(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    done = run(
        "--data", texts, "--output", tmp_path / "out", *SMALL, "--eval-fraction", "0.2", "--ste", "soft", "--json"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["steps"] == 3 and record["finished"] and 1 < record["bits_per_byte"] < 9
    assert "step 3/3" in done.stderr and len(done.stdout.splitlines()) == 1
    generate = [sys.executable, "-m", "bitnet_mlx", "generate", "--model", str(tmp_path / "out"), "--prompt", "def "]
    made = subprocess.run(
        [*generate, "--max-tokens", "4", "--backend", "numpy", "--json"], capture_output=True, text=True, timeout=120
    )
    assert made.returncode == 0, made.stderr


def test_from_ready_ids_without_the_tokenizers_library(tmp_path: Path) -> None:
    texts = [path.read_text() for path in sorted(write_texts(tmp_path / "texts").iterdir())]
    tokenizer = bpe.train_bpe(texts, 300)
    bpe.save(tokenizer, tmp_path, 16)
    np.save(tmp_path / "train.npy", bpe.encode_documents(tokenizer, texts[1:]))
    np.save(tmp_path / "held.npy", bpe.encode_documents(tokenizer, texts[:1]))
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "tokenizers.py").write_text("raise ImportError('tokenizers is not here')\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'without')!r})\n"
        "from bitnet_mlx.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["--data", tmp_path / "train.npy", "--eval-data", tmp_path / "held.npy", "--output", tmp_path / "out"]
    command = [sys.executable, "-c", program, "train", *map(str, arguments), *SMALL, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert 1 < json.loads(done.stdout.splitlines()[-1])["bits_per_byte"] < 9
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (["--data", "nowhere"], "no file or folder at nowhere", 2),
        (["--data", "{texts}", "--seq-length", "9000"], "fewer than one sequence of 9000", 2),
        (["--data", "{texts}", "--model", "nowhere"], "nowhere", 2),
        (["--data", "{texts}", "--iters", "0"], "--iters is 0", 2),
        (["--data", "{texts}", "--iters", "40", "--learning-rate", "1e20"], "step", 1),
    ],
)
def test_one_clear_message(tmp_path: Path, arguments: list[str], message: str, status: int) -> None:
    texts = write_texts(tmp_path / "texts", files=2)
    done = run("--output", tmp_path / "out", *SMALL, *(a.format(texts=texts) for a in arguments))
    assert done.returncode == status, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()

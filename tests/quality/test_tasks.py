"""What evaluation harnesses ask, against direct computation; and the real lm-eval on tasks that lie in a folder."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.api import make_decoder
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.cli.main import main
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.generation import generate
from bitnet_mlx.quality.requests import Answers
from bitnet_mlx.tokenizer import Tokenizer, load_tokenizer
from tests.support import hf_folder, tiny_tokenizers

ROWS = [
    {"question": "the quick brown fox jumps over", "options": [" a lazy dog", " hello world", "."], "answer": 0},
    {"question": "def return", "options": [" import", " class self", " value"], "answer": 1},
    {"question": "hello", "options": [" world", "!", " naïve café"], "answer": 2},
]
LONG = "hello world the quick brown fox jumps over a lazy dog " * 7
COMMON = "dataset_path: json\ndataset_kwargs:\n  data_files: {file}\ntest_split: train\n"
TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\ndoc_to_choice: options\ndoc_to_target: answer\n"
    "target_delimiter: ''\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{{{question}}}}'\n"
    "metric_list:\n  - metric: bits_per_byte\n  - metric: byte_perplexity\n",
    "writing": "output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\ndoc_to_target: '{{{{wanted}}}}'\n"
    "generation_kwargs:\n  until: ['\\n']\n  max_gen_toks: 5\nmetric_list:\n  - metric: exact_match\n",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks") / "model"
    hf_folder.write(folder, "llama", "online", seed=3, vocab_size=420, max_position_embeddings=32)
    return tiny_tokenizers.byte_level(folder)


@pytest.fixture(scope="module")
def parts(model: Path) -> tuple[Any, Tokenizer]:
    return make_decoder("numpy", read_weights(model)), load_tokenizer(model)


def direct(decoder: Any, ids: Sequence[int], first: int) -> tuple[float, bool]:
    """ln p of ids[first:] after the others, and whether each is the most likely one, all in one step."""
    [logits] = decoder.step([list(ids[:-1])], [decoder.make_cache()], "all")
    wide = logits.astype(np.float64)[first - 1 :]
    rows = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    targets = list(ids[first:])
    return float(rows[np.arange(len(targets)), targets].sum()), bool((rows.argmax(1) == targets).all())


def test_log_likelihoods(parts: tuple[Any, Tokenizer]) -> None:
    decoder, tokenizer = parts
    answers = Answers(decoder, tokenizer)
    for row in [*ROWS, *ROWS[::-1]]:
        for option in row["options"]:
            before, after = answers.encode_pair(row["question"], option)
            assert before + after == tokenizer.encode(row["question"] + option)
            found = answers.log_likelihood(before, after)
            wanted = direct(decoder, [*before, *after], len(before))
            assert found[0] == pytest.approx(wanted[0], rel=1e-9) and found[1] == wanted[1]
    best = int(decoder.step([before], [decoder.make_cache()])[0].argmax())
    assert answers.log_likelihood(before, [best])[1] and not answers.log_likelihood(before, [best - 1])[1]
    bos = tokenizer.bos_token_id
    assert answers.encode_pair("", "hello") == ([bos], tokenizer.encode("hello", add_special_tokens=False))
    assert answers.encode_pair("hello ", "world") == answers.encode_pair("hello", " world")
    assert answers.encode_pair("  ", "x") == ([bos], tokenizer.encode("  x", add_special_tokens=False))
    assert answers.log_likelihood([1, 2], []) == (0.0, True)
    step, calls = decoder.step, []

    def failing(*given: Any, **more: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise MemoryError("in the middle of a request")
        return step(*given, **more)

    first = ([5, 6, 7, 8, 9], [10, 11])
    answers.log_likelihood(*first)
    decoder.step = failing
    try:
        with pytest.raises(MemoryError):
            answers.log_likelihood([5, 60, 61, 62, 63], [64, 65])
    finally:
        del decoder.step
    assert len(calls) == 2 and answers.log_likelihood(*first)[0] == pytest.approx(
        direct(decoder, [*first[0], *first[1]], 5)[0]
    )
    long = [*before, *tokenizer.encode(LONG, add_special_tokens=False)[:60]]
    found = answers.log_likelihood(long[:50], long[50:60])
    assert found[0] == pytest.approx(direct(decoder, long[60 - 33 : 60], 23)[0], rel=1e-9)


def test_a_whole_text_in_windows(parts: tuple[Any, Tokenizer]) -> None:
    decoder, tokenizer = parts
    ids = [tokenizer.bos_token_id, *tokenizer.encode(LONG, add_special_tokens=False)]
    assert len(ids) > 70
    at, total = 0, 0.0
    while at < len(ids) - 1:
        stop = min(at + 32, len(ids) - 1)
        start = max(0, stop - 32)
        total += direct(decoder, ids[start : stop + 1], at - start + 1)[0]
        at = stop
    assert Answers(decoder, tokenizer).text_log_likelihood(LONG) == pytest.approx(total, rel=1e-9)
    assert Answers(decoder, tokenizer).text_log_likelihood("") == 0


def test_generated_text(parts: tuple[Any, Tokenizer]) -> None:
    decoder, tokenizer = parts
    answers = Answers(decoder, tokenizer)
    whole = generate(decoder, tokenizer, tokenizer.encode("hello"), 8)
    assert (
        answers.generate("hello", {"until": ["\n\n\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0})
        == whole
    )
    assert answers.generate("hello", {"max_tokens": 8, "do_sample": False, "temperature": 2.0}) == whole
    drawn = [
        Answers(decoder, tokenizer, seed).generate("hello", {"max_tokens": 8, "temperature": 2.0}) for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and whole not in drawn
    cut = whole[2:4]
    assert answers.generate("hello", {"until": cut, "max_gen_toks": 8}) == whole[: whole.index(cut)]
    assert answers.generate(LONG, {"max_gen_toks": 4}) == generate(decoder, tokenizer, tokenizer.encode(LONG)[-28:], 4)
    sampled = {answers.generate("hello", {"max_gen_toks": 8, "do_sample": True, "temperature": 9.0}) for _ in range(2)}
    assert len(sampled) == 1 and sampled != {whole}
    with pytest.raises(ConfigError, match="num_beams"):
        answers.generate("hello", {"num_beams": 4})


def test_what_is_missing(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["evaluate", "--model", str(model)]) == 2
    assert "give --data FILE, or --tasks alone" in capsys.readouterr().err
    assert main(["evaluate", "--model", str(model), "--tasks", "x", "--include-path", "nowhere"]) == 2
    assert "no folder nowhere" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert main(["evaluate", "--model", str(model), "--tasks", "arc_easy"]) == 2
    assert "pip install 'bitnet-mlx[eval]'" in capsys.readouterr().err


def test_lm_eval_asks_and_counts(model: Path, parts: tuple[Any, Tokenizer], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval (extra eval) is not installed, so its own tasks are not run")
    decoder, tokenizer = parts
    answers = Answers(decoder, tokenizer)
    rows = [row | {"wanted": generate(decoder, tokenizer, row["question"], 5).split("\n")[0]} for row in ROWS]
    rows[0]["wanted"] += "x"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(
            f"task: own_{name}\n" + (COMMON + text).format(file=tmp_path / "rows.json")
        )
    words = ["--model", model, "--tasks", ",".join(f"own_{name}" for name in TASKS), "--include-path", tmp_path]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "bitnet_mlx", "evaluate", *map(str, words), "--backend", "numpy"]
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, timeout=280, env={**os.environ, **offline}
    )
    assert done.returncode == 0, done.stderr
    tasks = json.loads(done.stdout.splitlines()[-1])["tasks"]
    scores = [[answers.log_likelihood(*answers.encode_pair(r["question"], o))[0] for o in r["options"]] for r in ROWS]
    picked = [int(np.argmax(s)) for s in scores]
    normed = [
        int(np.argmax([v / len(o) for v, o in zip(s, r["options"], strict=True)]))
        for s, r in zip(scores, ROWS, strict=True)
    ]
    found = tasks["own_choice"]["metrics"]
    assert found["acc,none"] == pytest.approx(np.mean([p == r["answer"] for p, r in zip(picked, ROWS, strict=True)]))
    assert found["acc_norm,none"] == pytest.approx(
        np.mean([p == r["answer"] for p, r in zip(normed, ROWS, strict=True)])
    )
    bits = -sum(answers.text_log_likelihood(r["question"]) for r in ROWS) / sum(
        len(r["question"].encode()) for r in ROWS
    )
    assert tasks["own_rolling"]["metrics"]["bits_per_byte,none"] == pytest.approx(bits / math.log(2), rel=1e-9)
    assert tasks["own_writing"]["metrics"]["exact_match,none"] == pytest.approx(2 / 3)
    assert all(task["samples"] == 3 for task in tasks.values())
    assert not [line for line in done.stdout.splitlines()[:-1] if line]

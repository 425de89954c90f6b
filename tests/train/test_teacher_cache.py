"""A teacher's logits on disk: the same losses, no teacher in memory, and files that are damaged, shared or too many."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.errors import MemoryLimitError
from bitnet_mlx.train.qat import qat
from bitnet_mlx.train.qat_options import QatOptions
from bitnet_mlx.train.qat_run import prepare
from bitnet_mlx.train.teacher_cache import Kept, TeacherCache, weights_digest
from tests.support.tiny_tokenizers import WORDS
from tests.train.support import qat_options, silent

IDS = np.arange(9, dtype=np.int32)


def window(rng: np.random.Generator, k: int, vocab: int) -> Kept:
    indices = np.stack([rng.permutation(vocab)[:k] for _ in IDS])
    return Kept(indices, rng.standard_normal((9, k)).astype(np.float32), rng.standard_normal(9).astype(np.float32))


@pytest.mark.parametrize("vocab", [1 << 16, 100_000])
def test_a_window_comes_back_or_counts_as_absent(tmp_path: Path, vocab: int) -> None:
    cache = TeacherCache(tmp_path, {"weights": "a"}, 7, vocab)
    kept = window(np.random.default_rng(vocab), 7, vocab)
    assert cache.read(IDS) is None and not cache.has(IDS)
    cache.write(IDS, kept)
    found = cache.read(IDS)
    assert found is not None and cache.has(IDS)
    for got, put in zip(found, kept, strict=True):
        np.testing.assert_array_equal(got, put)
    assert cache.path(IDS).stat().st_size == cache.nbytes(9) == 16 + 9 * (7 * (6 if vocab == 1 << 16 else 8) + 4) + 32
    others = [replace(cache, k=8), replace(cache, about={"weights": "b"}), replace(cache, vocab=vocab + 1)]
    assert all(other.read(IDS) is None for other in others) and cache.read(IDS + 1) is None
    whole = cache.path(IDS).read_bytes()
    for damaged in (
        whole[:-1],
        b"",
        whole + b"\0",
        whole[:40] + bytes([whole[40] ^ 1]) + whole[41:],
        bytes(len(whole)),
    ):
        cache.path(IDS).write_bytes(damaged)
        assert cache.read(IDS) is None
    cache.write(IDS, kept)
    assert cache.read(IDS) is not None and [p.name for p in cache.path(IDS).parent.iterdir()] == [cache.path(IDS).name]


def test_another_teacher_has_another_digest(tmp_path: Path) -> None:
    qat_options(tmp_path, "out")
    before = weights_digest(tmp_path / "float")
    assert weights_digest(tmp_path / "float") == before
    config = tmp_path / "float" / "config.json"
    text = config.read_text()
    config.write_text(text.replace("500000.0", "500001.0"))
    assert weights_digest(tmp_path / "float") != before
    config.write_text(text)
    weights = tmp_path / "float" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert weights_digest(tmp_path / "float") != before


def losses(run: QatOptions) -> list[float]:
    return [json.loads(line)["loss"] for line in (run.output / "log.jsonl").read_text().splitlines()]


def cached(place: Path, output: str, **changes: Any) -> QatOptions:
    """On a text of which no two windows are equal."""
    run = qat_options(place, output, **{"teacher_cache": place / "cache", "eval_data": (), **changes})
    run.data[0].write_text(" ".join(np.random.default_rng(0).choice(WORDS, 400)))
    return run


def test_all_tokens_kept_are_the_teacher_itself(tmp_path: Path) -> None:
    """To rounding at the first step; a step later one int8 code may have flipped."""
    plain = cached(tmp_path, "plain", teacher_cache=None, temperature=2.0)
    kept = cached(tmp_path, "kept", teacher_top_k=10_000, temperature=2.0)
    qat(plain, silent)
    record = qat(kept, silent)["teacher_cache"]
    assert losses(kept)[0] == pytest.approx(losses(plain)[0], rel=1e-6)
    np.testing.assert_allclose(losses(kept), losses(plain), rtol=1e-2)
    assert record["windows"] == record["written"] == 12 and record["teacher_loads"] == 1
    assert record["bytes"] == 12 * (16 + 16 * (420 * 6 + 4) + 32)


def test_whatever_changes_what_is_kept_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = set()
    for changes in ({}, {"temperature": 2.0}, {"teacher_top_k": 9}, {"dtype": "bfloat16"}):
        cache = prepare(cached(tmp_path, "out", **changes)).teacher.cache
        assert cache is not None
        folders.add(cache.folder)
    assert len(folders) == 4


def test_a_second_run_needs_no_teacher_and_mends_what_is_damaged(tmp_path: Path) -> None:
    first, second, third = (cached(tmp_path, name) for name in ("first", "second", "third"))
    record = qat(first, silent)["teacher_cache"]
    again = qat(second, silent)["teacher_cache"]
    assert (again["written"], again["teacher_loads"]) == (0, 0) and losses(second) == losses(first)
    files = sorted(Path(record["folder"]).glob("*/*.bin"))
    assert len(files) == 12 == again["windows"] and sum(f.stat().st_size for f in files) == record["bytes"]
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:100])
    files[2].write_bytes(bytes(files[2].stat().st_size))  # as long as it should be: found when it is read
    mended = qat(third, silent)["teacher_cache"]
    assert mended["written"] == 3 and mended["teacher_loads"] > 0 and losses(third) == losses(first)
    with_text = qat(cached(tmp_path, "text", eval_data=(tmp_path / "eval.txt",)), silent)
    assert with_text["after"]["kl"] > 0 and with_text["teacher_cache"]["teacher_loads"] == 2  # before, and after


PROGRAM = """
import sys
if (limit := int(sys.argv[1])):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # as a disk that takes no more of a file
from bitnet_mlx.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def start(run: QatOptions, limit: int = 0) -> subprocess.Popen[str]:
    names = ("batch_size", "seq_length", "iters", "teacher_top_k", "teacher_cache", "model", "output")
    flags = [f"--{name.replace('_', '-')}={getattr(run, name)}" for name in names]
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        PROGRAM,
        str(limit),
        "qat",
        "--data",
        str(run.data[0]),
        *flags,
        "--json",
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_writers(tmp_path: Path) -> None:
    runs = [cached(tmp_path, name, iters=4) for name in ("one", "two")]
    processes = [start(run) for run in runs]
    records = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        records.append(json.loads(out.splitlines()[-1])["teacher_cache"])
    assert losses(runs[0]) == losses(runs[1]) and records[0]["folder"] == records[1]["folder"]
    folder = Path(records[0]["folder"])
    assert len(list(folder.glob("*/*.bin"))) == 8 and not list(folder.rglob("*.tmp"))


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on the size of files")
def test_a_disk_that_fills(tmp_path: Path) -> None:
    """What was kept stays, nothing is half written, and a run with room goes on from there."""
    small = cached(tmp_path, "small", iters=2)
    before = qat(small, silent)["teacher_cache"]
    larger = cached(tmp_path, "larger", iters=4)
    process = start(larger, limit=4096)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err
    assert "could not be written: File too large; all that was kept before stays" in err, err
    folder = Path(before["folder"])
    assert len(list(folder.glob("*/*.bin"))) == before["windows"] == 4 and not list(folder.rglob("*.tmp"))
    assert not (larger.output / "model.safetensors").exists()
    assert qat(larger, silent)["teacher_cache"]["written"] == 4
    with pytest.raises(MemoryLimitError, match="windows take .* GB, and the disk of .* has"):
        TeacherCache(tmp_path, {}, 64, 420).check_room(1 << 50, 16)

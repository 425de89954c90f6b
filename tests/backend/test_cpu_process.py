"""What only a process of its own shows: compiled code on disk, forced bodies, threading layers, forks."""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet_mlx.backends.cache_root import VARIABLE, cache_root
from bitnet_mlx.backends.cpu_jit import cachefolder, compiled, isa, threads
from bitnet_mlx.errors import BackendError

ROOT = Path(__file__).resolve().parents[2]
# Logits of three tokens by the cpu decoder, compared with the reference; what was compiled and on which layer.
PROGRAM = """
import json
import numpy as np
from bitnet_mlx.backends.cpu_jit import compiled, isa, threads
from bitnet_mlx.models.decoder_cpu import CpuDecoder
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from tests.support.random_model import random_weights, tiny_config
weights = random_weights(tiny_config(intermediate_size=2700), scale="row", bias=True)
cpu, reference = CpuDecoder(weights, serial_below=0), NumpyDecoder(weights)
equal = all(
    np.array_equal(cpu.step([ids], [cpu.make_cache()], "all")[0], reference.step([ids], [reference.make_cache()], "all")[0])
    for ids in ([1], [5, 6, 7], list(range(11)))
)
worker, step = compiled._kept
hits = worker.cache_hits + sum(step.stats.cache_hits.values())
print(json.dumps(dict(equal=equal, hits=hits, body=isa.body_name(), layer=threads.threading_layer())))
"""


def start(program: str, **environment: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


@functools.cache
def layers() -> tuple[str, ...]:
    """Of numba's threading layers those that load here. Its wheels hold no tbb layer for ARM64, and for Macs an omp layer
    that looks for a library that macOS does not have.
    """
    program = "from bitnet_mlx.backends.cpu_jit import threads\nthreads._load_tbb()\nimport numba.np.ufunc."
    modules = {"tbb": "tbbpool", "omp": "omppool", "workqueue": "workqueue"}
    tried = {layer: start(program + module) for layer, module in modules.items()}
    found = tuple(layer for layer, process in tried.items() if not process.communicate()[1] and not process.returncode)
    assert "workqueue" in found and ("omp" in found or sys.platform == "darwin")
    assert "tbb" in found or (sys.platform, platform.machine()) != ("linux", "x86_64")
    return found


def answer(process: subprocess.Popen) -> dict:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder whose code was damaged, and that two processes mended at once, each by compiling again."""
    compiled.compiled_step()
    kept = cache_root() / "numba" / cachefolder.key()
    root = tmp_path_factory.mktemp("cache")
    folder = Path(shutil.copytree(kept, root / "numba" / kept.name))
    assert cachefolder.is_whole(folder)
    largest = max(folder.rglob("*.nbc"), key=lambda p: p.stat().st_size)
    code = bytearray(largest.read_bytes())
    code[len(code) // 2] ^= 255
    largest.write_bytes(code)
    both = [start(PROGRAM, BITNET_MLX_CACHE_DIR=str(root)) for _ in range(2)]
    assert [(got["equal"], got["hits"]) for got in map(answer, both)] == [(True, 0)] * 2
    return root


def test_the_second_start_compiles_nothing(warm: Path) -> None:
    (folder,) = (warm / "numba").iterdir()  # neither process left a draft
    assert cachefolder.is_whole(folder)
    got = answer(start(PROGRAM, BITNET_MLX_CACHE_DIR=str(warm)))
    assert got["equal"] and got["hits"] == 2


def test_any_layer_gives_the_same_bits(warm: Path) -> None:
    asked = [layer for layer in layers() if layer != "tbb"]  # which the test above ran on, where it is there
    got = [
        answer(p)
        for p in [start(PROGRAM, BITNET_MLX_CACHE_DIR=str(warm), NUMBA_THREADING_LAYER=layer) for layer in asked]
    ]
    assert [g["layer"] for g in got] == asked and all(g["equal"] for g in got)


def test_the_plain_body_and_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Both compile anew, so one process shows both."""
    (tmp_path / "file").write_text("in the way")
    process = start(PROGRAM, BITNET_MLX_CACHE_DIR=str(tmp_path / "file"), BITNET_MLX_CPU_BODY="plain")
    out, err = process.communicate()
    assert process.returncode == 0, err
    got = json.loads(out.splitlines()[-1])
    assert got["equal"] and got["body"] == "plain" and got["hits"] == 0
    assert "compiled code is not kept" in err and "BITNET_MLX_CACHE_DIR" in err


def test_a_child_forked_under_omp_gets_an_error(warm: Path) -> None:
    if "omp" not in layers():
        pytest.skip("numba has no OpenMP layer here")
    program = PROGRAM + (
        "import os, sys\n"
        "from bitnet_mlx.errors import BackendError\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    try:\n"
        "        cpu.step([[1]], [cpu.make_cache()])\n"
        "    except BackendError as error:\n"
        "        os._exit(7 if 'forked' in str(error) else 8)\n"
        "    os._exit(0)\n"
        "print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))\n"
    )
    assert answer(start(program, BITNET_MLX_CACHE_DIR=str(warm), NUMBA_THREADING_LAYER="omp")) == 7  # type: ignore[comparison-overlap]


def test_python_threads_take_turns(warm: Path) -> None:
    program = PROGRAM + (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "want = cpu.step([[3, 4]], [cpu.make_cache()])[0]\n"
        "def again(_):\n"
        "    return np.array_equal(cpu.step([[3, 4]], [cpu.make_cache()])[0], want)\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    print(json.dumps(sum(pool.map(again, range(200)))))\n"
    )
    for layer in sorted({"workqueue", "tbb"} & set(layers())):
        got = answer(start(program, BITNET_MLX_CACHE_DIR=str(warm), NUMBA_THREADING_LAYER=layer))
        assert got == 200  # type: ignore[comparison-overlap]


def test_a_body_that_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for forced in {"avx2", "sdot", "neon"} - set(isa.runnable()):
        monkeypatch.setenv(isa.VARIABLE, forced)
        with pytest.raises(BackendError, match=forced):
            isa.body_name()
    for allowed in isa.runnable():
        monkeypatch.setenv(isa.VARIABLE, allowed)
        assert isa.body_name() == allowed == isa.body().name


def test_the_choice_follows_the_features_that_numba_compiles_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core import config

    for machine, name, features, best in (
        ("x86_64", "haswell", "+avx2,+fma", "avx2"),
        ("x86_64", "generic", "", "plain"),
        ("AMD64", "generic", "+sse4.2,-avx2", "plain"),
        ("arm64", "apple-m1", "", "sdot"),
        ("aarch64", "neoverse-n1", "+neon,+dotprod", "sdot"),
        ("aarch64", "cortex-a72", "+neon", "plain"),
        ("riscv64", "generic", "", "plain"),
    ):
        monkeypatch.setattr(isa.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(config, "CPU_NAME", name)
        monkeypatch.setattr(config, "CPU_FEATURES", features)
        assert isa.runnable()[0] == best


def test_threads_stay_within_what_numba_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core import config

    monkeypatch.setattr(threads, "_count", None)
    limit: int = config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    for count in (0, -1, limit + 1):
        with pytest.raises(BackendError, match=f"{count} threads"):
            threads.set_threads(count)
    assert 1 <= threads.get_threads() <= limit
    threads.set_threads(1)
    assert threads.get_threads() == 1


@pytest.mark.parametrize("damage", ["deleted", "truncated", "changed", "added", "list deleted", "list damaged"])
def test_damage_to_a_folder_is_seen(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    draft = cachefolder.draft("abc")
    (draft / "code").write_bytes(b"0123456789")
    (draft / "index").write_bytes(b"01")
    cachefolder.publish(draft, "abc")
    folder = tmp_path / "numba" / "abc"
    assert cachefolder.is_whole(folder) and not draft.exists()
    code, names = folder / "code", folder / cachefolder.CHECKSUMS
    if damage == "deleted":
        code.unlink()
    elif damage == "list deleted":
        names.unlink()
    elif damage == "added":
        (folder / "more").write_bytes(b"")
    else:
        target = names if damage == "list damaged" else code
        target.write_bytes(b"012345678x" if damage == "changed" else target.read_bytes()[:5])
    assert not cachefolder.is_whole(folder)
    again = cachefolder.draft("abc")
    (again / "code").write_bytes(b"new")
    cachefolder.publish(again, "abc")
    assert cachefolder.is_whole(folder) and code.read_bytes() == b"new"
    late = cachefolder.draft("abc")  # a process that compiled at the same time and came second
    (late / "code").write_bytes(b"late")
    cachefolder.publish(late, "abc")
    assert code.read_bytes() == b"new" and [p.name for p in folder.parent.iterdir()] == ["abc"]


def test_an_edit_or_another_body_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    first = cachefolder.key()
    assert first == cachefolder.key()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: read(p) + (b"#" if p.name == "avx2.py" else b""))
    assert cachefolder.key() != first
    monkeypatch.undo()
    monkeypatch.setattr(isa, "body_name", lambda: "other")
    assert cachefolder.key() != first

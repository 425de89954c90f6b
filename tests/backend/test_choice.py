"""Which backend runs: a named one or a refusal that says what to do, the fastest by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitnet_mlx import backends
from bitnet_mlx.api import load
from bitnet_mlx.backends import NAMES, choose, choose_on_mlx, cuda, metal
from bitnet_mlx.backends.cache_root import VARIABLE, cache_root
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.cli.main import main
from bitnet_mlx.errors import BackendError, ConfigError


def test_the_names() -> None:
    assert NAMES == ("auto", "metal", "cuda", "mlx", "cpu", "numpy")
    with pytest.raises(ConfigError, match="auto, metal, cuda, mlx, cpu, numpy are known"):
        choose("gpu")


@pytest.mark.parametrize(("name", "what"), [("metal", "Mac with an M chip|default device"), ("cuda", r"mlx\[cuda13\]")])
def test_a_gpu_that_is_not_here_is_refused(name: str, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BackendError, match=what) as caught:
        load(backend=name)
    assert "--backend mlx or cpu or numpy" in str(caught.value)
    assert main(["generate", "--backend", name, "--prompt", "x"]) == 1
    assert "[backend]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("here", "chosen"),
    [
        (("metal", "mlx", "cpu"), "metal"), (("cuda", "mlx", "cpu"), "cuda"), (("mlx", "cpu"), "cpu"), (("cpu",), "cpu"),
        (("mlx",), "numpy"), ((), "numpy"),
    ],
)  # fmt: skip
def test_auto_takes_the_fastest(here: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "missing", lambda name: None if name in (*here, "numpy") else f"no {name}")
    choice = choose()
    assert choice.name == chosen and choice.reason
    assert choose(chosen).reason == "asked for by name"


def test_a_default_device_that_is_the_cpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((metal, "metal"), (cuda, "cuda")):
        monkeypatch.setattr(getattr(mx, name), "is_available", lambda: True)
        assert "default device" in str(module.missing()) and "default device" in str(backends.missing(name))


def test_a_mac_whose_gpu_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sandbox MLX, built for Metal, still says that Metal and its default device are there."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert not mx.is_available(mx.gpu)
    for name in ("metal", "mlx"):
        assert "finds no Metal device" in str(backends.missing(name))
    assert choose().name == "cpu"
    with pytest.raises(BackendError, match="sandboxes.*use --backend cpu or numpy"):
        choose("mlx")


def test_an_mlx_that_does_not_import_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str | None:
        raise BackendError("[mlx] its library is of another system")

    for module, name in ((metal, "metal"), (cuda, "cuda")):
        monkeypatch.setattr(module, "missing", broken)
        assert backends.missing(name) == "[mlx] its library is of another system"


@pytest.mark.parametrize(
    ("here", "chosen"), [(("metal", "mlx"), "metal"), (("cuda", "mlx"), "cuda"), (("mlx", "cpu"), "mlx")]
)
def test_training_takes_a_gpu_else_mlx(here: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "missing", lambda name: None if name in here else f"no {name}")
    assert choose_on_mlx().name == chosen
    for name in ("cpu", "numpy"):
        with pytest.raises(ConfigError, match=f"{name} was asked for; training runs on metal, cuda, mlx"):
            choose_on_mlx(name)
    with pytest.raises(BackendError):
        choose_on_mlx("metal" if chosen != "metal" else "cuda")


@pytest.mark.parametrize(
    ("system", "variables", "expected"),
    [
        ("linux", {}, ".cache/bitnet-mlx"), ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/bitnet-mlx"),
        ("darwin", {"XDG_CACHE_HOME": "/x"}, "Library/Caches/bitnet-mlx"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/bitnet-mlx/Cache"), ("win32", {}, ".cache/bitnet-mlx"),
        ("darwin", {VARIABLE: "/own"}, "/own"),
    ],
)  # fmt: skip
def test_where_caches_lie(
    system: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (VARIABLE, "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.platform", system)
    assert cache_root() == Path.home() / expected


def test_a_machine_without_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert backends.missing("metal") == backends.missing("mlx") == "the package mlx is not installed"
    assert choose().name == "numpy"
    with pytest.raises(BackendError, match="use --backend numpy"):
        choose("cuda")

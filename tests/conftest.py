"""Every test runs without the network, where a connection that leaves this machine is an error, and on MLX's CPU device."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import tally
from tests.support.on_cpu import sitecustomize  # for this process; others find it by the path

_FOLDER = str(Path(sitecustomize.__file__).parent)
_PATHS = os.environ.get("PYTHONPATH", "").split(os.pathsep)
os.environ["PYTHONPATH"] = os.pathsep.join([_FOLDER, *(path for path in _PATHS if path not in ("", _FOLDER))])
_LOCAL = ("127.", "::1", "localhost")


def pytest_configure(config: pytest.Config) -> None:
    """A product in a test may warn on a Mac, where numpy's BLAS raises flags by chance (see bitnet_mlx.ternary.matmul)."""
    if sys.platform == "darwin":
        config.addinivalue_line("filterwarnings", "ignore:.* encountered in (matmul|dot|vecdot):RuntimeWarning")


@pytest.fixture(autouse=True, scope="session")
def stay_on_this_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Refuse to connect anywhere but to this machine. No server elsewhere is trusted: every HTTP client that a test makes
    would read all of the machine's certificates, which is most of the work of making one.
    """
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and not str(address[0]).startswith(_LOCAL):
            raise AssertionError(f"a test connects to {address}; tests need no network")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        patch.delenv("SSL_CERT_FILE", raising=False)
        patch.setenv("SSL_CERT_DIR", str(tmp_path_factory.mktemp("no_certificates")))
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How much of the session ran on the emulated grid."""
    if line := tally.here.line():
        terminalreporter.write_line(line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist tells what it emulated."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["emulator"] = tally.here.record()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a worker told is added up where the session's end is printed."""
    if told := getattr(node, "workeroutput", {}).get("emulator"):
        tally.here.add(told)

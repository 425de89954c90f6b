"""`bitnet-mlx serve` as a user types it, README's example included, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from bitnet_mlx import generate, load
from tests.train.test_fuse import base_folder, write_adapter

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


@contextmanager
def started(*arguments: str, **env: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(process, url) of a server with the embedded model on a free port."""
    command = [sys.executable, "-m", "bitnet_mlx", "serve", "--json", "--port", "0", "--backend", "numpy", *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield process, json.loads(line)["url"]
        finally:
            process.kill()


def test_readme_and_sigterm() -> None:
    """README's curl and Python programs get their answers; a stream in progress is finished after SIGTERM, then it ends."""
    section = README.split("**The server.**")[1].split("## Make models")[0]
    (curl,) = re.findall(r"^```bash\n(.*?)^```$", section, re.M | re.S)
    (program,) = re.findall(r"^```py\n(.*?)^```$", section, re.M | re.S)
    with started() as (process, url):
        done = subprocess.run(
            ["bash", "-c", curl.replace("http://127.0.0.1:8080", url)], capture_output=True, text=True
        )
        assert json.loads(done.stdout)["choices"][0]["text"].strip()
        code = program.replace("http://127.0.0.1:8080", url)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            stream = client.completions.create(model="embedded", prompt="import ", max_tokens=40, stream=True)
            parts = [next(stream)]
            process.send_signal(signal.SIGTERM)
            parts += stream
        assert parts[-1].choices[0].finish_reason in ("length", "stop")
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


def test_a_key_from_the_environment() -> None:
    with started(BITNET_MLX_API_KEY="secret") as (_, url):
        for key, right in (("secret", True), ("secre", False)):
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
                if right:
                    assert [m.id for m in client.models.list()] == ["embedded"]
                else:
                    with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
                        client.models.list()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--port", "70000"], 1, "70000 cannot be listened on"),
        (["--max-batch", "0"], 2, "--max-batch is 0; it must be at least 1"),
        (["--max-kv-bytes", "nan"], 2, "--max-kv-bytes is 'nan'"),
        (["--max-kv-bytes", "1K"], 2, "--max-kv-bytes is 1000, which has room for no position"),
        (["--prompt-cache-bytes", "-1"], 2, "--prompt-cache-bytes is '-1'"),
        (["--request-timeout", "0"], 2, "--request-timeout is 0.0"),
        (["--max-kv-size", "99999"], 2, "max_kv_size is 99999; 1 to 1024"),
        (["--api-key", ""], 2, "API key is empty"),
    ],
)
def test_bad_options(arguments: list[str], code: int, said: str) -> None:
    command = [sys.executable, "-m", "bitnet_mlx", "serve", "--backend", "numpy", "--port", "0", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and said in done.stderr and done.stdout == "", done.stderr


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "bitnet_mlx", "serve", "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "cannot be listened on" in done.stderr


def test_base_and_adapter(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    write_adapter(tmp_path / "ad", base, 0.5)
    adapter = {"adapter_path": tmp_path / "ad"}
    texts = [generate(*load(base.path, "cpu", **given), "hello", max_tokens=5) for given in ({}, adapter)]
    with (
        started("--model", str(base.path), "--adapter-path", str(tmp_path / "ad")) as (_, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        [model] = client.models.list()
        found = client.completions.create(model=model.id, prompt="hello", max_tokens=5, temperature=0)
    assert found.choices[0].text == texts[1] != texts[0]

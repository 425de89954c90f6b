"""convert --upload-repo: the real client uploads to a hub on this machine, and what it holds is loaded from there.

The client reads its settings when it is imported, so commands run in processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitnet_mlx.checkpoint.upload import Upload
from bitnet_mlx.errors import ConfigError
from tests.support import hf_folder, tiny_tokenizers
from tests.support.hub_server import COMMIT, READER, WRITER, serving

# Runs commands, each with a token, and prints (exit code, stdout, stderr) of each as one JSON line.
SCRIPT = """
import contextlib, io, json, os, sys
from bitnet_mlx.cli.main import main
done = []
for token, words in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    done.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(done))
"""
ANSWER = ("--prompt", "hello", "--max-tokens", "6", "--backend", "numpy", "--temp", "0", "--json")
CONFIG: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 421}


def run(home: Path, endpoint: str, *commands: tuple[str, list[object]]) -> list[tuple[int, str, str]]:
    """What the commands give, in one process with this cache and this hub."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    env = {**keep, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    words = json.dumps([(token, [str(word) for word in command]) for token, command in commands])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, words], check=False, capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [tuple(one) for one in json.loads(done.stdout.splitlines()[-1])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upload") / "model"
    hf_folder.write(folder, "llama", "online", **CONFIG)
    return tiny_tokenizers.byte_level(folder)


def convert(source: object, out: Path, repo: str, *more: object) -> list[object]:
    return ["convert", "--hf-path", source, "--mlx-path", out, "--upload-repo", repo, *more]


def metadata(card: Path) -> dict[str, Any]:
    return yaml.safe_load(card.read_text().split("---\n")[1])


def test_what_is_uploaded_is_loaded_back(model: Path, tmp_path: Path) -> None:
    """A folder from the hub and a GGUF file from this disk; a card that someone wrote there is left alone."""
    mine, file, repos = tmp_path / "mine", tmp_path / "my.gguf", tmp_path / "repos"
    (repos / "me" / "file").mkdir(parents=True)
    (repos / "me" / "file" / "README.md").write_text("mine")
    with serving({"owner/tiny": model, "me/file": repos / "me" / "file"}, made=repos) as server:
        folder, gguf, here, there, of_file = run(
            tmp_path / "home", server.url,
            (WRITER, convert("owner/tiny", mine, "me/folder", "--json")),
            (WRITER, convert(model, file, "me/file", "--format", "gguf-tq2_0")),
            ("", ["generate", "--model", mine, *ANSWER]),
            ("", ["generate", "--model", "me/folder", *ANSWER]),
            ("", ["generate", "--model", "me/file", *ANSWER]),
        )  # fmt: skip
        assert [one[0] for one in (folder, gguf, here, there, of_file)] == [0] * 5, (folder, gguf, there, of_file)
        names = sorted(path.name for path in mine.iterdir())
        assert json.loads(folder[1].splitlines()[-1])["uploaded"] == {
            "repo": "me/folder", "url": f"{server.url}/me/folder", "commit": COMMIT, "files": sorted([*names, "README.md"]),
        }  # fmt: skip
        assert f"uploaded to {server.url}/me/file, 1 files" in gguf[1]
        (inline, large), from_file = server.commits
        assert "model.safetensors" in large and "README.md" in inline and from_file == ([], ["my.gguf"])
    for name in names:
        assert (repos / "me" / "folder" / name).read_bytes() == (mine / name).read_bytes()
    assert (repos / "me" / "file" / "my.gguf").read_bytes() == file.read_bytes()
    assert metadata(repos / "me" / "folder" / "README.md") == {
        "library_name": "bitnet-mlx", "pipeline_tag": "text-generation", "base_model": "owner/tiny",
        "tags": ["ternary", "bitnet-mlx", "mlx"],
    }  # fmt: skip
    assert not (mine / "README.md").exists() and (repos / "me" / "file" / "README.md").read_text() == "mine"
    answers = [json.loads(one[1].splitlines()[-1]) for one in (here, there, of_file)]
    assert answers[0]["text"] == answers[1]["text"] and all(answer["generation_tokens"] > 0 for answer in answers)


def test_what_fails_leaves_the_conversion(model: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("unknown", "a reader", "broken", "none")]
    with serving({}, made=tmp_path / "repos") as server:
        server.breaks.add("me/broken")
        unknown, reader, broken, none = run(
            tmp_path / "home", server.url,
            ("hf_wrong", convert(model, outs[0], "me/x")),
            (READER, convert(model, outs[1], "me/x", "--json")),
            (WRITER, convert(model, outs[2], "me/broken")),
            ("", convert(model, outs[3], "me/x")),
        )  # fmt: skip
    assert [unknown[0], reader[0], broken[0], none[0]] == [1, 1, 1, 2]
    assert "the hub does not know the token (401): log in with `hf auth login`" in unknown[2]
    assert "all of them read again and equal to the source" in unknown[1] and "uploaded" not in unknown[1]
    assert "the token may not write there (403): take one with write access to me's models" in reader[2]
    assert f"stays in {outs[1]}; to upload it without converting again: hf upload me/x '{outs[1]}'" in reader[2]
    record = json.loads(reader[1].splitlines()[-1])
    assert record["uploaded"] is None and record["verified"] is True
    assert f"{outs[2]} was not uploaded to me/broken: Server disconnected" in broken[2]
    assert "needs a Hugging Face token and there is none; log in" in none[2]
    assert [(out / "model.safetensors").is_file() for out in outs] == [True, True, True, False]


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE forbids to reach the hub"):
        Upload("me/x", "owner/tiny")


@pytest.mark.parametrize("name", ["", "name", "a/b/c", "own er/x", "me/", "me/x--y", "me/x.git", "me/" + "x" * 97])
def test_names_that_no_repository_has(name: str) -> None:
    with pytest.raises(ConfigError, match=r"--upload-repo is .*give your name on the hub"):
        Upload(name, "owner/tiny")

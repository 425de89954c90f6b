"""From a name to a folder: the real client against a server on this machine, the real cache, and no network at all.

The client reads its settings when it is imported, so each scene runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitnet_mlx.checkpoint.hub import resolve
from bitnet_mlx.errors import ConfigError
from tests.support import gguf_models, hf_folder
from tests.support.hub_server import COMMIT, serving

NAME = "owner/tiny"
# Resolves each (name, revision) and prints what came of it as one JSON line.
SCRIPT = """
import json, sys
from bitnet_mlx.checkpoint.hub import resolve
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.errors import BitnetError
out = []
for name, revision in json.loads(sys.argv[1]):
    try:
        folder = resolve(name, revision, progress=sys.argv[2] == "bars")
        out.append({"folder": str(folder), "linears": len(read_weights(folder).linears)})
    except BitnetError as error:
        out.append({"error": type(error).__name__, "text": str(error)})
print(json.dumps(out))
"""


def run(
    home: Path,
    *asked: tuple[str, str | None],
    endpoint: str = "http://127.0.0.1:9",
    offline: bool = False,
    bars: bool = False,
) -> tuple[list[dict[str, Any]], str]:
    """What resolve gives for each name with this cache, and what went to stderr. Port 9 answers nobody."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "1" if offline else "0"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT, json.dumps(asked), "bars" if bars else "quiet"],
        check=False, capture_output=True, text=True, env={**keep, **settings}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def repository(path: Path, shards: int = 1) -> Path:
    """A model, with files that must never be fetched beside it."""
    folder = hf_folder.write(path, shards=shards).path
    (folder / "tokenizer.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    nested = ("onnx/config.json", "1more/config.json", "original/1_Pooling/config.json")
    for name in ("modeling.py", "pytorch_model.bin", "consolidated.safetensors", *nested):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("never fetched")
    return folder


def test_a_download_with_bars_then_offline_from_the_cache(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with serving({NAME: repository(tmp_path / "repo", shards=2)}) as server:
        (first, again, tag), err = run(
            home, (NAME, None), (NAME, COMMIT), (NAME, "no-such-tag"), endpoint=server.url, bars=True
        )
        fetched = {path.split("/resolve/")[1].split("/", 1)[1] for path in server.asked if "/resolve/" in path}
    shards = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert fetched == {
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "1_Pooling/config.json",
        *shards,
    }
    assert first["linears"] == 14 and again == first and COMMIT in first["folder"]
    assert "%" in err
    assert tag["error"] == "ConfigError" and "owner/tiny has no revision no-such-tag" in tag["text"]
    for settings in ({"offline": True}, {}):  # told to be offline, and a network that is gone
        (cached,), err = run(home, (NAME, None), **settings)
        assert cached == first and "%" not in err
    blob = next((home / "hub").glob("**/snapshots/*/model-00002-of-00002.safetensors"))
    blob.unlink()
    (broken,), _ = run(home, (NAME, None), offline=True)
    assert broken["error"] == "FormatError" and "model-00002-of-00002.safetensors" in broken["text"]


def test_absent_private_and_gated_models(tmp_path: Path) -> None:
    with serving({}, gated=frozenset({"owner/gated"})) as server:
        (absent, gated), _ = run(tmp_path, ("owner/none", None), ("owner/gated", None), endpoint=server.url)
    assert absent["error"] == gated["error"] == "ConfigError"
    assert "no folder owner/none here and no model owner/none on the hub" in absent["text"]
    assert "owner/gated is gated" in gated["text"]


def test_a_repository_without_safetensors_is_refused(tmp_path: Path) -> None:
    folder = repository(tmp_path / "repo")
    (folder / "model.safetensors").unlink()
    with serving({NAME: folder}) as server:
        (found,), _ = run(tmp_path / "home", (NAME, None), endpoint=server.url)
    assert found["error"] == "FormatError" and "has no model.safetensors" in found["text"]


def gguf_repository(path: Path, *files: str) -> Path:
    keys, content = gguf_models.small()
    path.mkdir()
    for file in files:
        (path / file).parent.mkdir(exist_ok=True)
        gguf_models.write(path / file, keys, content)
    (path / "README.md").write_text("a model")
    return path


def test_repositories_of_gguf_files(tmp_path: Path) -> None:
    """The only file of a repository, one of several by its name, and both again from the cache."""
    repos = {
        "owner/one": gguf_repository(tmp_path / "one", "model.gguf"),
        "owner/two": gguf_repository(tmp_path / "two", "a.gguf", "sub/b.gguf"),
    }
    asked = (("owner/one", None), ("owner/two/sub/b.gguf", None), ("owner/two", None), ("owner/two/c.gguf", None))
    home = tmp_path / "home"
    with serving(repos) as server:
        (one, two, several, absent), _ = run(home, *asked, endpoint=server.url)
    assert one["folder"].endswith("model.gguf") and two["folder"].endswith("sub/b.gguf")
    assert one["linears"] == two["linears"] == 14
    assert several["error"] == absent["error"] == "ConfigError"
    assert "holds 2 GGUF files; give one of them: owner/two/a.gguf, owner/two/sub/b.gguf" in several["text"]
    assert "owner/two has no file c.gguf; its GGUF files are a.gguf, sub/b.gguf" in absent["text"]
    (again, other, missing), _ = run(home, *asked[:2], ("owner/two/a.gguf", None), offline=True)
    assert (again, other) == (one, two)
    assert "a.gguf of owner/two is not in the cache, and the hub may not be asked" in missing["text"]


def test_a_repository_of_gguf_files_alone_is_fetched_without_noise(tmp_path: Path) -> None:
    """The client warns of patterns that match nothing, and draws bars of no files."""
    with serving({"owner/one": gguf_repository(tmp_path / "one", "model.gguf")}) as server:
        (found,), err = run(tmp_path / "home", ("owner/one", None), endpoint=server.url, bars=True)
    assert found["linears"] == 14
    assert "Fetching 1 files" in err and "Fetching 0 files" not in err and "No files matched" not in err


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["README.md"], "it holds README.md"),
        (["config.json", "pytorch_model.bin"], "Pickles such as pytorch_model.bin can run code"),
        (["adapter_config.json", "adapters.safetensors"], "It is an adapter: fetch it (`hf download owner/other"),
        ([f"{i}.txt" for i in range(11)], "and 3 more"),
    ],
)
def test_a_repository_without_a_model_is_told_what_it_holds(files: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    for file in files:
        (tmp_path / "repo" / file).write_text("{}")
    with serving({"owner/other": tmp_path / "repo"}) as server:
        (found,), err = run(tmp_path / "home", ("owner/other", None), endpoint=server.url, bars=True)
        assert not any("/resolve/" in path for path in server.asked)
    assert found["error"] == "FormatError" and words in found["text"], found
    assert found["text"].startswith("[hub] owner/other has no model.safetensors, ") and err == ""


def test_a_folder_of_gguf_files(tmp_path: Path) -> None:
    folder = gguf_repository(tmp_path / "one", "model.gguf")
    assert resolve(folder) == folder / "model.gguf"
    several = gguf_repository(tmp_path / "two", "a.gguf", "b.gguf")
    with pytest.raises(ConfigError, match=r"holds 2 GGUF files; give one of them: .*two/a.gguf, .*two/b.gguf"):
        resolve(several)
    (several / "model.safetensors").write_bytes(b"")
    assert resolve(several) == several


def cache(home: Path, source: Path) -> Path:
    """The client's own layout: blobs, refs, and a snapshot of links; returns the snapshot."""
    store = home / "hub" / "models--owner--tiny"
    snapshot = store / "snapshots" / COMMIT
    for folder in (store / "blobs", store / "refs", snapshot):
        folder.mkdir(parents=True)
    (store / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(path for path in sorted(source.iterdir()) if path.is_file()):
        shutil.copyfile(path, store / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


@pytest.mark.parametrize("offline", [True, False])
def test_a_cache_that_another_tool_filled(tmp_path: Path, offline: bool) -> None:
    """No listing of the repository is kept there: the folder itself tells what is missing."""
    snapshot = cache(tmp_path, repository(tmp_path / "repo", shards=3))
    (whole, branch, other), _ = run(tmp_path, (NAME, None), (NAME, "dev"), ("owner/other", None), offline=offline)
    assert whole == {"folder": str(snapshot), "linears": 14}
    assert branch["error"] == other["error"] == "ConfigError"
    assert "owner/tiny at revision dev is not in the cache" in branch["text"]
    assert ("HF_HUB_OFFLINE is set" if offline else "cannot be reached") in other["text"]
    (snapshot / "model-00003-of-00003.safetensors").resolve().unlink()  # a link to a blob that never came
    (snapshot / "model-00001-of-00003.safetensors").unlink()
    (broken,), _ = run(tmp_path, (NAME, None), offline=offline)
    assert broken["error"] == "FormatError"
    assert "lacks 2 of its 3 weight files: model-00001-of-00003.safetensors, model-00003" in broken["text"]


def test_a_path_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/tiny") == Path("owner/tiny")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/owner") == tmp_path / "owner"
    with pytest.raises(ConfigError, match="revision 'v1' was given, but owner/tiny is on this disk"):
        resolve("owner/tiny", "v1")


@pytest.mark.parametrize(
    "address",
    ["https://huggingface.co/owner/tiny", "huggingface.co/owner/tiny/tree/main", "http://hf.co/owner/tiny?x=1", "hf.co/owner/tiny"],
)  # fmt: skip
def test_an_address_is_answered_with_the_name_in_it(address: str) -> None:
    with pytest.raises(ConfigError, match="is an address; give the model's name alone: owner/tiny$"):
        resolve(address)


@pytest.mark.parametrize("name", ["{here}/models/small", "models/small", "./models/a.gguf", "models/a.gguf"])
def test_a_misspelt_path_is_told_what_its_folder_holds(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "smal").mkdir(parents=True)
    (tmp_path / "models" / "b.gguf").touch()
    (tmp_path / "models" / "notes.txt").touch()
    (tmp_path / "models" / ".hidden").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"The folder \S*models here holds b.gguf, smal$"):
        resolve(name.format(here=tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        "nowhere",
        "./nowhere",
        "/no/where",
        "a/b/c",
        "owner/",
        "",
        "a" * 5000,
        "a\0b",
        "own er/x",
        "../owner/x",
        "-a/b",
        "a/b/../c.gguf",
        "a/b/.gguf/",
    ],
)
def test_what_is_neither_a_folder_nor_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="there is no file or folder" if name else "name is empty"):
        resolve(name)

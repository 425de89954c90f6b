"""Every command and program in README runs, and prints what README says it prints.

Names on the Hugging Face hub are served by a small hub on 127.0.0.1, with a tiny checkpoint in the true format.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import hf_folder, tiny_tokenizers
from tests.support.hub_server import serving

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
TEMPLATE = "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endfor %}Assistant: "


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
PROGRAMS = blocks("python")
# Which command makes a file or folder that others name: these tests may be spread over several processes.
MADE = {name: line for line in COMMANDS for name in re.findall(r"--(?:output|mlx-path|save-path) (\S+)", line)}
MADE |= {name: line for line in COMMANDS for name in re.findall(r" lora --train .*--adapter-path (\S+)", line)}
MADE["calibration.json"] = next(line for line in COMMANDS if " calibrate " in line)
Workshop = tuple[Path, dict[str, str], dict[str, subprocess.CompletedProcess[str]]]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """A folder with texts, samples and a float model, an environment whose hub has the model that README names, and what
    the commands that ran there gave."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my_texts").mkdir()
    for file in (ROOT / "bitnet_mlx").glob("*.py"):
        shutil.copy(file, folder / "my_texts")
    (folder / "my_samples").mkdir()
    (folder / "my_samples" / "train.jsonl").write_text('{"text": "import ship"}\n' * 4)
    (folder / "my_text.txt").write_text("def read_config(path):\n    return path\n")
    hf_folder.write(folder / "my_float_model", "llama", "dense", vocab_size=420)
    tiny_tokenizers.byte_level(folder / "my_float_model")
    model = folder / "hub_model"
    hf_folder.write(model, "bitnet", "packed", vocab_size=420).save()
    tiny_tokenizers.byte_level(model, settings={"chat_template": TEMPLATE})
    with serving({"microsoft/bitnet-b1.58-2B-4T": model}) as server:
        yield folder, {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(folder / "hf_home")}, {}


def run(command: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    words = [word.replace(".venv/bin/", f"{BIN}/") for word in shlex.split(command)]
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, input="Hello\n", check=False)


def once(command: str, workshop: Workshop) -> subprocess.CompletedProcess[str]:
    """Run a command, if it did not run yet, after those that make what it names."""
    folder, env, ran = workshop
    for name in shlex.split(command):
        maker = MADE.get(name, command)
        if maker != command:
            made = once(maker, workshop)
            assert made.returncode == 0, made.stderr
    if command not in ran:
        ran[command] = run(command, folder, env)
    return ran[command]


def test_readme_opens_with_the_two_commands() -> None:
    assert COMMANDS[:2] == ["./scripts/demo", "./scripts/test"]


def test_the_demo_prints_what_readme_shows() -> None:
    done = run("./scripts/demo", ROOT, dict(os.environ))
    assert done.returncode == 0, done.stderr
    shown = README.split("prints what the model that comes with it writes:\n\n```\n")[1].split("\n```")[0]
    assert shown.strip() in done.stdout


def test_the_test_script_runs_tests() -> None:
    done = run("./scripts/test -q tests/formats/test_words2.py", ROOT, dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


@pytest.mark.parametrize("command", COMMANDS[2:])
def test_command(command: str, workshop: Workshop) -> None:
    """The model that one command trains is what another one runs."""
    done = once(command, workshop)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "the command printed nothing"


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program: str, workshop: Workshop) -> None:
    folder, env, _ = workshop
    done = subprocess.run(
        [BIN / "python", "-c", program], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()

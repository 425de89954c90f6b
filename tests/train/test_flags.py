"""Every option of a training run has a flag of its name, and a key in mlx-lm's YAML, whose value arrives."""

from __future__ import annotations

import argparse
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitnet_mlx.cli.main import build_parser, main
from bitnet_mlx.cli.training import options
from bitnet_mlx.train.lora_config import read_options
from bitnet_mlx.train.lora_options import LoraOptions
from bitnet_mlx.train.options import TrainOptions
from bitnet_mlx.train.qat_options import QatOptions

NEEDED = {
    TrainOptions: ["--data", "texts", "--output", "out"],
    QatOptions: ["--data", "texts", "--output", "out", "--model", "own"],
    LoraOptions: ["--data", "samples", "--train"],
}
FLAGS = {"quantise": "--float", "test": "--test"}  # where the flag is not the option's name
VALUES = {"plot": "loss.png"}


def asked(action: argparse.Action, name: str) -> tuple[list[str], Any]:
    """What a user types to set an option, and its value then."""
    if action.nargs == 0:
        return [action.option_strings[0]], action.const
    if action.choices:
        value = list(action.choices)[-1]
        return [action.option_strings[0], value], value
    value = {int: 7, float: 0.25, Path: Path(VALUES.get(name, "there"))}.get(action.type or str, "there")  # type: ignore[call-overload]
    return [action.option_strings[0], str(value)], (value,) if action.nargs == "+" else value


@pytest.mark.parametrize("kind", NEEDED, ids=lambda kind: kind.COMMAND)
def test_each_flag_arrives(kind: Any) -> None:
    parser = build_parser(kind.COMMAND)
    actions = {action.dest: action for action in parser._actions}
    usual = options(parser.parse_args(NEEDED[kind]), kind)
    for field in fields(kind):
        words, value = asked(actions[field.name], field.name)
        assert words[0] == FLAGS.get(field.name, f"--{field.name.replace('_', '-')}")
        chosen = options(parser.parse_args([*NEEDED[kind], *words]), kind)
        assert getattr(chosen, field.name) == value, field.name
        if field.default is not MISSING and (kind, field.name) != (LoraOptions, "train"):
            assert getattr(usual, field.name) == field.default != value, field.name


def test_each_key_of_a_file_arrives(tmp_path: Path) -> None:
    actions = {action.dest: action for action in build_parser("lora")._actions}
    wanted = {field.name: asked(actions[field.name], field.name)[1] for field in fields(LoraOptions)}
    table = {
        name: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for name, v in wanted.items()
    }
    inner = {name: table.pop(name) for name in ("rank", "scale", "dropout", "keys")}
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump({**table, "lora_parameters": inner}))
    assert read_options(tmp_path / "lora.yaml") == wanted


FIGURES = ({"perplexity": 4.0, "kl": 0.0}, {"perplexity": 9.0, "kl": 2.0}, {"perplexity": 5.0, "kl": 0.5})
TOLD: dict[str, list[tuple[dict[str, Any], str]]] = {
    "train": [
        ({"steps": 3, "iters": 9, "loss": 1.5, "bits_per_byte": 2.5, "output": "out"},
         "3 of 9 steps, loss 1.5000, 2.5000 bits per byte on held-out text: out\n"),
        ({"steps": 9, "iters": 9, "loss": None, "bits_per_byte": None, "output": "out"}, "9 of 9 steps: out\n"),
    ],
    "qat": [
        ({"steps": 3, "iters": 9, "output": "out", "first_loss": 4.0, "loss": 1.5,
          **dict(zip(("parent", "before", "after"), FIGURES, strict=True)),
          "teacher_cache": {"files": 7, "bytes": 12345, "written": 2, "folder": "kept"}},
         "3 of 9 steps, loss 4.0000 to 1.5000: out\n"
         "  float model          perplexity 4.0000, KL 0.0000 from the teacher\n"
         "  ternary, untrained   perplexity 9.0000, KL 2.0000 from the teacher\n"
         "  ternary, trained     perplexity 5.0000, KL 0.5000 from the teacher\n"
         "  teacher's cache: 7 windows, 12,345 bytes, 2 new: kept\n"),
        ({"steps": 9, "iters": 9, "output": "out"}, "9 of 9 steps: out\n"),
    ],
    "lora": [
        ({"adapter_path": "ad", "first_loss": 4.0, "loss": 1.5, "valid_loss": None, "test_loss": 2.0, "test_perplexity": 7.5,
          "train_long": 2, "train_dropped": 0, "test_dropped": 1},
         "ad: first loss 4.0000, loss 1.5000, test loss 2.0000, test perplexity 7.5000, 2 train long, 1 test dropped\n"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("command", TOLD)
def test_what_a_run_tells(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """People, and programs with --json; a rank other than the first says nothing."""
    line = [command, *next(words for kind, words in NEEDED.items() if command == kind.COMMAND)]
    for record, told in TOLD[command]:
        monkeypatch.setattr(f"bitnet_mlx.cli.{command}.train", lambda _, record=record: record)
        assert main(line) == 0 and capsys.readouterr().out == told
        assert main([*line, "--json"]) == 0 and json.loads(capsys.readouterr().out) == record
    monkeypatch.setattr(f"bitnet_mlx.cli.{command}.train", lambda _: {"rank": 1})
    assert main([*line, "--json"]) == 0 and capsys.readouterr().out == ""

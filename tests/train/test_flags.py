"""Every option of a training run has a flag of its name, and a key in mlx-lm's YAML, whose value arrives."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitnet_mlx.cli.main import build_parser
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

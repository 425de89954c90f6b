"""mlx-lm's YAML of options: its own example's keys are taken, and what is not done here is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitnet_mlx.errors import BitnetError
from bitnet_mlx.train.lora_config import read_options
from tests.train.test_lora import command

# The keys of the example in mlx-lm's documentation.
EXAMPLE = """
model: {folder}/base
train: true
fine_tune_type: lora
optimizer: adamw
data: {folder}/data
seed: 0
num_layers: -1
batch_size: 2
iters: 3
val_batches: 25
learning_rate: 1e-3
report_to: null
project_name: null
steps_per_report: 10
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "{folder}/adapters"
save_every: 100
test: false
test_batches: 100
max_seq_length: 64
grad_checkpoint: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 4
  scale: 20.0
  dropout: 0.0
"""


def test_the_command_takes_mlx_lms_example_and_flags_go_before_it(tmp_path: Path) -> None:
    from tests.train.test_fuse import base_folder

    base_folder(tmp_path / "base")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "hello world"}\n' * 2)
    (tmp_path / "lora.yaml").write_text(EXAMPLE.format(folder=tmp_path))
    done = command("lora", "-c", tmp_path / "lora.yaml", "--iters", 2, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == 4 and config["num_layers"] == 2 and config["learning_rate"] == 1e-3
    assert config["lora_parameters"]["keys"] == ["self_attn.q_proj", "self_attn.v_proj"]
    missing = command("lora", "--train")
    assert missing.returncode == 2 and "give --data DIR" in missing.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr_schedule: {name: cosine_decay}", "lr_schedule is .*learning_rate and warmup"),
        ("trust_remote_code: true", "never run"),
        ("num_layer: 3", r"num_layer is 3.*num_layers.* are known"),
        ("lora_parameters: {alpha: 3}", r"'alpha': 3.*rank, scale"),
        ("iters: 2.5", "iters is 2.5; int is needed"),
        ("learning_rate: high", "learning_rate is 'high'; float"),
        ("- 1", "holds list"),
        ("a: [", "is no YAML"),
    ],
)
def test_what_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "lora.yaml"
    path.write_text(text)
    with pytest.raises(BitnetError, match=message):
        read_options(path)
    with pytest.raises(BitnetError, match="no file"):
        read_options(tmp_path / "other.yaml")
    path.write_text("trust_remote_code: false\nreport_to: null\nlearning_rate: 1e-5\nkeys: [a.b]\n")
    assert read_options(path) == {"learning_rate": 1e-5, "keys": ("a.b",)}

"""A checkpoint tells a run under other options apart: whatever decides an update is compared before a run goes on."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.train.group import Ranks
from bitnet_mlx.train.loop_options import LoopOptions
from bitnet_mlx.train.lora_options import LoraOptions
from bitnet_mlx.train.options import TrainOptions
from bitnet_mlx.train.qat_options import QatOptions

SHARED = {
    "iters": 7, "batch_size": 3, "learning_rate": 0.5, "warmup": 9, "weight_decay": 0.3, "optimizer": "lion", "grad_clip": 2.0,
    "grad_accumulation_steps": 5, "seed": 9,
}  # fmt: skip
ROUNDING = {"ste": "soft", "ste_clip": 9.0, "ste_sharpness": 9.0}
TAUGHT = {"kl_weight": 0.9, "temperature": 3.0, "teacher": None}
RUNS: list[LoopOptions] = [
    TrainOptions(data=(), output=Path("out"), teacher=Path("teacher")),
    QatOptions(data=(), output=Path("out"), model="model", teacher="teacher", hidden_weight=0.5, attention_weight=0.5),
    QatOptions(data=(), output=Path("out"), model="model", teacher_cache=Path("cache")),
    LoraOptions(data=Path("data"), train=True, model="model"),
]
# Another value of each option that decides an update.
OTHERS: dict[type[LoopOptions], dict[str, Any]] = {
    TrainOptions: {**SHARED, **ROUNDING, **TAUGHT, "seq_length": 17, "quantise": False, "dtype": "float32"},
    QatOptions: {
        **SHARED, **ROUNDING, **TAUGHT, "seq_length": 17, "model": "another", "blend": "layers", "blend_fraction": 0.9,
        "hidden_weight": 0.9, "hidden_loss": "mse", "attention_weight": 0.9, "attention_layer": 1, "sub_norms": True,
        "teacher_cache": None, "teacher_top_k": 9,
    },
    LoraOptions: {**SHARED, "model": "another", "pack": True},
}  # fmt: skip
# What decides none, or is compared by what comes of it: ids, samples, the arrays' shapes, the graph, the adapter's table.
FREE = {
    LoopOptions: "grad_checkpoint save_every steps_per_report max_seconds resume plot rank_timeout",
    TrainOptions: "data output model eval_data eval_fraction vocab_size hidden_size intermediate_size num_layers num_heads "
    "num_kv_heads",
    QatOptions: "data output eval_data dtype",
    LoraOptions: "data adapter_path train test fine_tune_type num_layers rank scale dropout keys mask_prompt max_seq_length "
    "long_samples steps_per_eval val_batches test_batches resume_adapter_file",
}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.COMMAND)
def test_every_option_that_decides_an_update_is_compared(run: LoopOptions) -> None:
    others = OTHERS[type(run)]
    free = {*FREE[LoopOptions].split(), *FREE[type(run)].split()}
    assert set(others) == {field.name for field in fields(run)} - free, "an option that is in neither list"
    if isinstance(run, QatOptions):  # the cache stands for a teacher without insides
        own = ("hidden_weight", "hidden_loss", "attention_weight", "attention_layer")
        left_out = own if run.teacher_cache else ("teacher_cache", "teacher_top_k")
        others = {name: value for name, value in others.items() if name not in left_out}
    if isinstance(run, QatOptions) and run.teacher is None:
        others = {**others, "teacher": "another"}
    for name, value in others.items():
        asked = replace(run, **{name: value}).course()
        assert any(run.course().get(key) != there for key, there in asked.items()), name


def test_ranks_that_were_told_different_things_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte of a digest that is another tells them apart."""
    ranks = Ranks(SimpleNamespace(rank=lambda: 0, size=lambda: 3), 9.0)
    for changed in (None, 1, 2):

        def gather(x: mx.array, changed: int | None = changed) -> mx.array:
            return mx.stack([x + (mx.arange(32) == 5) if rank == changed else x for rank in range(3)])

        monkeypatch.setattr(ranks, "_gather", gather)
        if changed is None:
            ranks.check_same({"iters": 3})
            continue
        with pytest.raises(ConfigError, match=f"rank {changed} was given other options or other data than rank 0"):
            ranks.check_same({"iters": 3})

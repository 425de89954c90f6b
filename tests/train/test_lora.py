"""LoRA runs: samples as mlx-lm reads them, resume and accumulation to the last bit, and the command as typed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.errors import ConfigError, FormatError, TrainError
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.tokenizer import load_tokenizer
from bitnet_mlx.train import lora as loop
from bitnet_mlx.train.batches import Batches, batch
from bitnet_mlx.train.group import Group
from bitnet_mlx.train.lora_options import LoraOptions
from bitnet_mlx.train.samples import Sample, read_samples
from bitnet_mlx.train.update import Update
from tests.support import hf_folder, tiny_tokenizers
from tests.support.random_model import random_weights, tiny_config
from tests.train.support import silent

TEXTS = [f"def {a}({b}): return {b}" for a in ("value", "class", "import") for b in ("x", "world", "fox")]


def write(path: Path, entries: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    return path


def options(folder: Path, **changes: Any) -> LoraOptions:
    base = dict(data=folder / "data", adapter_path=folder / "out", train=True, iters=4, batch_size=2, rank=2,
                learning_rate=1e-2, dropout=0.1, save_every=2, steps_per_report=1)  # fmt: skip
    return LoraOptions(**{**base, **changes})


def train(options: LoraOptions, tokenizer: Any) -> tuple[dict[str, Any], list[float]]:
    """The record, and the losses in the log."""
    weights = random_weights(tiny_config(vocab_size=tokenizer.vocab_size), seed=3)
    record = loop.lora(options, MlxModel(weights), tokenizer, silent)
    return record, [json.loads(line)["loss"] for line in (options.adapter_path / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(tiny_tokenizers.byte_level(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("chat")
    return load_tokenizer(tiny_tokenizers.byte_level(folder, settings={"chat_template": tiny_tokenizers.CHAT}))


def test_samples_are_those_of_mlx_lm(chatty: Any, tmp_path: Path) -> None:
    from bitnet_mlx import _mlxlm

    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    datasets = _mlxlm.module("tuner.datasets")

    class Theirs:
        """What mlx-lm's dataset asks of a tokenizer."""

        eos_token_id, encode = chatty.eos_token_id, chatty.encode

        def apply_chat_template(self, m: Any, tools: Any, add_generation_prompt: bool = False, **_: Any) -> list[int]:
            return chatty.apply_chat_template(m, add_generation_prompt)

    class Config:
        mask_prompt = False

    class Masked:
        mask_prompt = True

    for entry in ({"text": "hello world"}, {"messages": turns}, {"prompt": "the fox", "completion": "a dog"}):
        for config in (Config, Masked)[: 1 + ("text" not in entry)]:
            ids, offset = (theirs := datasets.create_dataset([entry], Theirs(), config)).process(theirs[0])
            [ours] = read_samples(write(tmp_path / "one.jsonl", [entry]), chatty, 99, config.mask_prompt).items
            assert ours.ids.tolist() == ids and ours.offset == offset


def test_tools_of_a_conversation_reach_its_template(tmp_path: Path) -> None:
    seen: list[Any] = []

    def template(messages: list[Any], **more: Any) -> list[int]:
        seen.append((len(messages), more))
        return [5] * (4 * len(messages))

    tokenizer: Any = SimpleNamespace(chat_template="a", apply_chat_template=template)
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    for entry in ({"messages": turns, "tools": [7]}, {"prompt": "hello", "completion": "world", "tools": [7]}):
        [one] = read_samples(write(tmp_path / "one.jsonl", [entry]), tokenizer, 99, True).items
        assert one.offset == 4
    assert seen == 2 * [
        (2, {"add_generation_prompt": False, "tools": [7]}), (1, {"add_generation_prompt": True, "tools": [7]}),
    ]  # fmt: skip


def test_the_last_layers_get_an_adapter(tmp_path: Path) -> None:
    for asked, there, count in ((None, 20, 16), (None, 8, 8), (-1, 20, 20), (3, 8, 3), (8, 8, 8)):
        assert options(tmp_path, num_layers=asked).layers(there) == count
    for asked in (0, 9, -2):
        with pytest.raises(ConfigError, match=f"--num-layers is {asked}; this model has 8 layers"):
            options(tmp_path, num_layers=asked).layers(8)


def test_completions_of_a_base_model_and_the_window(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "one.jsonl", [{"prompt": "hello ", "completion": "world"}])
    [sample] = read_samples(path, tokenizer, 99, True).items
    assert tokenizer.decode(sample.ids[sample.offset : -1]) == "world" and sample.ids[-1] == tokenizer.eos_token_id
    path = write(tmp_path / "many.jsonl", [{"text": t} for t in ("hello " * 50, "hello world")])
    cut, dropped = (read_samples(path, tokenizer, 9, False, how) for how in ("truncate", "drop"))
    assert len(cut.items[0].ids) == 9 and (cut.long, cut.dropped) == (1, 0)
    assert len(dropped.items) == 1 and (dropped.long, dropped.dropped) == (1, 1)
    with pytest.raises(FormatError, match="all 2 samples were dropped"):
        read_samples(path, tokenizer, 2, False, "drop")


def test_a_batch_counts_answers_and_no_padding() -> None:
    rows = batch([(Sample(np.arange(1, 6, dtype=np.int32), 3),), (Sample(np.arange(1, 4, dtype=np.int32), 0),)])
    assert rows.inputs.shape == (2, 32) and rows.tokens == 2 + 2
    assert rows.targets[0][rows.counts[0] > 0].tolist() == [4, 5]
    assert rows.targets[1][rows.counts[1] > 0].tolist() == [2, 3]
    batches = Batches.of([Sample(np.arange(n, dtype=np.int32), 0) for n in range(2, 9)], 2, seed=1)
    passes = [sorted(batches.at(i).tokens for i in range(at, at + 4)) for at in (0, 4)]
    assert passes[0] == passes[1] and len(batches) == 4


def test_stopped_and_resumed_is_the_same_to_the_bit(tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path / "data" / "train.jsonl", [{"text": t} for t in TEXTS])
    write(tmp_path / "data" / "valid.jsonl", [{"text": t} for t in TEXTS[:3]])
    whole = options(tmp_path, iters=6)
    record, losses = train(whole, tokenizer)
    assert (
        losses[-1] < losses[0] and record["valid_loss"] < record["valid_loss_before"] and record["train_samples"] == 9
    )
    part = replace(whole, adapter_path=tmp_path / "part")

    class StopError(Exception):
        """A process that ends in the middle of step 5."""

    def stop(entry: dict[str, Any]) -> None:
        if entry["step"] == 5:
            raise StopError

    weights = random_weights(tiny_config(vocab_size=tokenizer.vocab_size), seed=3)
    with pytest.raises(StopError):
        loop.lora(part, MlxModel(weights), tokenizer, stop)
    with pytest.raises(ConfigError, match="give --resume"):
        train(part, tokenizer)
    resumed, again = train(replace(part, resume=True), tokenizer)
    assert again == losses and resumed["loss"] == record["loss"]
    assert resumed["first_loss"] == record["first_loss"] == losses[0], "the run's, not that of the step after the stop"
    files = [(folder / "adapters.safetensors").read_bytes() for folder in (whole.adapter_path, part.adapter_path)]
    assert files[0] == files[1]
    with pytest.raises(ConfigError, match="learning_rate"):
        train(replace(part, resume=True, learning_rate=1.0), tokenizer)


def test_losses_are_of_as_many_batches_as_asked_and_without_dropout(tokenizer: Any, tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        write(tmp_path / "data" / f"{name}.jsonl", [{"text": t} for t in TEXTS])
    chosen = options(tmp_path, iters=5, dropout=0.5, test=True, test_batches=1, val_batches=2, steps_per_eval=2)
    model = MlxModel(random_weights(tiny_config(vocab_size=tokenizer.vocab_size), seed=3))
    record = loop.lora(chosen, model, tokenizer, silent)
    held = read_samples(tmp_path / "data" / "test.jsonl", tokenizer, 99, False).items
    for loss, count in ((record["test_loss"], 2), (record["valid_loss"], 4)):
        model.train()  # which measuring must leave
        assert loss == pytest.approx(loop.mean_loss(model, held[:count], 2, -1), rel=1e-6)
        nats = [float(np.array(loop.summed_loss(model, batch([(one,)])))) for one in held[:count]]
        assert loss == pytest.approx(sum(nats) / sum(len(one.ids) - 1 for one in held[:count]), rel=1e-3)
    assert record["test_perplexity"] == pytest.approx(np.exp(record["test_loss"]))
    log = [json.loads(line) for line in (chosen.adapter_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "valid_loss" in entry] == [2, 4, 5]
    start = replace(
        chosen, adapter_path=tmp_path / "more", resume_adapter_file=tmp_path / "out" / "adapters.safetensors"
    )
    fresh = MlxModel(random_weights(tiny_config(vocab_size=tokenizer.vocab_size), seed=3))
    parameters, file = (
        loop.first_parameters(loop.prepare(start, fresh, tokenizer)),
        mx.load(str(start.resume_adapter_file)),
    )
    assert parameters.keys() == file.keys() and all(mx.array_equal(parameters[k], file[k]) for k in file)


def test_accumulated_gradients_are_those_of_the_whole_batch(tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path / "data" / "train.jsonl", [{"text": t} for t in TEXTS])
    found = []
    for size, count in ((9, 1), (3, 3)):
        chosen = options(tmp_path, dropout=0.0, batch_size=size, grad_accumulation_steps=count)
        model = MlxModel(random_weights(tiny_config(vocab_size=420)))
        work = loop.prepare(chosen, model, tokenizer)
        parameters = loop.first_parameters(work)
        model.train()
        found.append(Update(loop.make_job(work, Group()).task, Group()).total(parameters, 0))
    (one, whole), (two, parts) = ((total["losses"]["loss"], total["gradients"]) for total in found)
    assert one.item() == pytest.approx(two.item(), rel=1e-5)
    assert found[0]["counts"]["weight"].item() == found[1]["counts"]["weight"].item() > 0
    for name, gradient in whole.items():
        top = float(abs(gradient).max().item())
        np.testing.assert_allclose(np.array(parts[name]), np.array(gradient), rtol=0, atol=1e-4 * top + 1e-9)


def test_a_loss_that_is_no_number_names_the_step(tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path / "data" / "train.jsonl", [{"text": t} for t in TEXTS])
    with pytest.raises(TrainError, match=r"step 2: .* first in the output of model\.layers\.\d"):
        train(options(tmp_path, learning_rate=1e36), tokenizer)
    assert not (tmp_path / "out" / "adapters.safetensors").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "it is empty"),
        ('{"text": "a fox"}\n\n{"text": ', "line 3 is no JSON"),
        ('{"text": "a fox"}\n[1]', "line 2 is a list"),
        ('{"words": "a"}', "line 1 has the keys words"),
        ('{"text": "a fox"}\n{"prompt": "a"}', "line 2: text is 'None'"),
        ('{"messages": []}', "line 1: messages is"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "base model"),
    ],
)
def test_malformed_lines_are_named(lines: str, message: str, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(lines)
    with pytest.raises((FormatError, ConfigError), match=message):
        read_samples(tmp_path / "train.jsonl", tokenizer, 99, False)
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(FormatError, match="line 1 is no JSON"):
        read_samples(tmp_path / "train.jsonl", tokenizer, 99, False)


def command(*words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-W", "error", "-m", "bitnet_mlx", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


def test_from_text_to_an_adapter_that_changes_what_is_written(tmp_path: Path) -> None:
    base = tmp_path / "base"
    hf_folder.write(base, "bitnet", "packed", vocab_size=420).save()
    tiny_tokenizers.byte_level(base)
    before = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in base.iterdir()}
    write(tmp_path / "data" / "train.jsonl", [{"text": "hello world hello world hello world"}] * 4)
    write(tmp_path / "data" / "test.jsonl", [{"text": "hello world"}])
    flags = ["--model", base, "--data", tmp_path / "data", "--adapter-path", tmp_path / "ad"]
    small = ["--iters", 8, "--batch-size", 2, "--learning-rate", 1e-2, "--num-layers", 2]
    done = command("lora", "--train", "--test", *flags, *small, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["loss"] < record["first_loss"] - 1 and record["test_loss"] > 0
    tested = command("lora", "--test", *flags, "--json")
    assert json.loads(tested.stdout)["test_loss"] == pytest.approx(record["test_loss"], rel=1e-6), tested.stderr
    prompt = ["generate", "--model", base, "--prompt", "hello", "--max-tokens", 4, "--temp", 0, "--json"]
    adapter = ["--adapter-path", tmp_path / "ad"]
    variants = ([], adapter, [*adapter, "--backend", "numpy"], [*adapter, "--backend", "mlx"])
    texts = [json.loads(command(*prompt, *more).stdout)["text"] for more in variants]
    assert texts[0] != texts[1] == texts[2] == texts[3]
    assert before == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in base.iterdir()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere", "--train"], "no folder nowhere"),
        (["--data", "{data}"], "nothing to do"),
        (["--data", "{data}", "--train", "--iters", "0"], "--iters is 0"),
        (["--data", "{data}", "--train", "--num-layers", "99"], "has 8 layers"),
        (["--data", "{data}", "--train", "--mask-prompt"], "no prompt"),
        (["--data", "{data}", "--train", "--test"], "no file"),
        (["--data", "{data}", "--test"], "no adapter_config.json"),
    ],
)
def test_one_clear_message(flags: list[str], message: str, tmp_path: Path) -> None:
    data = write(tmp_path / "data" / "train.jsonl", [{"text": "x"}]).parent
    done = command("lora", "--adapter-path", tmp_path / "out", *(flag.format(data=data) for flag in flags))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr

"""detect and inspect: what a folder is, and a clear word about each thing that is no model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.backends import Choice, choose
from bitnet_mlx.checkpoint.census import count_zeros, take_census
from bitnet_mlx.checkpoint.detect import detect
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.checkpoint.report import record
from bitnet_mlx.checkpoint.write import write_native
from bitnet_mlx.cli.main import main
from bitnet_mlx.errors import BitnetError, ConfigError, FormatError, UnsupportedModelError
from bitnet_mlx.formats import words2
from bitnet_mlx.ternary import TernaryTensor
from tests.support import hf_folder
from tests.support.random_model import random_ternary


@pytest.mark.parametrize(
    ("storage", "direction", "bits"),
    [("packed", "multiply", 8), ("inverse", "divide", 8), ("online", None, 8), ("dense", None, None)],
)
def test_detect_tells_the_storage_without_the_weights(
    tmp_path: Path, storage: str, direction: str | None, bits: int | None
) -> None:
    wrote = hf_folder.write(tmp_path, storage=storage, shards=2)
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"not looked at")
    info = detect(tmp_path)
    assert info.family == "bitnet" and info.path == tmp_path
    assert info.storage == ("packed" if storage == "inverse" else storage)
    assert (info.scale_direction, info.activation_bits) == (direction, bits)
    assert [file.name for file in info.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert info.nbytes == 2 * len(b"not looked at") and info.tokenizer_files == ("tokenizer.json",)
    assert info.config.hidden_size == wrote.config["hidden_size"]


def _nothing(folder: Path) -> Path:
    return folder / "absent"


def _file(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(b"GGUF")
        return folder / name

    return make


def _config(text: str | bytes, weights: str | None = "model.safetensors") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        if weights:
            (folder / weights).write_bytes(b"")
        return folder

    return make


GOOD = json.dumps({**hf_folder.TINY, "model_type": "bitnet"})


def _link(folder: Path) -> Path:
    (folder / "config.json").write_text(GOOD)
    (folder / "model.safetensors").symlink_to(folder / "gone")
    return folder


NO_MODEL: dict[str, tuple[Callable[[Path], Path], type[BitnetError], str]] = {
    "missing folder": (_nothing, ConfigError, "no folder"),
    "GGUF": (_file("model.gguf"), FormatError, "has 4 bytes; a GGUF file has at least 24"),
    "another file": (_file("model.safetensors"), ConfigError, "is a file; a folder"),
    "empty folder": (lambda folder: folder, FormatError, "no config.json; it is empty"),
    "folder without config": (lambda folder: _file("model.gguf")(folder).parent, FormatError, "it holds model.gguf"),
    "config is no JSON": (_config("{'a': 1}"), FormatError, "config.json is not valid JSON"),
    "config is cut": (_config(GOOD[:50]), FormatError, "config.json is not valid JSON"),
    "config is empty": (_config(""), FormatError, "config.json is not valid JSON"),
    "config is a list": (_config("[1]"), FormatError, "holds a list"),
    "config is UTF-16": (_config(GOOD.encode("utf-16")), FormatError, "not UTF-8"),
    "a key twice": (_config('{"model_type": "llama", "model_type": "bitnet"}'), FormatError, "'model_type' twice"),
    "NaN": (_config('{"model_type": "bitnet", "rms_norm_eps": NaN}'), FormatError, "NaN"),
    "unknown family": (
        _config('{"model_type": "mamba"}'),
        UnsupportedModelError,
        "'mamba'; bitnet, llama, qwen3, bitnet_qwen3, olmo are",
    ),
    "no weights": (_config(GOOD, None), FormatError, "no model.safetensors"),
    "pickles": (
        _config(GOOD, "pytorch_model.bin"),
        UnsupportedModelError,
        "pytorch_model.bin: pickles.*save_pretrained",
    ),
    "weights under another name": (_config(GOOD, "adapters.safetensors"), FormatError, "it holds adapters.safetensors"),
    "a link to nothing": (_link, FormatError, "points at a file that is gone"),
}


@pytest.mark.parametrize("name", NO_MODEL)
def test_what_is_no_model_is_told_by_the_library_and_the_command(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, kind, text = NO_MODEL[name]
    path = make(tmp_path)
    for function in (detect, read_weights):
        with pytest.raises(kind, match=text):
            function(path)
    for flags in ([], ["--json"]):
        assert main(["inspect", str(path), *flags]) == kind.exit_code
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        assert "Traceback" not in err and tmp_path.name in err


def inspected(path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(["inspect", str(path), "--json", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


@pytest.mark.parametrize("storage", ["packed", "inverse"])
def test_inspect_counts_what_the_folder_holds(tmp_path: Path, storage: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrote = hf_folder.write(tmp_path, storage=storage, eos_token_id=[2, 3])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    found = inspected(tmp_path, capsys, "--context", "10")
    ternary = sum(t.size for t in wrote.t.values())
    floats = sum(a.size for a in wrote.floats.values())
    zeros = sum(int((t == 0).sum()) for t in wrote.t.values())
    assert found["ternary_parameters"] == ternary and found["parameters"] == ternary + floats
    assert found["zeros_share"] == zeros / ternary
    shares = {module: float((t == 0).mean()) for module, t in wrote.t.items()}
    assert found["zeros_share_least"][1] == min(shares.values()) and found["zeros_share_most"][1] == max(
        shares.values()
    )
    packed = sum(
        a.nbytes for name, a in wrote.tensors.items() if name.removesuffix("_scale").removesuffix(".weight") in wrote.t
    )
    assert found["bits_per_ternary_weight"] == 8 * packed / ternary
    assert found["bits_per_weight"] == 8 * sum(a.nbytes for a in wrote.tensors.values()) / found["parameters"]
    weights = read_weights(tmp_path)
    reads = found["read_bytes"]
    assert reads["ternary"] == sum(linear.weight.nbytes for linear in weights.linears.values())
    assert reads["norms"] == sum(norm.nbytes for norm in weights.norms.values())
    assert reads["head"] == weights.lm_head.nbytes and reads["dense"] == 0
    assert found["backend"] == choose().name and found["backend_reason"] == choose().reason
    assert reads["kv"] == 10 * 2 * 2 * 2 * 18 * found["kv_bits"] // 8
    assert found["read_bytes_per_token"] == sum(reads.values())
    assert found["scale_direction"] == ("divide" if storage == "inverse" else "multiply")
    assert found["scale_granularity"] == ["tensor"] and found["eos_ids"] == [2, 3, 9]
    assert found["tokenizer"] == "tokenizers (tokenizer.json)" and found["chat_template"] and not found["tied"]
    assert found["notices"] == []


def test_inspect_counts_biases_float_layers_and_a_tied_head_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = "model.layers.1.mlp.up_proj"
    wrote = hf_folder.write(
        tmp_path, "llama", dense=(kept,), quantization={"modules_to_not_convert": ["lm_head", kept]}, attention_bias=True,
        tie_word_embeddings=True,
    )  # fmt: skip
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    found, weights = inspected(tmp_path, capsys), read_weights(tmp_path)
    assert found["chat_template"] and found["tied"]
    assert found["parameters"] == sum(a.size for a in (*wrote.t.values(), *wrote.floats.values()))
    biases = [linear.bias for linear in weights.linears.values() if linear.bias is not None]
    assert len(biases) == 8
    assert found["read_bytes"]["norms"] == sum(a.nbytes for a in (*weights.norms.values(), *biases))
    assert found["read_bytes"]["dense"] == weights.linears[kept].weight.nbytes


def test_what_is_odd_is_told_and_a_cache_of_half_precision_on_gpus_alone(tmp_path: Path) -> None:
    wrote = hf_folder.write(tmp_path, torch_dtype="float16")
    for module, t in wrote.t.items():
        wrote.tensors[f"{module}.weight"] = mx.array(hf_folder.pack(np.zeros_like(t)))
    wrote.save()
    census = take_census(tmp_path)
    metal, cpu = (record(census, 10, Choice(name, "")) for name in ("metal", "cpu"))
    assert (metal["kv_bits"], cpu["kv_bits"]) == (16, 32)
    assert 2 * metal["read_bytes"]["kv"] == cpu["read_bytes"]["kv"] > 0
    assert metal["notices"] == cpu["notices"]
    for text in ("100.0% of the ternary weights are 0", "config.json says float16, but squared ReLU"):
        assert any(text in notice for notice in cpu["notices"])


def test_inspect_gives_the_same_zeros_for_every_storage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrote = hf_folder.write(tmp_path / "online", storage="online", tie_word_embeddings=True)
    native = write_native(read_weights(wrote.path), wrote.config, tmp_path / "native", head_bits=8)
    online, words = inspected(wrote.path, capsys), inspected(native, capsys)
    same = ("zeros_share", "parameters", "ternary_parameters", "eos_ids", "tied", "rope", "rope_theta", "max_context")
    assert [online[key] for key in same] == [words[key] for key in same]
    assert (online["storage"], words["storage"]) == ("online", "words2")
    assert online["bits_per_ternary_weight"] == 16  # bfloat16 in the file
    assert words["head_storage"] == "8 bits in groups of 64"
    assert online["read_bytes"]["ternary"] == words["read_bytes"]["ternary"]


def test_the_table_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf_folder.write(tmp_path, "llama", "dense")
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for text in (
        "llama, 2 layers",
        "floats, not ternary",
        "no quantization_config",
        "no tokenizer: none of tokenizer.json, tokenizer.model, spiece.model",
        "rope default",
    ):
        assert text in out
    assert main(["inspect", str(tmp_path), "--context", "-1"]) == 2
    assert "--context is -1" in capsys.readouterr().err


# Padding of 56 and of none; several blocks of rows.
@pytest.mark.parametrize("shape", [(5, 72), (3, 128), (700, 1300)])
def test_zeros_are_counted_without_the_padding(shape: tuple[int, int]) -> None:
    w = random_ternary(np.random.default_rng(1), *shape)
    assert count_zeros(w) == int((words2.unpack(w.words, shape[1]) == 0).sum())
    none = TernaryTensor(words2.pack(np.ones(shape, np.int8)), w.scale, shape)
    assert count_zeros(none) == 0


def test_a_fault_inside_a_tensor_is_found_by_inspect(tmp_path: Path) -> None:
    wrote = hf_folder.write(tmp_path)
    wrote.tensors["model.layers.0.mlp.up_proj.weight"] |= 3
    wrote.save()
    with pytest.raises(FormatError, match="code 3"):
        take_census(tmp_path)


@pytest.mark.parametrize("storage", ["packed", "inverse", "online"])
@pytest.mark.parametrize("rows", [1024, 1030])
def test_zeros_counted_without_converting(tmp_path: Path, storage: str, rows: int) -> None:
    """Packed bytes as they lie, exactly; large master weights from a sample, and that is said."""
    wrote = hf_folder.write(tmp_path, storage=storage, hidden_size=1032, intermediate_size=rows, num_hidden_layers=1)
    census = take_census(wrote.path)
    exact = {
        module: count_zeros(linear.weight) / (linear.weight.shape[0] * linear.weight.shape[1])
        for module, linear in read_weights(wrote.path).linears.items()
    }
    if storage != "online":
        assert census.layers == exact
    else:
        assert census.layers == pytest.approx(exact, abs=0.01) and census.layers != exact
    told = any("estimated from a sample" in notice for notice in census.notices)
    assert told == (storage == "online")

"""The trained model on disk: a Hugging Face folder with float master weights, and the packed native folder.

Master folder: config.json as transformers' BitNetForCausalLM reads it (quantisation "online": weights are ternarised
from the masters at run time), model.safetensors in float32. Where scales were learnt, the mean of the masters is not the
scale: the ternary weights themselves are stored, packed, with their scales ("offline"), so that all readers get what was
trained. Packed native folder: words2 (see formats/words2.py), an int8 head in groups of 64. All with the tokenizer's files
and generation_config.json.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_mlx.checkpoint.folder import checkpoint_folder, read_config
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.checkpoint.write import write_native
from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.formats import hf, words2
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.hf_config import parse_config

if TYPE_CHECKING:
    from bitnet_mlx.train.optimizer import Tensors

ONLINE = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",
    "quantization_mode": "online",
    "modules_to_not_convert": ["lm_head"],
}
OFFLINE = {**ONLINE, "quantization_mode": "offline"}
EMBEDDING = "model.embed_tokens.weight"


def config_json(config: DecoderConfig, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """config.json of a model of the bitnet family; without quantization it describes the float twin."""
    raw: dict[str, Any] = {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "relu2",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        # Both spellings: readers of either age know one of them.
        "rope_theta": config.rope.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope.rope_theta},
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": config.eos_token_ids[0],
        "pad_token_id": config.pad_token_id,
        "torch_dtype": "float32",
    }
    return raw if quantization is None else {**raw, "quantization_config": quantization}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    scratch = path.with_name(f".{path.name}.writing")
    scratch.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
    scratch.rename(path)


def stored(parameters: Tensors) -> tuple[Tensors, dict[str, Any]]:
    """Masters by name -> the tensors of a folder, and its quantization_config.

    A linear with a log_scale becomes uint8 [ceil(N / 4), K] and weight_scale float32 [1]; transformers loads it where N is a
    multiple of 4. Its bias, if any, is divided by the scale, since readers of packed weights multiply the whole sum by it.
    """
    import mlx.core as mx

    from bitnet_mlx.train.ste import codes

    tensors = dict(parameters)
    learnt = [name.removesuffix(".log_scale") for name in parameters if name.endswith(".log_scale")]
    for module in learnt:
        m, w = mx.exp(tensors.pop(f"{module}.log_scale")), tensors[f"{module}.weight"]
        words = words2.pack(np.array(codes(w, m)).astype(np.int8))
        tensors[f"{module}.weight"] = mx.array(hf.from_words2(words, w.shape[1]))
        tensors[f"{module}.weight_scale"] = m.reshape(1)
        if f"{module}.bias" in tensors:
            tensors[f"{module}.bias"] = tensors[f"{module}.bias"] / m
    return tensors, OFFLINE if learnt else ONLINE


def write_hf(folder: Path, config: DecoderConfig, parameters: Tensors, quantise: bool) -> None:
    """Write config.json, generation_config.json and model.safetensors (see `stored`) beside the tokenizer."""
    import mlx.core as mx

    tensors, quantization = stored(parameters)
    scratch = folder / ".model.writing.safetensors"
    mx.save_safetensors(str(scratch), tensors, {"format": "pt"})
    scratch.rename(folder / "model.safetensors")
    _write_json(folder / "config.json", config_json(config, quantization if quantise else None))
    generation = {"eos_token_id": config.eos_token_ids[0], "pad_token_id": config.pad_token_id, "do_sample": False}
    _write_json(folder / "generation_config.json", generation)


def read_decoder_config(folder: Path) -> DecoderConfig:
    """config.json of a folder that `write_hf` wrote. Raises ConfigError where it is of another family, and what
    models/hf_config.py raises."""
    config = parse_config(read_config(checkpoint_folder(folder)), str(folder / "config.json")).decoder
    if config.model_type != "bitnet" or not config.tie_word_embeddings:
        tied = "tied" if config.tie_word_embeddings else "untied"
        raise ConfigError(
            f"[train] {folder} is of the {config.model_type} family with {tied} embeddings; training goes on from the "
            "bitnet family with tied embeddings and float master weights"
        )
    return config


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a master folder by name."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        for name, shape in config.linear_shapes().items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
        for name, size in config.norm_sizes().items():
            shapes[f"model.layers.{layer}.{name}.weight"] = (size,)
    shapes["model.norm.weight"] = (config.hidden_size,)
    return shapes


def read_master(folder: Path, seq_length: int) -> tuple[DecoderConfig, Tensors]:
    """A master folder's configuration, its context at least `seq_length`, and its weights as float32 arrays."""
    import mlx.core as mx

    config = read_decoder_config(folder)
    path = folder / "model.safetensors"
    if not path.is_file():
        raise ConfigError(f"[train] no model.safetensors in {folder}; training goes on from one file of float weights")
    try:
        tensors = mx.load(str(path))
    except RuntimeError as error:
        raise FormatError(f"[train] {path} is damaged: {error}") from error
    assert isinstance(tensors, dict)
    shapes = parameter_shapes(config)
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape or not mx.issubdtype(tensors[name].dtype, mx.floating):
            have = f"{tensors[name].dtype} {tensors[name].shape}" if name in tensors else "missing"
            raise FormatError(f"[train] {path}: {name} is {have}; float weights of shape {shape} are needed")
    if unknown := sorted(set(tensors) - set(shapes)):
        raise FormatError(f"[train] {path} holds unknown tensors: {', '.join(unknown[:5])}")
    longest = max(config.max_position_embeddings, seq_length)
    return replace(config, max_position_embeddings=longest), {n: tensors[n].astype(mx.float32) for n in shapes}


def pack(source: Path, target: Path, head_bits: int = 8) -> int:
    """Turn a master folder into a native words2 folder and return the bytes of its files."""
    write_native(read_weights(source), read_config(source), target, copy_from=source, head_bits=head_bits)
    return sum(path.stat().st_size for path in target.iterdir())

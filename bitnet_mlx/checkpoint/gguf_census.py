"""The census of a GGUF file: census.take_census's other half."""

from __future__ import annotations

from dataclasses import replace

from bitnet_mlx.checkpoint.census import Census, count_linear
from bitnet_mlx.checkpoint.detect import CheckpointInfo
from bitnet_mlx.checkpoint.read_gguf import EMBED, HEAD, GgufModel
from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats import ggml_floats
from bitnet_mlx.ternary import TernaryTensor
from bitnet_mlx.tokenizer.gguf import read_vocabulary


def gguf_census(info: CheckpointInfo, gguf: GgufModel) -> Census:
    """Read the layers once, a tensor at a time; embedding and head are counted, not read."""
    config = gguf.config
    census = Census(info, tied=config.tie_word_embeddings, types=gguf.types)
    census.tensor_bytes = sum(gguf.nbytes(name) for name in gguf.file.tensors)
    kinds: dict[str, None] = {}
    scales: set[int] = set()
    for layer in range(config.num_hidden_layers):
        for name in config.linear_shapes():
            linear, full = gguf.linear(layer, name), gguf.tensor(layer, name)
            count_linear(census, f"model.layers.{layer}.{name}", linear.weight, gguf.nbytes(full), kinds)
            if isinstance(linear.weight, TernaryTensor):
                scales.add(linear.weight.scale.ndim)
            if linear.bias is not None:
                census.parameters += linear.bias.size
                census.norm_read_bytes += 4 * linear.bias.size
            gguf.file.release(full)
    census.granularity = tuple(kinds)
    norms = config.num_hidden_layers * sum(config.norm_sizes().values()) + config.hidden_size
    census.norm_read_bytes += 4 * norms
    census.parameters += norms + config.vocab_size * config.hidden_size * (1 if census.tied else 2)
    head = EMBED if census.tied else HEAD
    census.head_read_bytes, census.head_storage = gguf.nbytes(head), gguf.file.tensors[head].kind
    if census.head_storage in ggml_floats.BLOCKS:
        census.head_read_bytes = 4 * config.vocab_size * config.hidden_size
        census.head_storage += " (float32 when loaded, unless --head-bits says otherwise)"
    _tokenizer(census, gguf)
    bits = gguf.activation_bits(scales)
    model = replace(info.model, quantization=replace(info.quantization, activation_bits=bits))
    census.info = replace(info, model=replace(model, decoder=replace(config, activation_bits=bits)))
    census.notices = (*gguf.notices, *census.notices)
    return census


def _tokenizer(census: Census, gguf: GgufModel) -> None:
    """What the metadata says of the tokenizer; that it says nothing usable is a notice here."""
    census.eos_ids = gguf.config.eos_token_ids
    try:
        found = read_vocabulary(gguf.file.metadata, gguf.file.path)
    except FormatError as error:
        census.notices = (str(error),)
        return
    kind = "tokenizers" if found.file == "tokenizer.json" else "sentencepiece"
    census.tokenizer, census.chat_template = f"{kind} (metadata)", bool(found.meta.templates)
    census.eos_ids = tuple(dict.fromkeys((*census.eos_ids, *found.meta.eos_ids)))
    census.notices = found.notices

"""The census of a GGUF file: census.take_census's other half."""

from __future__ import annotations

from bitnet_mlx.checkpoint.census import Census, count_linear, count_ternary
from bitnet_mlx.checkpoint.detect import CheckpointInfo
from bitnet_mlx.checkpoint.read_gguf import EMBED, HEAD, GgufModel
from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats import ggml_floats, i2s
from bitnet_mlx.ternary import CODES_PER_WORD, padded
from bitnet_mlx.tokenizer.gguf import read_vocabulary


def gguf_census(info: CheckpointInfo, gguf: GgufModel) -> Census:
    """Read the layers once, a tensor at a time; embedding and head are counted, not read."""
    config = gguf.config
    census = Census(info, tied=config.tie_word_embeddings, types=gguf.types)
    census.tensor_bytes = sum(gguf.nbytes(name) for name in gguf.file.tensors)
    kinds: dict[str, None] = {}
    for layer in range(config.num_hidden_layers):
        for name in config.linear_shapes():
            _linear(census, gguf, layer, name, kinds)
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
    census.notices = (*gguf.all_notices(), *census.notices)
    return census


def _linear(census: Census, gguf: GgufModel, layer: int, name: str, kinds: dict[str, None]) -> None:
    """Add a linear. I2_S, whose one scale is known beforehand, is counted as it lies: a model of it takes no second."""
    (n, k), module, full = gguf.config.linear_shapes()[name], f"model.layers.{layer}.{name}", gguf.tensor(layer, name)
    info, bias = gguf.file.tensors[full], gguf.tensor(layer, name, "bias")
    if info.kind == "I2_S" and info.shape == (n, k):
        zeros = i2s.count_zeros(gguf.file.array(full), n, k, f"{full} in {gguf.file.path}")
        census.parameters += n * k
        words = n * padded(k) // CODES_PER_WORD
        count_ternary(census, module, n * k, zeros, 4 * (words + 1), gguf.nbytes(full))
        kinds["tensor"] = None
    else:
        count_linear(census, module, gguf.linear(layer, name).weight, gguf.nbytes(full), kinds)
    if bias in gguf.file.tensors:
        census.parameters += n
        census.norm_read_bytes += 4 * n
    gguf.file.release(full)


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

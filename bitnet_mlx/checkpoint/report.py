"""A census as a JSON record and as a table for people: what `bitnet-mlx inspect` prints."""

from __future__ import annotations

from typing import Any

from bitnet_mlx.backends import GPUS, Choice
from bitnet_mlx.checkpoint.census import Census
from bitnet_mlx.checkpoint.detect import STORAGE_NAMES
from bitnet_mlx.checkpoint.folder import VOCABULARIES


def record(census: Census, context: int, choice: Choice) -> dict[str, Any]:
    """The JSON record. choice: the backend that would run it; on a GPU what passes between layers, and so the cache, may
    be in half precision.
    """
    info, config = census.info, census.info.config
    half = choice.name in GPUS and config.dtype in ("bfloat16", "float16")
    reads = {
        "ternary": census.ternary_read_bytes,
        "dense": census.dense_read_bytes,
        "head": census.head_read_bytes,
        "norms": census.norm_read_bytes,
        "kv": census.kv_read_bytes(context, 2 if half else 4),
    }
    shares = sorted(census.layers.items(), key=lambda item: item[1])
    return {
        "path": str(info.path),
        "family": info.family,
        "storage": info.storage,
        "storage_types": list(census.types),
        "scale_direction": info.scale_direction,
        "scale_granularity": list(census.granularity),
        "activation_bits": info.activation_bits,
        "parameters": census.parameters,
        "ternary_parameters": census.ternary_parameters,
        "zeros_share": census.zeros_share,
        "zeros_share_least": list(shares[0]) if shares else None,
        "zeros_share_most": list(shares[-1]) if shares else None,
        "bits_per_ternary_weight": census.bits_per_ternary_weight,
        "bits_per_weight": census.bits_per_weight,
        "head_storage": census.head_storage,
        "tied": census.tied,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "hidden_act": config.hidden_act,
        "sub_norms": config.sub_norms,
        "max_context": config.max_position_embeddings,
        "rope": config.rope.rope_type,
        "rope_theta": config.rope.rope_theta,
        "bos_id": config.bos_token_id,
        "eos_ids": list(census.eos_ids),
        "tokenizer": census.tokenizer,
        "chat_template": census.chat_template,
        "files": [file.name for file in info.files],
        "file_bytes": info.nbytes,
        "backend": choice.name,
        "backend_reason": choice.reason,
        "context": context,
        "kv_bits": 16 if half else 32,
        "read_bytes": reads,
        "read_bytes_per_token": sum(reads.values()),
        "notices": _notices(census),
    }


def _notices(census: Census) -> list[str]:
    """What is odd about the checkpoint."""
    info = census.info
    odd = list(census.notices)
    if census.tokenizer is None and info.gguf is None:  # of a GGUF file that has been said
        odd.append(f"the folder has no tokenizer: none of {', '.join(VOCABULARIES)}")
    if census.zeros_share is not None and not 0.1 <= census.zeros_share <= 0.7:
        odd.append(f"{census.zeros_share:.1%} of the ternary weights are 0; trained models have a third to a half")
    if info.config.dtype == "float16" and info.config.hidden_act == "relu2":
        odd.append("config.json says float16, but squared ReLU can pass 65504; run it in bfloat16 or float32")
    return odd


def size(count: float) -> str:
    """Bytes for people: 521.3 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def table(r: dict[str, Any]) -> str:
    """The record as lines of name and value."""
    direction = {"multiply": "w = t * scale", "divide": "w = t / scale", None: "none in the file"}[r["scale_direction"]]
    total = r["read_bytes_per_token"]
    shape = f"{r['layers']} layers of {r['hidden_size']} / {r['intermediate_size']}, {r['hidden_act']}"
    storage = ", ".join([STORAGE_NAMES[r["storage"]], *r["storage_types"]])
    tie = "tied to" if r["tied"] else "apart from"
    lines: list[tuple[str, str]] = [
        ("model", r["path"]),
        ("family", f"{r['family']}, {shape}{', sub-norms' if r['sub_norms'] else ''}"),
        ("attention", f"{r['heads']} heads of {r['head_dim']}, {r['kv_heads']} for keys and values"),
        ("storage", f"{storage}; {len(r['files'])} file(s), {size(r['file_bytes'])}"),
        ("scales", f"{direction}; one a {' or a '.join(r['scale_granularity']) or 'tensor'}"),
        ("activations", f"{r['activation_bits']} bits" if r["activation_bits"] else "floats"),
        ("parameters", f"{r['parameters']:,}, of them {r['ternary_parameters']:,} ternary"),
    ]  # fmt: skip
    if r["zeros_share"] is not None:
        (least, low), (most, high) = r["zeros_share_least"], r["zeros_share_most"]
        lines.append(("zeros", f"{r['zeros_share']:.2%}; from {low:.2%} ({least}) to {high:.2%} ({most})"))
        lines.append(
            ("bits a weight", f"{r['bits_per_ternary_weight']:.3f} ternary, {r['bits_per_weight']:.3f} over the model")
        )
    lines += [
        ("head", f"{r['head_storage']}, {tie} the embedding; {r['vocab_size']:,} tokens"),
        ("context", f"{r['max_context']:,} positions, rope {r['rope']} with base {r['rope_theta']:g}"),
        ("tokens", f"bos {r['bos_id']}, eos {', '.join(map(str, r['eos_ids'])) or 'none'}"),
        ("tokenizer", f"{r['tokenizer'] or 'none'}, {'with a' if r['chat_template'] else 'no'} chat template"),
        ("runs here on", f"{r['backend']}: {r['backend_reason']}"),
        ("read a token", f"{size(total)} at {r['context']:,} positions:"),
    ]  # fmt: skip
    names = {
        "ternary": "ternary",
        "dense": "float layers",
        "head": "head",
        "norms": "norms, biases",
        "kv": f"KV, {r['kv_bits']} bits",
    }
    for part, count in r["read_bytes"].items():
        if count:
            lines.append((f"  {names[part]}", f"{size(count)} ({count / total:.1%})"))
    lines += [("odd", notice) for notice in r["notices"]]
    return "\n".join(f"{name:<17}{value}" for name, value in lines)

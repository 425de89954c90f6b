"""Tiny checkpoints in the true Hugging Face format, made from a seed by numpy alone.

Nothing of the package is used here: its codecs and its quantiser are what the golden logits test.
The stream is default_rng(seed).standard_normal (PCG64), rounded to float32, drawn tensor by tensor in the order of the
sorted names. NumPy keeps such streams stable in practice but promises it only within a version, so the sha256 of every
file is committed (data/manifest.json) and compared first: a changed stream is then a named failure, not a wrong logit.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.cases import Case

Tensors = dict[str, tuple[str, np.ndarray]]  # name -> (safetensors dtype, raw array)


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of a bitnet, llama or qwen3 model by its Hugging Face name, with its shape before packing."""
    hidden, wide, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    dim = config.get("head_dim", hidden // heads)
    q, kv = heads * dim, config["num_key_value_heads"] * dim
    linears = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config["model_type"] == "bitnet":
        norms |= {"self_attn.attn_sub_norm": hidden, "mlp.ffn_sub_norm": wide}
    if config["model_type"] == "qwen3":
        norms |= {"self_attn.q_norm": dim, "self_attn.k_norm": dim}
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    out["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, shape in linears.items():
            out[f"{at}{name}.weight"] = shape
            if config.get("attention_bias" if name.startswith("self_attn") else "mlp_bias", False):
                out[f"{at}{name}.bias"] = shape[:1]
        for name, size in norms.items():
            out[f"{at}{name}.weight"] = (size,)
    return out


def inner_norms(case: Case) -> dict[str, tuple[int, ...]]:
    """The norms inside linears: name -> shape."""
    if not case.quantization.get("use_rms_norm"):
        return {}
    linears = {name.removesuffix(".weight"): shape for name, shape in shapes(case.config).items() if "_proj.w" in name}
    return {f"{name}.rms_norm.weight": shape[1:] for name, shape in linears.items() if case.converted(name)}


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Finite float32 -> uint16 bit patterns, half to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """uint16 bit patterns -> float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def draw(case: Case) -> dict[str, np.ndarray]:
    """The float parameters, rounded to bfloat16 and held as float32: norms 1 + 0.1 a, the rest a gain times a."""
    rng = np.random.default_rng(case.seed)
    values = {}
    for name, shape in sorted((shapes(case.config) | inner_norms(case)).items()):
        a = rng.standard_normal(shape).astype(np.float32)
        if "norm" in name:
            a = np.float32(1) + np.float32(0.1) * a
        else:
            a = np.float32(case.gain(name)) * a
        values[name] = from_bfloat16(to_bfloat16(a))
        if case.ternary and len(shape) == 2 and (case.ternary == "groups" or "_proj" in name):
            values[name] = blockwise(values[name], *blocks(case, name, *shape))
    if case.ties:
        values["model.embed_tokens.weight"] = _tied_rows(rng, case.config["vocab_size"])
        values["model.layers.0.input_layernorm.weight"] = np.ones(case.config["hidden_size"], np.float32)
    return values


def blocks(case: Case, name: str, n: int, k: int) -> tuple[int, int]:
    """Rows and columns of the blocks of a ternary float weight that have one magnitude."""
    if case.ternary == "groups":
        return 1, 128
    return (n, k // 2) if name.endswith(("o_proj.weight", "down_proj.weight")) else (n // 4, k)


def blockwise(w: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Ternarised block by block by the absmean rule, each block with its own bfloat16 magnitude; still floats."""
    out = np.empty_like(w)
    for n in range(0, w.shape[0], rows):
        for k in range(0, w.shape[1], columns):
            t, mean = ternary(w[n : n + rows, k : k + columns])
            # Blocks drawn alike have nearly one magnitude: here each has its own.
            magnitude = mean * np.float32((1.0, 1.5, 0.75, 1.25)[(n // rows + k // columns) % 4])
            out[n : n + rows, k : k + columns] = t * from_bfloat16(to_bfloat16(np.array([magnitude])))[0]
    return out


def _tied_rows(rng: np.random.Generator, count: int) -> np.ndarray:
    """Rows of 64 values with one 127 and many halves, whose mean square is 256.

    Added to 256, an eps of 1e-5 vanishes in float32; so the norm divides by exactly 16, the quantiser's scale is
    exactly 16, and the codes to round are the values themselves.
    """
    sizes = [127.0, *[2.5] * 9, *[3.5] * 8, *[1.5] * 20, *[0.5] * 23, 5.0, 5.0, 0.0]
    assert len(sizes) == 64 and sum(v * v for v in sizes) == 64 * 256
    signs = rng.integers(0, 2, (count, 64)) * 2 - 1
    return (rng.permuted(np.tile(sizes, (count, 1)), axis=1) * signs).astype(np.float32)


def ternary(w: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """BitNet b1.58's absmean rule: int8 values and the float32 mean of |w|."""
    mean = np.float32(np.abs(w.astype(np.float64)).mean())
    return np.clip(np.rint(w * (np.float32(1) / mean)), -1, 1).astype(np.int8), mean


def pack(t: np.ndarray) -> np.ndarray:
    """int8 [N, K] -> uint8 [N / 4, K]: row r in byte row r mod (N / 4), bits 2 * (r div (N / 4)), code t + 1."""
    quarter, rest = divmod(t.shape[0], 4)
    assert rest == 0, "transformers loads packed weights only where N is a multiple of 4"
    codes = (t + 1).astype(np.uint8).reshape(4, quarter, -1)
    return codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6


def tensors(case: Case) -> Tensors:
    """What the safetensors file holds: bfloat16 parameters, or packed linears with their weight_scale."""
    out: Tensors = {}
    for name, value in draw(case).items():
        module = name.removesuffix(".weight")
        if not (case.packed and module.endswith("_proj") and case.converted(module)):
            out[name] = ("BF16", to_bfloat16(value))
            continue
        t, mean = ternary(value)
        scale = np.array([np.float32(1) / mean if case.inverse else mean], np.float32)
        out[name] = ("U8", pack(t))
        as_bf16 = case.scale_dtype == "BF16"
        out[f"{module}.weight_scale"] = ("BF16", to_bfloat16(scale)) if as_bf16 else ("F32", scale)
    return out


def safetensors_bytes(content: Tensors) -> bytes:
    """One safetensors file: header length, JSON header padded to 8 bytes, then the data in the order of the names."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, at = [], 0
    for name, (dtype, array) in sorted(content.items()):
        blob = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(blobs)


def write(case: Case, folder: Path, for_transformers: bool = False) -> str:
    """Write config.json and model.safetensors; returns the sha256 of the latter.

    for_transformers: where the published form is one that transformers cannot run, the form that it can.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, content = case.config, tensors(case)
    if not for_transformers:
        config = case.file_config or config
        content = {case.published_name(name): value for name, value in content.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    data = safetensors_bytes(content)
    (folder / "model.safetensors").write_bytes(data)
    return hashlib.sha256(data).hexdigest()

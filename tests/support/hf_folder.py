"""Small Hugging Face folders, written without this package: MLX's safetensors writer, packing row by row."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

TINY: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip
QUANTIZATION: dict[str, dict[str, Any] | None] = {
    "packed": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"},
    "inverse": {"quant_method": "bitnet", "modules_to_not_convert": None},
    "online": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"},
    "dense": None,
}


@dataclass
class HFFolder:
    """What was written. t and scale: each ternary linear's int8 values and float64 scale (what a 1 stands for) before
    the rounding of the file. floats: every float tensor as float32, already rounded to its dtype.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, mx.array]
    t: dict[str, np.ndarray] = field(default_factory=dict)
    scale: dict[str, float] = field(default_factory=dict)
    floats: dict[str, np.ndarray] = field(default_factory=dict)

    def save(self, shards: int = 1) -> None:
        """Write (again) config.json and the weights, in one file or in several with an index."""
        self.path.mkdir(parents=True, exist_ok=True)
        for old in self.path.glob("*.safetensors*"):
            old.unlink()  # written in place, it would change under those who have mapped it
        (self.path / "config.json").write_text(json.dumps(self.config))
        if shards == 1:
            mx.save_safetensors(str(self.path / "model.safetensors"), self.tensors, {"format": "pt"})
            return
        names = sorted(self.tensors)
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = {name: self.tensors[name] for name in names[shard::shards]}
            mx.save_safetensors(str(self.path / file), part, {"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (self.path / "model.safetensors.index.json").write_text(json.dumps(index))


def pack(t: np.ndarray) -> np.ndarray:
    """int8 [N, K] -> uint8 [ceil(N / 4), K]: row r in byte row r mod n, bits 2 * (r div n), code t + 1."""
    rows = -(-t.shape[0] // 4)
    out = np.zeros((rows, t.shape[1]), np.uint8)
    for r, row in enumerate(t):
        out[r % rows] |= (row + 1).astype(np.uint8) << np.uint8(2 * (r // rows))
    return out


def linears(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(N, K) of each linear inside a layer."""
    h, f, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    dim = config.get("head_dim") or h // heads
    q, kv = heads * dim, config["num_key_value_heads"] * dim
    attention = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q)}
    mlp = {"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)}
    return {f"self_attn.{k}": v for k, v in attention.items()} | {f"mlp.{k}": v for k, v in mlp.items()}


def write(
    path: Path, family: str = "bitnet", storage: str = "packed", *, shards: int = 1, seed: int = 0,
    dtype: mx.Dtype = mx.bfloat16, scale_dtype: mx.Dtype = mx.bfloat16, dense: tuple[str, ...] = (),
    quantization: dict[str, Any] | None = None, **changes: Any,
) -> HFFolder:  # fmt: skip
    """A folder with random weights. dense: linears (full names) kept as floats. quantization, changes: config keys."""
    config = {**TINY, "model_type": family, "hidden_act": "relu2" if family == "bitnet" else "silu", **changes}
    kind = QUANTIZATION[storage]
    if kind is not None:
        config["quantization_config"] = {**kind, **(quantization or {})}
    folder = HFFolder(path, config, {})
    rng = np.random.default_rng(seed)

    def put(name: str, values: np.ndarray, kind: mx.Dtype = dtype) -> None:
        folder.tensors[name] = mx.array(values.astype(np.float32)).astype(kind)
        folder.floats[name] = np.array(folder.tensors[name].astype(mx.float32))

    h = config["hidden_size"]
    put("model.embed_tokens.weight", rng.standard_normal((config["vocab_size"], h)))
    if not config.get("tie_word_embeddings", False):
        put("lm_head.weight", rng.standard_normal((config["vocab_size"], h)))
    put("model.norm.weight", 1 + 0.1 * rng.standard_normal(h))
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        sizes = {"input_layernorm": h, "post_attention_layernorm": h}
        if family == "bitnet":
            sizes |= {"self_attn.attn_sub_norm": linears(config)["self_attn.q_proj"][0]}
            sizes |= {"mlp.ffn_sub_norm": config["intermediate_size"]}
        if family == "qwen3":
            dim = config.get("head_dim") or h // config["num_attention_heads"]
            sizes |= {"self_attn.q_norm": dim, "self_attn.k_norm": dim}
        for name, size in sizes.items():
            put(f"{at}.{name}.weight", 1 + 0.1 * rng.standard_normal(size))
        for name, shape in linears(config).items():
            w = rng.standard_normal(shape) * rng.uniform(0.05, 0.5)
            if storage in ("online", "dense") or f"{at}.{name}" in dense:
                put(f"{at}.{name}.weight", w)
            else:
                _put_packed(folder, f"{at}.{name}", w, storage == "inverse", scale_dtype)
            if config.get("attention_bias" if name.startswith("self_attn") else "mlp_bias"):
                put(f"{at}.{name}.bias", 0.1 * rng.standard_normal(shape[0]))
    folder.save(shards)
    return folder


def _put_packed(folder: HFFolder, module: str, w: np.ndarray, inverse: bool, dtype: mx.Dtype) -> None:
    m = float(np.abs(w).mean())
    t = np.clip(np.rint(w / m), -1, 1).astype(np.int8)
    folder.t[module], folder.scale[module] = t, m
    folder.tensors[f"{module}.weight"] = mx.array(pack(t))
    folder.tensors[f"{module}.weight_scale"] = mx.array([1 / m if inverse else m]).astype(dtype)

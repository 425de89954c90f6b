"""What is refused in a GGUF file, by name and with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.checkpoint.read_gguf import GgufModel, read_gguf
from bitnet_mlx.errors import BitnetError, FormatError, UnsupportedModelError
from tests.support import gguf_models
from tests.support.gguf_models import Tensors
from tests.support.random_model import random_weights, tiny_config

Change = Callable[[dict[str, Any], Tensors], object]
Q = "blk.0.attn_q.weight"


def content(kind: str = "I2_S", architecture: str = "bitnet-b1.58", **options: Any) -> tuple[dict[str, Any], Tensors]:
    config = tiny_config(
        vocab_size=16, hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_hidden_layers=2, sub_norms=architecture != "llama",
    )  # fmt: skip
    weights = random_weights(config, head="float32")
    return gguf_models.metadata(config, architecture), gguf_models.tensors(weights, kind, "F32", **options)


def retyped(name: str, number: int, size: int) -> Change:
    return lambda keys, tensors: tensors.update({name: (tensors[name][0], number, bytes(size))})


def patched(name: str, at: int, data: bytes) -> Change:
    def change(keys: dict[str, Any], tensors: Tensors) -> None:
        shape, number, raw = tensors[name]
        at_ = at % len(raw)
        tensors[name] = (shape, number, raw[:at_] + data + raw[at_ + len(data) :])

    return change


def key(name: str, value: Any) -> Change:
    return lambda keys, tensors: keys.update({name: value})


def extra(name: str, shape: tuple[int, ...] = (256,)) -> Change:
    return lambda keys, tensors: tensors.update({name: (shape, 0, bytes(4 * int(np.prod(shape))))})


B = "bitnet-b1.58"
NAN, INF, ZERO = (np.float32(x).tobytes() for x in (np.nan, np.inf, 0))
CASES: dict[str, tuple[str, Change, type[BitnetError], str]] = {
    "architecture": ("I2_S", key("general.architecture", "gpt2"), UnsupportedModelError, "'gpt2'; bitnet, bitnet-25"),
    "no architecture": ("I2_S", lambda k, t: k.pop("general.architecture"), UnsupportedModelError, "is missing"),
    "a part": ("I2_S", key("split.count", 3), UnsupportedModelError, "one of 3 parts of a model; whole files"),
    "missing keys": (
        "I2_S", lambda k, t: (k.pop(f"{B}.block_count"), k.pop(f"{B}.embedding_length")), FormatError,
        "lacks bitnet-b1.58.embedding_length, bitnet-b1.58.block_count",
    ),
    "experts": ("I2_S", key(f"{B}.expert_count", 8), UnsupportedModelError, "has bitnet-b1.58.expert_count"),
    "window": ("I2_S", key(f"{B}.attention.sliding_window", 512), UnsupportedModelError, "sliding_window"),
    "not causal": ("I2_S", key(f"{B}.attention.causal", False), UnsupportedModelError, "attention.causal = false, which is not"),
    "yarn's logarithm": (
        "I2_S", lambda k, t: k.update({f"{B}.rope.scaling.type": "yarn", f"{B}.rope.scaling.factor": 2.0,
                                       f"{B}.rope.scaling.yarn_log_multiplier": 0.1}),
        FormatError, "yarn_log_multiplier is 0.1.*; only 0 is supported",
    ),
    "partial rope": ("I2_S", key(f"{B}.rope.dimension_count", 32), FormatError, "is 32; it must be the head's size, 64"),
    "rope kind": ("I2_S", key(f"{B}.rope.scaling.type", "longrope"), UnsupportedModelError, "'longrope'; none, linear"),
    "vocabulary": ("I2_S", key(f"{B}.vocab_size", 17), FormatError, "vocab_size is 17; tensor token_embd.weight is F32"),
    "per layer": ("I2_S", key(f"{B}.feed_forward_length", [256, 256]), FormatError, "feed_forward_length is"),
    "TL1": ("I2_S", retyped(Q, 38, 99), UnsupportedModelError, r"type TL1 \(blk.0.attn_q.weight\): its bytes are arranged"),
    "TL2": ("I2_S", retyped(Q, 39, 99), UnsupportedModelError, "type TL2"),
    "rotated": ("I2_S", retyped(Q, 142, 99), UnsupportedModelError, "PQ2_0 .*Hadamard"),
    "Q4_K": ("I2_S", retyped(Q, 12, 256 * 144), UnsupportedModelError, "Q4_K .*: TQ1_0, TQ2_0, I2_S, Q2_0, F32, F16, BF16 are"),
    "Q8_0 linear": ("I2_S", retyped(Q, 8, 256 * 8 * 34), UnsupportedModelError, "type Q8_0"),
    "unknown type": ("I2_S", retyped(Q, 777, 99), UnsupportedModelError, "1 tensors of type 777 "),
    "head's type": ("I2_S", retyped("token_embd.weight", 10, 99), UnsupportedModelError, r"Q2_K \(token_embd.weight\)"),
    "norm's type": ("I2_S", retyped("output_norm.weight", 8, 8 * 34), UnsupportedModelError, r"Q8_0 \(output_norm.weight\)"),
    "unknown tensors": (
        "I2_S", lambda k, t: (extra("blk.0.attn_q.odd")(k, t), extra("blk.7.ffn_up.weight")(k, t)), FormatError,
        "has 2 tensors that a bitnet-b1.58 model does not know: blk.0.attn_q.odd, blk.7.ffn_up.weight",
    ),
    "rotation's tensors": ("I2_S", extra("blk.0.attn_q.signs"), UnsupportedModelError, "holds blk.0.attn_q.signs: .*Hadamard"),
    "missing tensors": (
        "I2_S", lambda k, t: (t.pop(Q), t.pop("output_norm.weight")), FormatError,
        "lacks 2 tensors: blk.0.attn_q.weight, output_norm.weight",
    ),
    "shape": (
        "I2_S", lambda k, t: t.update({Q: ((128, 512), *t[Q][1:])}), FormatError,
        r"'blk.0.attn_q.weight' is I2_S \[128, 512\]; \[256, 256\] is needed",
    ),
    "norm's size": ("I2_S", extra("blk.0.attn_norm.weight", (255,)), FormatError, r"F32 \[255\]; \[256\] is needed"),
    "code 3": ("I2_S", patched(Q, 5, b"\xc0"), FormatError, "attn_q.weight in .* holds code 3 in byte 5"),
    "scale 0": ("I2_S", patched(Q, -32, ZERO), FormatError, "attn_q.weight in .* has the scale 0.0"),
    "scale NaN": ("I2_S", patched(Q, -32, NAN), FormatError, "has the scale nan"),
    "scale inf": ("I2_S", patched(Q, -32, INF), FormatError, "has the scale inf"),
    "norm NaN": ("I2_S", patched("output_norm.weight", 8, NAN), FormatError, "'output_norm.weight' holds NaN"),
    "embedding inf": ("I2_S", patched("token_embd.weight", -4, INF), FormatError, "'token_embd.weight' holds NaN"),
    "Q8_0 embedding NaN": (
        "I2_S", lambda k, t: t.update({"token_embd.weight": ((16, 256), 8, b"\x00\x7e" + bytes(16 * 8 * 34 - 2))}),
        FormatError, "'token_embd.weight' holds NaN",
    ),
    "TQ2_0 code 3": ("TQ2_0", patched(Q, 66, b"\xff"), FormatError, "holds code 3 in row 1, block 0"),
    "TQ2_0 NaN": ("TQ2_0", patched(Q, 64, b"\x00\x7e"), FormatError, "scale of row 0, block 0 is nan"),
    "TQ1_0 zero": ("TQ1_0", patched(Q, 52, b"\0\0"), FormatError, "scale of row 0, block 0 is 0.0"),
    "TQ1_0 negative": ("TQ1_0", patched(Q, 53, b"\xbc"), FormatError, "a scale must be above 0"),
    "short": ("TQ2_0", lambda k, t: t.update({Q: (*t[Q][:2], t[Q][2][:-66])}), FormatError, "takes 16896 bytes; it has 168"),
    "long": ("TQ2_0", lambda k, t: t.update({Q: (*t[Q][:2], t[Q][2] + bytes(66))}), FormatError, "takes 16896 bytes; it has 169"),
    "scale tensor": ("I2_S", extra("blk.0.attn_q.scale", (1,)), FormatError, "'blk.0.attn_q.scale' is 0; a factor above 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_refused_by_name_with_the_reason(name: str, tmp_path: Path) -> None:
    kind, change, error, message = CASES[name]
    keys, tensors = content(kind)
    change(keys, tensors)
    with pytest.raises(error, match=message) as caught:
        read_by_hand(tmp_path, keys, tensors)
    assert "model.gguf" in str(caught.value)


def read_by_hand(path: Path, keys: dict[str, Any], tensors: Tensors) -> None:
    from tests.support import gguf_files

    table = [(name, shape, number, raw) for name, (shape, number, raw) in tensors.items()]
    (path / "model.gguf").write_bytes(gguf_files.by_hand(keys, table))
    read_gguf(path / "model.gguf")


def test_the_same_files_without_a_fault_are_read(tmp_path: Path) -> None:
    for kind in ("I2_S", "TQ1_0", "TQ2_0"):
        read_by_hand(tmp_path, *content(kind))
    keys, tensors = content()
    keys |= {f"{B}.expert_count": 0, f"{B}.attention.causal": True, f"{B}.mystery": 3}
    tensors["blk.0.attn_q.scale"] = ((1,), 0, np.float32(0.5).tobytes())
    read_by_hand(tmp_path, keys, tensors)
    (told,) = [text for text in GgufModel(tmp_path / "model.gguf").notices if "not known" in text]
    assert f"{B}.mystery" in told and "causal" not in told and "expert" not in told


def test_the_factor_of_yarns_attention_multiplies_its_own(tmp_path: Path) -> None:
    """As llama.cpp has it: attn_factor * (1 + 0.1 ln factor)."""
    keys, tensors = content()
    keys |= {f"{B}.rope.scaling.type": "yarn", f"{B}.rope.scaling.factor": 4.0, f"{B}.rope.scaling.attn_factor": 0.5}
    read_by_hand(tmp_path, keys, tensors)
    rope = GgufModel(tmp_path / "model.gguf").config.rope
    assert (rope.rope_type, rope.factor) == ("yarn", 4.0)
    assert rope.attention_factor == pytest.approx(0.5 * (1 + 0.1 * np.log(4)), rel=1e-12)


def test_llama_3s_scaling_is_found_from_its_tensor_and_others_are_refused(tmp_path: Path) -> None:
    from bitnet_mlx.models.config import RopeConfig, inverse_frequencies

    keys, tensors = content("I2_S", "llama")
    keys["llama.rope.freq_base"] = 500000.0
    config = tiny_config(head_dim=64, rope=RopeConfig(500000.0, "llama3", 32.0, original_max_position_embeddings=8192))
    scaled, _ = inverse_frequencies(config)
    plain, _ = inverse_frequencies(tiny_config(head_dim=64, rope=RopeConfig(500000.0)))
    factors = (plain / scaled).astype(np.float32)
    tensors["rope_freqs.weight"] = ((32,), 0, factors.tobytes())
    path = gguf_models.write(tmp_path / "a.gguf", keys, tensors)
    found = read_gguf(path).config.rope
    assert (found.rope_type, found.factor, found.original_max_position_embeddings) == ("llama3", 32.0, 8192)
    endless = np.where(factors == factors.max(), np.float32(np.inf), factors)
    for wrong in (factors[::-1], factors * 2, np.full(32, 4, np.float32), endless):
        tensors["rope_freqs.weight"] = ((32,), 0, wrong.tobytes())
        with pytest.raises(UnsupportedModelError, match="is not Llama 3's scaling"):
            read_gguf(gguf_models.write(tmp_path / "b.gguf", keys, tensors))
    tensors["rope_freqs.weight"] = ((32,), 0, factors.tobytes())
    twice = keys | {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}
    with pytest.raises(
        FormatError, match="rope.scaling.type is 'yarn'; with a tensor rope_freqs.weight it must be none"
    ):
        read_gguf(gguf_models.write(tmp_path / "d.gguf", twice, tensors))
    tensors["rope_freqs.weight"] = ((32,), 0, np.ones(32, np.float32).tobytes())
    assert read_gguf(gguf_models.write(tmp_path / "c.gguf", keys, tensors)).config.rope.rope_type == "default"

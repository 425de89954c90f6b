"""A decoder as plain MLX code has it, for comparison: stock 2-bit or dense bfloat16 linears, mx.fast's norms, RoPE, attention.

Random weights; every layer has its own, so that a step reads what a real model's would. Activations stay in bfloat16 and
nothing is quantised on the way, so it computes something else than a ternary model, and less of it.
"""

from __future__ import annotations

from typing import Literal

from bitnet_mlx.backends.mlx_import import mx, nn
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.config import DecoderConfig

Kind = Literal["stock", "bf16"]
KINDS: tuple[Kind, ...] = ("stock", "bf16")  # 2-bit groups of 128 with an 8-bit head; everything dense


class PlainLinear(nn.Module):
    """x W^T by one product: quantised in groups where bits are given, else dense; W [N, K] drawn at random."""

    def __init__(self, n: int, k: int, bits: int | None, group: int = 128) -> None:
        super().__init__()
        self.bits, self.group = bits, group
        if bits is None:
            self.weight = (mx.random.normal((n, k)) * 0.02).astype(mx.bfloat16)
        else:
            if k % group:
                raise ConfigError(f"[bench] K is {k}; stock MLX takes multiples of {group}: leave out --against stock")
            self.weight = mx.random.randint(0, 1 << 31, (n, k * bits // 32), mx.uint32)
            self.scales = mx.full((n, k // group), 0.02, mx.bfloat16)
            self.biases = self.scales * -(1 << (bits - 1))
        mx.eval(self.parameters())

    def __call__(self, x: mx.array) -> mx.array:
        """bfloat16 [..., K] -> [..., N]."""
        if self.bits is None:
            return x @ self.weight.T
        return mx.quantized_matmul(x, self.weight, self.scales, self.biases, group_size=self.group, bits=self.bits)

    def rows(self, index: mx.array) -> mx.array:
        """Rows of W as an embedding: bfloat16 [*index.shape, K]."""
        if self.bits is None:
            return self.weight[index]
        parts = (self.weight[index], self.scales[index], self.biases[index])
        return mx.dequantize(*parts, group_size=self.group, bits=self.bits)


class PlainCache:
    """Keys and values in two arrays that grow by 256 positions, as mlx-lm keeps them."""

    step = 256

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append [B, heads, L, D]; all that is held."""
        start, end = self.offset, self.offset + keys.shape[2]
        self.keys, self.values = self._grown(self.keys, keys, end), self._grown(self.values, values, end)
        self.keys[..., start:end, :] = keys
        self.values[..., start:end, :] = values
        self.offset = end
        return self.keys[..., :end, :], self.values[..., :end, :]

    def _grown(self, held: mx.array | None, new: mx.array, end: int) -> mx.array:
        if held is not None and end <= held.shape[2]:
            return held
        b, heads, _, dim = new.shape
        room = mx.zeros((b, heads, -(-new.shape[2] // self.step) * self.step, dim), new.dtype)
        return room if held is None else mx.concatenate([held[..., : self.offset, :], room], axis=2)

    @property
    def state(self) -> list[mx.array | None]:
        """What to evaluate."""
        return [self.keys, self.values]


class PlainBlock(nn.Module):
    """One layer."""

    def __init__(self, config: DecoderConfig, kind: Kind) -> None:
        super().__init__()
        self.config = config
        bits = 2 if kind == "stock" else None
        self.linears = {name.split(".")[1]: PlainLinear(n, k, bits) for name, (n, k) in config.linear_shapes().items()}
        self.norms = {
            name.split(".")[-1]: nn.RMSNorm(n, config.rms_norm_eps) for name, n in config.norm_sizes().items()
        }
        self.rope = nn.RoPE(config.head_dim, traditional=False, base=config.rope.rope_theta)
        self.set_dtype(mx.bfloat16)

    def __call__(self, x: mx.array, cache: PlainCache) -> mx.array:
        """x: bfloat16 [B, L, H]."""
        b, length, _ = x.shape
        h = self.norms["input_layernorm"](x)
        q, k, v = (
            self.linears[name](h).reshape(b, length, -1, self.config.head_dim).transpose(0, 2, 1, 3)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = self.rope(q, offset=cache.offset), self.rope(k, offset=cache.offset)
        k, v = cache.update_and_fetch(k, v)
        mask = "causal" if length > 1 else None
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.config.head_dim**-0.5, mask=mask)
        out = self._sub("attn_sub_norm", out.transpose(0, 2, 1, 3).reshape(b, length, -1))
        x = x + self.linears["o_proj"](out)
        h = self.norms["post_attention_layernorm"](x)
        act = nn.relu2 if self.config.hidden_act == "relu2" else nn.silu
        hidden = act(self.linears["gate_proj"](h)) * self.linears["up_proj"](h)
        return x + self.linears["down_proj"](self._sub("ffn_sub_norm", hidden))

    def _sub(self, name: str, x: mx.array) -> mx.array:
        return self.norms[name](x) if name in self.norms else x


class PlainModel(nn.Module):
    """All layers, with tied embeddings."""

    def __init__(self, config: DecoderConfig, kind: Kind) -> None:
        super().__init__()
        self.layers = [PlainBlock(config, kind) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm.set_dtype(mx.bfloat16)
        self.head = PlainLinear(config.vocab_size, config.hidden_size, 8 if kind == "stock" else None, 64)
        mx.eval(self.parameters())

    def make_cache(self) -> list[PlainCache]:
        """An empty cache for each layer."""
        return [PlainCache() for _ in self.layers]

    def __call__(self, inputs: mx.array, cache: list[PlainCache]) -> mx.array:
        """Token ids [B, L] -> the logits of the last token, [B, 1, vocab]."""
        x = self.head.rows(inputs)
        for layer, entry in zip(self.layers, cache, strict=True):
            x = layer(x, entry)
        return self.head(self.norm(x[:, -1:]))

"""The decoder on MLX: an mlx.nn.Module by Hugging Face's names, which mlx-lm's generate and server accept as it is.

The graph is that of decoder_numpy.py. Norms, quantisers, products and activation functions compute in float32; what
passes between layers has the model's dtype. layers_mlx.py has the layers; on a GPU with our kernels their parts of fixed
shape are compiled (compiled_mlx.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from bitnet_mlx.backends.mlx_affine import StockOps
from bitnet_mlx.backends.mlx_import import mx, nn
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.cache_mlx import KVCache, SequenceCache
from bitnet_mlx.models.cache_small_mlx import SmallKVCache
from bitnet_mlx.models.compiled_mlx import CompiledLayers
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.hooks import Hooks
from bitnet_mlx.models.hooks_mlx import linear_of, looked_into
from bitnet_mlx.models.layers_mlx import Block, Parts, Plan
from bitnet_mlx.models.parts import PIECE, Part, passes
from bitnet_mlx.models.ragged_mlx import rows as ragged_rows
from bitnet_mlx.models.rope_mlx import Rotary
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.nn.bitlinear import BitLinear
from bitnet_mlx.nn.dense import DenseLinear, head_layer
from bitnet_mlx.nn.head_norms import HeadNorms
from bitnet_mlx.nn.lora import LoRALinear
from bitnet_mlx.nn.site import PackedSite
from bitnet_mlx.ternary import SCALES

_EARLY = 8  # layers whose graph is built before a GPU begins with them
_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


class Backbone(nn.Module):
    """Embedding and layers; the last norm belongs to it, as in Hugging Face's names."""

    def __init__(self, parts: Parts, dtype: mx.Dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.hooks = Hooks()
        self.embed_tokens = head_layer(parts.weights.embed_tokens, parts.ops)
        self.layers = [Block(parts, i) for i in range(parts.config.num_hidden_layers)]
        self.norm = parts.norm("model.norm")
        self._rotary = Rotary(parts.config)
        self._compiled = CompiledLayers(parts.ops, Plan.of(parts.config)) if parts.ops.compiles else None

    def __call__(
        self, inputs: mx.array, cache: Sequence[Any] | None, embeddings: mx.array | None, early: bool = False
    ) -> mx.array:
        """Token ids [B, L] -> [B, L, H] before the last norm.

        early: a GPU begins with the first layers while the graph of the others is built.
        """
        x = (self.embed_tokens.rows(inputs) if embeddings is None else embeddings).astype(self.dtype)
        caches = [None] * len(self.layers) if cache is None else cache
        mask = _mask(x.shape[1], caches[0])
        rotation = self._rotary.at(caches[0], x.shape[1])
        begin = _begin if early and mx.default_device() == mx.gpu else _wait
        if self._compiled is not None and not self.hooks.used:
            out = self._compiled.run(self.layers, x, caches, mask, rotation, begin)
            if out is not None:
                return out
        for i, (layer, entry) in enumerate(zip(self.layers, caches, strict=True)):
            begin(i, x)
            if self.hooks.used:
                x = looked_into(self.hooks, i, layer, x, mask, entry, rotation)
            else:
                x = layer(x, mask, entry, rotation)
        return x


class MlxModel(nn.Module):
    """A decoder over DecoderWeights on MLX's default device; it offers models/decoder.py's protocol as well.

    Arrays are evaluated before `step` returns, so threads may take turns; at one time one of them may run it. Gradients
    take training mode (`train()`): the fused operations have none.
    """

    def __init__(self, weights: DecoderWeights, dtype: str | None = None, ops: StockOps | None = None) -> None:
        super().__init__()
        self.config = weights.config
        self.ops = ops or StockOps()
        self.dtype = model_dtype(weights.config, dtype)
        self.kv_bits: int | None = None  # of the caches that make_cache makes; None is dtype's
        self.model = Backbone(Parts(weights, self.ops), _DTYPES[self.dtype])
        if weights.lm_head is not weights.embed_tokens:
            self.lm_head = head_layer(weights.lm_head, self.ops)
        self.freeze()
        self.eval()
        self.ops.prepare(_product_shapes(self.model), self.dtype)

    @classmethod
    def from_weights(cls, weights: DecoderWeights, dtype: str | None = None, ops: StockOps | None = None) -> MlxModel:
        """dtype: of what passes between layers, "float32", "bfloat16" or "float16"; None lets model_dtype choose."""
        return cls(weights, dtype, ops)

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.ops.name

    @property
    def layers(self) -> list[Block]:
        return self.model.layers

    @property
    def hooks(self) -> Hooks:
        """What is told of the layers' insides; while it is used they run module by module, with the same results."""
        return self.model.hooks

    def linear(self, module: str, x: np.ndarray) -> np.ndarray:
        """One linear alone, as a step computes it: float32 x [M, K], behind all norms -> float32 [M, N]. Its clip counts."""
        _, _, layer, name = module.split(".", 3)
        clip = self.hooks.clips.get(module)
        return linear_of(self.layers[int(layer)], name, x, _DTYPES[self.dtype], clip)

    @property
    def model_type(self) -> str:
        return self.config.model_type

    def __call__(
        self, inputs: mx.array, cache: Sequence[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """Token ids [B, L] -> logits [B, L, vocab]. cache: one entry a layer, ours or mlx-lm's, updated in place."""
        return self.head(self.model(inputs, cache, input_embeddings))

    def head(self, x: mx.array) -> mx.array:
        """[..., H] before the last norm -> logits [..., vocab]."""
        return self.project(self.ready(x))

    def ready(self, x: mx.array) -> mx.array:
        """[..., H] before the last norm -> what the head multiplies, [..., H]."""
        # Codes are multiplied in float32 anyway; float rows of the model's own dtype are multiplied in it.
        return self.model.norm(x if isinstance(self._head, DenseLinear) else x.astype(mx.float32))

    def project(self, x: mx.array) -> mx.array:
        """What the head multiplies, [..., H] -> logits [..., vocab]."""
        return self._head(x)

    @property
    def _head(self) -> nn.Module:
        return self.lm_head if "lm_head" in self else self.model.embed_tokens

    def make_cache(self, limit: int | None = None) -> SequenceCache:
        """An empty cache for at most `limit` positions, the model's context by default."""
        limit = self.config.max_position_embeddings if limit is None else limit
        if self.kv_bits is None:
            return SequenceCache(KVCache(limit) for _ in self.layers)
        return SequenceCache(SmallKVCache(self.kv_bits, self.config.head_dim, limit) for _ in self.layers)

    def step(
        self, tokens: Sequence[Sequence[int]], caches: Sequence[SequenceCache], logits: Literal["last", "all"] = "last"
    ) -> list[np.ndarray]:
        """See models/decoder.py. Several sequences go side by side, 512 tokens of all of them in a pass."""
        for ids, cache in zip(tokens, caches, strict=True):
            if not len(ids):
                raise ConfigError("[step] a sequence has no tokens; each needs at least one")
            for entry in cache:
                entry.reserve(len(ids))
        if len(tokens) == 1:
            return [self._sequence(tokens[0], caches[0], logits)]
        pieces: list[list[np.ndarray]] = [[] for _ in tokens]
        for parts in passes(tokens, PIECE):
            for part, rows in zip(parts, self._side_by_side(parts, caches, logits), strict=True):
                pieces[part.sequence].append(rows)
        return [np.concatenate(p) if logits == "all" else p[-1] for p in pieces]

    def _side_by_side(self, parts: Sequence[Part], caches: Sequence[SequenceCache], logits: str) -> list[np.ndarray]:
        """One pass: for each part its logits, of all its tokens or of the last; none where the sequence goes on."""
        ids, layers = ragged_rows(parts, caches, self.ops.compiles)
        x = self.model(ids, layers, None, early=True)
        wanted = [
            range(p.at, p.at + len(p.ids)) if logits == "all" else [p.at + len(p.ids) - 1] * p.last for p in parts
        ]
        chosen = [row for rows in wanted for row in rows]
        y = self.head(x[0, mx.array(chosen)]).astype(mx.float32) if chosen else mx.zeros((0, 1))
        mx.eval(y, [entry.arrays for part in parts for entry in caches[part.sequence]])
        found = np.split(np.array(y), np.cumsum([len(rows) for rows in wanted])[:-1])
        return found if logits == "all" else [rows[0] if len(rows) else rows for rows in found]

    def hidden(self, tokens: Sequence[Sequence[int]], caches: Sequence[SequenceCache]) -> list[np.ndarray]:
        """See models/decoder.py."""
        return [self._sequence(ids, cache, "hidden") for ids, cache in zip(tokens, caches, strict=True)]

    def _sequence(self, ids: Sequence[int], cache: SequenceCache, logits: str) -> np.ndarray:
        pieces = []
        for at in range(0, len(ids), PIECE):
            piece = mx.array(np.asarray(ids[at : at + PIECE], np.int32))[None]
            x = self.model(piece, cache, None, early=True)
            if logits == "hidden":
                pieces.append(self.model.norm(x[0].astype(mx.float32)))
            elif logits == "all":
                pieces.append(self.head(x)[0].astype(mx.float32))
            elif at + PIECE >= len(ids):
                pieces.append(self.head(x[:, -1])[0].astype(mx.float32))
            mx.eval(pieces, [entry.arrays for entry in cache])
        return np.concatenate([np.array(p) for p in pieces])


def model_dtype(config: DecoderConfig, asked: str | None = None) -> str:
    """The dtype of what passes between layers.

    By default float32 on MLX's CPU device and the checkpoint's own on a GPU. Squared ReLU passes 65504, the largest
    float16: such a model refuses float16 (ConfigError), and takes bfloat16 where its checkpoint is float16.
    """
    if asked is not None and asked not in _DTYPES:
        raise ConfigError(f"[dtype] {asked!r} was asked for; {', '.join(_DTYPES)} are allowed")
    if asked == "float16" and config.hidden_act == "relu2":
        raise ConfigError(
            f"[dtype] float16 was asked for and {config.model_type} uses squared ReLU, whose values pass 65504, "
            "the largest float16; choose bfloat16 or float32"
        )
    if asked is not None:
        return asked
    if mx.default_device() == mx.cpu or config.dtype not in _DTYPES:
        return "float32"
    return "bfloat16" if config.dtype == "float16" and config.hidden_act == "relu2" else config.dtype


def _begin(layer: int, x: mx.array) -> None:
    if layer and layer % _EARLY == 0:
        mx.async_eval(x)


def _wait(_layer: int, _x: mx.array) -> None:
    pass


def _mask(length: int, cache: Any) -> mx.array | str | None:
    if cache is not None and hasattr(cache, "make_mask"):
        return cache.make_mask(length, return_array=False, window_size=None)
    return None if length == 1 else "causal"


def _product_shapes(model: Backbone) -> set[tuple[int, int, str]]:
    """(N, K, kind of scale) of every packed product that a step runs, joined ones as one."""
    found = set()
    for place in (place for layer in model.layers for place in layer.sites()):
        site = place.inner if isinstance(place, HeadNorms) else place
        if isinstance(site, PackedSite):
            words, scale, _ = site.arrays.packed
            found.add((words.shape[-2], site.static.k, SCALES[scale.ndim]))
        else:
            for layer in (x.linear if isinstance(x, LoRALinear) else x for x in site.layers):
                if isinstance(layer, BitLinear):
                    found.add((layer.output_dims, layer.input_dims, SCALES[layer.scale.ndim]))
    return found

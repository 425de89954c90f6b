"""This package's own folders: words2 (2 bits a weight, used in place) and trits5 (1.6 bits, unpacked when read)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_mlx.checkpoint import target as common
from bitnet_mlx.checkpoint.read import open_weights
from bitnet_mlx.checkpoint.safetensors_writer import Pending, pending
from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.formats import trits5
from bitnet_mlx.formats.dense import HEAD_GROUP, GroupedRows
from bitnet_mlx.models.quantization import NATIVE_FORMATS, NATIVE_METHOD, NATIVE_VERSION
from bitnet_mlx.models.weights import DecoderWeights, Linear, Matrix
from bitnet_mlx.ternary import TernaryTensor


class NativeTarget(common.FolderTarget):
    """Every scale and bias as float32, norms as float32, embedding and head in groups of 64 or as floats."""

    def __init__(
        self,
        weights: DecoderWeights,
        source: Mapping[str, Any],
        format: str = "words2",  # noqa: A002 - the command line's own name for it
        head_bits: int | None = None,
        dtype: str | None = None,
        default_head_bits: int = 8,
    ) -> None:
        """head_bits: None takes default_head_bits, or less where the file has less. dtype: None keeps floats as they are."""
        if head_bits not in (None, 32, 16, 8, 6, 4):
            raise ConfigError(f"[write] head_bits is {head_bits!r}; 16, 8, 6 or 4 are allowed")
        assert format in NATIVE_FORMATS
        super().__init__(weights, source, dtype)
        self.format = format
        self._normed: list[str] = []  # ternary linears with a norm of their own, and those without
        self._plain: list[str] = []
        self._bits = self._head_bits(head_bits, default_head_bits)

    def _head_bits(self, asked: int | None, default: int) -> int:
        tables = (self.weights.embed_tokens, self.weights.lm_head)
        if all(isinstance(rows, TernaryTensor) for rows in tables):
            if asked is not None:
                self.notices.append("embedding and head are ternary; they stay so, whatever head_bits says")
            return 2
        bits = {min(16, common.head_choice(rows, asked, default)) for rows in tables}
        stored = {rows.bits for rows in tables if isinstance(rows, GroupedRows)}
        if asked is not None and asked >= 16 and stored:
            self.notices.append(f"the head is stored in {min(stored)} bits; it stays so")
            bits = {rows.bits if isinstance(rows, GroupedRows) else 16 for rows in tables}
        elif asked is None and min(bits) < 16 and not stored:
            self.notices.append(
                f"embedding and head are written in {min(bits)} bits; --head-bits 16 keeps them as they are"
            )
        if min(bits) < 8 and not stored:
            self.notices.append(
                f"embedding and head of {min(bits)} bits take a byte a value in the file, as those of 8 do; less in MLX's memory"
            )
        if len(bits) > 1:
            raise FormatError(
                f"[write] embedding and head have {sorted(bits)} bits; the native format holds one number of bits for both"
            )
        return bits.pop()

    def _ternary(self, module: str, w: TernaryTensor) -> list[Pending]:
        words = w.words if self.format == "words2" else trits5.from_words2(w.words, w.shape[1])
        return [pending(f"{module}.weight", words), pending(f"{module}.weight_scale", w.scale)]

    def linear(self, module: str, linear: Linear) -> tuple[list[Pending], Linear]:
        w, tensors = linear.weight, []
        if isinstance(w, TernaryTensor):
            tensors = self._ternary(module, w)
        elif isinstance(w, GroupedRows):
            raise FormatError(f"[write] {module} is in {w.bits}-bit groups; linears are ternary or float here")
        else:
            tensors = [common.dense_rows(f"{module}.weight", w, self.dtype)]
            linear = common.recast(linear, self.dtype)
        if linear.bias is not None:
            tensors.append(pending(f"{module}.bias", linear.bias))
        if linear.norm is not None and isinstance(w, TernaryTensor):
            tensors.append(pending(f"{module}.norm.weight", linear.norm))
            self._normed.append(module)
        elif linear.norm is not None:
            raise FormatError(
                f"[write] {module} is float and has a norm of its own; only ternary linears have one here"
            )
        elif isinstance(w, TernaryTensor):
            self._plain.append(module)
        return tensors, linear

    def table(self, module: str, rows: Matrix) -> Iterator[Pending]:
        if isinstance(rows, TernaryTensor):
            if self._bits != 2:
                raise FormatError(
                    f"[write] {module} is ternary, and not both embedding and head are; the native format holds one kind"
                )
            yield from self._ternary(module, rows)
            return
        if self._bits >= 16:
            yield common.dense_rows(f"{module}.weight", rows, self.dtype)
            return
        n, k = rows.shape
        scales = np.full((n, -(-k // HEAD_GROUP)), np.nan, np.float32)  # known when the codes have been made

        def codes() -> Iterator[np.ndarray]:
            for part, block, scale in common.grouped_rows(rows, self._bits):
                scales[part] = scale
                yield block

        yield Pending(f"{module}.weight", "I8", (n, k), codes)
        name = f"{module}.weight_scale"
        yield Pending(name, "F32", scales.shape, lambda: [common.made(scales)], after=f"{module}.weight")

    def norm(self, module: str, norm: np.ndarray) -> Pending:
        return pending(f"{module}.weight", norm)

    def config(self, kept: list[str], activation_bits: int) -> dict[str, Any]:
        config = common.base_config(self.source, self.weights, self.dtype or self.weights.config.dtype)
        self._activation_bits = activation_bits
        if self._normed and self._plain:
            raise FormatError(
                f"[write] {self._normed[0]} has a norm of its own and {self._plain[0]} has none; the native format holds "
                "such norms for all ternary linears or for none"
            )
        table = config["quantization_config"] = {
            "quant_method": NATIVE_METHOD,
            "format": self.format,
            "format_version": NATIVE_VERSION,
            "activation_bits": activation_bits,
            "head_bits": self._bits,
            "modules_to_not_convert": [common.HEAD, *kept],
        }
        if self._normed:
            table |= {"linear_norms": True, "linear_norm_eps": self.weights.config.linear_norm_eps}
        return config

    def reopen(self, folder: Path) -> Mapping[str, Linear]:
        found = open_weights(folder)
        common.check_config(found.config, self.weights.config)
        if found.config.activation_bits != self._activation_bits:
            raise FormatError(
                f"[write] the layers take {self._activation_bits}-bit activations, and the folder read back "
                f"{found.config.activation_bits}; this is a fault of ours"
            )
        return found.linears

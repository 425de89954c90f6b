"""Hugging Face's packed layout, as transformers' bitnet quantiser loads it (linear_class autobitlinear, offline)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_mlx.checkpoint import target as common
from bitnet_mlx.checkpoint.read import open_weights
from bitnet_mlx.checkpoint.safetensors_writer import Pending, pending
from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.formats import hf
from bitnet_mlx.formats.dense import GroupedRows
from bitnet_mlx.models.weights import DecoderWeights, Linear, Matrix
from bitnet_mlx.ternary import TernaryTensor


class HfTarget(common.FolderTarget):
    """uint8 [ceil(N / 4), K] and weight_scale [1], w = t * weight_scale; all else as floats."""

    format = "hf"

    def __init__(
        self, weights: DecoderWeights, source: Mapping[str, Any], head_bits: int | None = None, dtype: str | None = None
    ) -> None:
        """dtype: None keeps the checkpoint's for what it holds exactly, and float32 for the rest."""
        super().__init__(weights, source, dtype)
        if head_bits not in (None, 32, 16):
            raise ConfigError(
                f"[convert] head_bits is {head_bits}; --format hf holds embedding and head as floats: give 16"
            )
        self._own = common.check_dtype(None, weights.config)
        for module, rows in ((common.EMBED, weights.embed_tokens), (common.HEAD, weights.lm_head)):
            if isinstance(rows, TernaryTensor):
                raise FormatError(
                    f"[convert] {module} is ternary; --format hf holds embedding and head as floats alone, and as such "
                    "they would lose what makes them small. Give --format mlx-2bit"
                )
            if isinstance(rows, GroupedRows):
                notice = f"embedding and head are stored in {rows.bits} bits; they are written as {dtype or self._own}"
                self.notices = [notice]

    def linear(self, module: str, linear: Linear) -> tuple[list[Pending], Linear]:
        w = linear.weight
        if linear.bias is not None and isinstance(w, TernaryTensor):
            raise self._refusal(module, "has a bias, which transformers multiplies by the scale")
        if linear.norm is not None:
            raise self._refusal(module, "has a norm of its own")
        if not isinstance(w, TernaryTensor):
            tensors = [common.dense_rows(f"{module}.weight", w, self.dtype)]
            if linear.bias is not None:
                tensors.append(pending(f"{module}.bias", linear.bias))
            return tensors, common.recast(linear, self.dtype)
        if w.activation_bits != 8:
            raise self._refusal(module, "takes activations that are not quantised, and transformers quantises them")
        if w.shape[0] % hf.FIELDS:
            raise self._refusal(module, f"has {w.shape[0]} rows, no multiple of 4, which transformers cannot load")
        scale = np.unique(w.scale)
        if scale.size != 1:
            kind = "row" if w.scale.ndim == 1 else "group of 128 columns"
            raise self._refusal(module, f"has a scale for each {kind}; this layout has one a matrix")
        name = f"{module}.weight_scale"
        held = common.narrowed(scale, self._dtype_of(scale), name)
        tensors = [
            pending(f"{module}.weight", hf.from_words2(w.words, w.shape[1])),
            pending(name, held, common.FILE_DTYPES[self._dtype_of(scale)]),
        ]
        return tensors, common.scaled(linear, common.uncast(held).reshape(()))

    def _refusal(self, module: str, text: str) -> FormatError:
        return FormatError(f"[convert] {module} {text}; --format hf cannot hold this model. Give --format words2")

    def _dtype_of(self, x: np.ndarray) -> str:
        return self.dtype or common.exact_dtype(x, self._own)

    def table(self, module: str, rows: Matrix) -> Iterator[Pending]:
        dtype = self.dtype or (self._own if isinstance(rows, GroupedRows) else None)
        yield common.dense_rows(f"{module}.weight", rows, dtype)

    def norm(self, module: str, norm: np.ndarray) -> Pending:
        return common.floats(f"{module}.weight", norm, self._dtype_of(norm))

    def config(self, kept: list[str], activation_bits: int) -> dict[str, Any]:  # noqa: ARG002
        config = common.base_config(self.source, self.weights, self.dtype or self._own)
        if (
            self.weights.config.sub_norms and not self.weights.config.qk_norms
        ):  # 1bitLLM calls itself llama, which has none
            config |= {"model_type": "bitnet", "architectures": ["BitNetForCausalLM"]}
            config |= {name: getattr(self.weights.config, name) for name in ("hidden_act", "rms_norm_eps")}
        config["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
            "modules_to_not_convert": [common.HEAD, *kept],
        }
        return config

    def reopen(self, folder: Path) -> Mapping[str, Linear]:
        found = open_weights(folder)
        wanted = self.weights.config
        kind = found.config.model_type if wanted.sub_norms else wanted.model_type
        common.check_config(found.config, replace(wanted, model_type=kind))
        return found.linears

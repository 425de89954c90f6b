"""MLX's 2-bit affine folders, as stock mlx-lm loads and runs them (without quantising activations)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_mlx.checkpoint import target as common
from bitnet_mlx.checkpoint.read import OnDemand
from bitnet_mlx.checkpoint.safetensors_file import SafetensorsFile
from bitnet_mlx.checkpoint.safetensors_writer import Pending, pending
from bitnet_mlx.errors import ConfigError, FormatError, UnsupportedModelError
from bitnet_mlx.formats import affine
from bitnet_mlx.formats.dense import HEAD_GROUP, DenseRows
from bitnet_mlx.models.weights import DecoderWeights, Linear, Matrix
from bitnet_mlx.ternary import GROUP, SCALES, TernaryTensor, padded

FAMILIES = {"llama": True, "qwen3": False}  # what mlx-lm runs with 2-bit layers, and whether it knows biases there


class MlxTarget(common.FolderTarget):
    """<linear>.weight uint32 [N, K / 16], .scales and .biases [N, K / group] of one float type for the whole model."""

    format = "mlx-2bit"

    def __init__(
        self, weights: DecoderWeights, source: Mapping[str, Any], head_bits: int | None = None, dtype: str | None = None
    ) -> None:
        """dtype: of scales and floats; None takes the checkpoint's, to which scales are rounded."""
        super().__init__(weights, source, dtype)
        if head_bits not in (None, 32, 16, 8, 6, 4):
            raise ConfigError(f"[convert] head_bits is {head_bits}; 16, 8, 6 or 4 are allowed")
        config = weights.config
        if config.model_type not in FAMILIES or config.sub_norms:
            kind = f"{config.model_type} model{' with sub-norms' if config.sub_norms else ''}"
            raise UnsupportedModelError(
                f"[convert] mlx-lm runs no {kind} with 2-bit layers ({', '.join(FAMILIES)} it does); give --format words2, "
                "or --format hf, which it reads for the bitnet family"
            )
        group = affine.group_for({k for _, k in config.linear_shapes().values()})
        if group is None:
            raise FormatError(
                f"[convert] the layers have {sorted({k for _, k in config.linear_shapes().values()})} columns; MLX's 2-bit "
                "layout needs a multiple of 64. Give --format words2"
            )
        self._group = group
        self._dtype = dtype or common.check_dtype(None, config)
        self._granularity: dict[str, int] = {}
        self._tables: dict[str, int] = {}
        for rows in (weights.embed_tokens, weights.lm_head):
            self._check_table(rows, head_bits)
        self._head_bits = head_bits
        if config.activation_bits == 8:
            self.notices.append(
                "mlx-lm does not quantise activations, so its numbers differ from those of this package"
            )

    def _check_table(self, rows: Matrix, asked: int | None) -> None:
        bits = self._bits_of(rows, asked)
        if bits not in (2, 16) and rows.shape[1] % HEAD_GROUP:
            raise ConfigError(
                f"[convert] embedding and head have {rows.shape[1]} columns, no multiple of 64; give --head-bits 16"
            )
        if bits < 16 and isinstance(rows, DenseRows) and asked is None and not self.notices:
            self.notices.append(f"embedding and head are written in {bits} bits; --head-bits 16 keeps them as floats")

    @staticmethod
    def _bits_of(rows: Matrix, asked: int | None) -> int:
        return 2 if isinstance(rows, TernaryTensor) else min(16, common.head_choice(rows, asked, 8))

    def linear(self, module: str, linear: Linear) -> tuple[list[Pending], Linear]:
        w = linear.weight
        if linear.norm is not None:
            raise FormatError(
                f"[convert] {module} has a norm of its own, which mlx-lm does not know. Give --format words2"
            )
        bias = []
        if linear.bias is not None:
            if not FAMILIES[self.weights.config.model_type]:
                raise FormatError(
                    f"[convert] {module} has a bias, which mlx-lm does not know there. Give --format words2"
                )
            bias = [common.floats(f"{module}.bias", linear.bias, self._dtype)]
        if not isinstance(w, TernaryTensor):
            return [common.dense_rows(f"{module}.weight", w, self._dtype), *bias], common.recast(linear, self._dtype)
        tensors, held = self._ternary(module, w)
        kept = None if linear.bias is None else common.uncast(common.cast(linear.bias, self._dtype))
        return [*tensors, *bias], Linear(held, kept)

    def _ternary(self, module: str, w: TernaryTensor) -> tuple[list[Pending], TernaryTensor]:
        self._granularity[module] = w.scale.ndim
        scale = common.narrowed(np.atleast_1d(w.scale), self._dtype, f"{module}.scale").reshape(w.scale.shape)
        held = common.uncast(scale)
        scales = affine.ternary_scales(held, w.shape, self._group)
        tensors = [pending(f"{module}.weight", affine.ternary_words(w.words, w.shape[1]))]
        return [*tensors, *self._affine(module, scales, 1)], TernaryTensor(w.words, held, w.shape)

    def _affine(self, module: str, scales: np.ndarray, zero: int) -> list[Pending]:
        """Scales, and biases that make the code `zero` the weight 0."""
        scales = common.uncast(common.narrowed(scales, self._dtype, f"{module}.scale"))
        return [
            common.floats(f"{module}.scales", scales, self._dtype),
            common.floats(f"{module}.biases", scales * np.float32(-zero), self._dtype),
        ]

    def table(self, module: str, rows: Matrix) -> Iterator[Pending]:
        bits = self._bits_of(rows, self._head_bits)
        self._tables[module] = bits
        if isinstance(rows, TernaryTensor):
            yield from self._ternary(module, rows)[0]
            return
        if bits == 16:
            yield common.dense_rows(f"{module}.weight", rows, self._dtype)
            return
        n, k = rows.shape
        scales = np.full((n, k // HEAD_GROUP), np.nan, np.float32)  # known when the codes have been made

        def words() -> Iterator[np.ndarray]:
            for part, codes, scale in common.grouped_rows(rows, bits):
                scales[part] = scale
                yield affine.pack(codes, bits)

        yield Pending(f"{module}.weight", "U32", (n, k * bits // 32), words)
        for number, name in enumerate((f"{module}.scales", f"{module}.biases")):
            part = partial(self._part, module, scales, 1 << (bits - 1), number)
            yield Pending(name, common.FILE_DTYPES[self._dtype], scales.shape, part, after=f"{module}.weight")

    def _part(self, module: str, scales: np.ndarray, zero: int, number: int) -> Any:
        """Blocks of the scales (0) or the biases (1) of a table that has been written."""
        return self._affine(module, common.made(scales), zero)[number].blocks()

    def norm(self, module: str, norm: np.ndarray) -> Pending:
        return common.floats(f"{module}.weight", norm, self._dtype)

    def config(self, kept: list[str], activation_bits: int) -> dict[str, Any]:  # noqa: ARG002
        config = common.base_config(self.source, self.weights, self._dtype)
        config["rope_theta"] = self.weights.config.rope.rope_theta  # the one spelling that mlx-lm reads
        table: dict[str, Any] = {"group_size": self._group, "bits": 2}
        for module, bits in self._tables.items():
            if bits in (8, 6, 4):
                table[module] = {"group_size": HEAD_GROUP, "bits": bits}
        config["quantization"] = table
        return config

    def reopen(self, folder: Path) -> Mapping[str, Linear]:
        file = SafetensorsFile(folder / self.file)
        return OnDemand({module: partial(self._read, file, module) for module in self.weights.linears})

    def _read(self, file: SafetensorsFile, module: str) -> Linear:
        """A linear of the file, its scale told as the source had it; FormatError where scales and biases disagree."""
        n, k = self.weights.config.linear_shapes()[module.split(".", 3)[3]]
        bias = common.uncast(file.array(f"{module}.bias")) if f"{module}.bias" in file.tensors else None
        words = file.array(f"{module}.weight")
        if f"{module}.scales" not in file.tensors:
            return Linear(DenseRows(words, self._dtype), bias)
        scales = common.uncast(file.array(f"{module}.scales"))
        shape = {"tensor": (), "row": (n,), "group": (n, padded(k) // GROUP)}[SCALES[self._granularity[module]]]
        scale = scales[:1, 0].reshape(()) if not shape else scales[:, 0] if len(shape) == 1 else None
        if scale is None:
            scale = np.ascontiguousarray(scales[:, :: GROUP // self._group])
        if not np.array_equal(affine.ternary_scales(scale, (n, k), self._group), scales) or not np.array_equal(
            common.uncast(file.array(f"{module}.biases")), -scales
        ):
            raise FormatError(f"[convert] scales and biases of {module} read back disagree; the disk may be faulty")
        return Linear(TernaryTensor(affine.words2(words, k), np.asarray(scale, np.float32), (n, k)), bias)

"""A model's weights as plain floats in Hugging Face's layout: no quantiser left, of weights or of activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bitnet_mlx.checkpoint import target as common
from bitnet_mlx.checkpoint import tensors
from bitnet_mlx.checkpoint.folder import TensorTable
from bitnet_mlx.checkpoint.read import OnDemand
from bitnet_mlx.checkpoint.safetensors_writer import Pending
from bitnet_mlx.checkpoint.target_hf import HfTarget
from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models.weights import DecoderWeights, Linear, Matrix


class FloatTarget(HfTarget):
    """weight [N, K] of every linear, in one dtype for all of the model. float32 holds t * scale without rounding."""

    format = "hf-float"

    def __init__(
        self, weights: DecoderWeights, source: Mapping[str, Any], head_bits: int | None = None, dtype: str | None = None
    ) -> None:
        """dtype: None takes float32."""
        common.FolderTarget.__init__(self, weights, source, dtype or "float32")
        if head_bits not in (None, 32, 16):
            raise ConfigError(f"[convert] head_bits is {head_bits}; --format hf-float holds floats alone: give 16")
        if weights.config.activation_bits == 8:
            self.notices = ["activations are not quantised in this form; logits differ by what the quantiser rounds"]

    @property
    def _floats(self) -> str:
        assert self.dtype is not None
        return self.dtype

    def linear(self, module: str, linear: Linear) -> tuple[list[Pending], Linear]:
        if linear.norm is not None:
            raise FormatError(f"[convert] {module} has a norm of its own, which transformers' float layers lack")
        w, name = linear.weight, f"{module}.weight"
        found = [common.dense_rows(name, w, self._floats)]
        if linear.bias is not None:
            found.append(common.floats(f"{module}.bias", linear.bias, self._floats))
        held = DenseRows(common.cast(w.rows(slice(None)), self._floats), self._floats)
        return found, Linear(
            held, None if linear.bias is None else common.uncast(common.cast(linear.bias, self._floats))
        )

    def table(self, module: str, rows: Matrix) -> Iterator[Pending]:
        yield common.dense_rows(f"{module}.weight", rows, self._floats)

    def norm(self, module: str, norm: Any) -> Pending:
        return common.floats(f"{module}.weight", norm, self._floats)

    def config(self, kept: list[str], activation_bits: int) -> dict[str, Any]:
        config = super().config(kept, activation_bits)
        del config["quantization_config"]
        return config

    def reopen(self, folder: Path) -> Mapping[str, Linear]:
        super().reopen(folder)  # that a reader takes it for this model; ternary floats would be packed by it
        table, found = TensorTable(folder), OnDemand()
        table.one_pass = True
        shapes = self.weights.config.linear_shapes()
        for module in self.weights.linears:
            shape = shapes[module.split(".", 3)[3]]
            found.data[module] = partial(_dense, table, module, shape)
        return found


def _dense(table: TensorTable, module: str, shape: tuple[int, int]) -> Linear:
    bias = f"{module}.bias"
    return Linear(
        tensors.dense(table, f"{module}.weight", shape),
        tensors.vector(table, bias, shape[0]) if bias in table else None,
    )

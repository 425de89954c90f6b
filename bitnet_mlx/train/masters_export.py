"""A student on disk: a Hugging Face folder (see train/export.py), read here and by transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import mlx.core as mx

from bitnet_mlx.checkpoint.folder import read_config
from bitnet_mlx.checkpoint.write import copy_files
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.train.export import stored
from bitnet_mlx.train.optimizer import Tensors
from bitnet_mlx.train.sub_norms import described


def write_masters(
    folder: Path, weights: DecoderWeights, parameters: Tensors, output: Path, sub_norms: bool = False
) -> None:
    """The masters, norms and everything that was left alone in `weights`, which came from `folder`, beside its tokenizer.

    sub_norms: the model in `folder` has none, `weights` has.
    """
    tensors = dict(parameters)
    tables = {"model.embed_tokens": weights.embed_tokens}
    if weights.lm_head is not weights.embed_tokens:
        tables["lm_head"] = weights.lm_head
    for name, rows in tables.items():
        assert isinstance(rows, DenseRows)
        tensors[f"{name}.weight"] = mx.array(rows.rows(slice(None)))
    for name, linear in weights.linears.items():
        if linear.bias is not None:
            tensors[f"{name}.bias"] = mx.array(linear.bias)
    tensors, quantization = stored(tensors)
    copy_files(folder, output)
    scratch = output / ".model.writing.safetensors"
    mx.save_safetensors(str(scratch), tensors, {"format": "pt"})
    os.replace(scratch, output / "model.safetensors")
    config = read_config(folder)
    config = {**(described(config, weights) if sub_norms else config), "quantization_config": quantization}
    (output / ".config.writing").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    os.replace(output / ".config.writing", output / "config.json")

"""bitnet-mlx fuse: an adapter fused into a model's weights, measured, and written only if that is better than none.

The sum of a ternary weight and an adapter is not ternary. Rounded to the nearest it mostly falls back to the weight that
was there: what an adapter adds is small against the step from 0 to 1. GPTQ carries each column's rounding error on to the
next, on a text's inputs, and so keeps more of it on that text; on text of many kinds there is no room for both.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bitnet_mlx.api import embedded_model, make_decoder
from bitnet_mlx.backends import choose
from bitnet_mlx.checkpoint.adapter import read_parts, with_adapter
from bitnet_mlx.checkpoint.convert import convert
from bitnet_mlx.checkpoint.hub import resolve
from bitnet_mlx.checkpoint.read import open_weights, read_weights
from bitnet_mlx.errors import ConfigError, TrainError
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.quality.observed import samples
from bitnet_mlx.quality.score import Score, score
from bitnet_mlx.quality.texts import Text, part, read_text
from bitnet_mlx.tokenizer import load_tokenizer
from bitnet_mlx.train.fuse_options import NATIVE, FuseOptions
from bitnet_mlx.train.fused import Loss, Progress, fused_weights, total

_log = logging.getLogger(__name__)
LENGTH, HELD_OUT, LEAST = 512, 8, 64  # tokens of a window; one part in eight is held out; tokens that a text needs
_MOST = 0.5  # of the adapter: above this a loss is a warning
_INSTEAD = "Run base and adapter with --adapter-path, or write floats with --dequantize"


def fuse(options: FuseOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Write the fused model and return the command's record: that of `convert`, and what of the adapter is left.

    The model appears at save_path when it is whole, was compared with what was to be written, and is nearer to base and
    adapter than the base alone is: by its KL on the texts, else by its weights. Raises TrainError where it is not, and
    whatever reading, writing and measuring raise.
    """
    source = embedded_model() if options.model is None else resolve(options.model, options.load.get("revision"))
    reading = {name: value for name, value in options.load.items() if name != "revision"}
    config = open_weights(source, **reading).config
    parts = read_parts(options.adapter_path, config)
    fit_to, texts = _texts(options, source, config.max_position_embeddings)
    losses: dict[str, Loss] = {}
    found: dict[str, Any] = {"adapter_path": str(options.adapter_path), "warnings": []}

    def prepare(weights: DecoderWeights, _errors: dict[str, float]) -> DecoderWeights:
        method = "float" if options.dequantize else options.chosen
        return fused_weights(weights, parts, method, options.scales, fit_to, losses, progress)

    def check(written: Path) -> None:
        if texts:
            found["quality"] = measured(options, read_weights(source, **reading), read_weights(written), texts)
        if not options.dequantize:
            found["warnings"] += judge(losses, found.get("quality"))

    done = convert(
        source, options.save_path, options.target, _head_bits(options), options.dtype, options.force, prepare=prepare,
        check=check, progress=progress, **reading,
    )  # fmt: skip
    record = {**done.record(), **found, "method": None if options.dequantize else options.chosen}
    if record["method"] == "gptq":
        record["notices"].append(
            f"fitted to {options.calibration_data}: text that is unlike it loses more of the adapter"
        )
    record["layers"] = {name: {**done.layers.get(name, {}), **losses[name].record()} for name in parts}
    return {**record, **total(losses).record()}


def _head_bits(options: FuseOptions) -> int | None:
    """Embedding and head stay as they are where nothing else is said."""
    return 16 if options.head_bits is None and options.target in NATIVE else options.head_bits


def _texts(options: FuseOptions, source: Path, context: int) -> tuple[list[list[int]], list[Text]]:
    """Stretches to fit to, and texts to measure on."""
    if not options.data and options.calibration_data is None:
        return [], []
    tokenizer = load_tokenizer(source)
    texts = [read_text(path, tokenizer, options.limit) for path in options.data]
    if options.calibration_data is None:
        return [], texts
    ids = list(read_text(options.calibration_data, tokenizer).ids)
    if len(ids) < LEAST:
        raise ConfigError(f"[fuse] {options.calibration_data} has {len(ids)} tokens; {LEAST} are the least to fit to")
    if not texts:
        cut = len(ids) - max(len(ids) // HELD_OUT, 8)
        texts = [part(f"{options.calibration_data}, its end", ids[cut:], tokenizer)]
        ids = ids[:cut]
    return samples(ids, options.calibration_samples, min(LENGTH, context)), texts


def measured(
    options: FuseOptions, base: DecoderWeights, fused: DecoderWeights, texts: Sequence[Text]
) -> dict[str, dict[str, float | int]]:
    """What `evaluate` says of "base", "adapter" (base and adapter) and "fused"; KL and agreement are against the second."""
    backend = choose(options.backend).name
    length = options.length or min(LENGTH, base.config.max_position_embeddings)
    make = partial(make_decoder, backend, threads=options.threads)
    teacher = make(with_adapter(base, options.adapter_path))
    found: dict[str, dict[str, float | int]] = {}
    for name, weights in (("base", base), ("fused", fused)):
        decoder, sums = make(weights), Score(0, 0, 0.0, 0.0, 0.0, 0)
        for text in texts:
            sums = sums + score(decoder, text.ids, text.nbytes, length, max(1, length // 2), teacher)
        record = sums.record()
        theirs = {k.removeprefix("teacher_"): record.pop(k) for k in list(record) if k.startswith("teacher_")}
        found[name], found["adapter"] = record, theirs
    return found


def judge(losses: dict[str, Loss], quality: dict[str, dict[str, float | int]] | None) -> list[str]:
    """Warnings about a fusion that loses much of the adapter. Raises TrainError where it is no better than the base."""
    if quality is not None:
        fused, base, what = quality["fused"]["kl"], quality["base"]["kl"], "KL from base and adapter, nats a token"
    else:
        sums = total(losses)
        fused, base, what = sums.lost, 1.0 if sums.delta else 0.0, "difference of the weights, in adapters"
    told = f"{what}: {fused:.4g} for the fused model, {base:.4g} for the base"
    if fused > base * (1 + 1e-6):
        raise TrainError(
            f"[fuse] the fused model is further from base and adapter than the base is; {told}. {_INSTEAD}"
        )
    if fused <= _MOST * base:
        return []
    text = f"fusing loses {fused / base:.1%} of the adapter; {told}. {_INSTEAD}"
    if quality is None:
        text += "; --calibration-data FILE keeps more of it on that text"
    _log.warning("[fuse] %s", text)
    return [text]

"""bitnet-mlx calibrate: text through a model; the ranges of its activations, clips, and the layers that lose most."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bitnet_mlx import __version__
from bitnet_mlx.api import make_decoder
from bitnet_mlx.backends import choose
from bitnet_mlx.calibration.clips import METHODS, clip_points
from bitnet_mlx.calibration.collect import Collector, Input, Twins
from bitnet_mlx.calibration.keep import RULE, noise_by_layer, recommend
from bitnet_mlx.calibration.options import CalibrateOptions
from bitnet_mlx.memory.system import processor
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.models.weights import DecoderWeights, Linear
from bitnet_mlx.quality.linears import sensitivity
from bitnet_mlx.quality.observed import (
    folder_of,
    observable,
    run,
    samples,
    tapped,
    weights_of,
)
from bitnet_mlx.quality.score import Score, perplexity
from bitnet_mlx.quality.texts import read_text
from bitnet_mlx.ternary import TernaryTensor
from bitnet_mlx.tokenizer import load_tokenizer

LENGTH = 512
Progress = Callable[[str, int, int], None]  # what is being done, done, in all


def calibrate(options: CalibrateOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Run the text, write options.output, and return what it holds.

    Raises ConfigError, FormatError or BackendError; OSError where the file cannot be written.
    """
    work = _Work(options, progress)
    collector = work.collect()
    record = work.head | {"inputs": [_input(e, options.percentile) for e in collector.inputs.values()]}
    record["linears"] = [{"name": name, "output_sqnr_db": r.decibel} for name, r in collector.outputs.items()]
    record["losses"] = None if options.ranges_only or not work.quantises else work.losses(record["inputs"])
    noise = noise_by_layer({name: (r.error, r.power) for name, r in collector.outputs.items()})
    record["layers"] = [{"layer": layer, "noise": value} for layer, value in noise.items()]
    record |= work.kept(record["layers"])
    _write(options.output, record)
    return record


class _Work:
    """A model, its text, and the runs."""

    def __init__(self, options: CalibrateOptions, progress: Progress | None) -> None:
        self._options, self._progress = options, progress
        self._backend = choose(options.load.get("backend", "auto")).name
        self.weights = weights_of(options.model, options.load)
        tokenizer = load_tokenizer(folder_of(options.model, options.load))
        self._length = min(options.length or LENGTH, self.weights.config.max_position_embeddings)
        ids = [i for path in options.data for i in read_text(path, tokenizer).ids]
        self._texts = samples(ids, options.samples, self._length)
        self._twins = Twins(self.weights.linears)
        self._decoder = observable(self._make(self.weights))
        kinds = {_kind(linear) for linear in self.weights.linears.values()}
        self.floats, self.quantises = kinds == {"float"}, "int8" in kinds
        self.head: dict[str, Any] = {
            "kind": "calibration", "version": __version__, "model": options.model or "embedded",
            "backend": self._backend, "looked_into_by": self._decoder.name, "processor": processor(),
            "files": [str(path) for path in options.data],
            "samples": len(self._texts), "length": self._length, "tokens": sum(map(len, self._texts)),
            "percentile": options.percentile, "float_weights": self.floats,
        }  # fmt: skip

    def _make(self, weights: DecoderWeights) -> Decoder:
        return make_decoder(self._backend, weights, self._options.load.get("dtype"), self._options.load.get("threads"))

    def _run(self, what: str, decoder: Decoder) -> Score:
        tell = None if self._progress is None else partial(self._progress, what)
        nats, tokens = run(decoder, self._texts, tell)
        return Score(tokens, 0, nats)

    def collect(self) -> Collector:
        """The run that is looked into; its loss goes to the record's head."""
        collector = Collector(self.weights, self._twins)
        with tapped(self._decoder, collector.tap):
            self.base = self._run("ranges", self._decoder)
        self.head["nats_per_token"] = self.base.nats / self.base.tokens
        self.head["perplexity"] = perplexity(self.head["nats_per_token"])
        return collector

    def losses(self, inputs: list[dict[str, Any]]) -> dict[str, float]:
        """Nats a token of the same text with every quantiser's input clipped, by method; absmax clips nothing."""
        found = {"absmax": self.base.nats / self.base.tokens}
        for method in METHODS[1:]:
            self._decoder.hooks.clips = {name: e["clips"][method] for e in inputs for name in e["linears"]}
            score = self._run(f"clips by {method}", self._decoder)
            found[method] = score.nats / score.tokens
        self._decoder.hooks.clips = {}
        return found

    def kept(self, layers: list[dict[str, Any]]) -> dict[str, Any]:
        """What to keep, by the loss that each layer alone costs where that can be measured; it is added to `layers`."""
        if not self.floats:
            return {"keep": [], "keep_rule": "the weights are ternary already: there is nothing to keep"}
        by = "noise"
        if not self._options.ranges_only:
            by = "nats_per_token"
            ternary = replace(self.weights, linears=self._twins)
            measure = partial(self._run, "layers")
            falls = dict(sensitivity(self.weights, ternary, self._make, measure, self.base))
            for entry in layers:
                entry["nats_per_token"] = -falls[entry["layer"]]
        return {"keep": recommend({e["layer"]: e[by] for e in layers}), "keep_rule": f"{RULE}, by {by}"}


def _kind(linear: Linear) -> str:
    weight = linear.weight
    if not isinstance(weight, TernaryTensor):
        return "float"
    return "int8" if weight.activation_bits == 8 else "ternary"


def _input(entry: Input, percentile: float) -> dict[str, Any]:
    values, clips = entry.values, clip_points(entry.values, percentile)
    rms = (values.squares / values.count) ** 0.5
    return {
        "name": entry.linears[0], "linears": entry.linears, "tokens": entry.peaks.count, "min": values.low,
        "max": values.high, "rms": rms, "zeros": values.zeros / values.count, "int8_sqnr_db": entry.int8.decibel,
        "clips": clips, "clipped": {name: values.above(clip) for name, clip in clips.items()},
        "tokens_clipped": {name: entry.peaks.above(clip) for name, clip in clips.items()},
        "histogram": values.record(), "token_peaks": entry.peaks.record(),
    }  # fmt: skip


def _write(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all."""
    scratch = path.with_name(f".{path.name}.writing")
    scratch.write_text(json.dumps(record) + "\n", "utf-8")
    os.replace(scratch, path)

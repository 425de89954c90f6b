"""bitnet-mlx evaluate: a model's figures on text, against a teacher, and by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_mlx.api import load, make_decoder
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.quality.linears import compare_linears, sensitivity
from bitnet_mlx.quality.observed import observable, samples, weights_of
from bitnet_mlx.quality.outputs import Side, compare_outputs
from bitnet_mlx.quality.score import Progress, Score, score
from bitnet_mlx.quality.tasks import TaskOptions, check_installed, run_tasks
from bitnet_mlx.quality.texts import check_same, read_text
from bitnet_mlx.tokenizer import Tokenizer

LENGTH = 512
_STRETCHES = 4  # of each text, for activations


@dataclass(frozen=True)
class EvaluateOptions:
    """data: text files, each scored by itself. length 0 means 512, or the context where it is shorter; stride 0 half of it.

    tasks: of lm-eval, beside texts or instead of them. layers: weights of every linear (against the teacher's, if there is
    one). outputs: activations of every linear and layer against the teacher's. sensitivity: the loss without each layer's
    quantisation. load: the model's other keyword arguments of bitnet_mlx.load.
    """

    data: tuple[Path, ...]
    load: dict[str, Any]
    model: str | None = None
    teacher: str | None = None
    length: int = 0
    stride: int = 0
    limit: int | None = None
    layers: bool = False
    sensitivity: bool = False
    outputs: bool = False
    tasks: TaskOptions | None = None

    def __post_init__(self) -> None:
        for name, least in (("length", 0), ("stride", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"[evaluate] --{name} is {value}; {max(least, 1)} or more is allowed")
        if not self.data and (self.tasks is None or self.teacher or self.layers):
            raise ConfigError("[evaluate] there is nothing to measure on; give --data FILE, or --tasks alone")
        if self.tasks is not None:
            check_installed()
        inside = [name for name in ("sensitivity", "outputs") if getattr(self, name)]
        if inside and self.teacher is None:
            raise ConfigError(
                f"[evaluate] --{inside[0]} compares a model with its teacher, layer by layer; give --teacher"
            )
        for name in ("adapter_path", "kv_bits", "precision"):
            if inside and self.load.get(name):
                raise ConfigError(
                    f"[evaluate] --{inside[0]} looks at a model as it is; leave out --{name.replace('_', '-')}"
                )


def evaluate(options: EvaluateOptions, progress: Progress | None = None) -> dict[str, Any]:
    """The record of the command; every figure comes from logits of the backend, or from the weights that it runs.

    Raises ConfigError or FormatError, and whatever loading raises.
    """
    model, tokenizer = load(options.model, **options.load)
    record: dict[str, Any] = {"model": options.model or "embedded", "backend": model.name, "teacher": options.teacher}
    if options.data:
        record |= _texts(options, model, tokenizer, progress)
    if options.tasks is not None:
        record["tasks"] = run_tasks(model, tokenizer, options.tasks, progress)
    return record


def _texts(options: EvaluateOptions, model: Decoder, tokenizer: Tokenizer, progress: Progress | None) -> dict[str, Any]:
    texts = [read_text(path, tokenizer, options.limit) for path in options.data]
    teacher = None
    if options.teacher is not None:
        teacher, other = load(options.teacher, backend=model.name, dtype=options.load.get("dtype"))
        for text in texts:
            check_same(tokenizer, other, text)
    length = _length(options, [model] if teacher is None else [model, teacher])
    stride = options.stride or max(1, length // 2)

    def measure(decoder: Decoder, beside: Decoder | None = None, tell: Progress | None = None) -> Score:
        return _sum([score(decoder, t.ids, t.nbytes, length, stride, beside, tell) for t in texts])

    total = measure(model, teacher, progress)
    record: dict[str, Any] = {
        "length": length, "stride": stride, **total.record(), "files": [text.name for text in texts],
    }  # fmt: skip
    if options.layers or options.sensitivity:
        record.update(_by_layer(options, model.name, measure, total))
    if options.outputs:
        record["outputs"] = _outputs(options, model.name, [list(text.ids) for text in texts], length, progress)
    return record


def _length(options: EvaluateOptions, models: Sequence[Decoder]) -> int:
    context = min(m.config.max_position_embeddings for m in models)
    length = options.length or min(LENGTH, context)
    if length > context:
        raise ConfigError(f"[evaluate] --length is {length}; the context holds {context} tokens")
    return length


def _sum(scores: list[Score]) -> Score:
    total = scores[0]
    for one in scores[1:]:
        total = total + one
    return total


def _outputs(
    options: EvaluateOptions, backend: str, texts: list[list[int]], length: int, progress: Progress | None
) -> dict[str, Any]:
    """On the backend itself where it can be looked into; on numpy, with the same bits, where it is cpu."""
    dtype = options.load.get("dtype")

    def side(weights: DecoderWeights) -> Side:
        return Side(observable(make_decoder("numpy" if backend == "cpu" else backend, weights, dtype)), weights)

    own, reference = weights_of(options.model, options.load), weights_of(options.teacher, {})
    stretches = [part for ids in texts for part in samples(ids, _STRETCHES, length)]
    return compare_outputs(side(own), side(reference), stretches, progress)


def _by_layer(
    options: EvaluateOptions, backend: str, measure: Callable[[Decoder], Score], total: Score
) -> dict[str, Any]:
    own = weights_of(options.model, options.load)
    reference = None if options.teacher is None else weights_of(options.teacher, {})
    found: dict[str, Any] = {"linears": [{"name": n, **f} for n, f in compare_linears(own, reference)]}
    if options.sensitivity:
        assert reference is not None

        def make(weights: DecoderWeights) -> Decoder:
            return make_decoder(backend, weights, options.load.get("dtype"), options.load.get("threads"))

        ranked = sensitivity(own, reference, make, measure, total)
        found["sensitivity"] = [{"layer": layer, "nats_per_token": fall} for layer, fall in ranked]
    return found

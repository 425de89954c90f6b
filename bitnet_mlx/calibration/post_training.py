"""Float weights made ternary without training, by absmean, least squares or GPTQ, and what that costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bitnet_mlx.api import load, make_decoder
from bitnet_mlx.backends import choose
from bitnet_mlx.calibration.keep import linears_of
from bitnet_mlx.calibration.layerwise import gptq_linears, relative_error
from bitnet_mlx.calibration.least_squares import check_granularity, fit, tensor
from bitnet_mlx.checkpoint.convert import Conversion, convert
from bitnet_mlx.checkpoint.folder import read_config
from bitnet_mlx.checkpoint.hub import resolve
from bitnet_mlx.checkpoint.read import OnDemand, open_weights
from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.hf_config import parse_config
from bitnet_mlx.models.weights import DecoderWeights, Linear
from bitnet_mlx.quality.observed import samples
from bitnet_mlx.quality.score import score
from bitnet_mlx.quality.texts import Text, part, read_text
from bitnet_mlx.tokenizer import Tokenizer, load_tokenizer

METHODS = ("absmean", "least-squares", "gptq")
LENGTH, HELD_OUT, LEAST = 512, 8, 64  # tokens of a stretch; one part in eight is held out; tokens that a text needs
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TernarizeOptions:
    """How floats become ternary. method: of METHODS. scales: per tensor, row or group (of 128 columns); absmean's are per
    tensor. data: a text; the last eighth of it is held out, to measure. keep: layers that stay floats, or a file of
    `calibrate` that recommends some.
    """

    method: str = "absmean"
    scales: str | None = None
    data: Path | None = None
    samples: int = 16
    keep_layers: tuple[int, ...] = ()
    calibration: Path | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"[convert] --ternarize-method is {self.method!r}; {', '.join(METHODS)} are allowed")
        if self.scales is not None:
            check_granularity(self.scales)
            if self.method == "absmean" and self.scales != "tensor":
                raise ConfigError("[convert] absmean has one scale a tensor; give --ternarize-method least-squares")
        if self.method == "gptq" and self.data is None:
            raise ConfigError("[convert] gptq fits weights to what a text makes of them; give --calibration-data FILE")
        if self.keep_layers and self.calibration:
            raise ConfigError(
                "[convert] --keep-layers and --calibration were both given; one of them says what to keep"
            )
        if self.samples < 1:
            raise ConfigError(f"[convert] --calibration-samples is {self.samples}; 1 or more is allowed")


def convert_ternary(
    hf_path: str | Path, mlx_path: str | Path, options: TernarizeOptions, progress: Progress | None = None, **more: Any
) -> tuple[Conversion, dict[str, Any]]:
    """As checkpoint.convert of a float model, whose linears become ternary; and what that costs.

    more: convert's other arguments. The second result has method, scales, kept (linears) and, with a text, the held-out
    figures of what was written against its float parent. Raises what convert raises.
    """
    source = resolve(hf_path, more.get("revision"))
    config = open_weights(source, floats=True, activations=more.get("activations")).config
    names = [
        f"model.layers.{layer}.{name}" for layer in range(config.num_hidden_layers) for name in config.linear_shapes()
    ]
    keep = tuple(dict.fromkeys([*_floats_of_masters(source, names), *_keep(options, config)]))
    record: dict[str, Any] = {
        "method": options.method, "scales": options.scales or ("tensor" if options.method == "absmean" else "group"),
        "kept": list(keep), "calibration_data": None if options.data is None else str(options.data),
    }  # fmt: skip
    texts, held = _texts(options, source, min(LENGTH, config.max_position_embeddings))
    prepare = None
    if options.method != "absmean":
        prepare = partial(_prepare, options.method, record["scales"], keep, texts, progress)
    done = convert(
        source, mlx_path, ternarize=prepare is None, keep=keep, floats=prepare is not None, prepare=prepare,
        progress=progress, **more,
    )  # fmt: skip
    if held is not None:
        record["held_out"] = measured(source, done.path, held)
    return done, record


def _floats_of_masters(source: Path, names: list[str]) -> list[str]:
    """Linears that a folder of master weights itself leaves floats."""
    quantization = parse_config(read_config(source), str(source / "config.json")).quantization
    return [name for name in names if not quantization.converts(name)] if quantization.storage == "online" else []


def _keep(options: TernarizeOptions, config: DecoderConfig) -> tuple[str, ...]:
    layers = options.keep_layers
    if options.calibration is not None:
        layers = _recommended(options.calibration)
    return linears_of(layers, list(config.linear_shapes()), config.num_hidden_layers)


def _recommended(path: Path) -> tuple[int, ...]:
    """The layers that a calibration recommends to keep. Raises FormatError where the file is none."""
    try:
        record = json.loads(path.read_text("utf-8"))
        return tuple(int(layer) for layer in record["keep"])
    except FileNotFoundError:
        raise ConfigError(f"[convert] no file {path}; --calibration takes what bitnet-mlx calibrate wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"[convert] {path} is not what bitnet-mlx calibrate writes ({error!r}); make it again"
        ) from error


def _texts(options: TernarizeOptions, source: Path, length: int) -> tuple[list[list[int]], Text | None]:
    """Stretches of `length` tokens to fit to, and the held-out end of the text."""
    if options.data is None:
        return [], None
    tokenizer: Tokenizer = load_tokenizer(source)
    ids = list(read_text(options.data, tokenizer).ids)
    if len(ids) < LEAST:
        raise ConfigError(
            f"[convert] {options.data} has {len(ids)} tokens; {LEAST} are the least to fit to and to measure"
        )
    cut = len(ids) - max(len(ids) // HELD_OUT, 8)
    return samples(ids[:cut], options.samples, length), part(str(options.data), ids[cut : cut + 8 * LENGTH], tokenizer)


def _prepare(
    method: str,
    scales: str,
    keep: Collection[str],
    texts: list[list[int]],
    progress: Progress | None,
    weights: DecoderWeights,
    errors: dict[str, float],
) -> DecoderWeights:
    if method == "gptq":
        return replace(weights, linears=gptq_linears(weights, texts, scales, keep, errors, progress))
    made = OnDemand()

    def fitted(name: str) -> Linear:
        linear = weights.linears[name]
        if name in keep:
            return linear
        w = linear.weight.rows(slice(None))
        found = fit(w, scales)
        errors[name] = relative_error(w, found)
        return replace(linear, weight=tensor(found, weights.config.activation_bits))

    made.data.update({name: partial(fitted, name) for name in weights.linears})
    return replace(weights, linears=made)


def measured(parent: Path, path: str, text: Text) -> dict[str, Any]:
    """Perplexity, KL and agreement of a written model against the floats of `parent`, on the backend that runs here."""
    backend = choose().name
    model, _ = load(path, backend)
    teacher = make_decoder(backend, open_weights(parent, floats=True))
    length = min(LENGTH, model.config.max_position_embeddings)
    found = score(model, text.ids, text.nbytes, length, max(1, length // 2), teacher)
    return found.record() | {"backend": backend}


def summary(record: dict[str, Any]) -> list[str]:
    """Lines for a terminal."""
    lines = [
        f"made ternary by {record['method']}, a scale a {record['scales']}; {len(record['kept'])} linears kept as floats"
    ]
    held = record.get("held_out")
    if held:
        lines.append(
            f"held-out end of {record['calibration_data']}, {held['tokens']} tokens on {held['backend']}: perplexity "
            f"{held['perplexity']:.4g}, the float parent's {held['teacher_perplexity']:.4g}; KL {held['kl']:.4g} nats a token, "
            f"the same best token at {held['top1_agreement']:.1%}. Training (bitnet-mlx qat) gets nearer"
        )
    return lines

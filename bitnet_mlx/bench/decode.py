"""Tokens a second of decoding and of prefill, and kernel launches a layer: `bitnet-mlx bench decode`.

Contenders take turns, so that the machine's moods fall on all of them; medians count. The model has random weights at a
preset's shapes, or is one from a folder.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bitnet_mlx import __version__
from bitnet_mlx.api import make_decoder
from bitnet_mlx.backends import ON_MLX, check_threads, choose, missing
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.config import DecoderConfig

if TYPE_CHECKING:
    from bitnet_mlx.models.weights import DecoderWeights

AGAINST = ("stock", "bf16")
PRESETS = ("small", "2b4t")
_MOST_LAYERS = 1000


@dataclass(frozen=True)
class DecodeOptions:
    """against: plain MLX models of the same shapes to compare with. prompt: tokens of the prefill that is timed, and
    behind which decoding is. layers: in place of the preset's. head_bits: 8 or 16, of a random model.
    """

    preset: str = "small"
    model: str | None = None
    backend: str = "auto"
    dtype: str | None = None
    against: tuple[str, ...] = ()
    prompt: int = 256
    tokens: int = 64
    repeats: int = 5
    layers: int | None = None
    head_bits: int = 8
    threads: int | None = None


class Contender(Protocol):
    """Something that decodes one sequence."""

    def prefill(self, tokens: list[int]) -> float:
        """Seconds for a prompt from an empty cache."""
        ...

    def decode(self, count: int) -> float:
        """Seconds for each of `count` tokens behind what the cache holds."""
        ...


class StepContender:
    """Any decoder, by the Decoder protocol: each token's logits come to the host before the next step."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._cache = decoder.make_cache()
        self._next = 0

    def prefill(self, tokens: list[int]) -> float:
        """See Contender."""
        self._cache.trim(0)
        start = time.perf_counter()
        self._next = int(self._decoder.step([tokens], [self._cache])[0].argmax())
        return time.perf_counter() - start

    def decode(self, count: int) -> float:
        """See Contender."""
        start = time.perf_counter()
        for _ in range(count):
            self._next = int(self._decoder.step([[self._next]], [self._cache])[0].argmax())
        return (time.perf_counter() - start) / count


def measure(options: DecodeOptions) -> dict[str, Any]:
    """The command's record. Raises ConfigError for options that cannot be, BackendError for a backend that cannot run."""
    check(options)
    choice = choose(options.backend)
    check_threads(options.threads, choice.name)
    if choice.name not in ON_MLX and (options.against or options.dtype not in (None, "float32")):
        raise ConfigError(f"[bench] the backend is {choice.name}; --against and --dtype need metal, cuda or mlx")
    weights = subject_weights(options)
    decoder = make_decoder(choice.name, weights, options.dtype, options.threads)
    contenders = {"ours": _contender(decoder)} | _plain(weights.config, options.against)
    times = _turns(contenders, options, weights.config.vocab_size)
    results = {
        name: {
            "decode_tps": 1 / decode, "decode_ms": decode * 1e3, "prefill_tps": options.prompt / prefill,
        }
        for name, (decode, prefill) in times.items()
    }  # fmt: skip
    return {
        "bench": "decode", **asdict(options), "backend": decoder.name, "dtype": getattr(decoder, "dtype", "float32"),
        "layers": weights.config.num_hidden_layers, "weight_bytes": weights.nbytes, "results": results,
        "ratios": {name: r["decode_ms"] / results["ours"]["decode_ms"] for name, r in results.items() if name != "ours"},
        "launches_per_layer": _launches(weights, choice.name, options.prompt), **_machine(choice.name),
    }  # fmt: skip


def check(options: DecodeOptions) -> None:
    """Raises ConfigError for what is not allowed."""
    for name, least in (("prompt", 1), ("tokens", 1), ("repeats", 1)):
        if getattr(options, name) < least:
            raise ConfigError(f"[bench] {name} is {getattr(options, name)}; it must be at least {least}")
    if options.layers is not None and not 1 <= options.layers <= _MOST_LAYERS:
        raise ConfigError(f"[bench] layers is {options.layers}; 1 to {_MOST_LAYERS} are allowed")
    if options.preset not in PRESETS:
        raise ConfigError(f"[bench] preset is {options.preset!r}; {', '.join(PRESETS)} are known")
    unknown = [name for name in options.against if name not in AGAINST]
    if unknown:
        raise ConfigError(f"[bench] --against names {', '.join(unknown)}; {', '.join(AGAINST)} are known")


def subject_weights(options: DecodeOptions) -> DecoderWeights:
    """The model that the options name. Raises ConfigError where prompt and tokens do not fit its context."""
    if options.model is not None:
        from bitnet_mlx.checkpoint.hub import resolve
        from bitnet_mlx.checkpoint.read import read_weights

        weights = read_weights(Path(resolve(options.model, None)))
    else:
        from bitnet_mlx.bench.random_decoder import preset, random_decoder

        config = preset(options.preset)
        if options.layers is not None:
            config = replace(config, num_hidden_layers=options.layers)
        weights = random_decoder(config, options.head_bits)
    room = weights.config.max_position_embeddings
    if options.prompt + options.tokens + 1 > room:
        raise ConfigError(f"[bench] prompt and tokens need {options.prompt + options.tokens + 1} positions of {room}")
    return weights


def _contender(decoder: Any) -> Contender:
    if decoder.name not in ON_MLX:
        return StepContender(decoder)
    from bitnet_mlx.bench.decode_mlx import MlxContender

    return MlxContender(decoder)


def _plain(config: DecoderConfig, against: tuple[str, ...]) -> dict[str, Contender]:
    if not against:
        return {}
    from bitnet_mlx.bench.decode_mlx import MlxContender
    from bitnet_mlx.bench.plain_mlx import KINDS, PlainModel

    return {kind: MlxContender(PlainModel(config, kind)) for kind in KINDS if kind in against}


def _turns(contenders: dict[str, Contender], options: DecodeOptions, vocab: int) -> dict[str, tuple[float, float]]:
    """Median seconds of a token and of the prompt, of each."""
    prompt = [i % vocab for i in range(options.prompt)]
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(options.repeats + 1):
        for name, contender in contenders.items():
            prefill = contender.prefill(prompt)
            decode = contender.decode(options.tokens)
            if turn:  # the first one compiles and warms up
                samples[name].append((decode, prefill))
    return {name: tuple(map(statistics.median, zip(*taken, strict=True))) for name, taken in samples.items()}


def _launches(weights: DecoderWeights, backend: str, past: int) -> dict[str, int]:
    """Of one layer in a decode step with `past` positions behind it; nothing without MLX."""
    if missing("mlx"):
        return {}
    from bitnet_mlx.bench.layer_launches_mlx import counts

    return counts(weights, None if backend == "mlx" else "cuda" if backend == "cuda" else "metal", past)


def _machine(backend: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "machine": platform.machine(), "system": platform.platform(), "python": platform.python_version(),
        "version": __version__,
    }  # fmt: skip
    if backend in ON_MLX:
        from bitnet_mlx.bench.decode_mlx import device

        found |= {"mlx": version("mlx"), **device()}
    return found


def lines(record: dict[str, Any]) -> Iterator[str]:
    """The record for people."""
    what = record["model"] or f"random weights, preset {record['preset']}"
    yield (
        f"{what}, {record['layers']} layers, {record['weight_bytes'] / 1e6:.0f} MB, {record['backend']} in "
        f"{record['dtype']}; {record['tokens']} tokens behind a prompt of {record['prompt']}, "
        f"medians of {record['repeats']}"
    )
    for name, r in record["results"].items():
        ratio = record["ratios"].get(name)
        rates = f"{r['decode_tps']:9.1f} tokens/s ({r['decode_ms']:.3f} ms)   prefill {r['prefill_tps']:9.0f} tokens/s"
        yield f"  {name:6} {rates}" + ("" if ratio is None else f"   a token takes {ratio:.2f} times as long as ours")
    counted = record["launches_per_layer"]
    if counted:
        yield "kernel launches a layer: " + ", ".join(f"{name} {n}" for name, n in counted.items())

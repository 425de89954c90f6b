"""load: from a folder, a GGUF file or a Hugging Face name to a model that runs and its tokenizer."""

from __future__ import annotations

import logging
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from bitnet_mlx import memory
from bitnet_mlx.backends import ON_MLX, check_threads, choose
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.precision import check_kv_bits, for_engine, policy

if TYPE_CHECKING:
    from bitnet_mlx.backends.mlx_affine import StockOps
    from bitnet_mlx.models.decoder import Decoder
    from bitnet_mlx.models.weights import DecoderWeights
    from bitnet_mlx.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

HEAD_BITS = (16, 8, 6, 4)
ACTIVATIONS = (8, 16)
DTYPES = ("float32", "bfloat16", "float16")
I2S_LAYOUTS = ("128", "64", "rows")  # formats/i2s.py tells them


def embedded_model() -> Path:
    """The folder of the model that comes with the package."""
    return Path(str(files("bitnet_mlx") / "assets" / "tiny"))


def load(
    path_or_repo: str | Path | None = None,
    backend: str = "auto",
    revision: str | None = None,
    head_bits: int | None = None,
    dtype: str | None = None,
    activations: int | None = None,
    threads: int | None = None,
    i2s_layout: str | None = None,
    ternarize: bool = False,
    kv_bits: int | None = None,
    precision: str | None = None,
    adapter_path: str | Path | None = None,
) -> tuple[Decoder, Tokenizer]:
    """Load a model and its tokenizer.

    path_or_repo: a folder, a GGUF file, a Hugging Face name "owner/name", or None for the model in the package. backend:
    auto, metal, cuda, mlx, cpu or numpy; a named one never falls back. head_bits: 16 keeps the head as it is, 8, 6 or 4
    quantise it; None keeps the file's. dtype: of what passes between layers (cpu and numpy compute in float32).
    activations: 8 or 16 bits; None is the model's own. threads: CPU threads. i2s_layout: "128", "64" or "rows", of a
    GGUF file's I2_S tensors; None finds it from the weights. ternarize: take float layers for BitNet's master weights,
    whatever config.json says or leaves out. kv_bits: 16, 8 or 4 of the KV cache, on MLX engines; None is dtype's.
    precision: "memory", "balanced" or "accuracy" (models/precision.py) sets head_bits, kv_bits and dtype, as far as the
    engine has them; arguments beside it go before it. adapter_path: a folder with a LoRA or DoRA adapter, in mlx-lm's layout.

    The model offers models/decoder.py's protocol and on MLX is an mlx.nn.Module, which mlx_lm's generate accepts. Raises
    ConfigError, BackendError, UnsupportedModelError or FormatError.
    """
    _check(head_bits, dtype, activations)
    choice = choose(backend)
    check_kv_bits(kv_bits, choice.name)
    use, notes = for_engine(policy(precision), choice.name)
    use = use.replaced(head_bits=head_bits, kv_bits=kv_bits, dtype=dtype, activations=activations)
    head_bits, kv_bits, dtype, activations = use.head_bits, use.kv_bits, use.dtype, use.activations
    for note in notes:
        _log.info("[precision] %s", note)
    from bitnet_mlx.checkpoint.adapter import with_adapter
    from bitnet_mlx.checkpoint.hub import resolve
    from bitnet_mlx.checkpoint.read import opened_once, read_weights
    from bitnet_mlx.tokenizer import load_tokenizer

    _log.debug("[load] backend %s: %s", choice.name, choice.reason)
    check_threads(threads, choice.name)
    _check_dtype(dtype, choice.name)
    folder = embedded_model() if path_or_repo is None else resolve(path_or_repo, revision)
    with memory.scope("load"):
        source = opened_once(folder)
        with memory.scope("tokenizer") as grown:
            tokenizer = load_tokenizer(source)
        weights = read_weights(
            source, head_bits=head_bits, activations=activations, i2s_layout=i2s_layout, ternarize=ternarize
        )
        del source  # metadata, tens of MB for a large vocabulary, goes before the engine is made
        weights = weights if adapter_path is None else with_adapter(weights, adapter_path)
        model = make_decoder(choice.name, weights, dtype, threads, kv_bits)
        if grown is not None:
            _tell_owners(model, tokenizer, grown.grew or 0)
    return model, tokenizer


def _tell_owners(model: Decoder, tokenizer: Tokenizer, grew: int) -> None:
    """The tracker in use learns what was loaded. grew: of the process, while the tokenizer was; its library counts nothing."""
    tracker = memory.current()
    if tracker is not None:
        from bitnet_mlx.models.owners import parts

        tracker.own(model, parts(model), "the model", keep=True, on_mlx=model.name in ON_MLX)
        tracker.own(tokenizer, "tokenizer", "the tokenizer", max(grew, 0), keep=True)


def _check(head_bits: int | None, dtype: str | None, activations: int | None) -> None:
    for name, value, allowed in (
        ("head_bits", head_bits, HEAD_BITS),
        ("dtype", dtype, DTYPES),
        ("activations", activations, ACTIVATIONS),
    ):
        if value is not None and value not in allowed:
            raise ConfigError(f"[load] {name} is {value!r}; {', '.join(map(str, allowed))} are allowed")


def make_decoder(
    backend: str,
    weights: DecoderWeights,
    dtype: str | None = None,
    threads: int | None = None,
    kv_bits: int | None = None,
) -> Decoder:
    """A decoder over weights that are at hand, by a backend that runs here (backends.choose): see `load`."""
    check_kv_bits(kv_bits, backend, weights.config)
    if backend in ON_MLX:
        from bitnet_mlx.models.decoder_mlx import MlxModel

        model = MlxModel.from_weights(weights, dtype, _ops(backend))
        model.kv_bits = kv_bits
        return model
    if backend == "cpu":
        from bitnet_mlx.backends.cpu_jit.threads import set_threads
        from bitnet_mlx.models.decoder_cpu import CpuDecoder

        if threads is not None:
            set_threads(threads)
        return CpuDecoder(weights)
    from bitnet_mlx.models.decoder_numpy import NumpyDecoder

    return NumpyDecoder(weights)


def _ops(backend: str) -> StockOps | None:
    """What a model's layers call on a GPU of ours; None is stock MLX."""
    if backend == "metal":
        from bitnet_mlx.backends import metal

        return metal.make_ops()
    if backend == "cuda":
        from bitnet_mlx.backends import cuda

        return cuda.make_ops()
    return None


def _check_dtype(dtype: str | None, backend: str) -> None:
    """Raises ConfigError for a dtype that the engine does not compute in."""
    if backend not in ON_MLX and dtype not in (None, "float32"):
        raise ConfigError(
            f"[load] dtype is {dtype} and the backend is {backend}, which computes in float32 alone; leave it out, or take "
            "metal, cuda or mlx"
        )

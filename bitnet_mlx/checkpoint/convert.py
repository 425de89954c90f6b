"""convert: any checkpoint that is read -> a folder or file of another format, compared with its source."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bitnet_mlx.checkpoint.detect import detect
from bitnet_mlx.checkpoint.folder import VOCABULARIES, read_config
from bitnet_mlx.checkpoint.gguf_folder import described
from bitnet_mlx.checkpoint.hub import resolve
from bitnet_mlx.checkpoint.read import open_weights, opened_once
from bitnet_mlx.checkpoint.target import Target, check_dtype
from bitnet_mlx.checkpoint.target_float import FloatTarget
from bitnet_mlx.checkpoint.target_gguf import TYPES, GgufTarget
from bitnet_mlx.checkpoint.target_hf import HfTarget
from bitnet_mlx.checkpoint.target_mlx import MlxTarget
from bitnet_mlx.checkpoint.target_native import NativeTarget
from bitnet_mlx.checkpoint.workplace import Workplace
from bitnet_mlx.checkpoint.write import Written, copy_files, write_folder
from bitnet_mlx.errors import ConfigError, MemoryLimitError
from bitnet_mlx.memory.system import peak_resident_bytes
from bitnet_mlx.models.precision import policy
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.ternary import padded
from bitnet_mlx.tokenizer.gguf_vocabulary import vocabulary

FORMATS = ("words2", "trits5", "hf", "hf-float", "gguf-tq1_0", "gguf-tq2_0", "mlx-2bit")
# Bits of a ternary weight with its scales, and of an embedding's value where no --head-bits says otherwise; 16 and what
# MLX's scales take are those of floats in two bytes.
_BITS = {
    "words2": (2.0, 8),
    "trits5": (1.6, 8),
    "hf": (2.0, 16),
    "hf-float": (16.0, 16),
    "gguf-tq1_0": (1.69, 8),
    "gguf-tq2_0": (2.07, 8),
    "mlx-2bit": (2.5, 8),
}
SPARE = 16 << 20  # bytes of disk beside the weights: tokenizer, header


@dataclass(frozen=True)
class Conversion:
    """What a conversion did. Bytes are of weight files; bits_per_weight is of ternary weights, scales included.

    layers: by module, the share of zeros, the least and the greatest scale, and for weights that were ternarised here the
    relative error |W - t m| / |W|. verified: every ternary tensor was read again and equals its source.
    """

    path: str
    source: str
    format: str
    tensors: int
    ternary_parameters: int
    parameters: int
    bits_per_weight: float
    bytes_in: int
    bytes_out: int
    seconds: float
    peak_memory_bytes: int | None
    verified: bool
    notices: list[str] = field(default_factory=list)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The JSON record."""
        return asdict(self)


def convert(
    hf_path: str | Path,
    mlx_path: str | Path,
    format: str = "words2",  # noqa: A002 - the command line's own name for it
    head_bits: int | None = None,
    dtype: str | None = None,
    force: bool = False,
    revision: str | None = None,
    activations: int | None = None,
    ternarize: bool = False,
    i2s_layout: str | None = None,
    precision: str | None = None,
    keep: Collection[str] = (),
    floats: bool = False,
    prepare: Callable[[DecoderWeights, dict[str, float]], DecoderWeights] | None = None,
    check: Callable[[Path], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Convert a checkpoint.

    hf_path: a folder, a GGUF file, or owner/name on the Hugging Face hub. mlx_path: where the result is to be; it appears
    when it is whole and has been compared. format: words2 (this package's own, used in place), trits5 (its own, 1.6 bits
    a weight), hf (Hugging Face's packed layout, for transformers), hf-float (plain floats), gguf-tq1_0, gguf-tq2_0 (a .gguf
    file with its tokenizer) or mlx-2bit (for stock mlx-lm; llama and qwen3 families).
    head_bits: of embedding and head: 16 as they are, else 8, 6 or 4; None makes floats 8 where the format can hold that.
    dtype: of what stays floats; None keeps the checkpoint's. force: replace a model at mlx_path. i2s_layout: of a
    GGUF file's I2_S tensors, where it should not be found from them. precision: "memory", "balanced" or "accuracy"
    (models/precision.py) sets head_bits and dtype where they are not given; bits of the KV cache are chosen at load.
    keep: full names of linears that stay floats where others are ternarised. floats: read all of them as floats. prepare:
    makes the weights that are written, and puts relative errors into its dict. check: looks at what was written before it
    appears, and raises where it should not. progress: called with weights done and weights in all.

    Raises ConfigError for options and places that are not allowed, MemoryLimitError where the disk lacks room,
    UnsupportedModelError or FormatError for checkpoints that are not read, are damaged, or do not fit the format.
    """
    _check_format(format, mlx_path)
    if precision is not None:
        use = policy(precision).replaced(head_bits=head_bits, dtype=dtype)
        head_bits, dtype = use.head_bits or 16, use.dtype
    start = time.perf_counter()
    path = resolve(hf_path, revision)
    with Workplace(mlx_path, force, (path,)) as place, described(source := opened_once(path)) as texts:
        errors: dict[str, float] = {}
        reading = {"activations": activations, "ternarize": ternarize, "i2s_layout": i2s_layout, "floats": floats}
        weights = open_weights(source, errors=errors, keep=() if prepare else keep, **reading)
        weights = weights if prepare is None else prepare(weights, errors)
        target = make_target(weights, texts, format, head_bits, dtype, Path(mlx_path).name)
        place.check_room(room(weights, format, head_bits, dtype, len(keep)))
        written = _write(weights, target, place, texts, progress)
        size = (place.path / target.file).stat().st_size
        if check is not None:
            check(place.path / target.file if target.whole else place.path)
        made = place.publish(target.file if target.whole else None)
    written.add("relative_error", {name: error for name, error in errors.items() if name in written.layers})
    return Conversion(
        path=str(made), source=str(path), format=format, tensors=written.tensors, parameters=written.parameters,
        ternary_parameters=written.ternary_parameters, bits_per_weight=written.bits_per_weight,
        bytes_in=detect(source).nbytes, bytes_out=size, seconds=time.perf_counter() - start,
        peak_memory_bytes=peak_resident_bytes(), verified=True, notices=target.notices, layers=written.layers,
    )  # fmt: skip


def _check_format(format: str, mlx_path: str | Path) -> None:  # noqa: A002
    if format not in FORMATS:
        raise ConfigError(f"[convert] format is {format!r}; {', '.join(FORMATS)} are allowed")
    if format in TYPES and Path(mlx_path).suffix != ".gguf":
        raise ConfigError(f"[convert] mlx_path is {mlx_path}; --format {format} makes a file: give a name with .gguf")


def make_target(
    weights: DecoderWeights,
    texts: Path,
    format: str,  # noqa: A002
    head_bits: int | None,
    dtype: str | None,
    name: str = "model.gguf",
) -> Target:
    """The writer of a format. texts: the folder of config.json and the tokenizer. name: of a GGUF file.

    Raises ConfigError, UnsupportedModelError or FormatError where it cannot hold this model or these options.
    """
    check_dtype(dtype, weights.config)
    config = read_config(texts)
    if format == "hf":
        return HfTarget(weights, config, head_bits, dtype)
    if format == "hf-float":
        return FloatTarget(weights, config, head_bits, dtype)
    if format == "mlx-2bit":
        return MlxTarget(weights, config, head_bits, dtype)
    if format in TYPES:
        keys = partial(vocabulary, texts, weights.config.vocab_size, weights.config.eos_token_ids)
        return GgufTarget(weights, keys, format, name, head_bits, dtype)
    return NativeTarget(weights, config, format, head_bits, dtype)


def room(
    weights: DecoderWeights,
    format: str,  # noqa: A002
    head_bits: int | None,
    dtype: str | None = None,
    kept: int = 0,
) -> int:
    """Bytes of disk that the result needs, a little above the truth. kept: how many linears stay floats."""
    c = weights.config
    sizes = [n * padded(k) for n, k in c.linear_shapes().values()]
    bits, head = _BITS[format]
    wide = (dtype or ("float32" if format == "hf-float" else c.dtype)) == "float32"
    if wide and format in ("hf-float", "mlx-2bit"):
        bits += 16 if format == "hf-float" else 0.5
    tables = 0.0
    for rows in {id(rows): rows for rows in (weights.embed_tokens, weights.lm_head)}.values():
        value = head_bits or head
        if value < 8 and format in ("words2", "trits5"):
            value = 8  # a code takes a byte there
        if value >= 16:
            own = "float32" if format == "hf-float" else getattr(rows, "dtype", c.dtype)
            value = 32 if (dtype or own) == "float32" else 16
        tables += rows.shape[0] * rows.shape[1] * (value / 8 + 0.07 * (2 if wide else 1))
    ternary = c.num_hidden_layers * sum(sizes) * (bits / 8 + 0.002)
    return int(ternary + tables) + 4 * kept * max(sizes) + SPARE


def _write(
    weights: DecoderWeights,
    target: Target,
    place: Workplace,
    texts: Path,
    progress: Callable[[int, int], None] | None,
) -> Written:
    if not target.whole and not any((texts / name).is_file() for name in VOCABULARIES):
        target.notices.append(f"{texts} has no tokenizer, so what is written has none: add its tokenizer.json")
    try:
        return write_folder(weights, target, place.path, partial(copy_files, texts), progress)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise MemoryLimitError(
            f"[convert] the disk of {place.destination} is full ({error.strerror}); nothing was kept. Make room, or give "
            "a place on another disk"
        ) from error

"""Writing a model folder: streamed tensor by tensor, read again and compared with its source, and renamed when whole."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_mlx.checkpoint.census import count_zeros
from bitnet_mlx.checkpoint.folder import TOKENIZER_FILES
from bitnet_mlx.checkpoint.safetensors_writer import Pending
from bitnet_mlx.checkpoint.target import EMBED, HEAD, Bytes, Target, release_linear, seal
from bitnet_mlx.checkpoint.target_native import NativeTarget
from bitnet_mlx.checkpoint.workplace import Workplace
from bitnet_mlx.errors import FormatError
from bitnet_mlx.models.weights import DecoderWeights, Linear
from bitnet_mlx.ternary import TernaryTensor

THREADS = 2  # linears converted at once; what one takes in memory is bounded by its size
Progress = Callable[[int, int], None]  # weights done, weights in all


@dataclass
class Written:
    """What was written. layers: zeros share and scales of each ternary linear. tensors: how many the file holds.

    parameters, ternary_parameters: counts, a tied head once. ternary_bytes: of ternary linears, scales included.
    """

    tensors: int = 0
    parameters: int = 0
    ternary_parameters: int = 0
    ternary_bytes: int = 0
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)  # linears that are not ternary
    activation_bits: set[int] = field(default_factory=set)
    seals: dict[str, bytes] = field(default_factory=dict)  # of linears as they are to be read back
    sums: dict[str, bytes] = field(default_factory=dict)  # of the other tensors' bytes

    @property
    def bits_per_weight(self) -> float:
        """Of ternary weights, scales included."""
        return 8 * self.ternary_bytes / max(self.ternary_parameters, 1)

    def add(self, name: str, values: Mapping[str, float]) -> None:
        """One more figure of layers, by module."""
        for module, value in values.items():
            self.layers[module][name] = value


def write_native(
    weights: DecoderWeights,
    source_config: dict[str, Any],
    destination: Path | str,
    *,
    copy_from: Path | str | None = None,
    head_bits: int | None = None,
    storage: str = "words2",
    force: bool = False,
) -> Path:
    """Write a folder that read_weights uses in place.

    source_config: the config.json that the model came with; its storage keys are replaced. copy_from: a folder whose
    tokenizer, template and generation_config files are copied byte for byte. head_bits: 8, 6 or 4 quantise embedding
    and head first; None and 16 write them as they are. storage: words2 or trits5.

    Returns the destination. Raises ConfigError where it exists, is not empty and `force` is not given, FormatError where
    the weights cannot be told by the format; nothing is left behind then.
    """
    target = NativeTarget(weights, source_config, storage, head_bits, default_head_bits=16)
    with Workplace(destination, force) as place:
        write_folder(weights, target, place.path, None if copy_from is None else partial(copy_files, Path(copy_from)))
        return place.publish()


def write_folder(
    weights: DecoderWeights,
    target: Target,
    folder: Path,
    copy: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write all files of a model into an empty folder, read them again and compare.

    copy: puts the tokenizer's files there. progress: called with the weights done and the weights to do, each counted
    twice: written and compared.
    """
    if copy is not None and not target.whole:
        copy(folder)
    ticks = _Ticks(weights, progress)
    written = _write_tensors(weights, target, folder / target.file, ticks)
    if len(written.activation_bits) > 1:
        raise FormatError(
            f"[write] layers have {sorted(written.activation_bits)} activation bits; one number for all is needed"
        )
    target.finish(folder, written.kept, max(written.activation_bits, default=8))
    _compare_bytes(target.opened(folder / target.file), written)
    compare_linears(target.reopen(folder), written, ticks)
    return written


def copy_files(source: Path, folder: Path) -> None:
    """Tokenizer, templates and generation config, byte for byte."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


class _Ticks:
    """Counts weights for the progress bar."""

    def __init__(self, weights: DecoderWeights, progress: Progress | None) -> None:
        config = weights.config
        tables = {id(rows): rows for rows in (weights.embed_tokens, weights.lm_head)}.values()
        self.tables = sum(rows.shape[0] * rows.shape[1] for rows in tables)
        self.linears = config.num_hidden_layers * sum(n * k for n, k in config.linear_shapes().values())
        self._done, self._progress = 0, progress

    def add(self, count: int) -> None:
        self._done += count
        if self._progress:
            self._progress(self._done, self.tables + 2 * self.linears)


def _write_tensors(weights: DecoderWeights, target: Target, path: Path, ticks: _Ticks) -> Written:
    written = Written()
    sums: dict[str, Any] = {}

    def seen(name: str, block: np.ndarray) -> None:
        if name in sums:
            sums[name].update(block.reshape(-1).view(np.uint8).data)

    with target.stream(path, seen) as file:

        def add(tensor: Pending) -> None:
            sums[tensor.name] = sha256()
            file.add(tensor)
            written.tensors += 1

        tables = [(EMBED, weights.embed_tokens)]
        if weights.lm_head is not weights.embed_tokens:
            tables.append((HEAD, weights.lm_head))
        for module, rows in tables:
            for tensor in target.table(module, rows):
                add(tensor)
            count = rows.shape[0] * rows.shape[1]
            written.parameters += count
            ticks.add(count)
        for module, norm in weights.norms.items():
            add(target.norm(module, norm))
            written.parameters += norm.size
        for tensor in target.extra():
            add(tensor)
        for module, (tensors, linear, held) in in_order(weights, target):
            _account(written, module, linear, tensors, held)
            for tensor in tensors:
                file.add(tensor)
                written.tensors += 1
            release_linear(linear)
            ticks.add(linear.weight.shape[0] * linear.weight.shape[1])
    written.sums = {name: digest.digest() for name, digest in sums.items()}
    return written


Converted = tuple[list[Pending], Linear, bytes]


def in_order(weights: DecoderWeights, target: Target) -> Iterator[tuple[str, Converted]]:
    """(name, (tensors, the linear read, its seal when read back)), several linears at work, in the order of the model."""

    def convert(module: str) -> Converted:
        linear = weights.linears[module]
        tensors, held = target.linear(module, linear)
        return tensors, linear, seal(held)

    with ThreadPoolExecutor(THREADS) as pool:
        waiting: deque[tuple[str, Future[Converted]]] = deque()
        try:
            for module in weights.linears:
                waiting.append((module, pool.submit(convert, module)))
                if len(waiting) > THREADS:
                    name, done = waiting.popleft()
                    yield name, done.result()
            while waiting:
                name, done = waiting.popleft()
                yield name, done.result()
        finally:
            for _, job in waiting:
                job.cancel()


def _account(written: Written, module: str, linear: Linear, tensors: list[Pending], held: bytes) -> None:
    w = linear.weight
    count = w.shape[0] * w.shape[1]
    written.seals[module] = held
    written.parameters += count + (0 if linear.bias is None else linear.bias.size)
    if not isinstance(w, TernaryTensor):
        written.kept.append(module)
        return
    written.activation_bits.add(w.activation_bits)
    written.ternary_parameters += count
    written.ternary_bytes += sum(tensor.nbytes for tensor in tensors if not tensor.name.endswith(".bias"))
    written.layers[module] = {
        "zeros": count_zeros(w) / count,
        "scale_min": float(w.scale.min()),
        "scale_max": float(w.scale.max()),
    }


def _compare_bytes(file: Bytes, written: Written) -> None:
    """Raise FormatError unless the file's embedding, head and norms hold the bytes that were to be written."""
    for name, wanted in written.sums.items():
        digest = sha256()
        raw = file.array(name).reshape(-1).view(np.uint8)
        for start in range(0, raw.size, 1 << 22):
            digest.update(raw[start : start + (1 << 22)].data)
        file.release(name)
        if digest.digest() != wanted:
            raise differs(name)


def compare_linears(found: Any, written: Written, ticks: _Ticks | None = None) -> None:
    """Raise FormatError, naming the first that differs, unless the linears read back are what was converted."""
    if list(found) != list(written.seals) and set(found) != set(written.seals):
        raise FormatError("[write] the linears read back have other names than those written; this is a fault of ours")

    def check(module: str) -> tuple[bytes, int]:
        linear = found[module]
        digest = seal(linear)
        release_linear(linear)
        return digest, linear.weight.shape[0] * linear.weight.shape[1]

    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for module, (digest, count) in zip(written.seals, pool.map(check, written.seals), strict=True):
                if digest != written.seals[module]:
                    raise differs(module)
                if ticks:
                    ticks.add(count)
        finally:
            pool.shutdown(cancel_futures=True)


def differs(name: str) -> FormatError:
    """The error for what came back otherwise than it was written."""
    return FormatError(
        f"[write] {name} read back differs from what was written; the disk may be faulty. Nothing was kept"
    )

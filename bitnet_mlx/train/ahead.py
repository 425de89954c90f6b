"""Kernels compiled ahead, side by side, where MLX compiles them on the way: on CUDA.

There a fused kernel is compiled when a step first needs it, three to six seconds each, one after another, and kept on disk for
later runs. So a run starts a few processes that compile some of them meanwhile, from the same functions over small arrays. Each
works in a folder of its own and moves what is whole into MLX's: the run finds it there, or compiles it as ever. Nothing waits
for these processes, and nothing depends on them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from bitnet_mlx import __version__

if TYPE_CHECKING:
    from bitnet_mlx.train.pieces import Head

CACHE = "MLX_PTX_CACHE_DIR"  # MLX's variable for its folder of compiled kernels
JOBS = {"train": ("update", "gate", "ends"), "qat": ("update", "rotary", "gated", "loss")}
Facts = dict[str, Any]


def start(command: str, dtype: str, optimizer: str, act: str, temperature: float | None = None) -> None:
    """Begin to compile what `command`, one of JOBS, needs: in its dtype, for its optimiser and its activation function.

    temperature: of a teacher's distribution; None where there is no teacher. Does nothing without CUDA, or where the same
    was compiled before.
    """
    if mx.default_device() != mx.gpu or not mx.cuda.is_available():
        return
    told = {"dtype": dtype, "optimizer": optimizer, "act": act, "temperature": temperature}
    for job in JOBS[command]:
        facts = {name: told[name] for name in signature(_WORK[job]).parameters}
        if not _mark(job, facts).exists():
            arguments = [sys.executable, "-m", "bitnet_mlx.train.ahead", job, json.dumps(facts)]
            process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            threading.Thread(target=process.wait, daemon=True).start()  # so that none is left behind as a zombie


def main(job: str, facts: Facts) -> None:
    """One such process: compile, and hand over."""
    mark = _mark(job, facts)
    mark.parent.mkdir(parents=True, exist_ok=True)
    # Beside MLX's folder, so that a file is moved by renaming it.
    own = Path(tempfile.mkdtemp(dir=mark.parent.parent, prefix="ahead-"))
    try:
        os.environ[CACHE] = str(own)
        _WORK[job](**facts)
        publish(own, mark.parent)
        mark.touch()
    finally:
        shutil.rmtree(own)


def publish(own: Path, shared: Path) -> None:
    """Move the kernels in a folder to another. A kernel is its name's .ptx, which MLX looks for, and the .txt that it then
    needs: so .ptx goes last, and each at once."""
    for path in sorted(own.rglob("*"), key=lambda path: path.suffix == ".ptx"):
        if path.is_file():
            to = shared / path.relative_to(own)
            to.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, to)


def _mark(job: str, facts: Facts) -> Path:
    """A file in MLX's folder that tells that this was done."""
    found = os.environ.get(CACHE)
    folder = Path(found) if found else Path(tempfile.gettempdir()) / "mlx" / importlib.metadata.version("mlx") / "ptx"
    told = hashlib.sha256(json.dumps([job, facts, __version__]).encode()).hexdigest()[:16]
    return folder / f"bitnet_mlx-{told}"


def _update(optimizer: str) -> None:
    from bitnet_mlx.train import optimizer as rules

    state = rules.init(optimizer, {"q_proj.weight": mx.ones((8, 8))})
    step: Any = mx.compile(partial(rules.update, optimizer))
    gradients = {name: mx.ones_like(p) for name, p in state[rules.PARAMETERS].items()}
    mx.eval(step(state, gradients, mx.array(1.0), rules.rates(0, 1.0, 1.0), mx.array(True)))


def _gate(dtype: str) -> None:
    from bitnet_mlx.train.model import gated

    x = mx.ones((4, 8), getattr(mx, dtype))
    _both_ways(gated, [x, x], [x])


def _loss(dtype: str, temperature: float | None) -> None:
    from bitnet_mlx.train.pieces import Head

    arrays = [mx.array(np.full(shape, 0.5, np.float32)).astype(getattr(mx, dtype)) for shape in ((2, 4, 8), (8, 8))]
    x, w, ready, theirs, targets = *arrays, *(a * 1 for a in arrays), mx.zeros((2, 4), mx.int32)
    mx.eval(x, w, ready, theirs, targets)
    head, teacher = Head(lambda x: x @ w.T, 8), Head(lambda x: x @ theirs.T, 8)
    mx.eval(mx.compile(mx.value_and_grad(lambda x: _lost(head, x, targets, teacher, ready, temperature)))(x))


def _ends(dtype: str, temperature: float | None) -> None:
    """Embedding, last norm and loss: a model without layers."""
    from bitnet_mlx.models.config import DecoderConfig
    from bitnet_mlx.train.layerwise import put
    from bitnet_mlx.train.model import TrainDecoder

    config = DecoderConfig(
        model_type="bitnet", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=0, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model, teacher = (TrainDecoder(config, dtype=getattr(mx, dtype)) for _ in range(2))
    name, weight = "model.embed_tokens.weight", model.model.embed_tokens.weight

    def loss(weight: mx.array, batch: mx.array, ready: mx.array) -> mx.array:
        put(model, {name: weight})
        return _lost(model.head(), model.ready(batch), batch, teacher.head(), ready, temperature)

    batch = mx.zeros((2, 4), mx.int32)
    mx.eval(mx.compile(mx.value_and_grad(loss))(weight, batch, teacher.ready(batch)))


def _lost(
    head: Head, x: mx.array, targets: mx.array, teacher: Head, ready: mx.array, temperature: float | None
) -> mx.array:
    from bitnet_mlx.train.losses import output_losses

    if temperature is None:
        return output_losses(head, x, {"targets": targets}, 0.5)["loss"]
    return output_losses(head, x, {"targets": targets, "ready": ready}, 0.5, 0.5, temperature, teacher)["loss"]


def _rotary(dtype: str) -> None:
    from bitnet_mlx.backends.attention_mlx import rope_kv

    cos, sin = (mx.array(np.ones((1, 4, 4), np.float32)) for _ in range(2))  # MLX would merge two mx.ones
    outputs = [mx.ones(shape, getattr(mx, dtype)) for shape in ((2, 2, 4, 8), (2, 2, 1, 4, 8))]
    _both_ways(lambda x: rope_kv(x, cos, sin, 2, 1, training=True), [mx.ones((2, 4, 32), getattr(mx, dtype))], outputs)


def _gated(dtype: str, act: str) -> None:
    from bitnet_mlx.backends.mlx_affine import gated

    _both_ways(lambda x: gated(x, act, training=True), [mx.ones((4, 16), getattr(mx, dtype))], [mx.ones((4, 8))])


_WORK: dict[str, Callable[..., None]] = {
    "update": _update, "gate": _gate, "ends": _ends, "loss": _loss, "rotary": _rotary, "gated": _gated,
}  # fmt: skip


def _both_ways(function: Callable[..., Any], inputs: list[mx.array], outputs: list[mx.array]) -> None:
    """Compile a function with its gradient. outputs: arrays of the shapes and dtypes of what it returns."""
    mx.eval(inputs, outputs)
    step: Any = mx.compile(partial(mx.vjp, function))
    mx.eval(step(inputs, outputs))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))

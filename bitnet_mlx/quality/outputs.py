"""How far a model's activations are from a teacher's: of every linear and layer, on the same inputs and in the running models.

On the same inputs: the model's linear, or layer, is given what the teacher's was given. Running: both models read the text, so
what went wrong before counts too. MSE is the mean of (y - r)^2; SQNR 10 log10(sum r^2 / sum (y - r)^2) in decibel; cosine
that of all outputs as two vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.quality.linears import Sums, check_alike
from bitnet_mlx.quality.observed import Observable, is_linear, tapped
from bitnet_mlx.quality.one_layer import run_layer
from bitnet_mlx.ternary import TernaryTensor, quantize_activations

_AT_ONCE = 64  # tokens of one pass: all of the teacher's outputs of them are held
OCTAVES = ("0", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64-128")  # magnitudes of int8 codes
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Side:
    """A decoder that can be looked into, and the weights that it runs."""

    decoder: Observable
    weights: DecoderWeights


def compare_outputs(
    model: Side,
    teacher: Side,
    texts: Sequence[Sequence[int]],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """tokens; linears: by name mse, sqnr_db, cosine on the same inputs, running_* in the running models, and of the model's
    int8 input codes the share that is 0 and the shares by magnitude; layers: the same of whole layers' outputs.

    Raises ConfigError where the two have other shapes.
    """
    check_alike(model.weights, teacher.weights)
    walk = _Walk(model, teacher)
    total, done = sum(map(len, texts)), 0
    for ids in texts:
        caches = teacher.decoder.make_cache(limit=len(ids)), model.decoder.make_cache(limit=len(ids))
        for at in range(0, len(ids), _AT_ONCE):
            part = list(ids[at : at + _AT_ONCE])
            walk.step(part, caches)
            done += len(part)
            if progress is not None:
                progress(done, total)
    backend = model.decoder.name
    for layer in range(model.weights.config.num_hidden_layers):
        before, after = (np.concatenate(parts) for parts in walk.hidden[layer])
        linears = {name: model.weights.layer_linear(layer, name) for name in model.weights.config.linear_shapes()}
        dtype = getattr(model.decoder, "dtype", None)
        found = run_layer(model.weights, layer, linears, before, [len(ids) for ids in texts], backend, dtype)
        walk.same[f"model.layers.{layer}"].add(found, after)
    return {"tokens": total, **walk.record()}


class _Walk:
    """Both models over one text, a few tokens at a time, and what was found so far."""

    def __init__(self, model: Side, teacher: Side) -> None:
        self._model, self._teacher = model, teacher
        self.same: dict[str, Sums] = {}
        self.running: dict[str, Sums] = {}
        self.codes: dict[str, np.ndarray] = {}
        self.hidden: dict[int, tuple[list[np.ndarray], list[np.ndarray]]] = {}
        self._outputs: dict[str, np.ndarray] = {}

    def step(self, ids: list[int], caches: tuple[Any, Any]) -> None:
        """The next tokens through both."""
        with tapped(self._teacher.decoder, self._of_teacher):
            self._teacher.decoder.step([ids], [caches[0]], "last")
        with tapped(self._model.decoder, self._of_model):
            self._model.decoder.step([ids], [caches[1]], "last")

    def _of_teacher(self, module: str, x: np.ndarray, y: np.ndarray) -> None:
        self._outputs[module] = y
        same = self.same.setdefault(module, Sums())
        if is_linear(module):
            same.add(self._model.decoder.linear(module, x), y)
        else:
            before, after = self.hidden.setdefault(int(module.rpartition(".")[2]), ([], []))
            before.append(x)
            after.append(y)

    def _of_model(self, module: str, x: np.ndarray, y: np.ndarray) -> None:
        self.running.setdefault(module, Sums()).add(y, self._outputs.pop(module))
        if is_linear(module):
            weight = self._model.weights.linears[module].weight
            if isinstance(weight, TernaryTensor) and weight.activation_bits == 8:
                counts = magnitudes(quantize_activations(x)[0])
                self.codes[module] = self.codes.get(module, np.zeros(len(OCTAVES), np.int64)) + counts

    def record(self) -> dict[str, Any]:
        """The figures, linears and layers apart."""
        found: dict[str, Any] = {"linears": [], "layers": []}
        for module, same in self.same.items():
            running = {f"running_{name}": value for name, value in self.running[module].figures().items()}
            entry: dict[str, Any] = {"name": module, **same.figures(), **running}
            if module in self.codes:
                shares = self.codes[module] / self.codes[module].sum()
                entry |= {
                    "input_zeros": float(shares[0]),
                    "input_codes": dict(zip(OCTAVES, shares.tolist(), strict=True)),
                }
            found["linears" if is_linear(module) else "layers"].append(entry)
        return found


def magnitudes(q: np.ndarray) -> np.ndarray:
    """int64 [8]: how many int8 codes have a magnitude of each of OCTAVES."""
    sizes = np.abs(q.astype(np.int16)).reshape(-1)
    octave = np.ceil(np.log2(np.arange(129) + 1)).astype(np.int64)
    octave[128] = len(OCTAVES) - 1
    return np.bincount(octave[sizes], minlength=len(OCTAVES))

"""Which of I2_S's three layouts a file has: nothing in it says so, but trained weights do.

A wrong layout only moves codes, so counts of codes tell nothing; their places do. Training leaves two traces:

- Columns of a matrix differ in their share of zeros. A layout that puts codes of one column into several ("rows" read as
  "128", or the reverse) levels them.
- Channels that the norm before the matrix scales up or down have another share of zeros. A layout that moves whole
  columns ("64" read as "128") loses that agreement with the norm's weights, which lie in the file in their true order.

Both are compared with what chance would give. Where neither decides, the layout of published files is taken and said so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bitnet_mlx.checkpoint.gguf_file import GgufFile
from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats import i2s

PUBLISHED = "128"
# The norm, of the same layer, whose output each matrix takes.
_NORMS = {
    "attn_q": "attn_norm", "attn_k": "attn_norm", "attn_v": "attn_norm", "attn_output": "attn_sub_norm",
    "ffn_gate": "ffn_norm", "ffn_up": "ffn_norm", "ffn_down": "ffn_sub_norm",
}  # fmt: skip
_LAYERS, _ROWS = 4, 128  # how much of a file is looked at
_SIGMAS = 6.0


@dataclass
class _Evidence:
    """Sums over matrices. spread, columns: chi-square of the columns' shares and its degrees of freedom.

    agreement, norms: K r^2, with r the correlation with the norm's weights, and how many such terms there are.
    """

    spread: float = 0.0
    columns: int = 0
    agreement: float = 0.0
    norms: int = 0

    def add(self, share: np.ndarray, rows: int, norm: np.ndarray | None) -> None:
        mean = float(share.mean())
        if 0 < mean < 1:
            self.spread += float(((share - mean) ** 2).sum()) * rows / (mean * (1 - mean))
            self.columns += share.size - 1
        if norm is not None and share.std() > 0 and norm.std() > 0:
            self.agreement += share.size * float(np.corrcoef(share, norm)[0, 1]) ** 2
            self.norms += 1


def find(file: GgufFile, names: list[str]) -> tuple[str, str]:
    """The layout of the I2_S tensors `names`, and a sentence about how it was found.

    Raises FormatError where no layout fits the shapes of all of them.
    """
    shapes = [(int(np.prod(file.tensors[name].shape[:-1])), file.tensors[name].shape[-1]) for name in names]
    possible = [layout for layout in i2s.LAYOUTS if all(i2s.fits(n, k, layout) for n, k in shapes)]
    if not possible:
        raise FormatError(f"[gguf] {file.path}: the I2_S tensors' shapes divide into the blocks of no layout")
    if len(possible) == 1:
        return possible[0], f"I2_S layout {possible[0]}: the only one that the shapes allow"
    evidence = {layout: _Evidence() for layout in possible}
    for name in _sample(names):
        _look(file, name, evidence)
    chosen, sure = _decide(evidence)
    if sure:
        return chosen, f"I2_S layout {chosen}: found from the places of zeros ({', '.join(possible)} are possible)"
    return chosen, (
        f"I2_S layout {chosen}, that of published files, is taken: the weights do not tell it from "
        f"{' and '.join(layout for layout in possible if layout != chosen)}. If the model writes nonsense, give "
        "--i2s-layout"
    )


def _sample(names: list[str]) -> list[str]:
    """The matrices of a few layers, evenly spread."""
    layers: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        if parts[0] == "blk" and len(parts) == 4:
            layers.setdefault(parts[1], []).append(name)
    step = max(1, len(layers) // _LAYERS)
    return [name for number in sorted(layers, key=int)[::step][:_LAYERS] for name in layers[number]]


def _look(file: GgufFile, name: str, evidence: dict[str, _Evidence]) -> None:
    """Add one matrix to the evidence for each layout."""
    n, k = file.tensors[name].shape
    whole = math.lcm(4, 128 // math.gcd(128, k))  # the fewest rows that are whole chunks in every layout
    rows = min(n, max(_ROWS // whole, 1) * whole) // whole * whole
    if not rows:
        return
    data = file.array(name)[: rows * k // 4]
    _, layer, short, _ = name.split(".")
    norm = f"blk.{layer}.{_NORMS.get(short, '')}.weight"
    info = file.tensors.get(norm)
    reference = None
    if info is not None and info.kind == "F32" and info.shape == (k,):
        reference = np.abs(file.array(norm).view("<f4").astype(np.float64))
    for layout, found in evidence.items():
        width = {"128": 32, "64": 16, "rows": k}[layout]
        found.add(_shares(data, width, k), rows, reference)


def _shares(data: np.ndarray, width: int, k: int) -> np.ndarray:
    """The share of weights that are not 0 in each column, float64 [K], of whole rows read in chunks of `width` bytes."""
    chunks = data.reshape(-1, 1, width)
    codes = (chunks >> np.array([6, 4, 2, 0], np.uint8)[:, None]) & np.uint8(3)
    return (codes != 1).reshape(-1, k).mean(axis=0)


def _decide(evidence: dict[str, _Evidence]) -> tuple[str, bool]:
    """(layout, whether the evidence is beyond chance)."""
    best = max(e.spread for e in evidence.values())
    margin = _SIGMAS * math.sqrt(2 * max(1, max(e.columns for e in evidence.values())))
    left = {layout: e for layout, e in evidence.items() if e.spread > best - margin}
    if len(left) == 1:
        return next(iter(left)), True
    order = sorted(left, key=lambda layout: -left[layout].agreement)
    first, second = left[order[0]], left[order[1]]
    if first.agreement - second.agreement > _SIGMAS * 2 * math.sqrt(max(1, first.norms)):
        return order[0], True
    return PUBLISHED if PUBLISHED in left else order[0], False

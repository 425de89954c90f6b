"""Whether all engines compute the same: logits at every position of a prompt, against the numpy specification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitnet_mlx.bench.verdicts import Figures, Verdict, percent
from bitnet_mlx.models.decoder import Decoder

EXACT = ("numpy", "cpu")  # these promise the same bits
_AGREE = 0.8  # of the best tokens, where float rounding may flip a code


def equality(engines: Mapping[str, Decoder], prompt: list[int]) -> dict[str, Any]:
    """Of each engine: whether all bits are the reference's, the largest difference, how often the best token is the same."""
    logits = {name: d.step([prompt], [d.make_cache()], "all")[0] for name, d in engines.items()}
    reference = logits["numpy"]
    spread = float(reference.std())
    found = {}
    for name, ours in logits.items():
        found[name] = {
            "same_bits": bool(np.array_equal(ours, reference)),
            "largest_of_spread": float(np.abs(ours - reference).max()) / spread,
            "same_best": float((ours.argmax(axis=-1) == reference.argmax(axis=-1)).mean()),
        }
    return {"positions": len(prompt), "engines": found}


def decide_equality(figures: Figures) -> Verdict:
    """Bits where bits are promised; else mostly the same best token."""
    bad, texts = [], []
    for name, f in figures["engines"].items():
        good = f["same_bits"] if name in EXACT else f["same_best"] >= _AGREE
        if not good:
            bad.append(name)
        texts.append(f"{name} " + ("same bits" if f["same_bits"] else f"same best token at {percent(f['same_best'])}"))
    return Verdict(not bad, f"{', '.join(bad)} differs" if bad else "agree", ", ".join(texts))

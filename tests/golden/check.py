"""One decoder against one golden case."""

from __future__ import annotations

from typing import Any

from bitnet_mlx.quality.agreement import Agreement, Trace, compare, record
from tests.golden import store
from tests.golden.cases import CASES

# Logits span about 80, with a standard deviation of 8 to 15 in all cases.
TOLERANCE = 1e-4  # where no flipped code reaches
FLOAT_TOLERANCE = 2e-4  # nothing is quantised; transformers is itself 8e-5 from the float64 result of bitnet-float
MARGIN = 2.0  # in logits: greedy tokens are equal above it, flips or not

# Codes that may differ without another flip before them. A float32 rounding of 1e-7 moves a value across a half now and
# then: in llama-odd-llama3 one of 64.50000 at layer 0, position 26, and in llama-auto-yarn one of -50.50007 at layer 1,
# position 9, both on x86 with transformers 5.24. In bitnet-long a flip is a row of 128 or 192 codes. Other processors
# round the sums of transformers' matrix products and our powers and cosines otherwise, hence one more for each case.
ROOTS = dict.fromkeys(CASES, 1) | {"llama-odd-llama3": 2, "llama-auto-yarn": 2, "bitnet-long": 24}


def reference(name: str) -> Trace:
    """The golden trace."""
    golden = store.load(name)
    return Trace(golden.logits, golden.positions, golden.codes, CASES[name].config["num_hidden_layers"])


def trace(decoder: Any, name: str, chunk: int | None = None) -> Trace:
    """The decoder's trace of the case's tokens, its codes in the golden's form."""
    case = CASES[name]
    found = record(decoder, case.tokens, chunk)
    if case.kept is None:
        return found
    return Trace(found.logits, found.positions, {k: store.digest(v) for k, v in found.codes.items()}, found.layers)


def agreement(found: Trace, name: str) -> Agreement:
    """How the trace agrees with the golden."""
    return compare(reference(name), found, MARGIN)


def problem(found: Trace, name: str) -> str | None:
    """What is wrong with a trace, or None: the promise that is made of whole models, and nothing else."""
    case, golden = CASES[name], store.load(name)
    result = agreement(found, name)
    quantised = bool(golden.codes)
    tolerance = TOLERANCE if quantised else FLOAT_TOLERANCE
    best = found.logits.argmax(-1)
    if quantised and result.roots > ROOTS[name]:
        return f"{name}: more than {ROOTS[name]} flips of its own: {result}"
    if not result.max_difference_where_codes_agree <= tolerance:
        return f"{name}: logits further than {tolerance} apart: {result}"
    if not result.greedy_equal_above_margin or (best != golden.best)[golden.margin > MARGIN].any():
        return f"{name}: another best token: {result}"
    if 2 * result.untouched < result.positions:
        return f"{name}: flips reach more than half of the positions: {result}"
    assert len(found.logits) == len(case.tokens)
    return None

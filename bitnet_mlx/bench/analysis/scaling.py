"""How speed changes with the context, with the rows of a pass and with threads."""

from __future__ import annotations

from typing import Any

from bitnet_mlx.bench.analysis.time_spent import cores_busy
from bitnet_mlx.bench.comparison.engines import Sequences, prompt_ids
from bitnet_mlx.bench.copying import cpu_threads
from bitnet_mlx.bench.samples import Spread, seconds
from bitnet_mlx.bench.verdicts import Figures, Verdict, milliseconds
from bitnet_mlx.models.decoder import Decoder

ROWS = (1, 2, 3, 4, 8, 16, 32, 64, 128)
_PROMPT = 256  # tokens of the prompt that all threads should share
_BUSY = 0.6


def scaling(decoder: Decoder, longest: int, repeats: int, tokens: int = 4) -> dict[str, Any]:
    """Curves: seconds of a token behind more and more positions, and of passes of M tokens, in turns.

    longest: the most positions. threads: how many the engine is set to, and how busy it kept the cores.
    """
    vocabulary = decoder.config.vocab_size
    lengths = sorted({max(1, longest * part // 8) for part in (1, 2, 4, 6, 8)})
    contexts = {length: Sequences(decoder, 1, prompt_ids(length, vocabulary)) for length in lengths}
    rows = [m for m in ROWS if m <= longest]
    prompts = {m: Sequences(decoder, 1, prompt_ids(m, vocabulary)) for m in rows}
    token: dict[int, list[float]] = {length: [] for length in lengths}
    passes: dict[int, list[float]] = {m: [] for m in rows}
    for turn in range(repeats + 1):
        for length, one in contexts.items():
            one.prefill()
            took = [seconds(one.step) for _ in range(tokens)]
            token[length] += took if turn else []
        for m, one in prompts.items():
            took = [seconds(one.prefill)]
            passes[m] += took if turn else []
    wide = Sequences(decoder, 1, prompt_ids(min(_PROMPT, longest), vocabulary))
    wide.prefill()
    return {
        "bench": "scaling", "backend": decoder.name,
        "context": [{"positions": n, "tokens": 1, **vars(Spread.of(s))} for n, s in token.items()],
        "rows": [{"m": m, "tokens": m, **vars(Spread.of(s))} for m, s in passes.items()],
        "threads": cpu_threads(decoder.name), "prefill_busy": cores_busy(wide.prefill),
    }  # fmt: skip


def decide_scaling(figures: Figures) -> Verdict:
    """Whether a prompt keeps as many cores busy as there are threads."""
    short, long = figures["context"][0], figures["context"][-1]
    one, many = figures["rows"][0], figures["rows"][-1]
    threads, busy = figures["threads"], figures["prefill_busy"]
    text = (
        f"a token takes {milliseconds(short['p50'])} behind {short['positions']} positions and "
        f"{milliseconds(long['p50'])} behind {long['positions']}; {many['m']} tokens at once take "
        f"{many['p50'] / one['p50']:.1f} times one; a prompt keeps {busy:.2f} of {threads} threads busy"
    )
    lost = busy < _BUSY * threads
    return Verdict(not lost, "a thread is missing" if lost else "scales", text)

"""Memory over a run, and what single steps allocate: bytes by the allocators' counts, never a clock."""

from __future__ import annotations

import statistics
from typing import Any

from bitnet_mlx.bench.comparison.engines import Sequences, greedy
from bitnet_mlx.bench.live_bytes import Meter
from bitnet_mlx.bench.verdicts import Figures, Verdict, megabytes
from bitnet_mlx.generation.measure import peak_memory_bytes
from bitnet_mlx.models.decoder import Decoder

_ROUNDS = 6
_LEAK = 256  # bytes a token, and
_LEAK_SEEN = 1 << 16  # bytes in all: less is the interpreter's own
_VECTORS = 64  # of the widest, float32, that a step may hold


def memory(decoder: Decoder, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Bytes held after each of several rounds of the same work, in one cache."""
    one = Sequences(decoder, 1, prompt)
    one.prefill()
    for _ in range(tokens):
        one.step()
    points = []
    with Meter(decoder.name).counting() as meter:
        for number in range(_ROUNDS):
            one.prefill()
            for _ in range(tokens):
                one.step()
            points.append(
                {"tokens": (number + 1) * tokens, "live_bytes": meter.live(), "peak_rss_bytes": peak_memory_bytes()}
            )
        run = _run(decoder, prompt, 2 * tokens, meter)
    return {"rounds": points, "run": run}


def _run(decoder: Decoder, prompt: list[int], tokens: int, meter: Meter) -> list[dict[str, int]]:
    """Bytes held behind each token of one run from an empty cache, the cache's among them."""
    before, cache = meter.live(), decoder.make_cache()
    logits = decoder.step([prompt], [cache])[0]
    points = []
    for count in range(len(prompt), min(len(prompt) + tokens, decoder.config.max_position_embeddings)):
        points.append({"tokens": count, "live_bytes": max(0, meter.live() - before), "cache_bytes": int(cache.nbytes)})
        logits = decoder.step([[greedy(logits)]], [cache])[0]
    return points


def decide_memory(figures: Figures) -> Verdict:
    """Whether bytes stay when the work repeats: from the second round on, which settles what the first one opened."""
    points = figures["rounds"][1:]
    grown = points[-1]["live_bytes"] - points[0]["live_bytes"]
    each = grown / (points[-1]["tokens"] - points[0]["tokens"])
    reason = f"{megabytes(grown)} more after {len(points) - 1} rounds, {each:.0f} bytes a token"
    leaks = each > _LEAK and grown > _LEAK_SEEN
    return Verdict(not leaks, "leaks" if leaks else "flat", reason)


def allocation(decoder: Decoder, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Bytes that each of several tokens needs beyond what is held, and what vectors of a step would take."""
    one = Sequences(decoder, 1, prompt)
    one.prefill()
    one.step()
    with Meter(decoder.name).counting() as meter:
        steps = [meter.transient(one.step) for _ in range(tokens)]
    c = decoder.config
    widest = max(c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim)
    return {"step_bytes": steps, "logits_bytes": 4 * c.vocab_size, "vector_bytes": 4 * widest}


def decide_allocation(figures: Figures) -> Verdict:
    """Whether a usual token needs vectors only. A matrix that is copied or unpacked takes more."""
    usual = statistics.median(figures["step_bytes"])
    allowed = _VECTORS * figures["vector_bytes"] + 4 * figures["logits_bytes"]
    reason = f"a usual token allocates {megabytes(usual)}; vectors alone would take up to {megabytes(allowed)}"
    return Verdict(usual <= allowed, "vectors only" if usual <= allowed else "copies matrices", reason)

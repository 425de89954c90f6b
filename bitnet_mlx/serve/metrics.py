"""What Prometheus reads: counters and gauges as text (version 0.0.4 of its format)."""

from __future__ import annotations

from collections import Counter

from bitnet_mlx.serve.engine import Counts

_PREFIX = "bitnet_mlx_"
_HELP = (
    ("steps", "counter", "steps_total", "Steps of the model"),
    ("step_seconds", "counter", "step_seconds_total", "Time inside steps, choosing tokens included"),
    ("prompt_tokens", "counter", "prompt_tokens_total", "Prompt tokens computed"),
    ("generated_tokens", "counter", "generated_tokens_total", "Tokens generated"),
    ("drafted_tokens", "counter", "drafted_tokens_total", "Tokens guessed ahead and checked"),
    ("accepted_tokens", "counter", "accepted_tokens_total", "Of these, those that came true"),
    ("finished", "counter", "texts_finished_total", "Texts that came to their end"),
    ("failed", "counter", "texts_failed_total", "Texts that the engine failed"),
    ("cancelled", "counter", "texts_cancelled_total", "Texts whose client left"),
    ("timed_out", "counter", "texts_timed_out_total", "Texts that took too long"),
    ("cached_tokens", "counter", "prompt_cached_tokens_total", "Prompt tokens taken from the beginnings that are kept"),
    (
        "prefix_evicted",
        "counter",
        "prompt_cache_evicted_blocks_total",
        "Blocks of beginnings let go of for want of room",
    ),
    ("running", "gauge", "texts_running", "Texts in the batch"),
    ("waiting", "gauge", "texts_waiting", "Texts in the queue"),
    ("kv_bytes", "gauge", "kv_cache_bytes", "Bytes allocated for keys and values of texts that run"),
    ("prefix_bytes", "gauge", "prompt_cache_bytes", "Bytes of the beginnings that are kept"),
    ("prefix_blocks", "gauge", "prompt_cache_blocks", "Blocks of 32 tokens that are kept"),
)


class Metrics:
    """Answers counted by route and status; the engine counts the rest. Used on the event loop's thread alone."""

    def __init__(self) -> None:
        self._answers: Counter[tuple[str, int]] = Counter()

    def answered(self, route: str, status: int) -> None:
        """Count one answer. route: its pattern, not what the client wrote."""
        self._answers[route, status] += 1

    def text(self, counts: Counts) -> str:
        """All of it."""
        lines = [f"# HELP {_PREFIX}answers_total Answers by route and status", f"# TYPE {_PREFIX}answers_total counter"]
        for (route, status), count in sorted(self._answers.items()):
            lines.append(f'{_PREFIX}answers_total{{route="{route}",status="{status}"}} {count}')
        for field, kind, name, text in _HELP:
            lines += [f"# HELP {_PREFIX}{name} {text}", f"# TYPE {_PREFIX}{name} {kind}"]
            lines.append(f"{_PREFIX}{name} {getattr(counts, field)}")
        return "\n".join(lines) + "\n"
